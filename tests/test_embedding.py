"""Embedding, sinusoids and the head."""

import math

import pytest
import torch

from tests.reference import assert_close, assert_same, draw, redraw
from transformer_annotated import Embedding, Head, Sinusoid

V, D = 11, 8


def by_hand(d_model: int, position: int, base: float = 10_000.0) -> list[float]:
    """The equations of section 3.5, one dimension at a time."""
    encoding = []
    for dimension in range(d_model):
        angle = position / base ** (2 * (dimension // 2) / d_model)
        encoding.append(math.sin(angle) if dimension % 2 == 0 else math.cos(angle))
    return encoding


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_sinusoid_by_hand() -> None:
    positions = torch.tensor([[0, 1, 2, 9], [5, 3, 3, 17]])
    expected = torch.tensor([[by_hand(D, p) for p in row] for row in positions.tolist()])
    assert_close(Sinusoid(D)(positions), expected)
    expected = torch.tensor([[by_hand(6, p, 50.0) for p in row] for row in positions.tolist()])
    assert_close(Sinusoid(6, base=50.0)(positions), expected)


@pytest.mark.usefixtures("in_float64")
def test_sinusoid_by_hand_in_float64() -> None:
    positions = torch.tensor([[0, 1, 2, 9, 5000]])
    expected = torch.tensor([[by_hand(D, p) for p in positions[0].tolist()]])
    assert_close(Sinusoid(D)(positions), expected)


def test_sinusoid_does_not_lose_precision_with_the_model() -> None:
    """A model in bfloat16 still has angles in 32 bits: 8 bits would not tell 257 from 258."""
    positions = torch.arange(600)[None]
    exact = torch.tensor([[by_hand(D, p) for p in range(600)]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = Sinusoid(D).to(dtype)(positions)
        assert_close(low.float(), exact, tolerance=5e-4)


@pytest.mark.parametrize("scale", [True, False])
def test_embedding_by_hand(scale: bool) -> None:
    m = Embedding(V, D, 0.0, scale=scale)
    redraw(m)
    ids, positions = torch.tensor([[1, 10, 1], [0, 4, 4]]), torch.tensor([[0, 1, 2], [4, 0, 9]])
    factor = math.sqrt(D) if scale else 1.0
    rows = [
        [m.weight[i] * factor + torch.tensor(by_hand(D, p)) for i, p in zip(*pair, strict=True)]
        for pair in zip(ids.tolist(), positions.tolist(), strict=True)
    ]
    theirs = torch.stack([torch.stack(row) for row in rows])
    assert_same(m(ids, positions), theirs, {"table": m.weight})


def test_embedding_without_positions() -> None:
    m = Embedding(V, D, 0.0, position=None).double()
    redraw(m)
    ids = torch.tensor([[1, 10, 1]])
    theirs = (torch.nn.functional.one_hot(ids, V).double() @ m.weight) * math.sqrt(D)
    assert_same(m(ids, torch.arange(3)[None]), theirs, {"table": m.weight})


def test_embedding_dropout_falls_on_the_sum() -> None:
    """Section 5.4: dropped are elements of tokens plus positions, in training only."""
    m = Embedding(V, 1000, 0.25)
    ids, positions = torch.tensor([[3]]), torch.tensor([[2]])
    trained = m(ids, positions)
    m.eval()
    whole = m(ids, positions)
    ratio = trained / whole
    dropped = trained == 0
    assert bool((dropped | ((ratio - 4 / 3).abs() < 1e-4)).all())
    assert 0.15 < dropped.float().mean().item() < 0.35
    assert torch.equal(m(ids, positions), whole)


def test_initial_scale() -> None:
    """Times sqrt(D), a token vector starts with elements of variance one, like a sinusoid's."""
    m = Embedding(2000, 64, 0.0, position=None)
    x = m(torch.arange(2000)[None], torch.zeros(1, 2000).long())
    assert abs(x.std().item() - 1) < 0.02
    assert abs(Head(64, 2000, tied=False).weight.std().item() * 8 - 1) < 0.02  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_head_by_hand(softcap: float | None, bias: bool, tied: bool, dtype: torch.dtype) -> None:
    m = Head(D, V, tied=tied, bias=bias, scale=0.5, softcap=softcap).to(dtype)
    redraw(m)
    x = draw(2, 3, D, seed="x", dtype=dtype).requires_grad_()
    table = draw(V, D, seed="table", dtype=dtype).requires_grad_()
    matrix = table if tied else m.weight
    assert matrix is not None
    theirs = (x @ matrix.T + (m.bias if bias else 0)) * 0.5
    if softcap is not None:
        theirs = softcap * torch.tanh(theirs / softcap)
    leaves = {"x": x, **dict(m.named_parameters())} | ({"table": table} if tied else {})
    assert_same(m(x, table), theirs, leaves)
