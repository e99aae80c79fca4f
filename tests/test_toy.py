"""Chapter 9: the grammar is right, deterministic and unambiguous; vocabulary and batches."""

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_annotated.paper import toy
from transformer_annotated.paper.toy import (
    ADVERB_FIRST,
    BOS,
    EOS,
    PAD,
    TENSES,
    UNK,
    Adjective,
    Adverb,
    Clause,
    Noun,
    NounPhrase,
    Sentence,
    Verb,
    Vocabulary,
    batches,
    collate,
    pairs,
    split,
)


def noun(german: str) -> Noun:
    return next(n for n in toy.NOUNS if n.singular == german)


def verb(infinitive: str) -> Verb:
    return next(v for v in toy.VERBS if v.infinitive == infinitive)


def adjective(english: str) -> Adjective:
    return next(a for a in toy.ADJECTIVES if a.english == english)


def adverb(german: str) -> Adverb:
    return next(a for a in toy.ADVERBS if a.german == german)


def the(
    german: str, described: str = "", plural: bool = False, definite: bool = True
) -> NounPhrase:
    return NounPhrase(noun(german), plural, definite, adjective(described) if described else None)


def a(german: str, described: str = "") -> NounPhrase:
    return the(german, described, definite=False)


def some(german: str, described: str = "") -> NounPhrase:
    return the(german, described, plural=True, definite=False)


def texts(sentence: Sentence) -> tuple[str, str]:
    derivation = sentence.derive()
    return " ".join(derivation.german), " ".join(derivation.english)


def clause(
    infinitive: str, tense: str, *roles: NounPhrase, when: str = "", front: int = 0
) -> Clause:
    return Clause(verb(infinitive), tense, roles, adverb(when) if when else None, front)


SLEEPS = clause("schlafen", "present", the("Hund"))
WOKE = clause("aufwachen", "perfect", the("Hund"))
GIVES = clause("geben", "present", the("Mann"), the("Frau"), a("Buch"), when="heute")
LIKES = clause("gefallen", "present", the("Mann"), the("Buch", plural=True))
SAYS = clause("sagen", "present", the("Königin"))

