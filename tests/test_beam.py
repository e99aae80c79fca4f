"""Chapter 21: beam search against references that share no code with it."""

import importlib.util
import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close, redraw
from tests.variants import CACHED, VARIANTS, batch, build
from transformer_annotated import Config, Head, Transformer, beam_search, greedy_search, patch, spec
from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK
from transformer_annotated.training.beam import GNMT, Finished, HuggingFace, best
from transformer_annotated.training.decoding import packed

SEQ2SEQ = [name for name in CACHED if VARIANTS[name].kind == "seq2seq"]
SIZES = {
    "d_model": 16,
    "n_layers": 2,
    "self_attention.n_heads": 4,
    "cross_attention.n_heads": 4,
    "ffn.d_ff": 24,
    "dropout": 0.0,
    "head": spec(Head, tied=False, bias=True),
}


def talker(seed: int, vocab_size: int = 24, eos: float = 2.0) -> Transformer:
    """A random model whose translations differ in length and words.

    Sharp logits, small biases, large embeddings and a push to EOS: a plain random model repeats
    one word for ever, and a test on it says nothing.
    """
    model = Transformer(patch(Config(vocab_size=vocab_size), SIZES))
    redraw(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1.0 if "norm.weight" in name else 0.1 * parameter)
        assert model.head.weight is not None
        assert model.head.bias is not None
        model.embedding.weight.mul_(2)
        model.head.weight.mul_(3)
        model.head.bias[EOS] += eos
    return model.eval()


def sources(vocab_size: int, lengths: tuple[int, ...] = (6, 3, 5, 4)) -> tuple[Tensor, Tensor]:
    """Source sentences of these lengths, padded on the right, and which places are real."""
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(UNK + 1, vocab_size, real.shape, generator=generator)
    return ids.masked_fill(~real, PAD), real


# A search as one would write it first: one sentence, Python lists, no cache, nothing ends early ---

Hypothesis = tuple[float, tuple[int, ...]]


def plain_search(
    model: Transformer, src: Tensor, beam: int, rule: GNMT | HuggingFace, extra: int
) -> list[Hypothesis]:
    """The finished hypotheses, best first, `(score, ids)`; `src` is `(1, S)` without padding."""
    memory, limit = model.encode(src), src.shape[1] + extra
    running: list[Hypothesis] = [(0.0, ())]
    finished: list[Hypothesis] = []
    stopped = False
    huggingface = isinstance(rule, HuggingFace)

    def score(log_p: float, n: int) -> float:
        if isinstance(rule, HuggingFace):
            return log_p / n**rule.length_penalty
        return log_p / (((5 + n) / 6) ** rule.alpha)

    for n in range(1, limit + 1):
        tgt = torch.tensor([[BOS, *ids] for _, ids in running])
        logits = model.logits(model.decode(tgt, memory.expand(len(tgt), -1, -1)))[:, -1]
        log_p = logits.log_softmax(dim=-1).tolist()
        candidates = [
            (total + log_p[i][v], (*ids, v))
            for i, (total, ids) in enumerate(running)
            for v in range(len(log_p[i]))
            if v not in (PAD, BOS, UNK)
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beam]
        for rank, (total, ids) in enumerate(candidates):
            ends = ids[-1] == EOS or (huggingface and n == limit)
            if ends and rank < beam and not stopped:
                finished.append((score(total, n), ids))
        finished = sorted(finished, reverse=True)[:beam]
        running = [(t, ids) for t, ids in candidates if ids[-1] != EOS][:beam]
        if isinstance(rule, HuggingFace) and len(finished) == beam and running:
            at = limit if rule.early_stopping == "never" and rule.length_penalty > 0 else n
            hopeless = score(running[0][0], at) <= finished[-1][0]
            stopped |= rule.early_stopping is True or hopeless
    if not finished:
        finished = [(score(total, limit), ids) for total, ids in running]
    return finished


