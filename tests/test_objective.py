"""Chapter 15: smoothing, sums over real tokens, chunks of the head, and R-Drop."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import assert_close, draw
from tests.variants import SMALL, VOCABULARY, build
from transformer_annotated import Batch, CrossEntropy, RDrop, Transformer, collate, patch
from transformer_annotated.paper.multi30k import label_smoothing
from transformer_annotated.training import objective as chapter
from transformer_annotated.training.objective import ChunkedLoss, Objective, accumulate

HEADS = ["paper", "untied", "scale", "softcap", "two_vocabularies", "sdpa"]


def batch(*sizes: tuple[int, int], seed: int = 0) -> Batch:
    """Pairs of random sentences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return collate(
        [
            tuple(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in pair)
            for pair in sizes
        ]
    )


RAGGED = ((3, 5), (6, 2), (4, 0), (2, 7))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for each parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def plain(model: Transformer, data: Batch, smoothing: float) -> Tensor:
    """The sum of PyTorch's cross-entropy over all real tokens, from all logits at once."""
    logits = model(data.src, data.tgt_in, src_padding=data.src_padding)
    real = data.tgt_padding
    return F.cross_entropy(
        logits[real], data.tgt_out[real], label_smoothing=smoothing, reduction="sum"
    )


@pytest.mark.parametrize("variant", HEADS)
def test_equal_to_plain_cross_entropy(variant: str) -> None:
    """Value and every gradient, for each kind of head and several chunks."""
    model, data = build(variant, torch.float64), batch(*RAGGED)
    for smoothing in (0.0, 0.1):
        expected = plain(model, data, smoothing)
        wanted = gradients(model, expected)
        for chunk in (1, 5, None):
            ours = CrossEntropy(smoothing, chunk)(model, data)
            assert ours.tokens == data.n_tokens
            assert_close(ours.loss, expected, "loss", 1e-9)
            assert_close(ours.nll, plain(model, data, 0.0), "nll", 1e-9)
            assert not ours.nll.requires_grad
            for name, gradient in gradients(model, ours.loss).items():
                assert_close(gradient, wanted[name], f"gradient of {name}", 1e-9)


def test_equal_in_float32_and_without_gradients() -> None:
    model, data = build("paper"), batch(*RAGGED)
    expected = plain(model, data, 0.1)
    ours = CrossEntropy(chunk=4)(model, data)
    assert_close(ours.loss, expected, "loss", 1e-4)
    with torch.no_grad():
        still = CrossEntropy(chunk=4)(model, data)
    assert_close(still.loss, ours.loss.detach(), "loss", 1e-4)
    assert_close(still.nll, ours.nll, "nll", 1e-4)
    assert not still.loss.requires_grad


def test_equal_to_part_one() -> None:
    """Chapter 11's loss is the mean; this is the sum."""
    model, data = build("paper", torch.float64), batch(*RAGGED)
    logits = model(data.src, data.tgt_in, src_padding=data.src_padding).float()
    mean = label_smoothing(0.1)(logits, data.tgt_out, data.tgt_padding)
    ours = CrossEntropy(0.1)(model, data)
    assert (ours.loss / ours.tokens).item() == pytest.approx(mean.item(), abs=1e-5)


def test_filler_changes_nothing() -> None:
    """A longer sentence in the batch, or other ids under the padding: the same sums."""
    model = build("paper", torch.float64)
    short, both = batch((3, 4)), batch((3, 4), (9, 11))
    alone = CrossEntropy()(model, short)
    row = Batch(*(getattr(both, n)[:1] for n in Batch.__dataclass_fields__))
    beside = CrossEntropy()(model, row)
    assert_close(beside.loss, alone.loss, "loss")
    garbage = row.tgt_out.masked_fill(~row.tgt_padding, 7)
    other = Batch(row.src, row.tgt_in, garbage, row.src_padding, row.tgt_padding)
    assert_close(CrossEntropy()(model, other).loss, alone.loss, "loss")


OBJECTIVES = {"smoothed": CrossEntropy(), "plain": CrossEntropy(0.0, 3), "r_drop": RDrop(1.0)}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_micro_batches_equal_one_batch(kind: str) -> None:
    """The gradient does not depend on how the tokens of a step are cut into batches."""
    objective = OBJECTIVES[kind]
    model = build("paper", torch.float64)
    whole = batch(*RAGGED)
    parts = [
        Batch(*(getattr(whole, n)[rows] for n in Batch.__dataclass_fields__))
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    assert len({part.n_tokens for part in parts}) == 3
    results = []
    for batches in ([whole], parts):
        model.zero_grad()
        mean = accumulate(objective, model, batches)
        grads = {n: p.grad for n, p in model.named_parameters()}
        results.append((mean, grads))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-10)
    for name, gradient in results[0][1].items():
        assert gradient is not None
        assert_close(gradient, results[1][1][name], name, 1e-10)


