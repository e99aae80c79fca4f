"""Chapter 10: the loss, the training loop and greedy decoding."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import assert_close, draw, redraw
from tests.variants import SMALL, VOCABULARY, batch
from transformer_annotated import Transformer, patch
from transformer_annotated.paper.first_translation import (
    Ids,
    cross_attention,
    cross_entropy,
    encode_pairs,
    exact_match,
    greedy,
    rise_and_fall,
    train,
    translate,
)
from transformer_annotated.paper.recurrent import RecurrentTranslator
from transformer_annotated.paper.toy import (
    BOS,
    EOS,
    PAD,
    UNK,
    Batch,
    Vocabulary,
    batches,
    collate,
)

WORDS = Vocabulary.build([list("abcdefghi")])  # ids 4 to 12, as SMALL has
MODELS: dict[str, Callable[[float], nn.Module]] = {
    "transformer": lambda dropout: Transformer(patch(SMALL, {"dropout": dropout})),
    "recurrent": lambda dropout: RecurrentTranslator(VOCABULARY, 16, dropout=dropout),
}


def random_model(kind: str = "transformer", dropout: float = 0.0, seed: int = 4) -> Any:
    """Every parameter at random: its translations are nonsense, but they depend on the source."""
    return redraw(MODELS[kind](dropout), seed=seed)


class Script(nn.Module):
    """A translator that says what it is told: word `t` of line `b` at step t."""

    def __init__(self, lines: list[list[int]]) -> None:
        super().__init__()
        self.lines = torch.tensor(lines)

    def encode(self, src: Tensor, padding: Tensor | None = None) -> Tensor:
        return src

    def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        return F.one_hot(self.lines[:, : tgt.shape[1]], 9).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


class Echo(Script):
    """A translator that says the source again; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__([])
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def encode(self, src: Tensor, padding: Tensor | None = None) -> Tensor:
        assert padding is not None
        assert torch.equal(padding, src != PAD)
        self.seen.append(tuple(src.shape))
        return src

    def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        return F.one_hot(memory[:, : tgt.shape[1]], len(WORDS)).float()


# The data


def test_the_decoder_never_reads_what_it_must_predict() -> None:
    """Shifted right: at each place it has read BOS and the words before the one it predicts."""
    made = collate([([4, 5], [6, 7, 8]), ([4], [5])])
    assert made.tgt_in.tolist() == [[BOS, 6, 7, 8], [BOS, 5, PAD, PAD]]
    assert made.tgt_out.tolist() == [[6, 7, 8, EOS], [5, EOS, PAD, PAD]]
    assert made.tgt_padding.tolist() == [[True] * 4, [True, True, False, False]]
    assert made.src.tolist() == [[4, 5, EOS], [4, EOS, PAD]]
    assert made.src_padding.tolist() == [[True] * 3, [True, True, False]]


def test_pairs_are_encoded_side_by_side() -> None:
    pairs = [(["a", "c"], ["b"]), ("ax", "i")]
    assert encode_pairs(pairs, WORDS) == [([4, 6], [5]), ([4, UNK], [12])]


# The loss


def test_the_loss_is_a_mean_over_real_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, real = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    found = cross_entropy(logits, target, real)
    places = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4)]
    expected = -sum(logits.log_softmax(dim=-1)[place] for place in places) / 4
    assert abs((found - expected).item()) < 1e-6
    gradient = torch.autograd.grad(found, logits)[0]
    assert not gradient[1, 1:].any()
    assert gradient[0].any()


def test_the_loss_is_torchs_with_padding_ignored() -> None:
    made = collate([([4], [5, 6, 7, 8]), ([4], [9]), ([4], [])])
    logits = draw(*made.tgt_out.shape, VOCABULARY, seed=1).requires_grad_()
    found = cross_entropy(logits, made.tgt_out, made.tgt_padding)
    expected = F.cross_entropy(logits.mT, made.tgt_out, ignore_index=PAD)
    assert_close(found, expected)
    pair = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert_close(*pair, "gradient", tolerance=1e-7)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    """Neither the target there nor the scores, not even numbers that are none."""
    real = torch.tensor([[True, True, False], [True, False, False]])
    logits, target = draw(2, 3, 7, seed=2), torch.tensor([[4, 2, 0], [5, 0, 0]])
    expected = cross_entropy(logits, target, real)
    logits[~real], target[~real] = torch.nan, -1
    assert torch.equal(cross_entropy(logits, target, real), expected)


def test_the_loss_of_half_precision_scores_is_computed_in_full() -> None:
    logits = draw(1, 4, 50, seed=3).bfloat16()
    target, real = torch.tensor([[4, 5, 6, 7]]), torch.ones(1, 4, dtype=torch.bool)
    found = cross_entropy(logits, target, real)
    assert found.dtype == torch.float32
    assert_close(found, F.cross_entropy(logits[0].double(), target[0]).float())


