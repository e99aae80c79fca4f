"""Chapter 34: routing, the mixture against a loop and Mixtral's block, capacity, balance."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, assert_same, draw, redraw
from tests.variants import SMALL, VOCABULARY, batch, run
from transformer_annotated import (
    DECODER_ONLY,
    Balanced,
    CrossEntropy,
    FeedForward,
    GatedFeedForward,
    MixtureOfExperts,
    RDrop,
    Transformer,
    active_parameters,
    collate,
    count_parameters,
    from_json,
    mixture_of_experts,
    patch,
    record_routing,
    spec,
    to_json,
)
from transformer_annotated.modern.experts import (
    balance_loss,
    route,
    router_z_loss,
    within_capacity,
)
from transformer_annotated.training.objective import accumulate

D, F = 8, 12
EXPERT = spec(FeedForward, d_ff=F)


def mixture(dtype: torch.dtype = torch.float64, **options: Any) -> MixtureOfExperts:
    """A mixture with every parameter redrawn, and a router that is not timid."""
    module = MixtureOfExperts(D, **{"expert": EXPERT, **options})
    redraw(module)
    module.router.weight.data *= 3
    return module.to(dtype)


def leaves(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **dict(module.named_parameters())}


def by_loop(
    module: MixtureOfExperts, x: Tensor, renormalise: bool, capacity: float | None = None
) -> Tensor:
    """Token by token, expert by expert, from the definition."""
    rows, E, k = x.reshape(-1, x.shape[-1]), len(module.experts), module.top_k
    p = [torch.stack([torch.exp((w * row).sum()) for w in module.router.weight]) for row in rows]
    order = [sorted(range(E), key=lambda e, q=q: -q[e].item()) for q in p]
    places = math.inf if capacity is None else math.ceil(capacity * len(rows) * k / E)
    taken, served = [0] * E, set()
    for rank in range(k):
        for token in range(len(rows)):
            e = order[token][rank]
            if taken[e] < places:
                taken[e] += 1
                served.add((token, e))
    output = []
    for token, row in enumerate(rows):
        y = 0.0 * (row + p[token].sum() * 0.0)
        chosen = order[token][:k]
        total = sum(p[token][e] for e in (chosen if renormalise else range(E)))
        for e in chosen:
            if (token, e) in served:
                y = y + p[token][e] / total * module.experts[e](row)
        output.append(y)
    return torch.stack(output).view(x.shape)


# Routing ------------------------------------------------------------------------------------------


def test_the_softmax_runs_over_the_chosen() -> None:
    n_experts, top_k = 5, 2
    logits = draw(3, 4, n_experts, seed="logits", dtype=torch.float64)
    weights, chosen = route(logits, top_k)
    assert weights.shape == chosen.shape == (3, 4, top_k)
    p = logits.softmax(dim=-1)
    best, expected = p.sort(dim=-1, descending=True)
    assert torch.equal(chosen, expected[..., :top_k])
    kept = best[..., :top_k]
    assert_close(weights, kept / kept.sum(dim=-1, keepdim=True))
    assert_close(route(logits, top_k, renormalise=False)[0], kept)


def test_routing_is_computed_in_32_bits() -> None:
    weights, _ = route(draw(7, 4, seed="half").bfloat16(), 2)
    assert weights.dtype == torch.float32
    assert_close(weights.sum(dim=-1), torch.ones(7), tolerance=1e-6)


# The mixture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("expert", [EXPERT, spec(GatedFeedForward, d_ff=F)], ids=str)
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_equal_to_a_loop_over_tokens(
    n_experts: int, top_k: int, expert: Any, renormalise: bool
) -> None:
    """Output, and the gradient of the input and of every parameter."""
    module = mixture(n_experts=n_experts, top_k=top_k, expert=expert, renormalise=renormalise)
    x = draw(2, 5, D, seed="x", dtype=torch.float64).requires_grad_()
    assert_same(module(x), by_loop(module, x, renormalise), leaves(module, x))


@pytest.mark.parametrize("capacity", [0.3, 0.7, 1.0, 2.0, 100.0])
def test_capacity_equal_to_a_loop(capacity: float) -> None:
    """All first choices come before all second ones, and tokens in their order."""
    module = mixture(n_experts=4, top_k=2, capacity=capacity)
    x = draw(3, 6, D, seed="x", dtype=torch.float64).requires_grad_()
    assert_same(module(x), by_loop(module, x, True, capacity), leaves(module, x))


@pytest.mark.parametrize("renormalise", [True, False])
def test_one_expert_is_the_dense_network(renormalise: bool) -> None:
    dense = redraw(FeedForward(D, F))
    module = MixtureOfExperts(D, 1, 1, expert=EXPERT, renormalise=renormalise)
    module.experts[0].load_state_dict(dense.state_dict())
    x = draw(2, 5, D, seed="x").requires_grad_()
    assert torch.equal(module(x), dense(x))
    weighting = draw(2, 5, D, seed="direction")
    ours, theirs = (torch.autograd.grad(m(x), x, weighting)[0] for m in (module, dense))
    assert_close(ours, theirs, tolerance=1e-6)


def test_all_experts_are_the_full_mixture() -> None:
    module = mixture(n_experts=5, top_k=5)
    x = draw(2, 4, D, seed="x", dtype=torch.float64).requires_grad_()
    p = module.router(x).softmax(dim=-1)
    full = (p[..., None, :] * torch.stack([e(x) for e in module.experts], dim=-1)).sum(dim=-1)
    assert_same(module(x), full, leaves(module, x))


def test_equal_to_mixtral() -> None:
    """Hugging Face's block with our weights: output and the gradient of every parameter."""
    pytest.importorskip("transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
        load_balancing_loss_func,
    )

    module = mixture(torch.float32, n_experts=4, expert=spec(GatedFeedForward, d_ff=F))
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    ours = {
        "gate.weight": list(module.router.weight),
        "experts.gate_up_proj": [torch.cat([e.gate.weight, e.up.weight]) for e in module.experts],
        "experts.down_proj": [e.down.weight for e in module.experts],
    }
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(torch.stack(ours[name]))
    x = draw(2, 6, D, seed="x").requires_grad_()
    y, expected = module(x), block(x)
    assert_close(y, expected)
    weighting = draw(2, 6, D, seed="direction")
    theirs = torch.autograd.grad(expected, [x, *block.parameters()], weighting)
    found = torch.autograd.grad(y, leaves(module, x).values(), weighting)
    mine = dict(zip(leaves(module, x), found, strict=True))
    per_expert = {
        "experts.gate_up_proj": [
            torch.cat([mine[f"experts.{e}.gate.weight"], mine[f"experts.{e}.up.weight"]])
            for e in range(4)
        ],
        "experts.down_proj": [mine[f"experts.{e}.down.weight"] for e in range(4)],
        "gate.weight": list(mine["router.weight"]),
    }
    assert_close(mine["x"], theirs[0], "gradient of x")
    for (name, _), gradient in zip(block.named_parameters(), theirs[1:], strict=True):
        assert_close(torch.stack(per_expert[name]), gradient, f"gradient of {name}")
    with record_routing(module) as routings:
        module(x)
    logits, chosen = routings[""]
    theirs_loss = load_balancing_loss_func((logits.flatten(0, 1),), 4, 2)
    assert_close(2 * balance_loss(logits, chosen), theirs_loss, "balance")  # theirs is k at balance


