"""What must hold for every variant of the model, written once.

Each test runs on every row of `tests/variants.py`; a later part adds rows there.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import assert_close
from tests.variants import SMALL, VARIANTS, VOCABULARY, Patch, batch, build, run, sentence
from transformer_annotated import Transformer, from_json, patch, to_json
from transformer_annotated.paper.multi_head import KeysValues

ALL = list(VARIANTS)
CAUSAL = [name for name, variant in VARIANTS.items() if variant.kind != "encoder"]


def on_each(names: list[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on these variants, but on those that are excepted from it by name."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        held = [name for name in names if test.__name__ not in VARIANTS[name].excepted]
        return pytest.mark.parametrize("variant", held)(test)

    return decorate


every_variant, every_causal_variant = on_each(ALL), on_each(CAUSAL)
T, S = 8, 7  # longer than three layers with a window of 3 can see


def another(ids: Tensor) -> Tensor:
    """Ids that differ from these in every place."""
    return (ids + 1) % VOCABULARY


# Time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@every_causal_variant
def test_no_future_leak(variant: str, train: bool, dropout: float) -> None:
    """A changed token leaves every earlier row exactly as it was, and moves its own row."""
    model, kind = build(variant, dropout=dropout).train(train), VARIANTS[variant].kind
    src, tgt = sentence(S, 1), sentence(T, 2)

    def logits(tgt: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same units are dropped
        return run(kind, model, src, tgt)

    before = logits(tgt)
    for t in range(T):
        changed = tgt.clone()
        changed[:, t] = another(tgt[:, t])
        difference = (logits(changed) - before).abs()[0]
        leak = difference[:t].max().item() if t else 0.0
        assert leak <= VARIANTS[variant].rounding, f"token {t} is seen by an earlier row"
        assert difference[t].max().item() > 1e-3, f"token {t} does not see itself"


@every_variant
def test_what_may_be_seen_is_seen(variant: str) -> None:
    """The first target token moves the last row; source and encoder are read in both directions."""
    model, row = build(variant), VARIANTS[variant]
    src, tgt = sentence(S, 1), sentence(T, 2)
    before = run(row.kind, model, src, tgt)
    for place, reader in ((0, -1), (-1, 0)) if row.kind == "encoder" else ((0, -1),):
        changed = tgt.clone()
        changed[:, place] = another(tgt[:, place])
        moved = (run(row.kind, model, src, changed) - before)[0, reader].abs().max().item()
        assert (moved > 1e-4) == row.reach, f"token {place} moves row {reader} by {moved}"
    if row.kind == "seq2seq":
        for place in range(S):
            changed = src.clone()
            changed[:, place] = another(src[:, place])
            difference = (run(row.kind, model, changed, tgt) - before)[0].abs().amax(dim=-1)
            assert difference.min().item() > 1e-5, f"source token {place} is not read"


@pytest.mark.parametrize("variant", [n for n in ALL if VARIANTS[n].kind == "seq2seq"])
def test_the_encoder_reads_both_directions(variant: str) -> None:
    model, src = build(variant), sentence(S, 1)
    before = model.encode(src)
    for place, row in ((0, -1), (-1, 0)):
        changed = src.clone()
        changed[:, place] = another(src[:, place])
        moved = (model.encode(changed) - before)[0, row].abs().max().item()
        assert (moved > 1e-4) == VARIANTS[variant].reach


# Padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@every_variant
def test_padding_invariance(variant: str, left: bool) -> None:
    """A sentence in a padded batch gets the logits that it gets alone."""
    model, kind = build(variant), VARIANTS[variant].kind
    src_lengths, tgt_lengths = (7, 4, 2), (3, 6, 1)
    src, src_real = batch(src_lengths, 10, left=left)
    tgt, tgt_real = batch(tgt_lengths, 20, left=left)
    together = run(kind, model, src, tgt, src_real, tgt_real)
    for row, (s, t) in enumerate(zip(src_lengths, tgt_lengths, strict=True)):
        alone = run(kind, model, sentence(s, 10 + row), sentence(t, 20 + row))[0]
        assert_close(together[row][tgt_real[row]], alone, f"sentence {row}")


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@every_variant
def test_garbage_under_the_mask_does_not_matter(variant: str, left: bool) -> None:
    """Any ids may stand where padding is: not one bit of a real row changes."""
    model, kind = build(variant), VARIANTS[variant].kind
    src, src_real = batch((7, 4, 2), 10, left=left)
    tgt, tgt_real = batch((3, 6, 1), 20, left=left)
    before = run(kind, model, src, tgt, src_real, tgt_real)
    garbage = torch.randint(VOCABULARY, (2, 3, 7), generator=torch.Generator().manual_seed(3))
    src = torch.where(src_real, src, garbage[0])
    tgt = torch.where(tgt_real, tgt, garbage[1][:, :6])
    after = run(kind, model, src, tgt, src_real, tgt_real)
    moved = (before[tgt_real] - after[tgt_real]).abs().max().item()
    assert moved <= VARIANTS[variant].rounding
    assert not torch.equal(before, after)  # the padded rows do move: the garbage was really there


@every_variant
def test_a_sentence_of_padding_alone_harms_nobody(variant: str) -> None:
    """Finite logits and gradients, and the other sentence keeps its own."""
    model, kind = build(variant), VARIANTS[variant].kind
    src, src_real = batch((5, 5), 10)
    tgt, tgt_real = batch((4, 4), 20)
    alone = run(kind, model, src[:1], tgt[:1])
    src_real[1] = tgt_real[1] = False
    logits = run(kind, model, src, tgt, src_real, tgt_real)
    assert_close(logits[:1], alone)
    found = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in found)


@every_variant
def test_batch_order_invariance(variant: str) -> None:
    model, kind = build(variant), VARIANTS[variant].kind
    src, src_real = batch((7, 4, 2, 5), 10)
    tgt, tgt_real = batch((3, 6, 1, 6), 20)
    order = torch.tensor([2, 0, 3, 1])
    logits = run(kind, model, src, tgt, src_real, tgt_real)
    shuffled = run(kind, model, src[order], tgt[order], src_real[order], tgt_real[order])
    assert_close(shuffled[tgt_real[order]], logits[order][tgt_real[order]], tolerance=1e-6)


# Configurations -----------------------------------------------------------------------------------


@every_variant
def test_save_and_load(variant: str, tmp_path: Path) -> None:
    """Weights as safetensors, config as JSON, read back into a new model: equal, bit by bit."""
    model, kind = build(variant), VARIANTS[variant].kind
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(to_json(model.config))
    again = Transformer(from_json((tmp_path / "config.json").read_text())).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert again.config == model.config
    src, tgt = sentence(S, 1), sentence(T, 2)
    assert torch.equal(run(kind, again, src, tgt), run(kind, model, src, tgt))


@every_variant
def test_a_config_is_a_value(variant: str) -> None:
    """Copied or pickled it is equal, and equal configs have the same hash and text."""
    config = VARIANTS[variant].config
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert hash(other) == hash(config)
        assert to_json(other) == to_json(config)


def bare(path: str) -> list[str]:
    """A path without its stack and its layer: what it changes, wherever that is."""
    names = path.split(".")
    names = names[1:] if names[0] in ("encoder", "decoder") else names
    return names[2:] if names[:1] == ["layers"] else names


def overlap(one: str, other: str) -> bool:
    """Whether one row's patches replace what the other's change, or what that is a part of."""
    first, second = ([bare(path) for p in VARIANTS[v].patches for path in p] for v in (one, other))
    return any(a[: len(b)] == b or b[: len(a)] == a for a in first for b in second if a and b)


PAIRS = [
    pytest.param(one, other, id=f"{one}-{other}")
    for one, other in itertools.combinations(ALL, 2)
    if not overlap(one, other)
]


def applied(*patches: tuple[Patch, ...]) -> object:
    """The patched config, one call for each group of patches, or the error it gives."""
    config = SMALL
    try:
        for group in patches:
            config = patch(config, *group)
    except ValueError:
        return ValueError  # both orders must object
    return config


def test_there_are_pairs() -> None:
    assert len(PAIRS) > 100


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_patches_commute(one: str, other: str) -> None:
    """Together in either order, and one after the other in either order: the same config."""
    a, b = VARIANTS[one].patches, VARIANTS[other].patches
    together = applied((*a, *b))
    assert applied((*b, *a)) == together
    if together is not ValueError:
        stacks = {"encoder", "decoder", "decoder.cross_attention"}
        for first, second in ((a, b), (b, a)):
            if not any(path in stacks for p in first for path in p):  # a removed part has no paths
                assert applied(first, second) == together


# Machinery ----------------------------------------------------------------------------------------


@every_variant
def test_compiles_without_a_break(variant: str) -> None:
    """One graph, with padding, and the same logits. One layer a stack is enough, or a pattern's."""
    config, kind = VARIANTS[variant].config, VARIANTS[variant].kind
    stacks = [stack for stack in (config.encoder, config.decoder) if stack is not None]
    pattern = any(isinstance(stack.self_attention, tuple) for stack in stacks)
    model = build(config if pattern else patch(config, {"n_layers": 1}))
    src, src_real = batch((7, 4), 10)
    tgt, tgt_real = batch((3, 6), 20)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    ours = run(kind, compiled, src, tgt, src_real, tgt_real)
    plain = run(kind, model, src, tgt, src_real, tgt_real)
    assert_close(ours[tgt_real], plain[tgt_real], tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "modern", "modern_decoder_only"])
