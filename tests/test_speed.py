"""Chapter 17: the fast parts compute what the plain ones do, and dropout keeps its law."""

import json
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, draw, gradients, redraw
from tests.variants import SMALL, VOCABULARY
from transformer_annotated import (
    DECODER_ONLY,
    FAST,
    SDPA,
    LayerNorm,
    PostNorm,
    Transformer,
    from_json,
    patch,
    spec,
    to_json,
)
from transformer_annotated.exercises import CHECKS
from transformer_annotated.training.speed import (
    KINDS,
    FastDropout,
    FastEmbedding,
    FastPostNorm,
    FusedNorm,
    OperationTimes,
    by_kind,
    keep_memory,
    kept,
    race,
)

# The norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_fused_norm_equals_layer_norm(dtype: torch.dtype, bias: bool, eps: float) -> None:
    plain = redraw(LayerNorm(24, eps=eps, bias=bias)).to(dtype)
    fused = FusedNorm(24, eps=eps, bias=bias).to(dtype)
    fused.load_state_dict(plain.state_dict())
    x = draw(2, 5, 24, seed="x", dtype=dtype).requires_grad_()
    found = [
        gradients(norm(x), {"x": x, **dict(norm.named_parameters())}) for norm in (plain, fused)
    ]
    assert_close(fused(x), plain(x))
    for name, value in found[0].items():
        assert_close(found[1][name], value, name)


# The mask of dropout ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_every_quarter_of_a_word_is_dropped_at_the_same_rate(p: float) -> None:
    """Within five standard errors, for each of the four places in a word of 64 bits."""
    n = 400_000
    mask, worth = kept(torch.empty(4 * n), p)
    rate = round(p * 2**16) / 2**16
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert worth * (1 - rate) == pytest.approx(1, abs=1e-12)
    for i in range(4):
        dropped = 1 - mask[i::4].double().mean().item()
        assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / n), f"quarter {i}"


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 32])
def test_dropped_elements_know_nothing_of_each_other(distance: int) -> None:
    n, rate = 1_000_000, 0.25
    zeros = (kept(torch.empty(n), rate)[0] == 0).double()
    both = (zeros[distance:] * zeros[:-distance]).mean().item()
    assert abs(both - rate**2) < 5 * math.sqrt(rate**2 / n)


def every_value(words: Tensor, *_: Any) -> Tensor:
    """Every value of 16 bits once, in place of random words."""
    return words.copy_(torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.int64))


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-16, 0.999999])
def test_exactly_k_of_65536_values_mean_drop(p: float) -> None:
    with mock.patch.object(torch.Tensor, "random_", every_value):
        mask, worth = kept(torch.empty(2**16), p)
    k = min(round(p * 2**16), 2**16 - 1)
    assert int((mask == 0).sum()) == k
    assert int((mask == 1).sum()) == 2**16 - k
    assert worth == 2**16 / (2**16 - k)


def test_a_rate_near_zero_drops_nothing_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    mask, worth = kept(torch.empty(100), 1e-6)
    assert bool((mask == 1).all())
    assert worth == 1.0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, math.nan])
def test_a_rate_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must .*0.*1"):
        kept(torch.empty(3), p)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_has_the_form_of_its_model(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    mask, _ = kept(x, 0.5)
    assert (mask.shape, mask.dtype, mask.device) == (x.shape, x.dtype, x.device)


def test_dropout_resumes_from_torchs_random_state() -> None:
    """Two masks, then again from the state between them: the second is the same."""
    dropout, x = FastDropout(0.3), torch.ones(1001)
    first = dropout(x)
    state = torch.get_rng_state()
    second = dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), second)
    assert not torch.equal(first, second)


def test_dropout_and_its_gradient_use_one_mask() -> None:
    x = draw(400, seed="x").requires_grad_()
    y = FastDropout(0.4)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    worth = 2**16 / (2**16 - round(0.4 * 2**16))
    assert_close(y.detach(), x.detach() * slope, tolerance=1e-6)
    values = torch.tensor([0.0, worth])
    assert bool(torch.isin(slope, values).all())
    assert 0 < int((slope == 0).sum()) < 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_grows_by_the_worth_of_a_one(dtype: torch.dtype) -> None:
    """In bfloat16, too: 1.1112 is not rounded to 1.1094 before it is used."""
    x = (1 + torch.rand(200_000)).to(dtype)
    y = FastDropout(0.1)(x)
    growth = y.double().sum() / x[y != 0].double().sum()
    assert abs(growth.item() - 2**16 / (2**16 - 6554)) < 3e-4


def test_dropout_is_the_identity_outside_training_and_at_rate_zero() -> None:
    x = draw(50, seed="x")
    assert FastDropout(0.5).eval()(x) is x
    assert FastDropout(0.0)(x) is x


# The patch ----------------------------------------------------------------------------------------


def config(*patches: Any, dropout: float = 0.0) -> Any:
    return patch(SMALL, *patches, {"dropout": dropout})