RULES = {
    "gnmt": GNMT(),
    "gnmt-0": GNMT(0.0),
    "gnmt-1.5": GNMT(1.5),
    "gnmt-negative": GNMT(-1.0),
    "hf": HuggingFace(),
    "hf-true": HuggingFace(1.0, early_stopping=True),
    "hf-never": HuggingFace(0.6, early_stopping="never"),
    "hf-never-0": HuggingFace(0.0, early_stopping="never"),
    "hf-negative": HuggingFace(-1.0),
}
every_rule = pytest.mark.parametrize("rule", list(RULES))


@pytest.mark.parametrize("seed", [0, 2])
@every_rule
def test_equal_to_a_plain_search(rule: str, seed: int) -> None:
    """A padded batch against one sentence at a time, without cache: ids, order and scores."""
    model, (src, real), scoring = talker(seed), sources(24), RULES[rule]
    found = beam_search(model, src, real, beam=3, n_best=3, scoring=scoring, extra=6)
    for row in range(len(src)):
        with torch.no_grad():
            expected = plain_search(model, src[row : row + 1, real[row]], 3, scoring, 6)
        for place, (score, ids) in enumerate(expected):
            got = found.n_best[row, place]
            assert got[: len(ids)].tolist() == list(ids)
            assert not got[len(ids) :].any()
            assert found.n_best_scores[row, place].item() == pytest.approx(score, rel=1e-5)
        assert (found.n_best_scores[row, len(expected) :] == -torch.inf).all()
        assert not found.n_best[row, len(expected) :].any()


def test_the_models_of_these_tests_say_something() -> None:
    """Different lengths and different words, or the comparisons above would be empty."""
    for seed in (0, 2):
        found = beam_search(talker(seed), *sources(24), beam=4, n_best=4, extra=6)
        assert (found.n_best != PAD).sum(dim=-1).unique().numel() > 3
        assert found.n_best.unique().numel() > 6


def all_translations(
    model: Transformer, src: Tensor, steps: int
) -> dict[tuple[int, ...], tuple[float, bool]]:
    """Every translation of at most `steps` tokens, its log-probability, and whether it ends."""
    memory = model.encode(src)
    words = [v for v in range(model.config.vocab_size) if v > UNK]
    found = {}
    for n in range(1, steps + 1):
        for start in itertools.product(words, repeat=n - 1):
            hidden = model.decode(torch.tensor([[BOS, *start]]), memory)
            log_p = model.logits(hidden).log_softmax(dim=-1)[0].tolist()
            for last in [EOS] if n < steps else [EOS, *words]:
                ids = (*start, last)
                total = sum(log_p[t][v] for t, v in enumerate(ids))
                found[ids] = total, last == EOS
    return found


@pytest.mark.parametrize("rule", ["gnmt", "gnmt-0", "gnmt-negative", "hf", "hf-never-0"])
def test_equal_to_trying_everything(rule: str) -> None:
    """Vocabulary 7, at most 4 tokens, a beam that never drops anything: the best of all."""
    scoring = RULES[rule]
    for seed in range(2):
        model, src = talker(seed, 7, eos=1.0), torch.tensor([[4, 6, 5]])
        with torch.no_grad():
            everything = all_translations(model, src, steps=4)
        compared = {
            ids: float(scoring.score(torch.tensor(log_p), len(ids)))
            for ids, (log_p, ends) in everything.items()
            if ends or scoring.cut_counts
        }
        if isinstance(scoring, HuggingFace) and scoring.early_stopping is False:
            scoring = HuggingFace(scoring.length_penalty, "never")  # the other one may stop early
        ordered = sorted(compared, key=compared.__getitem__, reverse=True)[:5]
        found = beam_search(model, src, beam=100, n_best=5, scoring=scoring, extra=1)
        got = [tuple(i for i in ids if i != PAD) for ids in found.n_best[0].tolist()]
        assert got == ordered
        assert_close(found.n_best_scores[0], torch.tensor([compared[i] for i in ordered]))