# Written by hand, not by the grammar.
GOLDEN = {
    "intransitive": (Sentence(SLEEPS), "der Hund schläft", "the dog sleeps"),
    "separable, present": (
        Sentence(replace(WOKE, tense="present")),
        "der Hund wacht auf",
        "the dog wakes up",
    ),
    "separable, plural": (
        Sentence(clause("ankommen", "present", the("Kind", "small", plural=True))),
        "die kleinen Kinder kommen an",
        "the small children arrive",
    ),
    "separable, perfect with sein": (Sentence(WOKE), "der Hund ist aufgewacht", "the dog woke up"),
    "separable, modal": (
        Sentence(clause("einladen", "muss", the("Frau"), the("Junge"))),
        "die Frau muss den Jungen einladen",
        "the woman must invite the boy",
    ),
    "separable, object and adverb inside": (
        Sentence(clause("abholen", "present", the("Frau"), the("Kind"), when="jetzt")),
        "die Frau holt jetzt das Kind ab",
        "the woman picks up the child now",
    ),
    "separable, subordinate": (
        Sentence(SAYS, after=(("dass", replace(WOKE, tense="present")),)),
        "die Königin sagt , dass der Hund aufwacht",
        "the queen says that the dog wakes up",
    ),
    "perfect, subordinate": (
        Sentence(SAYS, after=(("dass", WOKE),)),
        "die Königin sagt , dass der Hund aufgewacht ist",
        "the queen says that the dog woke up",
    ),
    "modal, subordinate": (
        Sentence(SAYS, after=(("dass", clause("lesen", "kann", the("Kind"), a("Brief"))),)),
        "die Königin sagt , dass das Kind einen Brief lesen kann",
        "the queen says that the child can read a letter",
    ),
    "ditransitive, adverb inside": (
        Sentence(GIVES),
        "der Mann gibt heute der Frau ein Buch",
        "the man gives the woman a book today",
    ),
    "ditransitive, adverb first": (
        Sentence(replace(GIVES, front=ADVERB_FIRST)),
        "heute gibt der Mann der Frau ein Buch",
        "today the man gives the woman a book",
    ),
    "dative first": (
        Sentence(replace(GIVES, front=1)),
        "der Frau gibt der Mann heute ein Buch",
        "the man gives the woman a book today",
    ),
    "accusative first": (
        Sentence(clause("suchen", "perfect", the("Katze"), the("Ball", "red"), front=1)),
        "den roten Ball hat die Katze gesucht",
        "the cat looked for the red ball",
    ),
    "dative verb": (
        Sentence(clause("helfen", "perfect", a("Frau", "old"), the("Pferd", plural=True))),
        "eine alte Frau hat den Pferden geholfen",
        "an old woman helped the horses",
    ),
    "dative verb with sein": (
        Sentence(clause("folgen", "perfect", the("Hund", plural=True), a("Junge", "tired"))),
        "die Hunde sind einem müden Jungen gefolgt",
        "the dogs followed a tired boy",
    ),
    "the roles swap": (
        Sentence(LIKES),
        "dem Mann gefallen die Bücher",
        "the man likes the books",
    ),
    "the roles swap, nominative first": (
        Sentence(replace(LIKES, front=1)),
        "die Bücher gefallen dem Mann",
        "the man likes the books",
    ),
    "the roles swap, subordinate": (
        Sentence(SLEEPS, after=(("weil", replace(LIKES, tense="perfect")),)),
        "der Hund schläft , weil dem Mann die Bücher gefallen haben",
        "the dog sleeps because the man liked the books",
    ),
    "bare plural": (
        Sentence(clause("zeigen", "will", some("Kind", "small"), some("Mann", "old"), some("Ei"))),
        "kleine Kinder wollen alten Männern Eier zeigen",
        "small children want to show old men eggs",
    ),
    "a or an": (
        Sentence(clause("essen", "perfect", a("Mädchen", "big"), a("Apfel"))),
        "ein großes Mädchen hat einen Apfel gegessen",
        "a big girl ate an apple",
    ),
    "an adjective takes the vowel away": (
        Sentence(clause("kaufen", "muss", the("Mann"), a("Apfel", "red"), when="morgen")),
        "der Mann muss morgen einen roten Apfel kaufen",
        "the man must buy a red apple tomorrow",
    ),
    "clause first": (
        Sentence(clause("lesen", "present", the("Frau"), the("Zeitung")), before=("wenn", SLEEPS)),
        "wenn der Hund schläft , liest die Frau die Zeitung",
        "when the dog sleeps , the woman reads the newspaper",
    ),
    "clause first, separable": (
        Sentence(
            clause("aufmachen", "present", the("Junge"), the("Tür"), when="jetzt"),
            before=("weil", clause("weglaufen", "will", the("Pferd"))),
        ),
        "weil das Pferd weglaufen will , macht der Junge jetzt die Tür auf",
        "because the horse wants to run away , the boy opens the door now",
    ),
    "three clauses": (
        Sentence(
            SAYS,
            after=(("dass", SLEEPS), ("weil", clause("tanzen", "present", the("Mädchen")))),
        ),
        "die Königin sagt , dass der Hund schläft , weil das Mädchen tanzt",
        "the queen says that the dog sleeps because the girl dances",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_sentences(name: str) -> None:
    sentence, german, english = GOLDEN[name]
    assert texts(sentence) == (german, english)


# case -> masculine, weak masculine, feminine, neuter, plural; written by hand
AGREEMENT = {
    (True, "nom"): "der alte Hund|der alte Junge|die alte Frau|das alte Kind|die alten Kinder",
    (True, "acc"): "den alten Hund|den alten Jungen|die alte Frau|das alte Kind|die alten Kinder",
    (
        True,
        "dat",
    ): "dem alten Hund|dem alten Jungen|der alten Frau|dem alten Kind|den alten Kindern",
    (False, "nom"): "ein alter Hund|ein alter Junge|eine alte Frau|ein altes Kind|alte Kinder",
    (False, "acc"): "einen alten Hund|einen alten Jungen|eine alte Frau|ein altes Kind|alte Kinder",
    (False, "dat"): (
        "einem alten Hund|einem alten Jungen|einer alten Frau|einem alten Kind|alten Kindern"
    ),
}


@pytest.mark.parametrize(("definite", "case"), AGREEMENT)
def test_agreement(definite: bool, case: toy.Case) -> None:
    phrases = [the(n, "old", False, definite) for n in ("Hund", "Junge", "Frau", "Kind")]
    phrases.append(the("Kind", "old", True, definite))
    got = [" ".join(word.text for word in phrase.german(case)) for phrase in phrases]
    assert got == AGREEMENT[definite, case].split("|")


def test_dative_plurals() -> None:
    got = {n.german("dat", True) for n in toy.NOUNS if n.kind in ("person", "animal")}
    assert got == {
        "Männern", "Frauen", "Kindern", "Jungen", "Mädchen", "Königinnen", "Hunden", "Katzen",
        "Pferden",
    }  # fmt: skip


def test_infinitives() -> None:
    separable = {v.infinitive for v in toy.VERBS if v.particle}
    assert separable == {"aufwachen", "weglaufen", "ankommen", "aufmachen", "einladen", "abholen"}


@pytest.mark.parametrize("n_clauses", [1, 2, 3, 4])
def test_no_german_sentence_has_two_translations(n_clauses: int) -> None:
    rng = random.Random(n_clauses)
    english: dict[str, str] = {}
    for _ in range(5_000):
        german, target = toy.sentence(rng, n_clauses)
        assert english.setdefault(german, target) == target


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lexicon that can be enumerated; it holds the cases that are the most alike."""
    nouns = [noun(n) for n in ("Junge", "Mädchen", "Frau", "Apfel", "Ei")]
    names = ("schlafen", "aufwachen", "sehen", "einladen", "helfen", "zeigen", "gefallen", "sagen")
    monkeypatch.setattr(toy, "NOUNS", tuple(nouns))
    monkeypatch.setattr(toy, "VERBS", tuple(verb(name) for name in names))
    monkeypatch.setattr(toy, "ADJECTIVES", (adjective("old"),))
    monkeypatch.setattr(toy, "ADVERBS", (adverb("heute"),))


def all_clauses(main: bool, takes_clause: bool) -> list[Clause]:
    clauses: list[Clause] = []
    for v in toy.VERBS:
        if v.takes_clause != takes_clause:
            continue
        fillers = [
            [
                NounPhrase(n, plural, definite, described)
                for n in toy.NOUNS
                if n.kind in kinds.split()
                for plural, definite in product((False, True), repeat=2)
                if definite or v.infinitive != "gefallen"
                for described in (None, *(a for a in toy.ADJECTIVES if n.kind in a.kinds.split()))
            ]
            for _, kinds in v.roles
        ]
        for roles, tense in product(product(*fillers), v.tenses):
            if len({role.noun for role in roles}) < len(roles):
                continue
            for when in (None, *(x for x in toy.ADVERBS if tense in x.tenses)):
                plain = Clause(v, tense, roles, when)
                fronts = plain.fronts() if main else [0]
                clauses += [replace(plain, front=front) for front in fronts]
    return clauses


@pytest.mark.parametrize(("main", "takes_clause"), [(True, False), (False, False), (True, True)])
def test_count_is_the_number_of_different_clauses(
    monkeypatch: pytest.MonkeyPatch, main: bool, takes_clause: bool
) -> None:
    small(monkeypatch)
    write = toy.german_main if main else toy.german_subordinate
    clauses = all_clauses(main, takes_clause)
    german = {" ".join(word.text for word in write(clause)) for clause in clauses}
    assert len(german) == len(clauses) == toy.count(main=main, takes_clause=takes_clause) > 0


def test_count_of_the_whole_language() -> None:
    assert toy.count() == 252_440_160


def test_what_is_drawn_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    possible = set(all_clauses(main=True, takes_clause=False))
    rng = random.Random(0)
    assert {toy.draw_sentence(rng).main for _ in range(2_000)} <= possible


@pytest.fixture(scope="module")
def parts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    return split(10_000, 500, seed=0)


def test_every_form_of_the_lexicon_is_drawn(
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]],
) -> None:
    german = {word for text, _ in parts[0] for word in text.split()}
    for v in toy.VERBS:
        assert set(f"{v.present} {v.present_plural}".split()) <= german
        assert ("perfect" not in v.tenses) or v.participle in german
    for n in toy.NOUNS:
        assert {n.singular, n.plural} <= german


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), n_clauses=st.integers(1, 4))
def test_any_sentence(seed: int, n_clauses: int) -> None:
    sentence = toy.draw_sentence(random.Random(seed), n_clauses)
    derivation = sentence.derive()
    clauses = [sentence.main, *(c for _, c in sentence.after)]
    if sentence.before is not None:
        clauses.append(sentence.before[1])
    assert len(clauses) == n_clauses
    assert derivation.german.count(",") == n_clauses - 1
    # each word but German commas is aligned, and no link leaves the sentence
    free = {i for i, word in enumerate(derivation.german) if word != ","}
    assert free <= {i for i, _ in derivation.links} <= set(range(len(derivation.german)))
    assert {j for _, j in derivation.links} == set(range(len(derivation.english)))
    # every clause but the last one of a chain of "dass" says something
    chain = [sentence.main, *(c for _, c in sentence.after)]
    for host, (conjunction, _) in zip(chain, sentence.after, strict=False):
        assert (conjunction == "dass") == host.verb.takes_clause
    assert not chain[-1].verb.takes_clause
    for c in clauses:
        assert c.tense in c.verb.tenses
        assert c.adverb is None or c.tense in c.adverb.tenses
        assert len({role.noun for role in c.roles}) == len(c.roles)
    for i, word in enumerate(derivation.english[:-1]):
        vowel = derivation.english[i + 1][0] in "aeiou"
        assert not (word == "a" and vowel)
        assert not (word == "an" and not vowel)


def test_nothing_past_has_a_reason_that_is_not() -> None:
    rng = random.Random(5)
    for _ in range(2_000):
        drawn = toy.draw_sentence(rng, 2)
        joined = drawn.before or drawn.after[0]
        if drawn.main.past:
            assert joined[0] == "weil"
            assert joined[1].past
        if joined[0] == "wenn":
            assert not joined[1].past
            assert joined[1].adverb is None


DIGEST = """
import hashlib
from transformer_annotated.paper import toy
train, test = toy.split(400, 100, seed=7)
vocabulary = toy.Vocabulary.build(text.split() for pair in train for text in pair)
print(hashlib.sha256(repr((train, test, vocabulary.words)).encode()).hexdigest())
"""


def test_same_in_every_process() -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("0", "1")
    ]
    digests = {process.communicate(timeout=300)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(digests) == 1


def test_pairs_are_distinct_and_depend_on_the_seed() -> None:
    first = pairs(300, seed=1)
    assert first == pairs(300, seed=1)
    assert first != pairs(300, seed=2)
    assert len({german for german, _ in first}) == 300
    assert all(2 <= len(german.split()) <= toy.MAX_WORDS for german, _ in first)
    assert pairs(0, seed=1) == []


def test_split_is_disjoint_and_of_one_kind(
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]],
) -> None:
    train, test = parts
    assert (len(train), len(test)) == (10_000, 500)
    assert not {german for german, _ in train} & {german for german, _ in test}
    mean = [sum(len(german.split()) for german, _ in part) / len(part) for part in (train, test)]
    assert abs(mean[0] - mean[1]) < 0.5
    known = {word for pair in train for text in pair for word in text.split()}
    assert {word for pair in test for text in pair for word in text.split()} <= known


def test_longer_sentences() -> None:
    long = pairs(100, seed=0, clauses=(3, 4), words=(21, 30))
    assert all(21 <= len(german.split()) <= 30 for german, _ in long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairs(-1, 0), "n must be at least 0, got -1"),
        (lambda: split(5, -1, 0), "n_test must be at least 0, got -1"),
        (lambda: pairs(1, 0, clauses=(0, 1)), "clauses must be"),
        (lambda: pairs(1, 0, words=(9, 3)), "words must be"),
        (lambda: pairs(1, 0, clauses=(1, 1), words=(40, 50)), "found only 0"),
        (lambda: toy.derive(random.Random(0), 0), "clauses must be at least 1, got 0"),
    ],
)
def test_bad_requests(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_vocabulary_order_and_limits() -> None:
    corpus = [["b", "a", "c", "a"], ["c", "a", "d"]]
    full = Vocabulary.build(corpus)
    assert full.words == ("<pad>", "<bos>", "<eos>", "<unk>", "a", "c", "b", "d")
    assert Vocabulary.build(corpus, min_count=2).words[4:] == ("a", "c")
    assert Vocabulary.build(corpus, max_size=5).words[4:] == ("a",)
    assert len(full) == 8
    assert "a" in full
    assert "z" not in full
    assert "<pad>" not in full
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)


def test_vocabulary_decodes_up_to_the_end() -> None:
    vocabulary = Vocabulary.build([["a", "b"]])
    a_, b_ = vocabulary.encode(["a", "b"])
    assert vocabulary.encode(["a", "z", "<eos>"]) == [a_, UNK, UNK]
    assert vocabulary.decode([BOS, a_, PAD, b_, UNK, EOS, a_]) == ["a", "b", "<unk>"]
    assert vocabulary.decode(torch.tensor([a_, b_])) == ["a", "b"]
    for bad in (-1, len(vocabulary)):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, 6\), got {bad}"):
            vocabulary.decode([bad])


def test_vocabulary_errors() -> None:
    with pytest.raises(ValueError, match=r"distinct, got \['a'\]"):
        Vocabulary((*toy.SPECIAL, "a", "a"))
    with pytest.raises(ValueError, match="must start with"):
        Vocabulary(("a", "b"))
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        Vocabulary.build([["a"]], min_count=0)
    with pytest.raises(ValueError, match="max_size must be at least 4, got 3"):
        Vocabulary.build([["a"]], max_size=3)
    with pytest.raises(ValueError, match="got the text 'a b'"):
        Vocabulary.build(["a b"])


def test_vocabulary_drops_special_words_of_a_text() -> None:
    assert Vocabulary.build([["<pad>", "a"]]).words == (*toy.SPECIAL, "a")


ROWS = st.lists(st.integers(UNK, 50), max_size=9)


@given(st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=6))
def test_collate_round_trip(rows: list[tuple[list[int], list[int]]]) -> None:
    batch = collate(rows)
    for i, (source, target) in enumerate(rows):
        assert batch.src[i][batch.src_padding[i]].tolist() == [*source, EOS]
        assert batch.tgt_in[i][batch.tgt_padding[i]].tolist() == [BOS, *target]
        assert batch.tgt_out[i][batch.tgt_padding[i]].tolist() == [*target, EOS]
    for ids, padding in ((batch.src, batch.src_padding), (batch.tgt_in, batch.tgt_padding)):
        assert ids.dtype == torch.long
        assert padding.dtype == torch.bool
        assert torch.equal(ids != PAD, padding)
    assert batch.n_tokens == sum(len(target) + 1 for _, target in rows)
    assert batch.src.shape[1] == max(len(source) for source, _ in rows) + 1


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        collate([])
    for bad in (-1, PAD, BOS, EOS):
        with pytest.raises(ValueError, match="ids of words"):
            collate([([4], [5, bad])])


def test_batch_to() -> None:
    batch = collate([([4, 5], [6])]).to("meta")
    assert batch.src.device.type == batch.tgt_padding.device.type == "meta"


def test_batches_visit_every_pair_once() -> None:
    rows = [([UNK + i], [UNK + i]) for i in range(10)]
    seen = list(batches(rows, 4, seed=0))
    assert [len(batch.src) for batch in seen] == [4, 4, 2]
    order = torch.cat([batch.src[:, 0] for batch in seen]).tolist()
    assert Counter(order) == Counter(range(UNK, UNK + 10))
    again = torch.cat([batch.src[:, 0] for batch in batches(rows, 4, seed=0)]).tolist()
    other = torch.cat([batch.src[:, 0] for batch in batches(rows, 4, seed=1)]).tolist()
    assert order == again != other


def test_batches_complain_when_called() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches([([4], [4])], 0, seed=0)
    with pytest.raises(ValueError, match="at least one pair"):
        batches([], 4, seed=0)


def test_tenses_name_modals() -> None:
    assert set(TENSES) == {"present", "perfect", *toy.MODALS}


def test_exercises(capsys: pytest.CaptureFixture[str]) -> None:
    from transformer_annotated.book import check

    check("9.1", "die großen Hunde")
    check("9.1", "den großen Hunden")
    check("9.2", Sentence(clause("essen", "perfect", the("Mädchen"), the("Apfel"), when="gestern")))
    check("9.3", lambda rows, size: list(batches(rows, size, seed=1)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": right.") for line in lines] == [False, True, False, False]
