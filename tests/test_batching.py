"""Chapter 14: batches of a number of positions, the same in every process, and packed rows."""

import hashlib
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from tests.reference import TOLERANCE, assert_close, draw
from tests.variants import VOCABULARY, build
from transformer_annotated import CrossEntropy, TokenBatchSampler, collate, pack
from transformer_annotated.paper.toy import EOS, PAD
from transformer_annotated.training.batching import cut, mixed, packed, pool_size, waste


def lengths(n: int, seed: int = 0, longest: int = 30) -> Tensor:
    """Lengths of n pairs, the two sides alike but not equal."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(1, longest, (n, 1), generator=generator)
    change = torch.randint(-2, 3, (n, 1), generator=generator)
    return torch.cat((source, (source + change).clamp(0, longest)), dim=1)


def sentences(sizes: Tensor) -> list[tuple[list[int], list[int]]]:
    """A pair of ids for each pair of lengths, all different where they can be."""
    generator = torch.Generator().manual_seed(5)
    return [
        tuple(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in row)
        for row in sizes.tolist()
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=200),
    st.integers(21, 90), st.integers(0, 3), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_every_pair_once_and_within_the_budget(
    rows: list[tuple[int, int]], max_tokens: int, seed: int, epoch: int, shuffle: bool
) -> None:
    check_epoch(torch.tensor(rows), max_tokens, seed, epoch, shuffle)


def check_epoch(
    sizes: Tensor, max_tokens: int, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> None:
    batches = TokenBatchSampler(sizes, max_tokens, seed=seed, shuffle=shuffle).epoch_batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        for side in (0, 1):
            assert len(batch) * (int(sizes[batch, side].max()) + 1) <= max_tokens


def test_a_full_batch_is_within_the_budget() -> None:
    check_epoch(torch.full((40, 2), 9), max_tokens=40)
    check_epoch(lengths(500), max_tokens=128)


def test_positions_are_counted_as_collate_makes_them() -> None:
    sizes = lengths(60)
    data = sentences(sizes)
    for numbers in TokenBatchSampler(sizes, 90).epoch_batches(1):
        batch = collate([data[i] for i in numbers])
        for side in (batch.src, batch.tgt_in, batch.tgt_out):
            assert side.numel() <= 90


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = lengths(3000)
    first = TokenBatchSampler(sizes, 128).epoch_batches(0)
    assert first == TokenBatchSampler(sizes, 128).epoch_batches(0)
    other_epoch = TokenBatchSampler(sizes, 128).epoch_batches(1)
    other_seed = TokenBatchSampler(sizes, 128, seed=1).epoch_batches(0)
    as_sets = [{frozenset(b) for b in batches} for batches in (first, other_epoch, other_seed)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(as_sets[i] & as_sets[j]) < len(first) / 20, (
            "the batches repeat, not only their order"
        )


def test_an_epoch_does_not_depend_on_earlier_ones() -> None:
    sampler = TokenBatchSampler(lengths(100), 64, seed=3)
    wanted = sampler.epoch_batches(2)
    torch.manual_seed(99)
    sampler.set_epoch(1)
    list(sampler)
    torch.rand(3)
    assert sampler.epoch_batches(2) == wanted
    sampler.set_epoch(2)
    assert list(sampler) == wanted
    assert len(sampler) == len(wanted)
    state = torch.get_rng_state()
    sampler.epoch_batches(4)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_resume_in_the_middle_of_an_epoch() -> None:
    sizes = lengths(200)
    whole = TokenBatchSampler(sizes, 64, seed=1).epoch_batches(5)
    rest = TokenBatchSampler(sizes, 64, seed=1).epoch_batches(5)[7:]
    assert list(islice(whole, 7, None)) == rest


def test_the_order_of_batches_is_shuffled_and_that_of_evaluation_is_not() -> None:
    sizes = lengths(400)
    longest = [int(sizes[b].max()) for b in TokenBatchSampler(sizes, 64).epoch_batches(0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    still = TokenBatchSampler(sizes, 64, shuffle=False)
    longest = [int(sizes[b].max()) for b in still.epoch_batches(0)]
    assert longest == sorted(longest, reverse=True)
    assert still.epoch_batches(0) == still.epoch_batches(1)


def test_similar_lengths_stand_together() -> None:
    sizes = lengths(2000)
    naive = [list(range(i, min(i + 8, 2000))) for i in range(0, 2000, 8)]
    assert waste(sizes, TokenBatchSampler(sizes, 256).epoch_batches(0)) < 0.15
    assert waste(sizes, naive) > 0.25


def test_waste_of_two_sentences() -> None:
    sizes = torch.tensor([[1, 1], [3, 3]])  # 2 and 4 positions a side: 6 of 8
    assert waste(sizes, [[0, 1]]) == pytest.approx(0.25)
    assert waste(sizes, [[0], [1]]) == 0


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_the_same_batches_in_another_process(hash_seed: str) -> None:
    """The order must not come from a set or from `hash`, which differ between processes."""
    code = (
        "import torch; from transformer_annotated import TokenBatchSampler\n"
        "sizes = torch.arange(200).remainder(17)[:, None].repeat(1, 2)\n"
        "print(TokenBatchSampler(sizes, 64, seed=2).epoch_batches(3))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    sizes = torch.arange(200).remainder(17)[:, None].repeat(1, 2)
    assert done.stdout.strip() == str(TokenBatchSampler(sizes, 64, seed=2).epoch_batches(3))


def test_mixed_is_a_fixed_function() -> None:
    assert mixed(0, 0) == int.from_bytes(hashlib.sha256(b"0,0").digest()[:4], "big")
    assert (
        len({mixed(s, e) for s in range(40) for e in range(40)}) == 1600
    )  # (1, 23) is not (12, 3)


def test_a_data_loader_gives_every_pair_once() -> None:
    """Ragged sentences are padded by `collate`, and each row is its pair."""
    sizes = lengths(80)
    data = sentences(sizes)
    sampler = TokenBatchSampler(sizes, 100)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    assert len(loader) == len(sampler)
    seen = []
    for numbers, batch in zip(sampler, loader, strict=True):
        for row, i in enumerate(numbers):
            source, target = data[i]
            assert batch.src[row, batch.src_padding[row]].tolist() == [*source, EOS]
            assert batch.tgt_out[row, batch.tgt_padding[row]].tolist() == [*target, EOS]
        assert bool((batch.src[~batch.src_padding] == PAD).all())
        seen += numbers
    assert sorted(seen) == list(range(80))


def test_training_twice_gives_the_same_bits() -> None:
    """Same seed, same machine: the parameters after five steps are equal to the last bit."""
    sizes = lengths(60)
    data = sentences(sizes)

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = build("paper", dropout=0.1).train()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for numbers in TokenBatchSampler(sizes, 100).epoch_batches(0)[:5]:
            result = CrossEntropy()(model, collate([data[i] for i in numbers]))
            adam.zero_grad()
            (result.loss / result.tokens).backward()
            adam.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


def test_pools_are_of_equal_size() -> None:
    longer = torch.full((1001,), 10)
    assert pool_size(longer, max_tokens=100) == 1001  # one pool of 100 batches
    assert pool_size(longer, max_tokens=50) == 501  # two pools of 100 batches
    assert pool_size(longer, max_tokens=10**6) == 1001
    assert cut([4, 4, 3, 4, 2], max_tokens=8, pool=3) == [(0, 2), (2, 3), (3, 5)]


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "message"),
    [
        (torch.tensor([[3, 4], [2, 20]]), 20, r"pair 1 has \[3, 21\] positions, got max_tokens=20"),
        (torch.zeros(0, 2, dtype=torch.long), 20, "at least one pair .* got 0 pairs"),
        (torch.zeros(3, dtype=torch.long), 20, r"integers \(N, 2\), got torch.int64 \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.long), 20, r"got torch.int64 \(3, 3\)"),
        (torch.zeros(3, 2), 20, "got torch.float32"),
        (torch.tensor([[3, -1]]), 20, "the smallest length -1"),
        (torch.tensor([[3, 4]]), 0, "max_tokens must be a whole number of at least 1, got 0"),
        (torch.tensor([[3, 4]]), 20.0, "max_tokens must be a whole number"),
    ],
)
def test_bad_input_is_refused(sizes: Tensor, max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(sizes, max_tokens)


def test_a_bad_epoch_is_refused() -> None:
    sampler = TokenBatchSampler(torch.tensor([[3, 4]]), 20)
    for call in (sampler.set_epoch, sampler.epoch_batches):
        for epoch in (-1, True, 1.0):
            with pytest.raises(ValueError, match="epoch must be a whole number of at least 0"):
                call(epoch)  # type: ignore[arg-type]


# Packing -----------------------------------------------------------------------------------------


def first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """First fit decreasing as it is defined: each sentence looks at every row."""
    rows: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for row in rows:
            if sum(sizes[j] for j in row) + sizes[i] <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 40))
def test_pack_is_first_fit_decreasing(sizes: list[int], capacity: int) -> None:
    assert pack(sizes, capacity) == first_fit(sizes, capacity)


@pytest.mark.parametrize(
    ("sizes", "capacity", "message"),
    [([3, 9], 8, r"lengths\[1\] must be in \[1, 8\], got 9"), ([0], 8, r"lengths\[0\]"),
     ([3], 0, "capacity must be a whole number")],
)  # fmt: skip
def test_pack_refuses(sizes: list[int], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(sizes, capacity)


def test_packing_changes_nothing_but_the_cost() -> None:
    """Each sentence gets the vectors and the gradients that it gets alone."""
    model = build("paper", torch.float64)
    sizes = [3, 7, 1, 5, 4, 2, 6]
    texts = [s for s, _ in sentences(torch.tensor([[n, 0] for n in sizes]))]
    rows = packed(texts, capacity=9)
    assert len(rows.ids) < len(texts)
    together = model.encode(rows.ids, mask=rows.mask, positions=rows.positions)  # (R, C, D)
    packed_loss = together.new_zeros(())
    alone_loss = together.new_zeros(())
    for i, ids in enumerate(texts):
        alone = model.encode(torch.tensor([ids]))[0]
        assert_close(together[rows.sentence == i], alone, f"sentence {i}")
        weighting = draw(*alone.shape, seed=i, dtype=torch.float64)
        packed_loss = packed_loss + (together[rows.sentence == i] * weighting).sum()
        alone_loss = alone_loss + (alone * weighting).sum()
    leaves = [p for n, p in model.named_parameters() if n.startswith(("encoder", "embedding"))]
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (packed_loss, alone_loss))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "gradient", 10 * TOLERANCE[torch.float64])


def test_a_packed_decoder_too() -> None:
    """Causality and packing join: a language model reads several texts in a row."""
    model = build("decoder_only", torch.float64)
    texts = [s for s, _ in sentences(torch.tensor([[n, 0] for n in (4, 3, 5, 2)]))]
    rows = packed(texts, capacity=7)
    together = model.decode(rows.ids, mask=rows.mask, positions=rows.positions)
    for i, ids in enumerate(texts):
        assert_close(together[rows.sentence == i], model.decode(torch.tensor([ids]))[0])