@pytest.mark.parametrize("variant", ["paper", "untied", "softcap"])
@pytest.mark.parametrize("objective", [CrossEntropy(), RDrop()])
def test_no_real_target_gives_zero(variant: str, objective: Objective) -> None:
    """A batch of filler alone: loss 0 with gradient 0, where the mean would be 0/0."""
    model, data = build(variant), batch((3, 4), (2, 2))
    nothing = Batch(
        data.src, data.tgt_in, data.tgt_out, data.src_padding, torch.zeros_like(data.tgt_padding)
    )
    result = objective(model, nothing)
    assert result.tokens == 0
    assert result.loss.item() == 0
    assert result.nll.item() == 0
    for name, gradient in gradients(model, result.loss).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name
    with pytest.raises(ValueError, match="at least one target token, got 1 batches"):
        accumulate(objective, model, [nothing])


def test_gradcheck() -> None:
    """Numerical differentiation in double precision, with bias, scale and an uneven last chunk."""
    hidden, weight, bias = (
        draw(*shape, seed=i, dtype=torch.float64).requires_grad_()
        for i, shape in enumerate(((5, 3), (7, 3), (7,)))
    )
    target = torch.tensor([0, 6, 2, 2, 5])
    for rule in (CrossEntropy(0.1), CrossEntropy(0.0)):
        assert torch.autograd.gradcheck(
            lambda h, w, b, rule=rule: ChunkedLoss.apply(h, w, b, target, rule, 0.5, 2)[0],
            (hidden, weight, bias),
        )
    twice = draw(5, 2, 3, seed=9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: ChunkedLoss.apply(h, w, b, target, RDrop(2.0), 0.5, 2)[0],
        (twice, weight, bias),
    )


def test_backward_twice_and_scaled() -> None:
    """The gradient is linear in what the loss is multiplied by, and the graph may be kept."""
    model, data = build("paper"), batch(*RAGGED)
    loss = CrossEntropy()(model, data).loss
    table = model.embedding.weight
    (once,) = torch.autograd.grad(loss, table, retain_graph=True)
    (again,) = torch.autograd.grad(loss / 8, table, retain_graph=True)
    assert_close(again * 8, once, "gradient")
    assert_close(torch.autograd.grad(loss, table)[0], once, "gradient")


def test_bfloat16_autocast() -> None:
    """Products in bfloat16, softmax and sums in float32: as the plain loss has it."""
    model, data = build("paper"), batch(*RAGGED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = CrossEntropy(chunk=4)(model, data)
        logits = model(data.src, data.tgt_in, src_padding=data.src_padding)
        assert logits.dtype == torch.bfloat16
        real = data.tgt_padding
        expected = F.cross_entropy(
            logits[real].float(), data.tgt_out[real], label_smoothing=0.1, reduction="sum"
        )
    assert ours.loss.dtype == torch.float32
    assert_close(ours.loss, expected, "loss", 1e-4)  # the same numbers in another order
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, ours.loss).items():
        assert gradient.dtype == torch.float32
        room = 0.02 * max(wanted[name].abs().max().item(), 1e-3)
        assert_close(gradient, wanted[name], f"gradient of {name}", room)


