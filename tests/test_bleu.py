"""Chapter 22: BLEU and chrF against sacreBLEU, intervals, and what an evaluation refuses."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import _bootstrap_resample, estimate_ci

from transformer_annotated.exercises import CHECKS
from transformer_annotated.paper.multi30k import bleu, multi30k
from transformer_annotated.training.bleu import (
    TOKENIZERS,
    bleu_score,
    bootstrap_bleu,
    clipped,
    corpus_bleu,
    corpus_chrf,
    corrupt,
    count_matches,
    cut,
    evaluate_translations,
    interval,
    n_grams,
    split_hyphens,
)

Tokens = list[list[str]]
SENTENCES = [
    "A man in a blue T-shirt is standing on a ladder, cleaning a window.",
    "Two children play with a ball near the river.",
    'The sign reads "no parking", but 1,000 cars stand there.',
    "A dog's owner throws a stick - and waits.",
    "An old woman reads a newspaper on a bench in the park.",
    "Three people sit at a table and drink coffee.",
]


def drawn(seed: int, n: int, words: int, longest: int) -> tuple[Tokens, Tokens]:
    """Random token lists, some of them empty."""
    rng = random.Random(seed)

    def side() -> Tokens:
        return [
            [f"w{rng.randrange(words)}" for _ in range(rng.randint(0, longest))] for _ in range(n)
        ]

    return side(), side()


def by_sacrebleu(hypotheses: Tokens, references: Tokens, smooth: str = "none") -> float:
    metric = BLEU(tokenize="none", smooth_method=smooth, force=True)
    texts = [[" ".join(tokens) for tokens in side] for side in (hypotheses, references)]
    return metric.corpus_score(texts[0], [texts[1]]).score


# BLEU


def test_n_grams_of_a_sentence() -> None:
    tokens = ["to", "be", "or", "to", "be"]
    assert n_grams(tokens, 1) == {("to",): 2, ("be",): 2, ("or",): 1}
    assert n_grams(tokens, 2)["to", "be"] == 2
    assert n_grams(tokens, 5).total() == 1
    assert n_grams(tokens, 6).total() == 0


def test_a_match_is_clipped() -> None:
    """The example of Papineni et al. (2002): seven times "the" is right twice."""
    assert clipped(["the"] * 7, "the cat is on the mat".split(), 1) == 2


def test_bleu_by_hand() -> None:
    hypothesis = "a small dog runs over the green green grass".split()
    reference = "a small dog runs across the green grass in spring".split()
    # n = 1: all but "over" and one "green"; n = 2: a small, small dog, dog runs, the green,
    # green grass; n = 3: a small dog, small dog runs; n = 4: a small dog runs
    shares = [7 / 9, 5 / 8, 2 / 7, 1 / 6]
    expected = 100 * math.exp(1 - 10 / 9) * math.prod(shares) ** (1 / 4)
    assert corpus_bleu([hypothesis], [reference]) == pytest.approx(expected, rel=1e-12)


def test_equal_to_sacrebleu() -> None:
    """With and without smoothing, on lists that match well, badly, and not at all."""
    seen = set()
    for seed in range(150):
        words, n, longest = (2, 5, 40)[seed % 3], 1 + seed % 5, 3 + seed % 9
        lists = drawn(seed, n, words, longest)
        for smooth, name in ((False, "none"), (True, "exp")):
            expected = by_sacrebleu(*lists, name)
            assert corpus_bleu(*lists, smooth=smooth) == pytest.approx(expected, abs=1e-9)
            seen.add(expected > 0)
    assert seen == {True, False}


def test_equal_to_sacrebleu_on_sentences() -> None:
    references = [text.split() for text in SENTENCES * 5]
    hypotheses = [text.split() for text in corrupt(SENTENCES * 5, 0.3, seed=1)]
    expected = by_sacrebleu(hypotheses, references)
    assert 10 < expected < 90
    assert corpus_bleu(hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_counts_are_sacrebleus() -> None:
    lists = drawn(3, 20, 4, 12)
    texts = [[" ".join(tokens) for tokens in side] for side in lists]
    expected = BLEU(tokenize="none")._extract_corpus_statistics(texts[0], [texts[1]])
    assert count_matches(*lists).tolist() == expected


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=8), min_size=1, max_size=5), st.data())
def test_bleu_lies_between_0_and_100_and_forgets_the_order_of_sentences(
    references: Tokens, data: st.DataObject
) -> None:
    n = len(references)
    sentence = st.lists(st.sampled_from("abc"), max_size=8)
    hypotheses = data.draw(st.lists(sentence, min_size=n, max_size=n))
    score = corpus_bleu(hypotheses, references)
    assert 0 <= score <= 100 + 1e-9
    turned = data.draw(st.permutations(range(n)))
    again = corpus_bleu([hypotheses[i] for i in turned], [references[i] for i in turned])
    assert again == pytest.approx(score, abs=1e-9)
    assert corpus_bleu(hypotheses * 2, references * 2) == pytest.approx(score, abs=1e-9)
    if max(map(len, references)) >= 4:
        assert corpus_bleu(references, references) == pytest.approx(100, abs=1e-9)


def test_long_translations_earn_nothing_by_length() -> None:
    reference = "two dogs run over the green grass".split()
    shares = 7 / 10 * 6 / 9 * 5 / 8 * 4 / 7
    long = corpus_bleu([reference + ["today"] * 3], [reference])
    assert long == pytest.approx(100 * shares**0.25, rel=1e-9)
    short = corpus_bleu([reference[:5]], [reference])
    assert short == pytest.approx(100 * math.exp(1 - 7 / 5), rel=1e-9)


def test_corpus_bleu_is_no_mean_of_sentences() -> None:
    hypotheses = ["a b c d e".split(), "f g".split()]
    references = ["a b c d e".split(), "f h".split()]
    alone = [corpus_bleu([h], [r]) for h, r in zip(hypotheses, references, strict=True)]
    assert alone == pytest.approx([100, 0], abs=1e-9)
    assert corpus_bleu(hypotheses, references) == pytest.approx(
        100 * (6 / 7 * 4 / 5) ** 0.25, rel=1e-9
    )


# chrF


def test_chrf_by_hand() -> None:
    # abd against abc: 2 of 3 characters, 1 of 2 pairs, no triple; the same in both directions
    assert corpus_chrf(["ab d"], ["a bc"]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_chrf_equal_to_sacrebleu() -> None:
    for seed in range(60):
        lists = drawn(seed, 4, 12, 5)
        hypotheses, references = ([" ".join(tokens) for tokens in side] for side in lists)
        expected = CHRF().corpus_score(hypotheses, [references]).score
        assert corpus_chrf(hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_chrf_prefers_recall() -> None:
    text = SENTENCES[0]
    longer = text + " Yes, indeed."
    assert corpus_chrf([longer], [text]) > corpus_chrf([text], [longer])


# Intervals


def systems(n: int = 30, rates: Sequence[float] = (0.3,)) -> tuple[list[str], list[list[str]]]:
    references = SENTENCES * n
    return references, [corrupt(references, rate, seed=i) for i, rate in enumerate(rates)]


def test_bootstrap_scores_whole_test_sets() -> None:
    """Each score is sacreBLEU's of a test set whose sentences were drawn with replacement."""
    hypotheses, references = drawn(5, 12, 3, 9)
    scores = bootstrap_bleu(count_matches(hypotheses, references), resamples=15, seed=7)
    generator = torch.Generator().manual_seed(7)
    repeats = 0
    for score in scores.tolist():
        rows = torch.randint(12, (12,), generator=generator).tolist()
        repeats += len(set(rows)) < 12
        resampled = [hypotheses[i] for i in rows], [references[i] for i in rows]
        assert score == pytest.approx(by_sacrebleu(*resampled, "exp"), abs=1e-9)
    assert repeats == 15
    assert len(set(scores.tolist())) > 10


