"""Every two patches of Part III together: what must hold for one must hold for both.

Two patches that change one place to different values, or that tell positions twice, are refused.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.reference import assert_close
from tests.test_invariants import TestCache
from tests.variants import SINGLE, SMALL, VOCABULARY, batch, build, sentence
from transformer_annotated import Config, Transformer, from_json, patch, to_json

BASE = patch(SMALL, {"n_layers": 1})
# Two values for one place, or two ways to tell positions: each group's members exclude each other.
RIVALS = [
    {"pre_ln", "sandwich", "deepnorm"},
    {"rms_norm", "gemma_norm"},
    {"swiglu", "geglu", "experts"},
    {"gelu", "experts"},
    {"rope", "alibi", "t5_bias", "learned"},
]
# Together a gate with GELU; one after the other, the later one stands.
PAIRS = [
    p for p in itertools.combinations(SINGLE, 2) if p not in {("gelu", "swiglu"), ("gelu", "geglu")}
]
FITTING = [(a, b) for a, b in PAIRS if not any({a, b} <= group for group in RIVALS)]
CLASHING = [pair for pair in PAIRS if pair not in FITTING]
each_pair = pytest.mark.parametrize(("one", "other"), FITTING)


def both(one: str, other: str) -> Config:
    return patch(BASE, SINGLE[one], SINGLE[other])


def test_there_are_enough_pairs() -> None:
    assert len(FITTING) > 100
    assert len(CLASHING) >= 14


@pytest.mark.parametrize(("one", "other"), CLASHING)
def test_a_clash_is_refused(one: str, other: str) -> None:
    """By `patch`, naming both values or the missing place; or by the model, naming both ways."""
    refusals = ("two values for .* and ", "positions are told twice: .* and ", "unknown path 'ffn")
    with pytest.raises(ValueError, match="|".join(refusals)):
        Transformer(both(one, other))


@each_pair
def test_order_does_not_matter(one: str, other: str) -> None:
    assert both(one, other) == both(other, one)
    assert patch(patch(BASE, SINGLE[one]), SINGLE[other]) == both(one, other)


@each_pair
def test_saved_and_loaded(one: str, other: str, tmp_path: Path) -> None:
    model = build(both(one, other))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = Transformer(from_json(to_json(model.config))).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    src, tgt = sentence(7, 1), sentence(8, 2)
    assert again.config == model.config
    assert torch.equal(again(src, tgt), model(src, tgt))


@each_pair
def test_decoded_in_pieces(one: str, other: str) -> None:
    """With a cache, in pieces, with padding on the left: as in one go."""
    model = build(both(one, other))
    src, src_real = batch((7, 4), 10)
    tgt, real = batch((6, 4), 20, left=True)
    memory = model.encode(src, src_real)
    whole = model.decode(tgt, memory, src_real, padding=real)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    cache, pieces = [TestCache()], []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        pieces.append(
            model.decode(
                tgt[:, start:end], memory, src_real, padding=real[:, :end],
                positions=positions[:, start:end], cache=cache,
            )
        )  # fmt: skip
    assert_close(torch.cat(pieces, dim=1)[real], whole[real])


@each_pair
def test_compiled_as_one_graph(one: str, other: str) -> None:
    model = build(both(one, other))
    src, src_real = batch((7, 4), 10)
    tgt, tgt_real = batch((3, 6), 20)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    ours = compiled(src, tgt, src_padding=src_real, tgt_padding=tgt_real)
    plain = model(src, tgt, src_padding=src_real, tgt_padding=tgt_real)
    assert_close(ours[tgt_real], plain[tgt_real], tolerance=1e-6)


@pytest.mark.parametrize("name", SINGLE)
def test_one_patch_learns(name: str) -> None:
    """Twenty steps on one batch: the loss falls by more than half."""
    torch.manual_seed(0)
    model = Transformer(patch(BASE, SINGLE[name]))
    src, tgt = (torch.randint(VOCABULARY, (8, 7)) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model(src, tgt[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