def test_only_real_tokens_meet_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of logits has more rows than a chunk."""
    rows: list[int] = []
    slope_ = CrossEntropy.slope_

    def spy(self: CrossEntropy, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(logits))
        return slope_(self, logits, target)

    monkeypatch.setattr(CrossEntropy, "slope_", spy)
    data = batch(*RAGGED)
    CrossEntropy(chunk=4)(build("paper"), data)
    assert max(rows) == 4
    assert sum(rows) == data.n_tokens < data.tgt_out.numel()


def test_a_target_outside_the_vocabulary_is_named() -> None:
    model, data = build("paper"), batch(*RAGGED)
    for wrong in (VOCABULARY, -1):
        target = data.tgt_out.clone()
        target[0, 1] = wrong
        bad = Batch(data.src, data.tgt_in, target, data.src_padding, data.tgt_padding)
        with pytest.raises(ValueError, match=rf"target ids must be in \[0, 13\), got {wrong}"):
            CrossEntropy()(model, bad)
    target[0, 1] = 4
    target[2, -1] = VOCABULARY  # under the padding nobody looks
    unseen = Batch(data.src, data.tgt_in, target, data.src_padding, data.tgt_padding)
    CrossEntropy()(model, unseen)


def test_the_best_smoothed_loss_is_not_zero() -> None:
    """It is the entropy of the smoothed target, reached where p equals q."""
    V, smoothing = 9, 0.1
    q = torch.full((V,), smoothing / V, dtype=torch.float64)
    q[2] += 1 - smoothing
    logits = q.log()[None].requires_grad_()
    loss, nll = CrossEntropy(smoothing).sums(logits, torch.tensor([2]))
    assert loss.item() == pytest.approx(-(q * q.log()).sum().item())
    assert nll.item() == pytest.approx(-math.log(q[2].item()))
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() < 1e-12


# R-Drop ------------------------------------------------------------------------------------------


def naive_r_drop(logits: Tensor, target: Tensor, alpha: float, smoothing: float) -> Tensor:
    """Half of the paper's equation, from PyTorch's pieces: `(n, 2, V)` logits."""
    first, second = logits[:, 0], logits[:, 1]
    loss = logits.new_zeros(())
    for z in (first, second):
        loss = loss + F.cross_entropy(z, target, label_smoothing=smoothing, reduction="sum")
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    forth = F.kl_div(log_q, log_p, log_target=True, reduction="sum")  # KL(p || q)
    back = F.kl_div(log_p, log_q, log_target=True, reduction="sum")  # KL(q || p)
    return (loss + alpha * (forth + back) / 2) / 2


def test_r_drop_equal_to_naive() -> None:
    """Value and gradient, from the differentiable form and from the closed one."""
    target = torch.tensor([0, 6, 2, 2, 5])
    for alpha, smoothing in ((0.0, 0.1), (5.0, 0.1), (1.5, 0.0)):
        logits = (2 * draw(5, 2, 7, seed=1, dtype=torch.float64)).requires_grad_()
        expected = naive_r_drop(logits, target, alpha, smoothing)
        (wanted,) = torch.autograd.grad(expected, logits)
        rule = RDrop(alpha, smoothing)
        loss, nll = rule.sums(logits, target)
        assert_close(loss, expected, "loss", 1e-10)
        assert_close(torch.autograd.grad(loss, logits)[0], wanted, "gradient", 1e-10)
        room = logits.detach().clone()
        closed, closed_nll = rule.slope_(room, target)
        assert_close(closed, expected.detach(), "loss", 1e-10)
        assert_close(room, wanted, "slope", 1e-10)
        both = sum(F.cross_entropy(logits[:, i], target, reduction="sum") for i in (0, 1))
        assert_close(nll, torch.as_tensor(both).detach() / 2, "nll", 1e-10)
        assert_close(closed_nll, nll, "nll", 1e-10)


def test_r_drop_of_a_model() -> None:
    """With dropout: the two halves of one pass over the batch and its copy, twice as long."""
    model = build("paper", torch.float64, dropout=0.2).train()
    data = batch(*RAGGED)
    torch.manual_seed(4)
    ours = RDrop(2.0, 0.1, chunk=3)(model, data)
    ours_gradients = gradients(model, ours.loss)
    torch.manual_seed(4)
    double = Batch(*(torch.cat((getattr(data, n),) * 2) for n in Batch.__dataclass_fields__))
    logits = model(double.src, double.tgt_in, src_padding=double.src_padding)
    first, second = (half[data.tgt_padding] for half in logits.chunk(2))
    expected = naive_r_drop(
        torch.stack((first, second), dim=1), data.tgt_out[data.tgt_padding], 2.0, 0.1
    )
    assert ours.tokens == data.n_tokens
    assert_close(ours.loss, expected, "loss", 1e-9)
    for name, gradient in gradients(model, expected).items():
        assert_close(ours_gradients[name], gradient, name, 1e-9)


def test_r_drop_without_dropout_is_cross_entropy() -> None:
    model, data = build("paper", torch.float64), batch(*RAGGED)
    ours, plain = RDrop(5.0)(model, data), CrossEntropy()(model, data)
    assert_close(ours.loss, plain.loss, "loss", 1e-9)
    assert_close(ours.nll, plain.nll, "nll", 1e-9)


@pytest.mark.parametrize("variant", ["softcap", "untied"])
def test_r_drop_with_other_heads(variant: str) -> None:
    model, data = build(variant, torch.float64), batch(*RAGGED)
    ours, plain = RDrop(5.0, chunk=3)(model, data), CrossEntropy()(model, data)
    wanted = gradients(model, plain.loss)
    for name, gradient in gradients(model, ours.loss).items():
        assert_close(gradient, wanted[name], name, 1e-9)


@pytest.mark.parametrize("kind", [CrossEntropy, RDrop])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"smoothing": -0.1}, r"smoothing must be in \[0, 1\), got -0.1"),
        ({"smoothing": math.nan}, "smoothing must be"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(
    kind: type[CrossEntropy] | type[RDrop], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_bad_alpha_is_refused() -> None:
    for alpha in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be at least 0 and finite"):
            RDrop(alpha)


def test_the_largest_tensor_is_a_chunk() -> None:
    """The profiler sees no allocation of the size of all logits."""
    n, V, D, chunk = 512, 3000, 8, 64
    config = patch(SMALL, {"vocab_size": V, "d_model": D})
    model = Transformer(config)
    rows = torch.randn(n, D, requires_grad=True)
    target = torch.randint(V, (n,))
    with torch.profiler.profile(profile_memory=True) as profile:
        chapter.head_loss(CrossEntropy(chunk=chunk), model, rows, target).loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2 * chunk * V * 4 < n * V * 4