IDS = torch.tensor([[5, 6, 7, 8, 4], [9, 4, 5, 6, 7]])
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def outputs(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    output = (
        model(IDS, src_padding=REAL)
        if model.encoder is None
        else model(IDS, IDS.flip(1), src_padding=REAL)
    )
    return output, gradients(output, dict(model.named_parameters()))


@pytest.mark.parametrize("other", [{}, SDPA, DECODER_ONLY, {"final_norm": True}])
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.3, False)])
def test_fast_computes_the_same_function(other: Any, dropout: float, training: bool) -> None:
    """Logits and every gradient, in float64: dropout off, and evaluation mode with dropout."""
    plain = redraw(Transformer(config(other, dropout=dropout))).double().train(training)
    fast = Transformer(config(other, FAST, dropout=dropout)).double().train(training)
    fast.load_state_dict(plain.state_dict())
    (ours, mine), (theirs, its) = outputs(fast), outputs(plain)  # type: ignore[arg-type]
    assert_close(ours, theirs)
    assert mine.keys() == its.keys()
    for name, value in its.items():
        assert_close(mine[name], value, name)


def test_fast_has_the_same_parameters_and_the_same_start() -> None:
    states = []
    for patches in ((), (FAST,)):
        torch.manual_seed(3)
        states.append(Transformer(config(*patches)).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_fast_commutes_and_survives_json() -> None:
    both = [config(FAST, SDPA), config(SDPA, FAST), patch(config(FAST), SDPA)]
    assert both[0] == both[1] == both[2]
    assert from_json(to_json(both[0])) == both[0]


def test_fast_uses_its_parts_everywhere() -> None:
    model = Transformer(config(FAST, {"final_norm": True}, dropout=0.1))
    for name, module in model.named_modules():
        assert not isinstance(module, LayerNorm) or type(module) is FusedNorm, name
        assert not isinstance(module, PostNorm) or type(module) is FastPostNorm, name
        if isinstance(module, nn.Dropout) and "ffn." not in name.replace("residuals.ffn.", ""):
            assert type(module) is FastDropout, name
            assert module.p == 0.1, name
    assert type(model.embedding) is FastEmbedding


def test_fast_drops_in_the_papers_two_places() -> None:
    """Sub-layers that return ones: what the residual adds is dropped, and x itself is not."""
    x = torch.zeros(4, 6, 50)
    frame = FastPostNorm(50, spec(FusedNorm), 0.5)
    frame.norm = nn.Identity()
    y = frame(x + 10, torch.ones_like)
    assert set(y.unique().tolist()) == {10.0, 12.0}
    table = FastEmbedding(VOCABULARY, 64, 0.5)
    vectors = table(IDS, torch.arange(5)[None])
    whole = table.eval()(IDS, torch.arange(5)[None])
    zeros = vectors == 0
    assert 0.3 < zeros.double().mean() < 0.7
    assert_close(vectors[~zeros], 2 * whole[~zeros], tolerance=1e-5)


def test_fast_trains_under_autocast() -> None:
    model = Transformer(config(FAST, dropout=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, IDS.flip(1)).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_mask_on_a_gpu() -> None:
    mask, _ = kept(torch.empty(400_000, device="cuda"), 0.1)
    assert mask.device.type == "cuda"
    assert abs(1 - mask.mean().item() - 0.1) < 0.003


# The instruments ----------------------------------------------------------------------------------


def test_a_race_runs_each_once_a_round() -> None:
    runs: list[str] = []
    seconds = race({name: lambda name=name: runs.append(name) for name in "abc"}, 4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [tuple(runs[i : i + 3]) for i in range(0, 18, 3)]
    assert all(set(order) == set("abc") for order in rounds)
    assert len(set(rounds)) > 1, "the order never changed"
    with pytest.raises(ValueError, match="rounds"):
        race({}, 0)


def test_operation_times_see_forward_and_backward() -> None:
    """Three products of matrices in all, and results that are what they were."""
    x, w = draw(4, 3, seed="x").requires_grad_(), draw(3, 2, seed="w").requires_grad_()
    expected = torch.autograd.grad((x @ w).square().sum(), [x, w])
    with OperationTimes() as times:
        found = torch.autograd.grad((x @ w).square().sum(), [x, w])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert times.seconds["mm"] > 0
    assert all(value >= 0 for value in times.seconds.values())


def test_kinds_add_up() -> None:
    seconds = {
        "mm": 1.0,
        "addmm": 2.0,
        "bernoulli_": 4.0,
        "_softmax_backward_data": 8.0,
        "mul": 16.0,
    }
    totals = by_kind(seconds)
    assert list(totals) == [*KINDS, "one number at a time"]
    assert totals["matrix products"] == 3
    assert totals["random numbers"] == 4
    assert totals["softmax, exp, log"] == 8
    assert totals["one number at a time"] == 16


def test_keep_memory_says_whether_it_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_memory() is False


def test_stored_measurements_are_complete() -> None:
    """Every line that the page shows names its machine and versions, and holds no path."""
    from transformer_annotated.book import results

    for line in results("bench"):
        assert {"kind", "size", "rows", "machine", "versions", "rounds", "clock"} <= line.keys()
        assert "/" not in json.dumps({k: v for k, v in line.items() if k != "unit"})
        assert any(row["name"] == "this book" for row in line["rows"])
        for row in line["rows"]:
            assert 0 < row["low"] <= row["median"] <= row["high"]


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("17.1", [3.2832e18, 8.208e17], [3.2832e18, 3.2832e18]),
        ("17.2", [1.1062, 1.1364], [1.12, 1.2]),
        ("17.3", [26 / 256, 256 / 230], [0.1, 1 / 0.9]),
        ("17.4", 0.075, 0.1),
    ],
)
def test_exercises(number: str, right: Any, wrong: Any) -> None:
    CHECKS[number](right)
    with pytest.raises(AssertionError):
        CHECKS[number](wrong)