def test_an_expert_without_tokens_has_gradients_of_zero() -> None:
    module = mixture(n_experts=3, top_k=1, renormalise=False)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[1] = 1.0
    x = draw(1, 4, D, seed="x", dtype=torch.float64).abs()  # every token goes to expert 1
    module(x).sum().backward()
    for e, expert in enumerate(module.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (e == 1)


def test_a_renormalised_top_1_router_learns_nothing_from_the_loss() -> None:
    x = draw(2, 5, D, seed="x", dtype=torch.float64)
    for renormalise in (True, False):
        module = mixture(n_experts=4, top_k=1, renormalise=renormalise)
        module(x).square().sum().backward()
        size = module.router.weight.grad.abs().max().item()
        assert (size < 1e-12) == renormalise, size


# In a model ---------------------------------------------------------------------------------------

SPARSE = mixture_of_experts(4, 2, expert=spec(FeedForward, d_ff=24))
TIGHT = mixture_of_experts(4, 2, expert=spec(FeedForward, d_ff=24), capacity=1.0)


def model(*patches: Any, dtype: torch.dtype = torch.float64) -> Transformer:
    built = Transformer(patch(SMALL, *patches))
    redraw(built)
    return built.to(dtype).eval()


def test_tokens_do_not_meet_without_a_capacity() -> None:
    """Alone, in a padded batch, with other tokens behind: a sentence keeps its logits."""
    built = model(DECODER_ONLY, SPARSE)
    ids, real = batch((3, 6, 2), 20)
    together = run("decoder", built, ids, ids, tgt_padding=real)
    for row, length in enumerate((3, 6, 2)):
        alone = run("decoder", built, ids[row : row + 1], ids[row : row + 1, :length])[0]
        assert_close(together[row, :length], alone, tolerance=1e-12)


def test_with_a_capacity_they_do() -> None:
    """A later token, and another sentence, take the place of a second choice."""
    module = MixtureOfExperts(2, 2, 2, expert=spec(FeedForward, d_ff=3), capacity=0.5)
    redraw(module)
    with torch.no_grad():
        module.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[[2.0, 1.0], [2.0, 1.0]]])  # both choose expert 0 first; expert 1 is second
    other = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])  # the later token now wants expert 1 first
    assert (module(other)[0, 0] - module(x)[0, 0]).abs().max() > 1e-3
    module.capacity = None
    assert_close(module(other)[0, 0], module(x)[0, 0], tolerance=1e-6)


