"""Chapter 16: Adam, the schedules, clipping, and the instruments of the warm-up experiment."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, draw, redraw
from tests.variants import SMALL, VOCABULARY
from transformer_annotated import (
    DECODER_ONLY,
    Transformer,
    cross_entropy,
    paper_rate,
    patch,
    rise_and_fall,
)
from transformer_annotated.exercises import CHECKS
from transformer_annotated.paper.toy import Batch, collate
from transformer_annotated.training.schedule import (
    adam,
    adam_update,
    clip_gradients,
    cosine,
    inverse_square_root,
    layer_gradients,
    set_rate,
    spread,
)

# Adam ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.0, 0.5), (0.9, 0.999)])
@pytest.mark.parametrize("eps", [1e-9, 1e-2])
def test_adam_by_hand_equals_torch(betas: tuple[float, float], eps: float) -> None:
    """Twenty steps on a quadratic, in float64: every weight and both running means."""
    theirs = nn.Parameter(draw(4, 3, seed="start", dtype=torch.float64))
    ours = theirs.detach().clone()
    goal, curve = (draw(4, 3, seed=s, dtype=torch.float64) for s in ("goal", "curve"))
    mean, square = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.Adam([theirs], lr=0.05, betas=betas, eps=eps)
    for step in range(1, 21):
        theirs.grad = curve * (theirs.detach() - goal)
        optimizer.step()
        ours -= 0.05 * adam_update(curve * (ours - goal), mean, square, step, betas=betas, eps=eps)
        assert_close(ours, theirs.detach(), f"weights after step {step}", tolerance=1e-12)
    assert_close(mean, optimizer.state[theirs]["exp_avg"], "mean", tolerance=1e-12)
    assert_close(square, optimizer.state[theirs]["exp_avg_sq"], "mean square", tolerance=1e-12)


def test_the_first_step_is_a_full_one() -> None:
    gradient = torch.tensor([5.0, -1e-3, 1e-6], dtype=torch.float64)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    update = adam_update(gradient, zeros[0], zeros[1], step=1)
    assert_close(update, gradient.sign(), tolerance=2e-3)


def test_a_constant_factor_of_the_gradient_cancels() -> None:
    updates = []
    for factor in (1.0, 1e4):
        mean, square = torch.zeros(2, 5, dtype=torch.float64)
        for step in range(1, 9):
            gradient = factor * draw(5, seed=step, dtype=torch.float64)
            update = adam_update(gradient, mean, square, step)
        updates.append(update)
    assert_close(updates[0], updates[1], tolerance=1e-7)


def test_adam_has_the_papers_values() -> None:
    """Section 5.3; and the fused pass takes the same steps as torch's plain loop."""
    model = nn.Linear(5, 4).double()
    plain = copy.deepcopy(model)
    optimizer = adam(model.parameters())
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-9
    assert optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["lr"] == 0.0
    assert optimizer.defaults["fused"] is True
    reference = torch.optim.Adam(
        plain.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-9, foreach=False
    )
    set_rate(optimizer, 0.01)
    for step in range(10):
        for net, steps in ((model, optimizer), (plain, reference)):
            net.zero_grad()
            net(draw(7, 5, seed=step, dtype=torch.float64)).square().sum().backward()
            steps.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.detach(), theirs.detach(), tolerance=1e-12)


def test_no_rate_no_step() -> None:
    """Until a schedule sets a rate, nothing moves."""
    layer = nn.Linear(2, 2)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.ones(1, 2)).sum().backward()
    adam(layer.parameters()).step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_set_rate_sets_every_group() -> None:
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "lr": 1.0} for layer in layers])
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# Schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_model", "warm_up"), [(512, 4000), (1024, 4000), (64, 1)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.3])
def test_the_papers_rate(d_model: int, warm_up: int, factor: float) -> None:
    """Equation 3 of the paper, written out independently, and Part I's function."""
    rate = inverse_square_root(d_model, warm_up, factor)
    part_one = paper_rate(d_model, warm_up)
    for step in (1, 2, 7, warm_up, warm_up + 1, 4 * warm_up, 100_000):
        rise, fall = step / (warm_up * math.sqrt(warm_up)), 1 / math.sqrt(step)
        wanted = factor / math.sqrt(d_model) * (rise if step < warm_up else fall)
        assert rate(step) == pytest.approx(wanted, rel=1e-12)
        assert rate(step) == pytest.approx(factor * part_one(step), rel=1e-12)
    assert rate(warm_up) == pytest.approx(factor * (d_model * warm_up) ** -0.5)
    assert rate(4 * warm_up) == pytest.approx(rate(warm_up) / 2)


