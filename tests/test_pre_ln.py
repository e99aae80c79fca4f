"""Pre-LN, sandwich norm and DeepNorm: against PyTorch, against their formulas, and in the limit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import (
    assert_close,
    assert_same,
    assert_same_model,
    copy_weights,
    draw,
    layer_map,
    model_map,
    redraw,
)
from tests.test_against_torch import DTYPES, LATER, S_REAL, T_REAL, B, D, F, H, T
from tests.variants import SMALL, build
from transformer_annotated import (
    DECODER_ONLY,
    FAST,
    PRE_LN,
    DeepNorm,
    FeedForward,
    LayerNorm,
    Mask,
    PostNorm,
    PreNorm,
    SandwichNorm,
    Transformer,
    from_json,
    patch,
    spec,
    to_json,
)
from transformer_annotated.modern.pre_ln import (
    deepnorm_constants,
    deepnorm_init,
    stream_sizes,
)
from transformer_annotated.paper.transformer import Layer

SRC = torch.tensor([[5, 3, 12, 0, 1, 1], [7, 7, 2, 9, 4, 11]])
TGT = torch.tensor([[2, 8, 6, 10, 3], [2, 12, 3, 1, 1]])
FRAMES: dict[str, Any] = {
    "PreNorm": PreNorm,
    "SandwichNorm": SandwichNorm,
    "DeepNorm": spec(DeepNorm, alpha=1.7),
}


def normalised(x: Tensor, norm: Any) -> Tensor:
    """Layer normalisation as the formula reads, with the parameters of `norm`."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return norm.weight * (x - mean) / torch.sqrt(variance + 1e-5) + norm.bias


def formula(name: str, frame: Any, x: Tensor, f: Any) -> Tensor:
    """The three frames, written out; the feed-forward network `f` too."""

    def sublayer(y: Tensor) -> Tensor:
        hidden = (y @ f.up.weight.T + f.up.bias).clamp(min=0)
        return hidden @ f.down.weight.T + f.down.bias

    if name == "DeepNorm":
        return normalised(1.7 * x + sublayer(x), frame.norm)
    inner = sublayer(normalised(x, frame.norm))
    return x + (normalised(inner, frame.norm_out) if name == "SandwichNorm" else inner)


@DTYPES
@pytest.mark.parametrize("name", FRAMES)
def test_frames_equal_their_formulas(name: str, dtype: torch.dtype) -> None:
    frame = FRAMES[name](d_model=D, norm=spec(LayerNorm), dropout=0.0).to(dtype)
    ffn = FeedForward(D, F).to(dtype)
    redraw(frame)
    redraw(ffn, seed=1)
    x = draw(B, T, D, seed="x", dtype=dtype).requires_grad_()
    leaves = {"x": x, **dict(frame.named_parameters()), **dict(ffn.named_parameters())}
    assert_same(frame(x, ffn), formula(name, frame, x, ffn), leaves)


@DTYPES
def test_pre_norm_equals_the_stock_layer(dtype: torch.dtype) -> None:
    """`norm_first=True` is pre-LN."""
    config = SMALL.encoder
    assert config is not None
    ours = Layer(
        D, norm=SMALL.norm, residual=spec(PreNorm), dropout=0.0,
        self_attention=config.self_attention, cross_attention=None, ffn=config.ffn,
    ).to(dtype)  # fmt: skip
    redraw(ours)
    theirs = nn.TransformerEncoderLayer(
        D, H, 24, dropout=0.0, batch_first=True, norm_first=True, dtype=dtype
    )
    copy_weights(layer_map(cross=False), ours, theirs)
    x = draw(B, T, D, seed="x", dtype=dtype).requires_grad_()
    mine, stock = ours(x, mask=Mask(padding=T_REAL)), theirs(x, src_key_padding_mask=~T_REAL)
    assert_same_model(layer_map(cross=False), ours, theirs, mine, stock, {"x": x})