def test_the_table_of_places() -> None:
    """No expert gets more than its places, over the whole call; none stays empty without need."""
    n, n_experts, capacity = 8, 4, 1.1
    chosen = draw(n, n_experts, seed="crowd").argsort(dim=-1)[:, :2]
    chosen[:, 0] = 1  # everybody's first choice
    chosen[:, 1] = torch.where(chosen[:, 1] == 1, 2, chosen[:, 1])
    kept = within_capacity(chosen, n_experts, capacity)
    places = math.ceil(capacity * n * 2 / n_experts)
    for e in range(n_experts):
        asked, served = int((chosen == e).sum()), int((kept & (chosen == e)).sum())
        assert served == min(asked, places), f"expert {e}: {served} of {asked}, {places} places"
    first = kept[:, 0].nonzero()[:, 0]
    assert first.tolist() == list(range(places))  # the tokens that came first


def test_rounding_does_not_add_a_place() -> None:
    chosen = torch.zeros(20, 1, dtype=torch.long)
    assert int(within_capacity(chosen, 2, 1.1).sum()) == 11  # 1.1 * 20 / 2 is 11.000000000000002


def test_compiles_in_one_graph_with_a_capacity() -> None:
    """Without one, the suite of invariants says so."""
    built = model(TIGHT, {"n_layers": 1}, dtype=torch.float32)
    src, src_real = batch((7, 4), 10)
    tgt, tgt_real = batch((3, 6), 20)
    torch.compiler.reset()
    compiled = torch.compile(built, fullgraph=True, backend="eager", dynamic=False)
    ours = run("seq2seq", compiled, src, tgt, src_real, tgt_real)
    plain = run("seq2seq", built, src, tgt, src_real, tgt_real)
    assert_close(ours[tgt_real], plain[tgt_real], tolerance=1e-6)


