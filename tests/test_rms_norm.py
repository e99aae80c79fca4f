"""RMSNorm against PyTorch's, Llama's and Gemma's, and the norm on queries and keys."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.reference import assert_close, assert_same, draw, loop_attention, redraw
from tests.variants import SMALL
from transformer_annotated import (
    DECODER_ONLY,
    PAPER_BASE,
    QK_NORM,
    RMS_NORM,
    LayerNorm,
    MultiHeadAttention,
    PostNorm,
    RMSNorm,
    Transformer,
    count_parameters,
    from_json,
    patch,
    spec,
    to_json,
)
from transformer_annotated.modern.ablation import kept_bytes
from transformer_annotated.modern.rms_norm import scores_and_entropy

EPS = [1e-6, 0.05, 0.5]  # with a small one, eps outside the root would hardly show


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", EPS)
def test_equal_to_torch(eps: float, dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(7, eps).to(dtype), nn.RMSNorm(7, eps, dtype=dtype)
    redraw(ours)
    theirs.load_state_dict(ours.state_dict())
    x = (1 + 2 * draw(2, 3, 7, seed="x", dtype=dtype)).requires_grad_()
    mine, stock = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert_same(ours(x), theirs(x), {"x": x, **mine}, {"x": x, **stock})


def hugging_face(name: str) -> Any:
    """The norm of a model of `transformers`, which may warn when it is imported."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
    return {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm}[name]


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_equal_to_hugging_face(name: str, eps: float) -> None:
    offset = {"llama": 0.0, "gemma": 1.0}[name]
    ours, theirs = RMSNorm(16, eps, offset), hugging_face(name)(16, eps)
    assert_close(ours.weight.data, theirs.weight.data)  # the same fresh weights
    redraw(ours)
    theirs.load_state_dict(ours.state_dict())
    x = (1 + 2 * draw(2, 3, 16, seed="x")).requires_grad_()
    mine, its = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert_same(ours(x), theirs(x), {"x": x, **mine}, {"x": x, **its})


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.5])
def test_by_hand(offset: float) -> None:
    """The definition, one vector at a time."""
    m = redraw(RMSNorm(5, eps=0.5, offset=offset).double())
    assert isinstance(m, RMSNorm)
    x = draw(4, 5, seed="x", dtype=torch.float64).requires_grad_()
    rows = []
    for row in x:
        mean_square = sum(number * number for number in row) / 5
        rows.append((offset + m.weight) * row / (mean_square + 0.5) ** 0.5)
    assert_same(m(x), torch.stack(rows), {"x": x, "weight": m.weight})


def test_layer_norm_of_what_has_no_mean() -> None:
    """LayerNorm without shift is RMSNorm after the mean has been taken off."""
    rms, layer = RMSNorm(8, eps=0.1).double(), LayerNorm(8, eps=0.1, bias=False).double()
    redraw(rms)
    layer.load_state_dict(rms.state_dict())
    x = (3 + draw(6, 8, seed="x", dtype=torch.float64)).requires_grad_()
    centred = x - x.mean(dim=-1, keepdim=True)
    assert_same(rms(centred), layer(x), {"x": x})
    assert (rms(x) - layer(x)).abs().max() > 0.1
    both = nn.functional.layer_norm(torch.cat((x, -x), dim=-1), (16,), eps=0.1)
    assert_close(rms(x), rms.weight * both[:, :8])


def test_size_does_not_matter() -> None:
    x = draw(4, 8, seed="x", dtype=torch.float64)
    norm = RMSNorm(8, eps=1e-12).double()
    assert_close(norm(x).square().mean(dim=-1), torch.ones(4, dtype=torch.float64))
    assert_close(norm(1000 * x), norm(x))
    assert_close(norm(-x), -norm(x))


def test_zero_vector() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = RMSNorm(4, eps=0.25)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(y.detach(), torch.zeros(2, 4))
    assert_close(gradient, torch.full((2, 4), 2.0))  # 1 / sqrt(eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_wider(dtype: torch.dtype) -> None:
    """Squares of 300 overflow float16; and the result is rounded once."""
    x = (300 * draw(4, 16, seed="x")).to(dtype)
    ours = RMSNorm(16).to(dtype)(x)
    assert ours.dtype == dtype
    exact = x.double() * torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + 1e-6)
    assert torch.equal(ours, exact.to(dtype))
    assert RMSNorm(16)(x).dtype == dtype  # 32-bit weights under autocast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_on_a_gpu(dtype: torch.dtype) -> None:
    m = redraw(RMSNorm(64, eps=0.05, offset=1.0))
    x = draw(8, 64, seed="x").to(dtype)
    ours = m.cuda()(x.cuda())
    assert ours.dtype == dtype
    assert_close(ours.float().cpu(), m.cpu()(x).float(), tolerance=4 * torch.finfo(dtype).eps)