@DTYPES
@pytest.mark.parametrize("padded", [False, True])
def test_pre_ln_equals_the_stock_transformer(padded: bool, dtype: torch.dtype) -> None:
    """From ids to logits; both stock stacks end in a norm, as PRE_LN has it."""
    ours = build(patch(SMALL, PRE_LN), dtype).train()
    sizes: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    sizes |= {"dtype": dtype}
    theirs = nn.Transformer(
        D, H, batch_first=True, dtype=dtype,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, H, 24, **sizes), 2,
            norm=nn.LayerNorm(D, dtype=dtype), enable_nested_tensor=False,
        ),
        custom_decoder=nn.TransformerDecoder(
            nn.TransformerDecoderLayer(D, H, F, **sizes), 3, norm=nn.LayerNorm(D, dtype=dtype)
        ),
    )  # fmt: skip
    names = model_map(2, 3, final_norm=True)
    copy_weights(names, ours, theirs)
    src_real, tgt_real = (S_REAL, T_REAL) if padded else (None, None)
    mine = ours(SRC, TGT, src_padding=src_real, tgt_padding=tgt_real)
    table, encoding = ours.embedding.weight, ours.embedding.position
    vectors = [
        nn.functional.embedding(ids, table) * D**0.5 + encoding(torch.arange(ids.shape[1]))
        for ids in (SRC, TGT)
    ]
    hide = {"src": src_real, "tgt": tgt_real, "memory": src_real}
    stock = theirs(
        *vectors, tgt_mask=LATER,
        **{f"{k}_key_padding_mask": None if v is None else ~v for k, v in hide.items()},
    ) @ table.T  # fmt: skip
    real = T_REAL if padded else torch.ones(B, T).bool()
    assert_same_model(names, ours, theirs, mine[real], stock[real], {"table": table})


def test_both_stacks_end_in_a_norm() -> None:
    """The memory and the decoder's vectors have mean 0 and size 1, however large the stream is."""
    model = Transformer(patch(SMALL, PRE_LN)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        memory = model.encode(SRC)
        for vectors in (memory, model.decode(TGT, memory)):
            assert_close(vectors.mean(dim=-1), torch.zeros(vectors.shape[:2]), "the mean")
            sizes = vectors.std(dim=-1, correction=0)
            assert_close(sizes, torch.ones_like(sizes), "the size", tolerance=1e-3)
    assert sum(".norm.weight" in name for name in model.state_dict()) == 2 * 2 + 3 * 3 + 2


def silent(model: Transformer) -> Transformer:
    """The model with sub-layers that say nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj" in name or "ffn.down" in name:
                parameter.zero_()
    return model


@pytest.mark.parametrize("frame", [PreNorm, SandwichNorm])
def test_silent_sublayers_leave_the_identity(frame: type[nn.Module]) -> None:
    """Without the sub-layers' part a pre-LN stack is the identity, and so is its gradient."""
    change = {"residual": spec(frame)}
    stack = silent(Transformer(patch(SMALL, DECODER_ONLY, change))).decoder
    assert stack is not None
    x = draw(B, T, D, seed="x").requires_grad_()
    y, direction = stack(x), draw(B, T, D, seed="direction")
    assert torch.equal(y, x)
    if frame is PreNorm:
        (gradient,) = torch.autograd.grad(y, x, direction)
        assert torch.equal(gradient, direction)


def test_the_jacobian_contains_the_identity() -> None:
    """d(out)/dx of a pre-LN frame is I + the sub-layer's; a post-LN frame's is singular."""
    ffn, x = FeedForward(D, F).double(), draw(D, seed="x", dtype=torch.float64)
    redraw(ffn)

    def jacobian(frame: nn.Module) -> Tensor:
        redraw(frame.double())
        return torch.autograd.functional.jacobian(lambda y: frame(y, ffn), x)

    pre = PreNorm(D, spec(LayerNorm), 0.0)
    post = PostNorm(D, spec(LayerNorm), 0.0)
    pre_jacobian = jacobian(pre)
    through = torch.autograd.functional.jacobian(lambda y: ffn(pre.norm(y)), x)
    assert_close(pre_jacobian, torch.eye(D, dtype=torch.float64) + through, "Jacobian")
    singular = torch.linalg.svdvals(jacobian(post))
    assert singular[-1] < 1e-10 < singular[-3]  # LayerNorm loses the mean and the length


def test_deep_norm_with_alpha_one_is_post_norm() -> None:
    post = build(SMALL, torch.float64)
    deep = build(patch(SMALL, {"residual": spec(DeepNorm, alpha=1.0)}), torch.float64)
    deep.load_state_dict(post.state_dict())
    leaves = dict(post.named_parameters()), dict(deep.named_parameters())
    assert_same(post(SRC, TGT), deep(SRC, TGT), *leaves)


def test_weights_carry_over() -> None:
    """PreNorm and DeepNorm have PostNorm's names; PRE_LN adds one norm a stack."""
    names = {
        kind: set(Transformer(patch(SMALL, change)).state_dict())
        for kind, change in {
            "post": {}, "pre": PRE_LN, "deep": {"residual": spec(DeepNorm, alpha=2.0)},
            "sandwich": {"residual": spec(SandwichNorm), "final_norm": True},
        }.items()
    }  # fmt: skip
    assert names["deep"] == names["post"]
    added = {
        f"{stack}.norm.{kind}" for stack in ("encoder", "decoder") for kind in ("weight", "bias")
    }
    assert names["pre"] == names["post"] | added
    more = names["sandwich"] - names["pre"]
    assert names["pre"] < names["sandwich"]
    assert all(".norm_out." in name for name in more)
    assert len(more) == 2 * (2 * 2 + 3 * 3)


def test_dropout_acts_on_the_sublayer_alone() -> None:
    """In training each place holds x, or x and the sub-layer's output times 1 / (1 - p)."""
    torch.manual_seed(0)
    for frame in (PreNorm, SandwichNorm):
        module, x = frame(D, spec(LayerNorm), 0.25).train(), draw(50, T, D, seed="x")
        full = module.eval()(x, torch.tanh) - x
        found = module.train()(x, torch.tanh) - x
        dropped = found == 0
        assert 0.2 < dropped.float().mean() < 0.3
        assert_close(found[~dropped], (full / 0.75)[~dropped], tolerance=1e-5)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_config_is_saved_and_read(frame: str) -> None:
    residual = FRAMES[frame] if frame == "DeepNorm" else spec(FRAMES[frame])
    config = patch(SMALL, {"residual": residual, "final_norm": True})
    assert from_json(to_json(config)) == config


def test_fast_and_pre_ln_name_their_quarrel() -> None:
    """Both fill the seam `residual`; without it the rest of FAST combines."""
    with pytest.raises(ValueError, match="two values for residual"):
        patch(SMALL, FAST, PRE_LN)
    rest = {name: value for name, value in FAST.items() if name != "residual"}
    assert_close(build(patch(SMALL, PRE_LN, rest))(SRC, TGT), build(patch(SMALL, PRE_LN))(SRC, TGT))


def test_deepnorm_constants() -> None:
    """Against the table of Wang et al. 2022, at depths where its numbers are known."""
    assert deepnorm_constants(decoder=8)["decoder"] == pytest.approx((2.0, 64**-0.25))
    assert deepnorm_constants(encoder=8)["encoder"] == pytest.approx((2.0, 64**-0.25))
    both = deepnorm_constants(encoder=6, decoder=6)
    assert both["encoder"] == pytest.approx((0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)))
    assert both["decoder"] == pytest.approx((18**0.25, 72**-0.25))
    uneven = deepnorm_constants(encoder=16, decoder=1)
    assert uneven["encoder"] == pytest.approx((0.81 * 2, 0.87 / 2))
    assert uneven["decoder"] == pytest.approx((3**0.25, 12**-0.25))