def test_a_wide_beam_has_no_duplicates() -> None:
    """Fault row 45: more hypotheses than the vocabulary has words, and more than there are."""
    model, src = talker(0, 7, eos=1.0), torch.tensor([[4, 6, 5]])
    found = beam_search(model, src, beam=300, n_best=300, extra=1)
    real = found.n_best[0][found.n_best_scores[0] > -torch.inf].tolist()
    assert len({tuple(ids) for ids in real}) == len(real) == 1 + 3 + 9 + 27


# Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SEQ2SEQ)
def test_one_hypothesis_is_greedy(variant: str) -> None:
    model = build(variant)
    src, real = batch((7, 4, 2), 5)
    found = beam_search(model, src, real, beam=1, extra=6)
    assert torch.equal(found.ids, greedy_search(model, src, real, extra=6))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_one_hypothesis_is_greedy_where_sentences_end(alpha: float) -> None:
    for seed in range(6):
        model, (src, real) = talker(seed), sources(24)
        found = beam_search(model, src, real, beam=1, alpha=alpha, extra=9)
        assert torch.equal(found.ids, greedy_search(model, src, real, extra=9))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("variant", SEQ2SEQ)
def test_a_batch_is_its_sentences(variant: str, left: bool) -> None:
    """Fault row 47: finished hypotheses and padding do not change a neighbour."""
    model = build(variant)
    src, real = batch((7, 4, 2), 5, left=left)
    together = beam_search(model, src, real, beam=3, extra=4)
    for row in range(len(src)):
        alone = beam_search(model, src[row : row + 1, real[row]], beam=3, extra=4)
        T = alone.ids.shape[1]
        assert torch.equal(together.ids[row, :T], alone.ids[0])
        assert not together.ids[row, T:].any()
        assert_close(together.scores[row], alone.scores[0])


def test_sentences_that_end_leave_their_neighbours_alone() -> None:
    model, (src, real) = talker(2), sources(24, (6, 3, 5, 4, 2, 6, 5, 3))
    together = beam_search(model, src, real, n_best=4)
    lengths = (together.ids != PAD).sum(dim=1)
    assert lengths.unique().numel() > 2  # they do end at different times
    for row in range(len(src)):
        alone = beam_search(model, src[row : row + 1, real[row]], n_best=4)
        T = alone.n_best.shape[2]
        assert torch.equal(together.n_best[row, :, :T], alone.n_best[0])
        torch.testing.assert_close(together.n_best_scores[row], alone.n_best_scores[0])


def test_scores_are_those_of_the_model() -> None:
    """Each hypothesis, read again in one pass without cache, has the score that was reported."""
    model, (src, real) = talker(2), sources(24)
    found = beam_search(model, src, real, n_best=4)
    assert found.n_best_scores.isfinite().sum() > 12
    for row, place in found.n_best_scores.isfinite().nonzero().tolist():
        ids = found.n_best[row, place]
        ids = ids[ids != PAD]
        with torch.no_grad():
            tgt = torch.cat((torch.tensor([BOS]), ids[:-1]))[None]
            log_p = model(src[row : row + 1, real[row]], tgt)[0].log_softmax(dim=-1)
        total = log_p.gather(1, ids[:, None]).sum()
        score = total / ((5 + len(ids)) / 6) ** 0.6
        torch.testing.assert_close(found.n_best_scores[row, place], score)
    assert (found.n_best_scores.diff(dim=1) <= 0).all()
    assert torch.equal(found.ids, found.n_best[:, 0])
    assert torch.equal(found.scores, found.n_best_scores[:, 0])