def test_in_the_model() -> None:
    """Every norm is exchanged, and each gives up its D biases."""
    before, after = count_parameters(PAPER_BASE), count_parameters(patch(PAPER_BASE, RMS_NORM))
    assert before["total"] - after["total"] == (6 * 2 + 6 * 3) * 512
    model = Transformer(patch(SMALL, RMS_NORM, {"final_norm": True}))
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 2 * 2 + 3 * 3 + 2
    assert not any(isinstance(m, LayerNorm) for m in model.modules())
    frames = [m for m in model.modules() if isinstance(m, PostNorm)]
    assert all(isinstance(frame.norm, RMSNorm) for frame in frames)


def test_saved_and_read() -> None:
    config = patch(PAPER_BASE, {"norm": spec(RMSNorm, offset=1.0, eps=1e-5)}, QK_NORM)
    assert from_json(to_json(config)) == config


def test_qk_norm_by_hand() -> None:
    """Each head of each query and key is normalised by itself; values are not."""
    m = MultiHeadAttention(12, 4, n_kv_heads=2, qk_norm=spec(RMSNorm, eps=0.1)).double()
    redraw(m)
    x = draw(2, 5, 12, seed="x", dtype=torch.float64).requires_grad_()
    q, k, v = m.split(m.q_proj(x)), m.split(m.k_proj(x)), m.split(m.v_proj(x))
    assert m.q_norm is not None
    assert m.k_norm is not None
    q = q / (q.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * m.q_norm.weight
    k = k / (k.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * m.k_norm.weight
    theirs = m.out_proj(loop_attention(q, k, v).transpose(1, 2).flatten(-2))
    assert_same(m(x), theirs, {"x": x, **dict(m.named_parameters())})


def test_scores_are_bounded() -> None:
    """|q . k| / sqrt(d) is at most sqrt(d) times the largest weights, whatever comes in."""
    d = 16
    query, key = redraw(RMSNorm(d), 1), redraw(RMSNorm(d), 2)
    x = 100 * draw(1000, d, seed="x")
    with torch.no_grad():
        scores = query(x) @ key(torch.cat((x, -x))).T / math.sqrt(d)
        products = math.sqrt(d) * (query.weight * key.weight).abs().max()
        bound = math.sqrt(d) * query.weight.abs().max() * key.weight.abs().max()
        assert scores.abs().max() <= products * (1 + 1e-6)  # without positions in between
        assert products <= bound
        for angle in (0.3, 2.0):  # a rotation mixes the numbers: the page's bound still holds
            turn = torch.matrix_exp(angle * (draw(d, d, seed="a") - draw(d, d, seed="a").T))
            turned = query(x) @ turn @ key(torch.cat((x, -x))).T / math.sqrt(d)
            assert turned.abs().max() <= bound * (1 + 1e-4)
        reached = RMSNorm(d)(x) @ RMSNorm(d)(x).T / math.sqrt(d)
    assert_close(reached.max(), torch.tensor(math.sqrt(d)))  # a key that points along the query


def test_scores_and_entropy() -> None:
    """One query along one of four keys, of length 6 each; weights alike, then on one key."""
    q, k = torch.zeros(1, 1, 1, 4), 6 * torch.eye(4).view(1, 1, 4, 4)
    q[..., 0] = -6.0
    score, entropy = scores_and_entropy(q, k, torch.full((1, 1, 1, 4), 0.25))
    assert score == pytest.approx(18.0)
    assert entropy == pytest.approx(math.log(4))
    one = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    assert scores_and_entropy(q, k, one)[1] == 0.0


def test_qk_norm_ignores_the_size_of_the_weights() -> None:
    """Queries and keys times 10: attention stays as it was."""
    config = patch(SMALL, DECODER_ONLY, {"self_attention.qk_norm": spec(RMSNorm, eps=1e-12)})
    model = Transformer(config).double().eval()
    redraw(model)
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiHeadAttention):
                for projection in (module.q_proj, module.k_proj):
                    for parameter in projection.parameters():
                        parameter.mul_(10)
    assert_close(model(ids), before)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_eps_must_be_positive(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be above 0, got"):
        RMSNorm(8, eps)


def test_width_must_be_positive() -> None:
    with pytest.raises(ValueError, match="d_model"):
        RMSNorm(0)


@pytest.mark.parametrize("eps", [1e-6, 0.05])
def test_the_backward_pass_by_hand(eps: float) -> None:
    """Against finite differences, for vectors in any number of dimensions."""
    torch.manual_seed(0)
    norm = RMSNorm(5, eps=eps).double()
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for shape in ((5,), (3, 5), (2, 3, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(norm, {"weight": weight}, (x,))

        assert torch.autograd.gradcheck(run, (x, weight))


def test_it_keeps_x_and_one_number_a_row() -> None:
    norm, x = RMSNorm(64), torch.randn(10, 64, requires_grad=True)
    assert kept_bytes(norm, lambda: norm(x)) == 4 * (10 * 64 + 10)

    def written(x: torch.Tensor) -> torch.Tensor:  # PyTorch's own gradient keeps one more
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)

    assert kept_bytes(norm, lambda: written(x)) == 4 * (2 * 10 * 64 + 10)