def test_inductor_computes_the_same(variant: str) -> None:
    config = patch(VARIANTS[variant].config, {"n_layers": 1})
    model = build(config)
    src, src_real = batch((7, 4), 10)
    tgt, tgt_real = batch((3, 6), 20)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        ours = run(VARIANTS[variant].kind, compiled, src, tgt, src_real, tgt_real)
        plain = run(VARIANTS[variant].kind, model, src, tgt, src_real, tgt_real)
    assert_close(ours[tgt_real], plain[tgt_real])


@every_variant
def test_float64(variant: str) -> None:
    """Everything runs in 64 bits, and 32 bits differ from it by rounding alone."""
    kind = VARIANTS[variant].kind
    wide, narrow = build(variant, torch.float64), build(variant)
    src, tgt = sentence(S, 1), sentence(T, 2)
    exact = run(kind, wide, src, tgt)
    assert exact.dtype == torch.float64
    assert_close(run(kind, narrow, src, tgt), exact.float(), tolerance=5e-5)


@every_variant
def test_bfloat16(variant: str) -> None:
    """Everything runs in 16 bits; rounding is large but nothing is lost, positions least of all."""
    kind = VARIANTS[variant].kind
    low, full = build(variant, torch.bfloat16), build(variant)
    src, tgt = sentence(S, 1), sentence(T, 2)
    ours, exact = run(kind, low, src, tgt), run(kind, full, src, tgt)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().max().item() < 0.1 * exact.abs().max().item()