def test_the_patch_is_saved_and_counted() -> None:
    config = patch(SMALL, SPARSE)
    assert from_json(to_json(config)) == config
    total, active = count_parameters(config)["total"], active_parameters(config)
    one, router, layers = 2 * 16 * 24 + 24 + 16, 4 * 16, 2 + 3
    assert total - active == layers * 2 * one
    dense = count_parameters(patch(SMALL, {"ffn.d_ff": 48}))["total"]
    assert active - dense == layers * (router + 16)  # two experts have one bias more
    assert active_parameters(SMALL) == count_parameters(SMALL)["total"]


# Balance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_one_when_even_and_the_number_of_experts_when_not(top_k: int) -> None:
    E, n = 4, 8
    logits = torch.zeros(n, E, dtype=torch.float64)
    turns = torch.arange(n)[:, None] + torch.arange(top_k)
    assert balance_loss(logits, turns % E).item() == pytest.approx(1.0)
    logits[:, 2] = 50.0  # sure of one, and the other choice, if any, is always the same
    chosen = torch.arange(2, 2 + top_k).expand(n, top_k)
    assert balance_loss(logits, chosen).item() == pytest.approx(E / top_k)


def test_balance_can_be_below_one() -> None:
    """Three of five tokens lean to expert 0, barely; the others are sure of expert 1."""
    p = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]] * 2, dtype=torch.float64)
    _, chosen = route(p.log(), 1)
    by_hand = 2 * (3 / 5 * p[:, 0].mean() + 2 / 5 * p[:, 1].mean())
    assert balance_loss(p.log(), chosen).item() == pytest.approx(by_hand.item())
    assert by_hand < 0.95


def test_balance_and_its_gradient_by_hand() -> None:
    """The shares are constants: the gradient flows through the probabilities alone."""
    n_experts, top_k = 5, 2
    logits = draw(3, 4, n_experts, seed="logits", dtype=torch.float64).requires_grad_()
    _, chosen = route(logits, top_k)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    shares = [0.0] * n_experts
    for token in chosen[real].tolist():
        for e in token:
            shares[e] += 1 / (7 * top_k)
    p = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
    means = [p[..., e][real].sum() / 7 for e in range(n_experts)]
    expected = n_experts * sum(f * m for f, m in zip(shares, means, strict=True))
    loss = balance_loss(logits, chosen, real)
    assert loss.dtype == torch.float64
    assert_close(loss, expected, tolerance=1e-6)  # the shares are 32-bit
    (found,), (wanted,) = (torch.autograd.grad(value, logits) for value in (loss, expected))
    assert_close(found, wanted, tolerance=1e-6)
    assert balance_loss(logits.bfloat16(), chosen).dtype == torch.float32
    assert found[real].abs().min().item() > 0


def test_z_loss_by_hand() -> None:
    logits = draw(2, 3, 4, seed="z", dtype=torch.float64)
    real = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    squares = torch.exp(logits).sum(dim=-1).log() ** 2
    assert router_z_loss(logits).item() == pytest.approx(squares.mean().item(), rel=1e-12)
    wanted = squares[real].mean().item()
    assert router_z_loss(logits, real).item() == pytest.approx(wanted, rel=1e-12)


def sentences(*lengths: tuple[int, int]) -> Any:
    generator = torch.Generator().manual_seed(0)
    return collate(
        [
            tuple(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in pair)
            for pair in lengths
        ]
    )