def test_more_alpha_gives_longer_translations() -> None:
    model, (src, real) = talker(2), sources(24)
    lengths = [
        int((beam_search(model, src, real, alpha=alpha, beam=6, extra=20).ids != PAD).sum())
        for alpha in (-1.0, 0.0, 1.0, 2.0)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_limit_and_unfinished_hypotheses() -> None:
    """Fault row 44: EOS never comes; each sentence stops at its own limit and says so."""
    model, (src, real) = talker(0, eos=-1e4), sources(24)
    found = beam_search(model, src, real, extra=2, n_best=2)
    assert (found.ids != PAD).sum(dim=1).tolist() == [8, 5, 7, 6]
    assert not found.finished.any()
    assert found.scores.isfinite().all()
    assert beam_search(talker(0), src, real, extra=50).finished.all()


def test_the_mode_and_the_model_are_restored() -> None:
    """Fault row 40."""
    model = talker(0).train()
    model.encoder.eval()
    attends = [layer.cross_attention.attend for layer in model.decoder.layers]
    modes = [module.training for module in model.modules()]
    src, real = sources(24)
    beam_search(model, src, real, extra=2)
    with torch.no_grad():
        model.head.bias[5] = torch.nan
    with pytest.raises(ValueError, match="logits at step 1 are not finite"):
        beam_search(model, src, real)
    assert [module.training for module in model.modules()] == modes
    assert [layer.cross_attention.attend for layer in model.decoder.layers] == attends


def test_a_result_can_be_trained_on() -> None:
    model, (src, real) = talker(0), sources(24)
    ids = beam_search(model, src, real, extra=3).ids
    model(src, ids, src_padding=real).sum().backward()


def test_packed_weights_give_the_same_translations() -> None:
    model, (src, real) = talker(3), sources(24)
    before = beam_search(model, src, real, n_best=4)
    with packed(model):
        after = beam_search(model, src, real, n_best=4)
    assert torch.equal(before.n_best, after.n_best)
    torch.testing.assert_close(after.n_best_scores, before.n_best_scores)


@pytest.mark.parametrize(
    ("m", "V", "n"),
    [
        (1, 24, 8),
        (4, 20_000, 8),
        (4, 10_007, 6),
        (3, 7, 6),
        (2, 13, 26),
        (2, 5, 14),
        (1, 40_000, 3),
    ],
)
def test_the_best_are_the_best(m: int, V: int, n: int) -> None:
    """Against a sort of everything; a table of any shape, and more wanted than there are."""
    scores, offset = torch.randn(3, m, V), torch.randn(3, m)
    values, row, column = best(scores, offset, n)
    expected = (scores + offset[..., None]).flatten(1).sort(dim=1, descending=True).values
    k = min(n, m * V)
    assert_close(values[:, :k], expected[:, :k])
    assert (values[:, k:] == -torch.inf).all()
    at = torch.arange(3)[:, None]
    assert_close((scores[at, row, column] + offset[at, row])[:, :k], values[:, :k])


def test_finished_keeps_the_best_in_order() -> None:
    finished = Finished(torch.zeros(1, 2, 4, dtype=torch.long), torch.full((1, 2), -torch.inf))
    finished.add(torch.tensor([[[5], [6], [7]]]), torch.tensor([[-3.0, -torch.inf, -2.0]]))
    finished.add(torch.tensor([[[8, 9], [9, 9]]]), torch.tensor([[-2.5, -4.0]]))
    assert finished.ids.tolist() == [[[7, 0, 0, 0], [8, 9, 0, 0]]]
    assert finished.scores.tolist() == [[-2.0, -2.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"n_best": 5}, r"n_best must be in \[1, 4\], got 5"),
        ({"n_best": 0}, r"n_best must be in \[1, 4\], got 0"),
        ({"extra": 0}, "extra must be at least 1, got 0"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    src, real = sources(24)
    with pytest.raises(ValueError, match=message):
        beam_search(talker(0), src, real, **arguments)


# Hugging Face itself -----------------------------------------------------------------------------


def marian(model: Transformer) -> Any:
    """`MarianMTModel` with our weights; its positions are replaced by the paper's order."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=model.config.vocab_size, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_ffn_dim=24, activation_function="relu", scale_embedding=True,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=BOS, forced_eos_token_id=None, tie_word_embeddings=False,
        dropout=0.0,
    )  # fmt: skip
    theirs = MarianMTModel(config).eval()
    ours = model.state_dict()
    renamed = {
        "residuals.self_attention.norm": "self_attn_layer_norm",
        "residuals.cross_attention.norm": "encoder_attn_layer_norm",
        "residuals.ffn.norm": "final_layer_norm",
        "self_attention": "self_attn",
        "cross_attention": "encoder_attn",
        "ffn.up": "fc1",
        "ffn.down": "fc2",
    }
    weights = {}
    for name, value in ours.items():
        if name.startswith(("encoder.", "decoder.")):
            for old, new in renamed.items():
                name = name.replace(old, new)
            weights[f"model.{name}"] = value
    table = ours["embedding.tokens.weight"]
    positions = model.embedding.position(torch.arange(64)[None])[0]
    for name in theirs.state_dict():
        if "embed_tokens" in name or "shared" in name:
            weights[name] = table
        if "embed_positions" in name:
            weights[name] = positions
    weights["lm_head.weight"] = ours["head.weight"]
    weights["final_logits_bias"] = ours["head.bias"][None]
    with torch.no_grad():
        theirs.load_state_dict(weights, strict=True)
        theirs.final_logits_bias[0, [PAD, BOS, UNK]] = -1e4
    return theirs


@dataclass
class Case:
    """One setting of `generate` and ours."""

    beam: int
    rule: HuggingFace


CASES = {
    "4-1-false": Case(4, HuggingFace(1.0, False)),
    "4-1-true": Case(4, HuggingFace(1.0, True)),
    "4-0-never": Case(4, HuggingFace(0.0, "never")),
    "4-0.6-never": Case(4, HuggingFace(0.6, "never")),
    "4-2-never": Case(4, HuggingFace(2.0, "never")),
    "2--1-false": Case(2, HuggingFace(-1.0, False)),
    "7-1-false": Case(7, HuggingFace(1.0, False)),
}


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_generate(case: str) -> None:
    """`generate` with the same weights: every sentence, ids and scores (parity, section 3)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    beam, rule = CASES[case].beam, CASES[case].rule
    lengths = set()
    for seed in range(5):
        model = talker(seed)
        with torch.no_grad():
            model.head.bias[[PAD, BOS, UNK]] = -1e4
        src, real = sources(24, (6, 6, 6, 6))
        ours = beam_search(model, src, real, beam=beam, n_best=beam, scoring=rule, extra=9)
        theirs = marian(model).generate(
            input_ids=src, attention_mask=real.long(), num_beams=beam, num_return_sequences=beam,
            max_new_tokens=15, do_sample=False, length_penalty=rule.length_penalty,
            early_stopping=rule.early_stopping, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        ids = theirs.sequences[:, 1:].view(4, beam, -1)
        ended = (ids == EOS).cumsum(dim=-1) - (ids == EOS).long() > 0
        ids = ids.masked_fill(ended, PAD)  # it fills up with EOS where PAD is 0
        T = ids.shape[2]
        assert torch.equal(ours.n_best[:, :, :T], ids[:, :, : ours.n_best.shape[2]])
        scores = ours.n_best_scores.flatten()
        torch.testing.assert_close(scores, theirs.sequences_scores, rtol=1e-5, atol=1e-4)
        lengths |= set((ids != PAD).sum(dim=-1).flatten().tolist())
    assert len(lengths) > 1


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="length_penalty must be finite"):
        HuggingFace(length_penalty=float("inf"))
    with pytest.raises(ValueError, match="early_stopping"):
        HuggingFace(early_stopping="sometimes")  # type: ignore[arg-type]