# Caches -------------------------------------------------------------------------------------------


class Growing:
    """A cache for self-attention: what is new is appended to what is held."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor, Tensor] | None = None

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert positions is not None
        k, v = project(source)
        if self.held is not None:
            k = torch.cat((self.held[0], k), dim=2)
            v = torch.cat((self.held[1], v), dim=2)
            positions = torch.cat((self.held[2], positions), dim=1)
        self.held = k, v, positions
        return self.held


class Once:
    """A cache for cross-attention: the memory does not change, so it is projected once."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor, Tensor | None] | None = None

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.held is None:
            self.held = (*project(source), positions)
        return self.held


class TestCache:
    """The two caches of a layer."""

    __test__ = False

    def __init__(self) -> None:
        self.self_attention, self.cross_attention = Growing(), Once()


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (3, 2, 1), (6,), (1, 4, 1)], ids=str)
@every_causal_variant
def test_cached_equals_uncached(variant: str, chunks: tuple[int, ...], padded: bool) -> None:
    """A sentence decoded in pieces, with a cache, gets the vectors that it gets in one go."""
    model, kind = build(variant), VARIANTS[variant].kind
    src, src_real = batch((7, 4), 10)
    tgt, real = batch((6, 4) if padded else (6, 6), 20, left=True)
    memory = model.encode(src, src_real) if kind == "seq2seq" else None
    memory_real = src_real if kind == "seq2seq" else None
    whole = model.decode(tgt, memory, memory_real, padding=real)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    assert model.decoder is not None
    cache = [TestCache() for _ in model.decoder.layers]
    pieces, end = [], 0
    for chunk in chunks:
        start, end = end, end + chunk
        pieces.append(
            model.decode(
                tgt[:, start:end], memory, memory_real, padding=real[:, :end],
                positions=positions[:, start:end], cache=cache,
            )
        )  # fmt: skip
    assert_close(torch.cat(pieces, dim=1)[real], whole[real])


# Exceptions ---------------------------------------------------------------------------------------

EXCEPTED = [(name, test) for name, row in VARIANTS.items() for test in row.excepted]
ONE_CASE: dict[str, dict[str, object]] = {  # the other arguments of the tests that have some
    "test_no_future_leak": {"train": False, "dropout": 0.0},
    "test_padding_invariance": {"left": False},
    "test_garbage_under_the_mask_does_not_matter": {"left": True},
    "test_cached_equals_uncached": {"chunks": (1, 1, 1, 1, 1, 1), "padded": False},
}


@pytest.mark.parametrize(("variant", "test"), EXCEPTED)
def test_an_exception_is_one(variant: str, test: str) -> None:
    """Whoever is excepted from an invariant does break it; else the exception has to go."""
    with pytest.raises(AssertionError):
        globals()[test](variant, **ONE_CASE.get(test, {}))