def test_deepnorm_init_scales_the_right_matrices() -> None:
    fresh = Transformer(SMALL)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    deepnorm_init(fresh, 0.3)
    scaled = ("up.weight", "down.weight", "v_proj.weight", "out_proj.weight")
    for name, value in fresh.state_dict().items():
        factor = 0.3 if name.endswith(scaled) else 1.0
        assert_close(value, factor * before[name], name)
    stack = Transformer(SMALL)
    assert stack.encoder is not None
    kept = stack.decoder.state_dict()["layers.0.ffn.up.weight"].clone()
    deepnorm_init(stack.encoder, 0.3)
    assert torch.equal(stack.decoder.state_dict()["layers.0.ffn.up.weight"], kept)


def test_stream_sizes() -> None:
    """Post-norm: 1 after each layer. Pre-norm grows by what each layer adds."""
    post = Transformer(patch(SMALL, DECODER_ONLY)).decoder
    x = draw(B, T, D, seed="x")
    assert post is not None
    found = stream_sizes(post, x)
    assert len(found) == 4
    assert found[1:] == pytest.approx([1.0] * 3, rel=1e-3)
    pre = Transformer(patch(SMALL, DECODER_ONLY, PRE_LN)).decoder
    grown = stream_sizes(pre, x)
    assert grown == sorted(grown)
    assert math.isclose(grown[0], x.std(correction=0).item(), rel_tol=1e-6)
    assert not any(layer._forward_hooks for layer in pre.layers)


BAD = {
    "dropout": (lambda: PreNorm(D, spec(LayerNorm), 1.0), "dropout must be in"),
    "alpha": (lambda: DeepNorm(D, spec(LayerNorm), 0.0, alpha=0.0), "alpha must be"),
    "depth": (lambda: deepnorm_constants(encoder=0), "encoder must be"),
    "no depth": (lambda: deepnorm_constants(), "both None"),
    "beta": (lambda: deepnorm_init(nn.Linear(2, 2), -1.0), "beta must be"),
    "nothing to scale": (lambda: deepnorm_init(nn.Linear(2, 2), 0.5), "model must hold"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    act, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        act()