def test_the_interval_agrees_with_sacrebleus() -> None:
    """Other draws, the same distribution: the ends lie within a tenth of the width."""
    references, (hypotheses,) = systems()
    metric = BLEU()
    stats = metric._extract_corpus_statistics(hypotheses, [references])
    _, found = _bootstrap_resample(stats, metric, 1000)
    mean, half = estimate_ci([score.score for score in found])
    scores = evaluate_translations(hypotheses, references, bootstrap=1000, seed=1)
    assert scores.bleu_low == pytest.approx(mean - half, abs=0.2 * half)
    assert scores.bleu_high == pytest.approx(mean + half, abs=0.2 * half)
    assert scores.bleu_low < scores.bleu < scores.bleu_high


def test_the_interval_holds_95_of_100() -> None:
    assert interval(torch.arange(1001.0)) == pytest.approx((25, 975))


def test_the_interval_depends_on_the_seed_alone() -> None:
    references, (hypotheses,) = systems(5)
    counts = count_matches(*[[cut(text) for text in side] for side in (hypotheses, references)])
    one, same, other = (bootstrap_bleu(counts, resamples=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(123)
    assert torch.equal(one, bootstrap_bleu(counts, resamples=50, seed=1))


def test_two_systems_are_drawn_together() -> None:
    """The sentences of a drawn test set are the same for both."""
    references, (a, b) = systems(10, (0.2, 0.4))
    wanted = [cut(text) for text in references]
    first, second = (count_matches([cut(text) for text in side], wanted) for side in (a, b))
    both = bootstrap_bleu(torch.stack((first, second, first), dim=1), resamples=40, seed=3)
    assert both.shape == (40, 3)
    assert torch.equal(both[:, 0], both[:, 2])
    assert torch.equal(both[:, 0], bootstrap_bleu(first, resamples=40, seed=3))
    assert torch.equal(both[:, 1], bootstrap_bleu(second, resamples=40, seed=3))


# Cutting text


def test_the_tokens_are_sacrebleus() -> None:
    references, (hypotheses,) = systems(2)
    for tokenize in TOKENIZERS:
        for lowercase in (False, True):
            metric = BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
            expected = metric.corpus_score(hypotheses, [references]).score
            lists = (
                [cut(text, tokenize, lowercase=lowercase) for text in side]
                for side in (hypotheses, references)
            )
            assert corpus_bleu(*lists, smooth=True) == pytest.approx(expected, abs=1e-9)


def test_what_each_tokenizer_does_with_a_hyphen() -> None:
    text = "A T-shirt."
    assert cut(text) == ["A", "T-shirt", "."]
    assert cut(text, "intl") == ["A", "T", "-", "shirt", "."]
    assert cut(text, "none") == ["A", "T-shirt."]
    assert cut(text, "char") == list("AT-shirt.")
    assert cut(text, lowercase=True) == ["a", "t-shirt", "."]


def test_hyphens_are_split_as_by_the_paper_s_script() -> None:
    """The expression s{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g, with what it overlooks."""
    assert split_hyphens("A rich-text format - yes".split()) == [
        "A", "rich", "##AT##-##AT##", "text", "format", "-", "yes",
    ]  # fmt: skip
    assert split_hyphens(["a-b-c"]) == ["a", "##AT##-##AT##", "b-c"]
    assert split_hyphens(["ab-cd-ef"]) == ["ab", "##AT##-##AT##", "cd", "##AT##-##AT##", "ef"]
    assert split_hyphens([]) == []


# An evaluation


def test_the_score_is_sacrebleus_and_part_i_s() -> None:
    references, (hypotheses,) = systems()
    scores = evaluate_translations(hypotheses, references, bootstrap=10)
    assert (scores.bleu, scores.bleu_signature) == bleu(hypotheses, references)
    assert scores.chrf == CHRF().corpus_score(hypotheses, [references]).score
    lowercase = BLEU(lowercase=True).corpus_score(hypotheses, [references]).score
    assert scores.bleu_lowercase == lowercase
    assert scores.sentences == len(references)
    for signature, part in (
        (scores.bleu_signature, "case:mixed|eff:no|tok:13a|smooth:exp"),
        (scores.bleu_lowercase_signature, "case:lc|eff:no|tok:13a|smooth:exp"),
        (scores.chrf_signature, "nc:6|nw:0|space:no"),
    ):
        assert signature.startswith("nrefs:1|case:")
        assert part in signature


def test_case_counts_and_in_lower_case_it_does_not() -> None:
    scores = evaluate_translations([text.upper() for text in SENTENCES], SENTENCES, bootstrap=0)
    assert scores.bleu < 50
    assert scores.bleu_lowercase == pytest.approx(100)


def test_scores_can_be_printed_and_stored() -> None:
    references, (hypotheses,) = systems(3)
    scores = evaluate_translations(hypotheses, references, bootstrap=20)
    stored = json.loads(json.dumps(scores.to_dict()))
    assert stored["bleu"] == scores.bleu
    text = str(scores)
    assert f"{scores.bleu:.2f}" in text
    assert scores.bleu_signature in text
    assert f"({scores.bleu_low:.1f} to {scores.bleu_high:.1f})" in text
    without = evaluate_translations(hypotheses, references, bootstrap=0)
    assert without.bleu_low is without.bleu_high is None
    assert " to " not in str(without)


def test_an_empty_translation_counts_as_nothing() -> None:
    scores = evaluate_translations(["", *SENTENCES[1:]], SENTENCES, bootstrap=10)
    assert 0 < scores.bleu < 100
    assert evaluate_translations([""] * 6, SENTENCES, bootstrap=10).bleu == 0


SCORERS: list[Callable[[Any, Any], Any]] = [
    corpus_bleu, corpus_chrf, count_matches, evaluate_translations,
]  # fmt: skip


def test_unequal_counts_are_refused() -> None:
    for scorer in SCORERS:
        for hypotheses, references in ((2, 1), (1, 2)):
            message = rf"got {hypotheses} hypotheses and {references} references"
            with pytest.raises(ValueError, match=message):
                scorer([SENTENCES[0]] * hypotheses, [SENTENCES[0]] * references)


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_sentences_are_refused(scorer: Callable[[Any, Any], Any]) -> None:
    for sides, name in ((([], []), "hypotheses"), ((["a"], []), "references")):
        with pytest.raises(ValueError, match=f"{name} must hold at least one sentence"):
            scorer(*sides)


def test_sacrebleu_alone_would_cut_the_longer_list() -> None:
    """Why the counts are checked here: the day this test fails, the page must change."""
    assert BLEU().corpus_score([SENTENCES[0], "Nonsense."], [[SENTENCES[0]]]).score > 99.9
    with pytest.raises(IndexError):
        BLEU().corpus_score([], [[]])


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ("a dog", ["a dog"], "hypotheses must be a list of sentences, got one text 'a dog'"),
        (["a"], "a", "references must be a list"),
        (["a"], [["a"]], r"references\[0\] must be a text, got \['a'\]"),
        (["a", None], ["a", "b"], r"hypotheses\[1\] must be a text, got None"),
    ],
    ids=["one text", "one reference", "lists of lists", "none"],
)
def test_what_is_no_list_of_texts_is_refused(
    hypotheses: Any, references: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_translations(hypotheses, references)


def test_other_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="bootstrap must be at least 0, got -1"):
        evaluate_translations(["a"], ["a"], bootstrap=-1)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        bootstrap_bleu(torch.ones(2, 10), resamples=0)
    with pytest.raises(ValueError, match=r"tokenize must be one of .*, got 'moses'"):
        cut("a", "moses")
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="rate must lie between 0 and 1"):
            corrupt(["a"], rate, seed=0)
    with pytest.raises(ValueError, match=r"kinds must be some of .*, got \('shuffle',\)"):
        corrupt(["a"], 0.1, seed=0, kinds=("shuffle",))


