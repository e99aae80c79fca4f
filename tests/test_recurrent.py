"""Chapter 1: the recurrent translator that the Transformer displaced."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.exercises import CHECKS
from transformer_annotated.paper.recurrent import (
    AdditiveAttention,
    GRUCell,
    Memory,
    RecurrentTranslator,
    check_ids,
    check_right_padding,
    everyone_sees_everyone,
    longest_chain,
    reach,
    read,
    time_per_token,
)

V, D = 17, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def redraw(module: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Draw every parameter anew: fresh biases are small and would hide mistakes."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(dtype).eval()


def lengths_to_padding(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cell_equals_torch_in_output_and_every_gradient(dtype: torch.dtype) -> None:
    ours, theirs = redraw(GRUCell(3, 4), dtype), nn.GRUCell(3, 4).to(dtype)
    names = {"input.weight": "weight_ih", "input.bias": "bias_ih"}
    names |= {"state.weight": "weight_hh", "state.bias": "bias_hh"}
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    h = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    upstream = torch.randn(5, 4, dtype=dtype)
    mine = [parameter for _, parameter in ours.named_parameters()]
    other = [theirs.get_parameter(names[name]) for name, _ in ours.named_parameters()]
    left = torch.autograd.grad(ours(x, h), [x, h, *mine], upstream)
    right = torch.autograd.grad(theirs(x, h), [x, h, *other], upstream)
    torch.testing.assert_close(ours(x, h), theirs(x, h), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE[dtype])


def test_read_equals_the_library_s_gru() -> None:
    cell, gru = redraw(GRUCell(D, D)), nn.GRU(D, D).double()
    names = {"input": "ih_l0", "state": "hh_l0"}
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            part, kind = name.split(".")
            gru.get_parameter(f"{kind}_{names[part]}").copy_(parameter)
    x = torch.randn(6, D, dtype=torch.float64)
    torch.testing.assert_close(read(cell, x), gru(x)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_additive_attention_equals_a_loop_in_output_and_every_gradient(dtype: torch.dtype) -> None:
    layer = redraw(AdditiveAttention(4), dtype)
    query = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    states = torch.randn(3, 5, 4, dtype=dtype, requires_grad=True)
    lengths = [5, 1, 3]
    rows = []
    for q, h, length in zip(query, states, lengths, strict=True):
        scores = []
        for j in range(length):
            inner = [
                torch.tanh(
                    sum(layer.W.weight[i, k] * q[k] for k in range(4))
                    + sum(layer.U.weight[i, k] * h[j, k] for k in range(4))
                )
                for i in range(4)
            ]
            scores.append(sum(layer.v.weight[0, i] * inner[i] for i in range(4)))
        total = sum(torch.exp(score) for score in scores)
        rows.append(sum(torch.exp(e) / total * h[j] for j, e in enumerate(scores)))
    expected = torch.stack(rows)
    context, weights = layer(query, layer.keys(states), states, lengths_to_padding(lengths, 5))
    torch.testing.assert_close(context, expected, rtol=0, atol=TOLERANCE[dtype])
    assert weights[1].tolist() == [1, 0, 0, 0, 0]
    inputs, upstream = [query, states, *layer.parameters()], torch.randn(3, 4, dtype=dtype)
    left = torch.autograd.grad(context, inputs, upstream)
    right = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture
def model() -> RecurrentTranslator:
    return redraw(RecurrentTranslator(V, D, dropout=0.1))


def test_shapes_and_the_methods_make_up_the_forward_pass(model: RecurrentTranslator) -> None:
    src, tgt = torch.randint(V, (3, 5)), torch.randint(V, (3, 4))
    memory = model.encode(src)
    assert isinstance(memory, Memory)
    assert memory.states.shape == (3, 5, D)
    assert memory.start.shape == (3, D)
    hidden, weights = model.align(tgt, memory)
    assert hidden.shape == (3, 4, D)
    assert weights.shape == (3, 4, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    logits = model.logits(model.decode(tgt, memory))
    assert logits.shape == (3, 4, V)
    assert torch.equal(logits, model(src, tgt))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_right_padding_and_what_stands_in_it_do_not_matter(dtype: torch.dtype) -> None:
    model = redraw(RecurrentTranslator(V, D, dropout=0.0), dtype)
    lengths = [5, 2, 7]
    real = lengths_to_padding(lengths, 9)
    src, tgt = torch.randint(V, (3, 9)), torch.randint(V, (3, 4))
    together = model(src, tgt, src_padding=real)
    other = torch.where(real, src, torch.randint(V, (3, 9)))
    torch.testing.assert_close(model(other, tgt, src_padding=real), together, rtol=0, atol=0)
    for row, length in enumerate(lengths):
        alone = model(src[row : row + 1, :length], tgt[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=TOLERANCE[dtype])


def test_padding_does_not_change_gradients(model: RecurrentTranslator) -> None:
    src, tgt = torch.randint(V, (2, 4)), torch.randint(V, (2, 3))
    model(src, tgt).square().sum().backward()
    plain = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad()
    real = lengths_to_padding([4, 4], 6)
    model(F.pad(src, (0, 2), value=3), tgt, src_padding=real).square().sum().backward()
    padded = [parameter.grad for parameter in model.parameters()]
    assert len(plain) == len(padded), "every parameter takes part"
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-10)


def test_without_the_padding_tensor_the_backward_direction_is_wrong() -> None:
    # the control of the test above: it can fail
    model = redraw(RecurrentTranslator(V, D, dropout=0.0))
    src = torch.randint(1, V, (1, 4))
    difference = model.encode(F.pad(src, (0, 3))).states[:, :4] - model.encode(src).states
    forward, backward = difference.abs().chunk(2, dim=-1)
    assert forward.max() < 1e-12
    assert backward.max() > 1e-3


@pytest.mark.parametrize("train", [True, False])
def test_the_decoder_does_not_look_ahead(train: bool) -> None:
    model = redraw(RecurrentTranslator(V, D, dropout=0.5)).train(train)
    src, tgt = torch.randint(V, (2, 5)), torch.randint(V, (2, 6))
    for t in range(1, 6):
        changed = tgt.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        outputs = []
        for ids in (tgt, changed):
            torch.manual_seed(1)  # the same dropout for both
            outputs.append(model(src, ids))
        assert torch.equal(outputs[0][:, :t], outputs[1][:, :t])
        assert not torch.equal(outputs[0][:, t], outputs[1][:, t])


def test_decoding_step_by_step_agrees(model: RecurrentTranslator) -> None:
    src, tgt = torch.randint(V, (2, 5)), torch.randint(V, (2, 6))
    memory = model.encode(src, lengths_to_padding([5, 3], 5))
    whole = model.decode(tgt, memory)
    for t in range(1, 7):
        step = model.decode(tgt[:, :t], memory)[:, -1]
        torch.testing.assert_close(step, whole[:, t - 1], rtol=0, atol=1e-12)


def test_memory_padding_replaces_the_remembered_one(model: RecurrentTranslator) -> None:
    src, tgt = torch.randint(V, (2, 5)), torch.randint(V, (2, 3))
    memory = model.encode(src)
    _, weights = model.align(tgt, memory, lengths_to_padding([5, 2], 5))
    assert weights[1, :, 2:].abs().max() == 0
    assert weights[0].min() > 0


def test_order_of_the_batch_does_not_matter(model: RecurrentTranslator) -> None:
    src, tgt, real = torch.randint(V, (3, 5)), torch.randint(V, (3, 4)), [2, 5, 3]
    order = torch.tensor([2, 0, 1])
    padding = lengths_to_padding(real, 5)
    shuffled = model(src[order], tgt[order], src_padding=padding[order])
    expected = model(src, tgt, src_padding=padding)[order]
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-12)


def test_state_dict_round_trip_and_one_shared_matrix(model: RecurrentTranslator) -> None:
    twin = RecurrentTranslator(V, D).double().eval()
    twin.load_state_dict(model.state_dict())
    src, tgt = torch.randint(V, (2, 5)), torch.randint(V, (2, 4))
    assert torch.equal(twin(src, tgt), model(src, tgt))
    assert [p.shape for p in model.parameters()].count(torch.Size((V, D))) == 1


def ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RecurrentTranslator(0), "vocab_size is 0; allowed: 1"),
        (lambda: RecurrentTranslator(9, 7), "d_model is 7; allowed: even"),
        (lambda: RecurrentTranslator(9, 8, dropout=1.0), "dropout is 1.0; allowed: 0 <="),
        (lambda: RecurrentTranslator(9, 8, dropout=-0.1), "dropout is -0.1"),
        (lambda: RecurrentTranslator(9, 8, dropout=math.nan), "dropout is nan"),
        (lambda: check_ids("src", ids(3), 9), r"src must be \(B, T\) with B, T >= 1, got \(3,\)"),
        (
            lambda: check_ids("src", ids(2, 3).float(), 9),
            "src must be integers .* got torch.float32",
        ),
        (lambda: check_ids("src", ids(0, 3), 9), "src must be .* with B, T >= 1"),
        (lambda: check_ids("src", ids(2, 0), 9), "src must be .* with B, T >= 1"),
        (lambda: check_ids("src", 9 * ids(2, 3), 9), "src holds 9; the vocabulary has ids 0 to 8"),
        (lambda: check_ids("src", -ids(2, 3), 9), "src holds -1; the vocabulary has ids 0 to 8"),
    ],
)
def test_bad_numbers_and_ids_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("padding", "words"),
    [
        (torch.ones(2, 3), "p must be bool"),
        (torch.ones(2, 4, dtype=torch.bool), r"p must have shape \(2, 3\), got \(2, 4\)"),
        (torch.tensor([[True, True, True], [False, True, True]]), r"p\[1\] is \[0, 1, 1\]"),
        (torch.tensor([[True, False, True], [True, True, True]]), r"p\[0\] is \[1, 0, 1\]"),
        (torch.tensor([[True, True, True], [False, False, False]]), r"p\[1\] is \[0, 0, 0\]"),
    ],
)
def test_bad_padding_is_named(padding: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_right_padding("p", padding, (2, 3))


def test_the_model_checks_all_of_its_inputs(model: RecurrentTranslator) -> None:
    src, tgt, bad = ids(2, 3), ids(2, 4), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="src holds 17"):
        model(17 * src, tgt)
    with pytest.raises(ValueError, match="tgt holds 17"):
        model(src, 17 * tgt)
    with pytest.raises(ValueError, match=r"src_padding\[0\]"):
        model(src, tgt, src_padding=bad)
    with pytest.raises(ValueError, match="tgt_padding must have shape"):
        model(src, tgt, tgt_padding=bad)
    with pytest.raises(ValueError, match="tgt has 1 rows; the memory has 2"):
        model(src, tgt[:1])
    with pytest.raises(ValueError, match=r"memory_padding\[0\]"):
        model.decode(tgt, model.encode(src), bad)


def test_it_learns_to_reverse() -> None:
    torch.manual_seed(0)
    model = RecurrentTranslator(8, 32, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        src = torch.randint(2, 8, (32, 4))
        out = src.flip(1)
        tgt = torch.cat([ids(32, 1), out[:, :-1]], dim=1)
        loss = F.cross_entropy(model(src, tgt).flatten(0, 1), out.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 < math.log(6)


def test_longest_chain() -> None:
    w = torch.tensor(2.0, requires_grad=True)
    assert longest_chain(torch.tanh(3 * w + 1)) == 3
    assert longest_chain(w.exp() * torch.tanh(w.exp().sin())) == 4
    deep = w
    for _ in range(5000):  # deeper than Python's stack
        deep = deep + 1
    assert longest_chain(deep) == 5000
    with pytest.raises(ValueError, match="output has no graph"):
        longest_chain(torch.tensor(1.0))


def test_the_gru_s_chain_grows_by_the_token_and_the_other_s_does_not() -> None:
    cell = GRUCell(D, D)
    grown, flat = [], []
    for n in (4, 8, 12):
        x = torch.randn(n, D, requires_grad=True)
        grown.append(longest_chain(read(cell, x)[-1]))
        flat.append(longest_chain(everyone_sees_everyone(x)[-1]))
    first, second = (b - a for a, b in pairwise(grown))
    assert first == second > 4
    assert len(set(flat)) == 1


def test_reach_is_the_gradient_of_the_last_output() -> None:
    torch.manual_seed(0)
    x, u = torch.randn(5, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    weights = torch.tensor([0.25, 0.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    value = reach(lambda x: (weights @ x).expand(5, D), x, u)
    assert value == pytest.approx(0.25 * u.norm().item())
    jacobian = torch.autograd.functional.jacobian(lambda x: everyone_sees_everyone(x)[-1], x)
    expected = (u @ jacobian[:, 0]).norm().item()
    assert reach(everyone_sees_everyone, x, u) == pytest.approx(expected)


def test_everyone_sees_everyone_equals_scaled_dot_product_attention() -> None:
    x = torch.randn(2, 6, D, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(x, x, x, scale=1.0)
    torch.testing.assert_close(everyone_sees_everyone(x), expected, rtol=0, atol=1e-10)


def test_time_per_token_fills_every_cell() -> None:
    times = time_per_token(
        {"a": everyone_sees_everyone, "b": torch.tanh}, [2, 3], width=4, batch=2, rounds=3
    )
    assert list(times) == ["a", "b"]
    assert all(len(cell) == 3 and min(cell) > 0 for row in times.values() for cell in row)


def weights_for_all_queries(queries: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1)) @ v).softmax(dim=-1)


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("1.1", 1536, 512),
        ("1.2", 4.5, 0.989),
        ("1.3", weights_for_all_queries, lambda q, k, v: (q @ k.mT).softmax(-1)),
        ("1.3", weights_for_all_queries, 3),
    ],
)
def test_exercises(number: str, right: object, wrong: object) -> None:
    CHECKS[number](right)
    with pytest.raises(AssertionError):
        CHECKS[number](wrong)