@pytest.mark.parametrize("plain", [CrossEntropy(), RDrop()], ids=["cross-entropy", "r-drop"])
def test_balanced_adds_the_losses_of_all_layers_times_the_tokens(plain: Any) -> None:
    built, data = model(SPARSE), sentences((3, 5), (6, 2), (4, 0))
    base = plain(built, data)
    with record_routing(built) as routings:
        built(data.src, data.tgt_in, src_padding=data.src_padding)
    assert sorted(routings) == [f"decoder.layers.{i}.ffn" for i in range(3)] + [
        f"encoder.layers.{i}.ffn" for i in range(2)
    ]
    extra = 0.0
    for name, (logits, chosen) in routings.items():
        real = data.src_padding if "encoder" in name else data.tgt_padding
        assert logits.shape == (*real.shape, 4)
        assert chosen.shape == (*real.shape, 2)
        extra += 0.5 * balance_loss(logits, chosen, real).item()
        extra += 0.25 * router_z_loss(logits, real).item()
    ours = Balanced(plain, weight=0.5, z_weight=0.25)(built, data)
    assert ours.tokens == base.tokens
    assert ours.nll.item() == pytest.approx(base.nll.item())
    wanted = base.loss.item() + base.tokens * extra
    assert ours.loss.item() == pytest.approx(wanted, rel=1e-6)
    assert not any(m._forward_hooks for m in built.modules())  # nobody watches any more


def test_balanced_reads_the_padding_of_a_wrapped_encoder() -> None:
    """The names begin with `_orig_mod` then."""
    built, data = model(SPARSE, {"encoder.n_layers": 1, "decoder.n_layers": 1}), sentences((6, 2))
    objective = Balanced(CrossEntropy(), weight=0.5)
    torch.compiler.reset()
    compiled: Any = torch.compile(built, backend="eager")
    wrapped = objective(compiled, data).loss
    assert wrapped.item() == pytest.approx(objective(built, data).loss.item(), rel=1e-6)


def test_a_router_that_cannot_be_seen_is_an_error() -> None:
    """A layer that was compiled and called before overlooks hooks."""
    built, data = model(SPARSE, {"encoder.n_layers": 1, "decoder.n_layers": 1}), sentences((3, 5))
    torch.compiler.reset()
    built.decoder.layers[0].compile(backend="eager")
    with torch.no_grad():
        CrossEntropy()(built, data)  # the same shapes: otherwise it would be compiled again
        with pytest.raises(RuntimeError, match="1 of 2 routers were seen"):
            Balanced(CrossEntropy())(built, data)


def test_balance_reaches_the_router_and_not_its_experts() -> None:
    built, data = model(SPARSE, {"encoder.n_layers": 1, "decoder.n_layers": 1}), sentences((3, 5))
    with record_routing(built) as routings:
        built(data.src, data.tgt_in)
    logits, chosen = routings["decoder.layers.0.ffn"]
    balance_loss(logits, chosen).backward()
    layer = built.decoder.layers[0].ffn
    assert bool(layer.router.weight.grad.any())
    assert all(p.grad is None for p in layer.experts.parameters())


def test_balancing_balances() -> None:
    """A router that sends everything to one expert learns to share."""
    torch.manual_seed(0)
    module = MixtureOfExperts(D, 4, 1, expert=EXPERT, renormalise=False)
    x = torch.randn(64, D) + 1.0
    module.router.weight.data[0] += 1.0
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    values = []
    for _ in range(60):
        with record_routing(module) as routings:
            module(x)
        logits, chosen = routings[""]
        loss = balance_loss(logits, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 2.5
    assert values[-1] < 1.3
    counts = chosen.flatten().bincount(minlength=4)
    assert counts.max().item() < 40


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    built, data = Transformer(patch(SMALL, SPARSE)), sentences((3, 5), (6, 2), (4, 3))
    optimizer, losses = torch.optim.Adam(built.parameters(), 1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(accumulate(Balanced(CrossEntropy()), built, [data]))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k must be at most n_experts, got 9 and 8"),
        ({"n_experts": 0}, "n_experts must be a whole number of at least 1, got 0"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"capacity": 0}, "capacity must be None or above 0 and finite, got 0"),
        ({"capacity": -1.0}, "capacity must be None or above 0 and finite, got -1.0"),
        ({"capacity": math.nan}, "capacity must be None or above 0 and finite, got nan"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MixtureOfExperts(D, expert=EXPERT, **options)


@pytest.mark.parametrize("options", [{"weight": -0.1}, {"z_weight": math.inf}])
def test_bad_weights(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and finite"):
        Balanced(CrossEntropy(), **options)