# Training


def data(n: int = 6, seed: int = 0) -> list[Batch]:
    """`n` batches of 16 sentences and themselves the other way round, some shorter than others."""
    draws = torch.randint(UNK + 1, VOCABULARY, (16 * n, 3), generator=torch.manual_seed(seed))
    pairs: list[Ids] = [(ids[: 1 + i % 3], ids[: 1 + i % 3][::-1])
                        for i, ids in enumerate(draws.tolist())]  # fmt: skip
    return list(batches(pairs, 16, seed=seed))


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """The same numbers, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_optimizer_is_the_papers_adam() -> None:
    """Against Adam by hand, with a loss so small that epsilon matters."""
    torch.manual_seed(0)
    # without the bias of the keys, whose gradient is zero but for rounding
    config = patch(SMALL, {f"{a}_attention.qkv_bias": False for a in ("self", "cross")})
    model = Transformer(config).double()
    twin = copy.deepcopy(model)
    some = [collate([([4, 5, 6], [7, 8])]), collate([([9], [10, 4])]), collate([([5], [6])])]

    def loss(logits: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        return 1e-8 * F.cross_entropy(logits[padding], target[padding])

    def rate(step: int) -> float:
        return 0.05 * (1 + step % 3)

    train(model, some, learning_rate=rate, loss=loss)
    mean = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step, made in enumerate(some, start=1):
        logits = twin(made.src, made.tgt_in, src_padding=made.src_padding)
        twin.zero_grad()
        loss(logits, made.tgt_out, made.tgt_padding).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                mean[name] = 0.9 * mean[name] + 0.1 * p.grad
                square[name] = 0.98 * square[name] + 0.02 * p.grad**2
                m, s = mean[name] / (1 - 0.9**step), square[name] / (1 - 0.98**step)
                p -= rate(step) * m / (s.sqrt() + 1e-9)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad: float) -> None:
    model = random_model()
    calls: list[float] = []
    after: list[list[Tensor]] = []

    def loss(logits: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        calls.append(1.0 if len(calls) < 2 else bad)
        return calls[-1] * cross_entropy(logits, target, padding)

    with pytest.raises(ValueError, match=rf"step 3 is {bad}"):
        train(
            model,
            data(),
            learning_rate=lambda step: 0.01,
            loss=loss,
            on_step=lambda step, value: after.append(state(model)),
        )
    assert len(calls) == 3
    assert len(after) == 2
    assert not equal(after[0], after[1])
    assert equal(after[1], state(model))


def test_the_history_has_each_step() -> None:
    some, steps, rates = data(), [], []
    model = random_model().eval()
    history = train(
        model,
        iter(some),
        learning_rate=lambda step: rates.append(step) or 0.01,
        on_step=lambda step, value: steps.append((step, value)),
    )
    assert rates == [1, 2, 3, 4, 5, 6]
    assert steps == list(enumerate(history.loss, start=1))
    assert history.tokens == sum(int((made.tgt_out != PAD).sum()) for made in some)
    assert len(history.seconds) == 6
    assert history.seconds == sorted(history.seconds)
    assert history.seconds[0] > 0
    assert model.training


def test_no_batches_change_nothing() -> None:
    model = random_model()
    before = state(model)
    assert train(model, [], learning_rate=lambda step: 1.0).loss == []
    assert equal(before, state(model))


@pytest.mark.parametrize("kind", MODELS)
def test_training_is_determined_by_the_seed(kind: str) -> None:
    """Dropout is on, so the seed of torch decides with the data; again the same, bit by bit."""

    def run(seed: int) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(seed)
        model = MODELS[kind](0.3)
        return train(model, data(3), learning_rate=lambda step: 0.01).loss, state(model)

    first, again, other = run(1), run(1), run(2)
    assert first[0] == again[0] != other[0]
    assert equal(first[1], again[1])


def test_training_is_with_dropout() -> None:
    """The same weights and batch, twice: with dropout, another loss."""
    some = data(1) * 2
    still = train(random_model(), some, learning_rate=lambda step: 0.0).loss
    moved = train(random_model(dropout=0.5).eval(), some, learning_rate=lambda step: 0.0).loss
    assert still[0] == still[1]
    assert moved[0] != moved[1]


@pytest.mark.parametrize("kind", MODELS)
def test_what_stands_in_the_padding_of_the_source_is_not_learned_from(kind: str) -> None:
    clean = data(2)
    dirty = [copy.copy(made) for made in clean]
    for made in dirty:
        object.__setattr__(made, "src", made.src.masked_fill(~made.src_padding, 7))
    assert any(not torch.equal(a.src, b.src) for a, b in zip(clean, dirty, strict=True))
    models = random_model(kind), random_model(kind)
    losses = [
        train(model, some, learning_rate=lambda step: 0.01).loss
        for model, some in zip(models, (clean, dirty), strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_autocast_is_for_the_forward_pass_alone() -> None:
    seen = []

    def loss(logits: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, target, padding)

    for precision in (torch.bfloat16, None):
        model = random_model()
        train(model, data(1), learning_rate=lambda step: 0.01, loss=loss, autocast=precision)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert seen == [(torch.bfloat16, False), (torch.float32, False)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_small_model_learns_to_turn_sentences_round(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind](0.0)
    steps = 250 if kind == "transformer" else 400
    history = train(model, data(steps), learning_rate=rise_and_fall(0.01, 20, steps))
    assert history.loss[0] > 0.8 * math.log(VOCABULARY)
    assert sum(history.loss[-10:]) / 10 < 0.2 * history.loss[0]
    held_out = [list("ab"), list("hci"), list("d"), list("gfe"), list("bb")]
    found = translate(model, WORDS, held_out)
    assert sum(words == source[::-1] for words, source in zip(found, held_out, strict=True)) >= 4
    assert model.training


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rate = rise_and_fall(peak=0.003, warm_up=50, steps=249)
    assert rate(1) == pytest.approx(0.003 / 50)
    assert rate(25) == pytest.approx(0.0015)
    assert rate(50) == max(map(rate, range(1, 250))) == pytest.approx(0.003)
    assert rate(150) == pytest.approx(0.0015)
    assert rate(249) == pytest.approx(0.003 / 200)  # the last step is a small one, and not wasted
    assert rate(250) == 0
    assert rise_and_fall(0.1, 1, 2)(1) == 0.1


@pytest.mark.parametrize(("up", "steps"), [(0, 10), (-1, 10), (10, 10), (11, 10)])
def test_the_rise_must_fit_into_the_steps(up: int, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"warm_up must be in \[1, {steps}\), got {up}"):
        rise_and_fall(0.01, up, steps)


# Greedy decoding


def test_a_finished_sentence_gets_padding_alone() -> None:
    lines = [[5, 6, EOS, 7, 8, EOS], [6, 7, 8, 5, 6, EOS], [EOS, 5, 5, 5, 5, 5]]
    output = greedy(Script(lines), torch.ones(3, 2).long())
    assert output.tolist() == [
        [5, 6, EOS, PAD, PAD, PAD],
        [6, 7, 8, 5, 6, EOS],
        [EOS, PAD, PAD, PAD, PAD, PAD],
    ]


def test_the_output_is_at_most_50_tokens_longer_than_the_input() -> None:
    src = torch.tensor([[4, 6, EOS]])
    assert greedy(Script([[5] * 99]), src).tolist() == [[5] * 53]
    assert greedy(Script([[5] * 99]), src, extra=1).tolist() == [[5] * 4]
    assert greedy(Script([[5, 5, EOS, *[6] * 99]]), src).tolist() == [[5, 5, EOS]]
    # in a batch, each sentence has its own limit
    short = torch.tensor([[4, 6, EOS], [4, EOS, PAD]])
    found = greedy(Script([[5] * 9] * 2), short, short != PAD, extra=2)
    assert found.tolist() == [[5, 5, 5, 5, 5], [5, 5, 5, 5, PAD]]


@pytest.mark.parametrize("extra", [0, -3])
def test_the_output_may_not_be_forbidden(extra: int) -> None:
    with pytest.raises(ValueError, match=f"extra must be at least 1, got {extra}"):
        greedy(Script([[5]]), torch.tensor([[EOS]]), extra=extra)


def test_some_tokens_are_never_produced() -> None:
    """The script wants PAD, BOS and UNK most; what is left of the scores decides."""

    class Stubborn(Script):
        def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
            scores = torch.zeros(*tgt.shape, 9)
            scores[..., [PAD, BOS, UNK]] = 5.0
            scores[..., 7] = 1.0
            return scores

    output = greedy(Stubborn([[5]]), torch.ones(1, 2).long(), extra=3)
    assert output.tolist() == [[7, 7, 7, 7, 7]]


def test_decoding_is_without_dropout() -> None:
    """The same translation each time, and the model is in training mode again afterwards."""
    src, real = batch((7, 5), 10)
    plain, dropped = random_model(), random_model(dropout=0.5).train()
    expected = greedy(plain, src, real, extra=8)
    assert all(torch.equal(greedy(dropped, src, real, extra=8), expected) for _ in range(3))
    assert dropped.training
    assert not greedy(dropped.eval(), src, real, extra=1).requires_grad
    assert not dropped.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_error(training: bool) -> None:
    model = random_model().train(training)
    with pytest.raises(ValueError):
        greedy(model, torch.tensor([[VOCABULARY]]))
    assert model.training is training


def alone(model: Any, src: Tensor, steps: int) -> list[int]:
    """One sentence, by the whole model again for each token, up to EOS or so many steps."""
    ids = [BOS]
    with torch.no_grad():
        while len(ids) <= steps and ids[-1] != EOS:
            scores = model(src[None], torch.tensor([ids]))[0, -1].tolist()
            words = [i for i in range(len(scores)) if i not in (PAD, BOS, UNK)]
            ids.append(max(words, key=scores.__getitem__))
    return ids[1:]


def test_a_batch_is_decoded_like_its_sentences() -> None:
    """As by a loop over sentences that knows no padding; some end by EOS, some by their length."""
    src, real = batch((7, 3, 2), 10)
    ends = set()
    for kind in MODELS:
        for seed in range(5):
            model = random_model(kind, seed=seed).eval()
            rows = [alone(model, src[i, real[i]], int(real[i].sum()) + 8) for i in range(3)]
            width = max(map(len, rows))
            expected = [row + [PAD] * (width - len(row)) for row in rows]
            assert greedy(model, src, real, extra=8).tolist() == expected
            for i, row in enumerate(rows):
                assert greedy(model, src[i : i + 1, real[i]], extra=8).tolist() == [row]
            ends |= {row[-1] == EOS for row in rows}
    assert ends == {True, False}


def test_no_padding_is_the_same_as_all_real() -> None:
    src, real = batch((5, 5), 3)
    model = random_model()
    assert torch.equal(greedy(model, src, extra=5), greedy(model, src, real, extra=5))


# Translation


SENTENCES = [list(text) for text in ("abc", "i", "", "defghia", "bb", "cdefg", "ca", "hgfedcba")]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 128])
def test_translations_come_in_the_order_of_the_sentences(batch_size: int) -> None:
    assert translate(Echo(), WORDS, SENTENCES, batch_size=batch_size) == SENTENCES


def test_similar_lengths_are_translated_together() -> None:
    model = Echo()
    translate(model, WORDS, [list("a"), list("abcdefg"), list("b"), list("bcdefgh")], batch_size=2)
    assert model.seen == [(2, 2), (2, 8)]


def test_the_source_may_have_words_of_its_own() -> None:
    german = Vocabulary.build([["drei"] * 1, ["zwei"] * 2, ["eins"] * 3])
    found = translate(Echo(), WORDS, [["zwei", "eins"], ["drei"]], source_vocabulary=german)
    assert found == [["b", "a"], ["c"]]


def test_the_length_of_translations_is_bounded() -> None:
    class Endless(Echo):
        def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
            return F.one_hot(torch.full_like(tgt, 4), len(WORDS)).float()

    assert translate(Endless(), WORDS, [["b", "c"]], extra=2) == [["a"] * 5]


def test_nothing_to_translate() -> None:
    assert translate(Echo(), WORDS, []) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_the_size_of_a_batch_is_checked(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        translate(Echo(), WORDS, SENTENCES, batch_size=batch_size)


def test_exact_match_counts_whole_sentences() -> None:
    references = [["a", "b"], ["c"], [], ["d"]]
    assert exact_match(references, references) == 1.0
    assert exact_match([["b", "a"], ("c",), ["a"], ["d", "d"]], references) == 0.25


@pytest.mark.parametrize(("found", "wanted"), [(0, 0), (1, 2), (2, 1)])
def test_exact_match_needs_a_reference_for_each_sentence(found: int, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"got {found} hypotheses and {wanted} references"):
        exact_match([["a"]] * found, [["a"]] * wanted)


# Where it looks


def test_cross_attention_is_the_last_layers_mean_over_heads() -> None:
    """Against the formula, from the last layer's own queries and keys."""
    model = random_model(dropout=0.5).train()
    source, target = list("abc"), list("de")
    found = cross_attention(model, WORDS, source, target)
    assert model.training
    assert not found.requires_grad
    assert found.shape == (3, 4)
    assert_close(found.sum(dim=-1), torch.ones(3))

    layer, inputs = model.eval().decoder.layers[-1].cross_attention, []
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args[0], kwargs["memory"])), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.tensor([[4, 5, 6, EOS]]), torch.tensor([[BOS, 7, 8]]))
        hook.remove()
        q = layer.q_proj(inputs[0][0])[0].unflatten(-1, (layer.n_heads, -1))  # (T, H, d)
        k = layer.k_proj(inputs[0][1])[0].unflatten(-1, (layer.n_heads, -1))  # (S, H, d)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    assert_close(found, scores.softmax(dim=-1).mean(dim=0))
    assert_close(cross_attention(model, WORDS, source, target), found)
    assert not model.training


def test_looking_restores_the_mode_after_an_error() -> None:
    model = random_model().train()
    with pytest.raises(ValueError):
        cross_attention(model, Vocabulary.build([list("abcdefghijklmno")]), ["o"], ["a"])
    assert model.training