def test_factor_one_is_part_ones_rate_to_the_last_bit() -> None:
    ours, theirs = inverse_square_root(512), paper_rate(512)
    assert all(ours(step) == theirs(step) for step in range(1, 10_000))


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine(floor: float) -> None:
    rate = cosine(0.5, warm_up=10, steps=110, floor=floor)
    rates = [rate(step) for step in range(1, 131)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 0.5
    assert rate(60) == pytest.approx((0.5 + floor) / 2)  # half way: half the cosine
    assert rate(35) == pytest.approx(floor + (0.5 - floor) * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(rates[9:110]))
    assert rates[109:] == pytest.approx([floor] * 21, abs=1e-15)  # and no way below it


def test_schedules_share_their_rise() -> None:
    peak, warm_up = 1e-3, 50
    schedules = (
        inverse_square_root(64, warm_up, factor=peak * math.sqrt(64 * warm_up)),
        cosine(peak, warm_up, 500),
        rise_and_fall(peak, warm_up, 500),
    )
    for step in (1, 10, warm_up):
        assert [s(step) for s in schedules] == pytest.approx([peak * step / warm_up] * 3)


# Bad input ----------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_square_root(512)(0), "step .* at least 1, got 0"),
        (lambda: inverse_square_root(512)(-1), "step .* at least 1, got -1"),
        (lambda: cosine(1.0, 2, 5)(0), "step .* at least 1, got 0"),
        (lambda: inverse_square_root(0), "d_model .* at least 1, got 0"),
        (lambda: inverse_square_root(512, warm_up=0), "warm_up .* at least 1, got 0"),
        (lambda: inverse_square_root(512, warm_up=1.5), "warm_up .* whole number .* got 1.5"),
        (lambda: inverse_square_root(512, factor=0.0), "factor .* above 0, got 0.0"),
        (lambda: inverse_square_root(512, factor=NAN), "factor .* above 0, got nan"),
        (lambda: cosine(1.0, 0, 5), "warm_up .* at least 1, got 0"),
        (lambda: cosine(1.0, 5, 5), r"warm_up must be in \[1, 5\), got 5"),
        (lambda: cosine(-1.0, 1, 5), "peak .* above 0, got -1.0"),
        (lambda: cosine(INF, 1, 5), "peak .* finite .* got inf"),
        (lambda: cosine(1.0, 1, 5, floor=2.0), r"floor must be in \[0, 1.0\], got 2.0"),
        (lambda: cosine(1.0, 1, 5, floor=-0.1), r"floor must be in \[0, 1.0\], got -0.1"),
        (lambda: adam([]), "parameters must hold at least one tensor"),
        (lambda: adam(nn.Linear(1, 1).parameters(), betas=(0.9, 1.0)), r"betas\[1\] .* got 1.0"),
        (lambda: adam(nn.Linear(1, 1).parameters(), betas=(-0.1, 0.9)), r"betas\[0\] .* got -0.1"),
        (lambda: adam(nn.Linear(1, 1).parameters(), eps=0.0), "eps .* above 0, got 0.0"),
        (lambda: adam_update(*torch.zeros(3, 2), step=0), "step .* at least 1, got 0"),
        (lambda: set_rate(torch.optim.SGD([nn.Parameter(torch.ones(1))]), NAN), "rate .* got nan"),
        (lambda: set_rate(torch.optim.SGD([nn.Parameter(torch.ones(1))]), -1), "rate .* got -1"),
        (lambda: clip_gradients([], 0.0), "max_norm .* above 0, got 0.0"),
        (lambda: layer_gradients(Transformer(SMALL)), "model must have gradients"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Clipping -----------------------------------------------------------------------------------------


def with_gradients(scale: float = 1.0) -> nn.Sequential:
    """Two layers with random gradients; one parameter has none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = None if i == 1 else scale * draw(*parameter.shape, seed=i)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_equals_torch(scale: float) -> None:
    ours, theirs = with_gradients(scale), with_gradients(scale)
    before = clip_gradients(ours.parameters(), 0.5)
    assert_close(before, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5), "the length before")
    for mine, its in zip(gradients(ours), gradients(theirs), strict=True):
        assert_close(mine, its, "gradient")
    length = math.sqrt(sum(g.square().sum().item() for g in gradients(ours)))
    assert length == pytest.approx(min(0.5, before.item()), rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_gradient_is_refused(bad: float) -> None:
    """Row 51 of the fault list: the step is not taken and no gradient is changed."""
    model = with_gradients()
    gradient = model[1].bias.grad
    assert gradient is not None
    gradient[0] = bad
    before = gradients(model)
    with pytest.raises(ValueError, match=r"norm of the gradient is (nan|inf)"):
        clip_gradients(model.parameters(), 1.0)
    for now, then in zip(gradients(model), before, strict=True):
        assert torch.equal(now.nan_to_num(9.0), then.nan_to_num(9.0))


def test_the_trap_that_is_refused() -> None:
    """What torch does by default: one NaN, and after the step no weight is a number."""
    model = with_gradients()
    gradient = model[1].bias.grad
    assert gradient is not None
    gradient[0] = NAN
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters()).step()
    assert all(p.isnan().all() for i, p in enumerate(model.parameters()) if i != 1)


# The instruments ----------------------------------------------------------------------------------


def probe() -> Batch:
    return collate([([4, 5, 6, 7], [8, 9, 10]), ([5, 11], [4, 12, 6, 9, 8])])


def test_layer_gradients_bottom_to_top() -> None:
    model = redraw(Transformer(SMALL))
    batch = probe()
    logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
    cross_entropy(logits, batch.tgt_out, batch.tgt_padding).backward()
    wanted = []
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        for i in range(layers):
            parts = [
                p.grad.square().sum().item()
                for name, p in model.named_parameters()
                if name.startswith(f"{stack}.layers.{i}.") and p.grad is not None
            ]
            wanted.append(math.sqrt(sum(parts)))
    assert layer_gradients(model) == pytest.approx(wanted, rel=1e-5)


def test_spread_against_the_layers_outputs() -> None:
    """Computed again from each sub-stack's output, position by position; padding has no part."""
    model = redraw(Transformer(SMALL)).eval()
    batch = probe()
    found = spread(model, batch)
    assert len(found) == 5
    with torch.no_grad():
        memory = model.encode(batch.src, batch.src_padding)
        last = model.decode(batch.tgt_in, memory, batch.src_padding)
    for x, padding, value in (
        (memory, batch.src_padding, found[1]),
        (last, batch.tgt_padding, found[4]),
    ):
        real = [x[b, t] for b in range(2) for t in range(x.shape[1]) if padding[b, t]]
        deviations = [torch.stack(real)[:, i].std().item() for i in range(x.shape[2])]
        assert value == pytest.approx(sum(deviations) / len(deviations), rel=1e-5)
    wide = Batch(
        *(nn.functional.pad(t, (0, 3)) for t in (batch.src, batch.tgt_in, batch.tgt_out)),
        *(
            nn.functional.pad(t, (0, 3), value=False)
            for t in (batch.src_padding, batch.tgt_padding)
        ),
    )
    assert spread(model, wide) == pytest.approx(found, rel=1e-5)


def test_spread_leaves_the_model_as_it_was() -> None:
    model = Transformer(SMALL)
    spread(model, probe())
    with pytest.raises(ValueError):
        spread(Transformer(patch(SMALL, DECODER_ONLY)), probe())
    bad = probe()
    bad.src.fill_(VOCABULARY)
    with pytest.raises(ValueError):
        spread(model, bad)
    layers = [layer for layer in model.modules() if hasattr(layer, "residuals")]
    assert layers
    assert not any(layer._forward_hooks for layer in layers)


def test_one_full_step_makes_positions_alike() -> None:
    """The page's finding at its first step: twelve post-norm layers, with and without a rise."""
    config = patch(SMALL, {"d_model": 32, "n_layers": 6, "ffn.d_ff": 64})
    batch, spreads = probe(), []
    for rate in (2e-5, 4e-3):
        torch.manual_seed(0)
        model = Transformer(config)
        optimizer = adam(model.parameters())
        set_rate(optimizer, rate)
        before = spread(model, batch)[-1]
        for _ in range(5):
            optimizer.zero_grad()
            logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
            cross_entropy(logits, batch.tgt_out, batch.tgt_padding).backward()
            optimizer.step()
        spreads.append(spread(model, batch)[-1] / before)
    small, full = spreads
    assert small > 0.9
    assert full < 0.5 * small


# Exercises ----------------------------------------------------------------------------------------


def shorten(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    length = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g * min(1.0, max_norm / max(length, 1e-12)) for g in gradients]


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("16.1", [1e-3, 1e-3 * 0.1 / math.sqrt(0.02)], [1e-3, 1e-3]),
        ("16.2", [228, 4603], [228, 4602]),
        ("16.3", 0.50596, 2.0),
        ("16.4", shorten, lambda gs, c: [g * min(1.0, c / g.norm().item()) for g in gs]),
    ],
)
def test_exercises(number: str, right: Any, wrong: Any) -> None:
    CHECKS[number](right)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        CHECKS[number](wrong)