# Planted errors


def test_corrupt_changes_the_share_that_it_says() -> None:
    text = [" ".join(f"w{i}" for i in range(5000))]
    assert corrupt(text, 0.0, seed=0) == text
    assert corrupt(text, 0.2, seed=0) == corrupt(text, 0.2, seed=0)
    assert corrupt(text, 0.2, seed=0) != corrupt(text, 0.2, seed=1)
    left = corrupt(text, 0.2, seed=0, kinds=("drop",))[0].split()
    assert len(left) == pytest.approx(4000, abs=120)
    swapped = corrupt(text, 0.2, seed=0, kinds=("swap",))[0].split()
    assert sorted(swapped) == sorted(text[0].split())
    assert swapped != text[0].split()
    replaced = corrupt(text, 0.2, seed=0, kinds=("replace",))[0].split()
    assert len(replaced) == 5000
    same = sum(a == b for a, b in zip(replaced, text[0].split(), strict=True))
    assert same == pytest.approx(4000, abs=120)


def test_bleu_falls_with_the_share_of_wrong_words() -> None:
    references, hypotheses = systems(20, (0.0, 0.1, 0.3, 0.6))
    scores = [evaluate_translations(side, references, bootstrap=0) for side in hypotheses]
    assert scores[0].bleu == pytest.approx(100)
    assert [s.bleu for s in scores] == sorted((s.bleu for s in scores), reverse=True)
    assert [s.chrf for s in scores] == sorted((s.chrf for s in scores), reverse=True)


def test_bleu_score_takes_any_number_of_axes() -> None:
    counts = torch.stack([count_matches(*drawn(seed, 6, 3, 9)).sum(dim=0) for seed in range(6)])
    expected = [bleu_score(row).item() for row in counts]
    assert bleu_score(counts.view(2, 3, 10)).flatten().tolist() == expected


# The exercises


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("22.1", [4 / 6, 2 / 5], [5 / 6, 2 / 5]),
        ("22.2", 100 * math.exp(-0.25), 80.0),
        ("22.4", 4000, 2000),
    ],
)
def test_exercises(number: str, right: Any, wrong: Any) -> None:
    CHECKS[number](right)
    with pytest.raises(AssertionError):
        CHECKS[number](wrong)


def test_the_exercise_with_several_references() -> None:
    def right(hypothesis: list[str], references: Tokens, n: int) -> int:
        most = n_grams(references[0], n)
        for reference in references[1:]:
            most |= n_grams(reference, n)
        return (n_grams(hypothesis, n) & most).total()

    CHECKS["22.3"](right)
    for wrong in (
        lambda hypothesis, references, n: max(clipped(hypothesis, r, n) for r in references),
        lambda hypothesis, references, n: sum(clipped(hypothesis, r, n) for r in references),
    ):
        with pytest.raises(AssertionError):
            CHECKS["22.3"](wrong)


# A real corpus


@pytest.mark.data
def test_a_perfect_translation_of_the_test_set_scores_100() -> None:
    try:
        references = [german for german, _ in multi30k("test_2016_flickr")]
    except OSError as error:
        pytest.skip(f"Multi30k is not at hand: {error}")
    scores = evaluate_translations(references, references, bootstrap=5)
    assert (scores.sentences, round(scores.bleu, 6), round(scores.chrf, 6)) == (1000, 100, 100)
    assert scores.bleu_low == pytest.approx(100)
