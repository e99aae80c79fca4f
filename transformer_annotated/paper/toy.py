# %% [markdown]
r"""
# A small language

A German sentence and its English translation come out of one derivation, in a grammar small enough
to read and large enough never to run out. A vocabulary and a batch turn the sentences into tensors.
"""

# %%
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# The model stands; it needs something to learn. This chapter writes a language for it: German and
# English about queens, dogs and letters, with cases, endings and verbs that travel. It takes a
# minute of training, and no download. The real corpus waits until chapter 11.
#
# ## Which words move?
#
# Here is one sentence of the language and its translation. The positions were matched by hand. The class
# is called `Derivation` because later both sentences will be derived from one plan; section 9.5 shows it.


# %% mystnb={"figure": {"caption": "Chapter 9 of Part I: a language to learn.", "name": "fig-map-toy"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The ninth, Small language, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(9);

# %%
@dataclass(frozen=True)
class Derivation:
    """A German and an English sentence, and which words of them belong together."""

    german: tuple[str, ...]
    english: tuple[str, ...]
    links: tuple[tuple[int, int], ...]

    def crossing(self) -> set[tuple[int, int]]:
        """The links that cross a link of other words."""
        links = set(self.links)
        return {
            (i, j)
            for i, j in links
            for a, b in links
            if (i - a) * (j - b) < 0 and (i, b) not in links
        }


# %% tags=["active-ipynb"]
# by_hand = Derivation(
#     german="die Königin sagt , dass der Mann dem Kind den Ball zeigen will".split(),
#     english="the queen says that the man wants to show the child the ball".split(),
#     links=(
#         (0, 0),
#         (1, 1),
#         (2, 2),
#         (4, 3),
#         (5, 4),
#         (6, 5),
#         (7, 9),
#         (8, 10),
#         (9, 11),
#         (10, 12),
#         (11, 8),
#         (12, 6),
#         (12, 7),
#     ),
# )
# for i, j in by_hand.links:
#     print(f"{by_hand.german[i]:>8} {i:3} -> {j:2} {by_hand.english[j]}")

# %% [markdown]
# Read the two columns of numbers. Up to *Mann* they run in step, one apart after the comma. Then *dem Kind den Ball* is pushed
# back by the words that come from the far end: *will*, the last German word, becomes *wants to*, which
# stands right after its subject. A translator that goes from left to right has to reach over the whole
# clause to write its next word.
#
# The same thing as a picture. The function only draws; a line that crosses another is coloured.


# %%
def draw_alignment(derivation: Derivation) -> "Figure":
    """The two sentences as two rows, with a line between words that belong together."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    rows = derivation.german, derivation.english
    widths = [[len(word) + 2.0 for word in row] for row in rows]
    longest = max(map(sum, widths))
    figure, ax = plt.subplots(figsize=(min(7.2, 0.13 * longest + 0.6), 1.7))
    centres: list[list[float]] = []
    for row, width, y in zip(rows, widths, (1.0, 0.0), strict=True):
        start = (longest - sum(width)) / 2
        centres.append([start + sum(width[:i]) + width[i] / 2 for i in range(len(row))])
        for word, x in zip(row, centres[-1], strict=True):
            ax.text(x, y, word, ha="center", va="bottom" if y else "top", fontsize=11)
    crossing = derivation.crossing()
    for i, j in derivation.links:
        color = figures.COLORS[1 if (i, j) in crossing else 4]
        ax.plot([centres[0][i], centres[1][j]], [0.97, 0.05], color=color)
    ax.set(xlim=(0, longest), ylim=(-0.3, 1.3))
    ax.axis("off")
    return figure


# %% mystnb={"figure": {"caption": "The German verbs stand at the end of their clause, so their lines cross those of both objects.", "name": "fig-toy-by-hand"}, "image": {"alt": "Two rows of words joined by lines. The lines of the German words zeigen and will run left, across the lines of dem Kind and den Ball."}} tags=["active-ipynb"]
# from transformer_annotated import figures
#
# figures.use_style()
# draw_alignment(by_hand);

# %% [markdown]
# {numref}`fig-toy-by-hand` shows two bundles. No two lines on the left cross: copying in order
# would do. On the right the verbs cut across all four words of the two objects. That crossing is what
# attention has to learn.
#
# ## One derivation, two sentences
#
# How do we get thousands of such pairs without translating anything? We never start from German or
# from English. We first decide *what is said*: who does what to whom, and when. Then two sets of rules
# write it down, one for each language. Such a pair of rule sets over one derivation is called a
# **synchronous grammar**. A word remembers which part of the derivation it came from, so the lines of
# the picture come for free.
#
# ## Nouns: the same woman, two articles
#
# German marks the role of a noun on the words around it. The *nominative* is the case of who acts,
# the *accusative* of what is acted on, the *dative* of who receives. Four columns are enough: three
# genders, and a plural that has none.

# %%
Case = Literal["nom", "acc", "dat"]
Gender = Literal["m", "f", "n"]
Role = tuple[Case, str]  # a case and the kinds of noun
Roles = tuple[Role, ...]
# Articles and adjective endings   m      f      n      plural
DEFINITE: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("der", "die", "das", "die"),
    "acc": ("den", "die", "das", "die"),
    "dat": ("dem", "der", "dem", "den"),
}
INDEFINITE: dict[Case, tuple[str, str, str, str]] = {  # no article in the plural
    "nom": ("ein", "eine", "ein", ""),
    "acc": ("einen", "eine", "ein", ""),
    "dat": ("einem", "einer", "einem", ""),
}
AFTER_DEFINITE: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("e", "e", "e", "en"),
    "acc": ("en", "e", "e", "en"),
    "dat": ("en", "en", "en", "en"),
}
AFTER_INDEFINITE: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("er", "e", "es", "e"),
    "acc": ("en", "e", "es", "e"),
    "dat": ("en", "en", "en", "en"),
}

# %% [markdown]
# Adjectives take an ending too, and it depends on the article: *der alte Mann* but *ein alter Mann*.
# The rule is not to say a thing twice. Where *der* already shows the case, the adjective takes a plain *-e*
# or *-en*; where *ein* shows nothing, the adjective has to.
#
# A noun carries its forms and its `kind`. The kind keeps the sentences sane: persons give, doors do
# not. One noun is *weak*: *Junge* becomes *Jungen* everywhere but in the nominative singular, so that
# *den Jungen* is one boy acted on or several boys who receive. The verb decides.


# %%
@dataclass(frozen=True)
class Noun:
    """A noun in both languages. `oblique`: the singular outside the nominative, if it differs."""

    gender: Gender
    singular: str
    plural: str
    english: str
    english_plural: str
    kind: str
    oblique: str = ""

    def german(self, case: Case, plural: bool) -> str:
        """The German form: the dative plural adds -n, a weak noun adds -n to its oblique cases."""
        if not plural:
            return self.singular if case == "nom" else self.oblique or self.singular
        return self.plural + "n" if case == "dat" and self.plural[-1] != "n" else self.plural


@dataclass(frozen=True)
class Adjective:
    """An adjective: its German stem, its English form and the kinds of noun it may describe."""

    stem: str
    english: str
    kinds: str


# %%
NOUNS = (
    Noun("m", "Mann", "Männer", "man", "men", "person"),
    Noun("f", "Frau", "Frauen", "woman", "women", "person"),
    Noun("n", "Kind", "Kinder", "child", "children", "person"),
    Noun("m", "Junge", "Jungen", "boy", "boys", "person", oblique="Jungen"),
    Noun("n", "Mädchen", "Mädchen", "girl", "girls", "person"),
    Noun("f", "Königin", "Königinnen", "queen", "queens", "person"),
    Noun("m", "Hund", "Hunde", "dog", "dogs", "animal"),
    Noun("f", "Katze", "Katzen", "cat", "cats", "animal"),
    Noun("n", "Pferd", "Pferde", "horse", "horses", "animal"),
    Noun("m", "Brief", "Briefe", "letter", "letters", "text"),
    Noun("n", "Buch", "Bücher", "book", "books", "text"),
    Noun("f", "Zeitung", "Zeitungen", "newspaper", "newspapers", "text"),
    Noun("m", "Apfel", "Äpfel", "apple", "apples", "food"),
    Noun("n", "Ei", "Eier", "egg", "eggs", "food"),
    Noun("m", "Ball", "Bälle", "ball", "balls", "gift"),
    Noun("f", "Blume", "Blumen", "flower", "flowers", "gift"),
    Noun("f", "Tür", "Türen", "door", "doors", "door"),
    Noun("m", "Schrank", "Schränke", "cupboard", "cupboards", "door"),
)
ADJECTIVES = (
    Adjective("klein", "small", "person animal text food gift door"),
    Adjective("groß", "big", "person animal text food gift door"),
    Adjective("alt", "old", "person animal text food gift door"),
    Adjective("müd", "tired", "person animal"),
    Adjective("rot", "red", "text food gift door"),
)

# %% [markdown]
# German writes its nouns with a capital, and so do we. The first word of a sentence gets no capital unless it is a noun:
# *Der* and *der* would be two words for the model, and nothing would be learnt from it.
#
# A noun phrase puts the pieces together. `link` is the memory mentioned above: the article, the
# adjective and the noun each get a name that is the same in both languages.


# %%
@dataclass(frozen=True)
class Word:
    """One word of a sentence; words with the same `link` in both languages belong together."""

    text: str
    link: str


def words(text: str, link: str) -> list[Word]:
    """The words of a text, all with one link."""
    return [Word(word, link) for word in text.split()]


def flat(parts: Iterable[list[Word]]) -> list[Word]:
    """All words of several parts, in order."""
    return [word for part in parts for word in part]


# %%
@dataclass(frozen=True)
class NounPhrase:
    """A noun with its number, its article and at most one adjective."""

    noun: Noun
    plural: bool = False
    definite: bool = True
    adjective: Adjective | None = None

    def german(self, case: Case, link: str = "") -> list[Word]:
        """Article, adjective and noun, all three in the same case."""
        column = 3 if self.plural else "mfn".index(self.noun.gender)
        article = (DEFINITE if self.definite else INDEFINITE)[case][column]
        phrase = words(article, link + "article")
        if self.adjective is not None:
            ending = (AFTER_DEFINITE if self.definite else AFTER_INDEFINITE)[case][column]
            phrase += words(self.adjective.stem + ending, link + "adjective")
        return phrase + words(self.noun.german(case, self.plural), link + "noun")

    def english(self, link: str = "") -> list[Word]:
        """Article, adjective and noun: "an" before a vowel, no article before a bare plural."""
        adjective = (
            [] if self.adjective is None else words(self.adjective.english, link + "adjective")
        )
        noun = self.noun.english_plural if self.plural else self.noun.english
        phrase = adjective + words(noun, link + "noun")
        article = "an" if phrase[0].text[0] in "aeiou" else "a"
        if self.definite or self.plural:
            article = "the" if self.definite else ""
        return words(article, link + "article") + phrase

    def unmistakable(self, case: Case) -> bool:
        """Whether the German form shows its case, so that it may stand in front of the subject."""
        if case == "acc":
            return self.noun.gender == "m" and not self.plural
        return self.definite or not self.plural


# %% tags=["active-ipynb"]
# man, woman, child = NOUNS[:3]
# old = ADJECTIVES[2]
# for definite, plural in ((True, False), (False, False), (True, True), (False, True)):
#     for case in ("nom", "acc", "dat"):
#         phrases = [NounPhrase(noun, plural, definite, old) for noun in (man, woman, child)]
#         columns = [" ".join(word.text for word in phrase.german(case)) for phrase in phrases]
#         print(f"{case}  " + "".join(f"{column:22}" for column in columns))
#     print("     " + "".join(f"{' '.join(w.text for w in p.english()):22}" for p in phrases), "\n")

# %% [markdown]
# Look down the first column: *der*, *den*, *dem* are three words, and English has one. Now look at
# *der*: it is a man who acts in the first line and a woman who receives in the third. A model that
# translates word by word cannot know which. It has to look at the noun, and sometimes at the verb.
#
# English has one such case too: *an old man*, but *a man*. The article looks ahead.
#
# ## Verbs: one verb, two pieces
#
# *Aufwachen* means to wake up. In a main clause it comes apart: *der Hund wacht auf*. The piece that
# splits off is a **separable particle**. A verb also says which roles it has, in English order, and the
# case that German gives each of them.

# %%
NOT_PAST = ("present", "will", "kann", "muss")
TENSES = ("perfect", *NOT_PAST)


@dataclass(frozen=True)
class Verb:
    """A verb with its forms in both languages and its roles, in English order.

    `present` and `present_plural` are written "wacht auf" where a particle separates;
    `roles` gives each role's German case and the kinds of noun that may fill it.
    """

    present: str
    present_plural: str
    participle: str
    english: str
    english_plural: str
    english_past: str
    roles: Roles
    auxiliary: Literal["haben", "sein"] = "haben"
    tenses: tuple[str, ...] = TENSES
    takes_clause: bool = False

    @property
    def particle(self) -> str:
        """The separable particle, or nothing: "auf" in "wacht auf"."""
        return (self.present.split() + [""])[1]

    @property
    def infinitive(self) -> str:
        """The German infinitive, with its particle in front: "aufwachen"."""
        return self.particle + self.present_plural.split()[0]

    @property
    def definite_only(self) -> bool:
        """Whether all phrases are definite: where the dative comes first, it must show."""
        return self.roles[0][0] == "dat"


@dataclass(frozen=True)
class Adverb:
    """An adverb of time and the tenses it goes with."""

    german: str
    english: str
    tenses: tuple[str, ...]


# %%
MODALS = {  # singular and plural, German and English
    "will": ("will", "wollen", "wants to", "want to"),
    "kann": ("kann", "können", "can", "can"),
    "muss": ("muss", "müssen", "must", "must"),
}
AUXILIARIES = {"haben": ("hat", "haben"), "sein": ("ist", "sind")}
ADVERBS = (
    Adverb("heute", "today", TENSES),
    Adverb("jetzt", "now", NOT_PAST),
    Adverb("gestern", "yesterday", ("perfect",)),
    Adverb("morgen", "tomorrow", ("will", "kann", "muss")),
)

# %%
LIVING = "person animal"
THING = "text food gift"
BY_PERSON: Role = ("nom", "person")
BY_LIVING: Role = ("nom", LIVING)
ALONE: Roles = (BY_LIVING,)
SOMETHING: Roles = (BY_LIVING, ("acc", LIVING + " " + THING + " door"))
GIVING: Roles = (BY_PERSON, ("dat", "person"), ("acc", THING))
VERBS = (
    Verb("schläft", "schlafen", "geschlafen", "sleeps", "sleep", "slept", ALONE),
    Verb("lacht", "lachen", "gelacht", "laughs", "laugh", "laughed", (BY_PERSON,)),
    Verb("tanzt", "tanzen", "getanzt", "dances", "dance", "danced", (BY_PERSON,)),
    Verb("wacht auf", "wachen auf", "aufgewacht", "wakes up", "wake up", "woke up", ALONE, "sein"),
    Verb("läuft weg", "laufen weg", "weggelaufen", "runs away", "run away", "ran away", ALONE, "sein"),
    Verb("kommt an", "kommen an", "angekommen", "arrives", "arrive", "arrived", ALONE, "sein"),
    Verb("sieht", "sehen", "gesehen", "sees", "see", "saw", SOMETHING),
    Verb("sucht", "suchen", "gesucht", "looks for", "look for", "looked for", SOMETHING),
    Verb("liest", "lesen", "gelesen", "reads", "read", "read", (BY_PERSON, ("acc", "text"))),
    Verb("isst", "essen", "gegessen", "eats", "eat", "ate", (BY_PERSON, ("acc", "food"))),
    Verb("kauft", "kaufen", "gekauft", "buys", "buy", "bought", (BY_PERSON, ("acc", THING))),
    Verb("macht auf", "machen auf", "aufgemacht", "opens", "open", "opened",
         (BY_PERSON, ("acc", "door"))),
    Verb("lädt ein", "laden ein", "eingeladen", "invites", "invite", "invited",
         (BY_PERSON, ("acc", "person"))),
    Verb("holt ab", "holen ab", "abgeholt", "picks up", "pick up", "picked up",
         (BY_PERSON, ("acc", LIVING))),
    Verb("hilft", "helfen", "geholfen", "helps", "help", "helped", (BY_PERSON, ("dat", LIVING))),
    Verb("folgt", "folgen", "gefolgt", "follows", "follow", "followed",
         (BY_LIVING, ("dat", LIVING)), "sein"),
    Verb("gibt", "geben", "gegeben", "gives", "give", "gave", GIVING),
    Verb("zeigt", "zeigen", "gezeigt", "shows", "show", "showed", GIVING),
    Verb("bringt", "bringen", "gebracht", "brings", "bring", "brought", GIVING),
    Verb("gefällt", "gefallen", "gefallen", "likes", "like", "liked",
         (("dat", "person"), ("nom", "animal " + THING)), tenses=("present", "perfect")),
    Verb("sagt", "sagen", "gesagt", "says", "say", "said",
         (BY_PERSON,), tenses=("present",), takes_clause=True),
    Verb("glaubt", "glauben", "geglaubt", "thinks", "think", "thought",
         (BY_PERSON,), tenses=("present",), takes_clause=True),
    Verb("weiß", "wissen", "gewusst", "knows", "know", "knew",
         (BY_PERSON,), tenses=("present",), takes_clause=True),
)  # fmt: skip

# %% [markdown]
# A row of the table reads from left to right: he does, they do, has done; does, do, did. Then come the
# roles. The infinitive is not written down. In German it is the plural with its particle in front, in
# English the plural as it stands.
#
# Three entries deserve a second look. *Helfen* takes the dative where English has a plain object.
# *Suchen* is one word that becomes two, *look for*. And *gefallen* turns the sentence around: what
# pleases is the German subject, the person pleased is the English one. *Dem Mann gefällt das Buch* is
# *the man likes the book*.
#
# The past is the German perfect, *hat gesehen* or *ist gekommen*, and the English simple past.

# %% tags=["active-ipynb"]
# verbs = {verb.infinitive: verb for verb in VERBS}
# for name in ("aufwachen", "einladen", "helfen", "gefallen"):
#     verb = verbs[name]
#     cases = ", ".join(case for case, _ in verb.roles)
#     print(f"{name:10} {verb.present:12} {verb.participle:12} {verb.english_past:9} {cases}")

# %% [markdown]
# ## A clause in no language
#
# This is the plan of a derivation: a verb, a tense, the roles, perhaps an adverb. Nothing in it has an
# order yet, except one German choice. A German main clause may open with the subject, with the adverb,
# or with an object, and the verb comes second whatever opens it. We let an object open the clause only
# if its form shows that it is no subject: *den Hund* may, *die Katze* may not.

# %%
ADVERB_FIRST = -1


@dataclass(frozen=True)
class Clause:
    """One clause, in no language yet: who does what to whom, and when.

    `roles` stand in English order. `front` says what opens a German main clause: the role with
    that index, or the adverb if it is `ADVERB_FIRST`.
    """

    verb: Verb
    tense: str
    roles: tuple[NounPhrase, ...]
    adverb: Adverb | None = None
    front: int = 0

    @property
    def cases(self) -> tuple[Case, ...]:
        """The German case of each role."""
        return tuple(case for case, _ in self.verb.roles)

    @property
    def past(self) -> bool:
        """Whether the clause speaks of the past."""
        return self.tense == "perfect"

    def fronts(self) -> list[int]:
        """What may open the main clause: the subject, the adverb, an object whose case shows."""
        objects = [
            i
            for i, (role, case) in enumerate(zip(self.roles, self.cases, strict=True))
            if i > 0 and role.unmistakable(case)
        ]
        return [0, *objects] if self.adverb is None else [0, ADVERB_FIRST, *objects]


# %% [markdown]
# English is the easy side: subject, verb, objects, adverb.


# %%
def english_clause(clause: Clause, link: str = "") -> list[Word]:
    """The English clause: subject, verb, objects, adverb (or the adverb first)."""
    subject, *objects = (role.english(f"{link}{i}.") for i, role in enumerate(clause.roles))
    verb, plural = clause.verb, clause.roles[0].plural
    if clause.tense == "perfect":
        group = words(verb.english_past, link + "verb")
    elif clause.tense == "present":
        group = words(verb.english_plural if plural else verb.english, link + "verb")
    else:
        group = words(MODALS[clause.tense][2 + plural], link + "modal")
        group += words(verb.english_plural, link + "verb")
    adverb = [] if clause.adverb is None else words(clause.adverb.english, link + "adverb")
    body = subject + group + flat(objects)
    return adverb + body if clause.front == ADVERB_FIRST else body + adverb


# %% [markdown]
# A role hands its index to its words as part of their link, so the article of the object and the article
# of the subject keep different names. The modal and the verb have names of their own too, since each
# goes its own way in German.
#
# The German verb has two parts that embrace the rest of the clause, so grammarians speak of a
# **bracket**. The *finite* part agrees with the subject. The rest is a particle, a participle or an
# infinitive.


# %%
def bracket(clause: Clause, link: str = "") -> tuple[list[Word], list[Word]]:
    """The German verb in two parts: the finite one, which moves, and the rest, which ends it."""
    verb = clause.verb
    plural = clause.roles[clause.cases.index("nom")].plural
    if clause.tense == "present":
        finite, *rest = (verb.present_plural if plural else verb.present).split()
        return words(finite, link + "verb"), words(" ".join(rest), link + "verb")
    if clause.tense == "perfect":
        finite = AUXILIARIES[verb.auxiliary][plural]
        return words(finite, link + "verb"), words(verb.participle, link + "verb")
    modal = MODALS[clause.tense][plural]
    return words(modal, link + "modal"), words(verb.infinitive, link + "verb")


# %% [markdown]
# Which role is the subject? The one in the nominative, wherever it stands. English lets the verb agree with
# the first role instead. With *gefallen* the two differ: *dem Mann gefallen die Bücher* has a plural verb,
# *the man likes the books* a singular one.
#
# Now the two orders. In a main clause one thing stands in front, then the finite part, and the bracket
# closes at the end. In a subordinate clause everything waits for the end, and the particle is joined
# to its verb again.


# %%
def german_parts(clause: Clause, link: str) -> tuple[list[list[Word]], list[Word]]:
    """The roles, each in its case, and the adverb."""
    roles = [
        role.german(case, f"{link}{i}.")
        for i, (role, case) in enumerate(zip(clause.roles, clause.cases, strict=True))
    ]
    return roles, [] if clause.adverb is None else words(clause.adverb.german, link + "adverb")


# %%
def german_main(clause: Clause, link: str = "", opened: bool = False) -> list[Word]:
    """A main clause: one thing, the finite verb, everything else, the rest of the verb.

    `opened`: another clause already stands in front, so the verb comes first.
    """
    finite, rest = bracket(clause, link)
    middle, adverb = german_parts(clause, link)
    if opened:
        first: list[Word] = []
    elif clause.front == ADVERB_FIRST:
        first, adverb = adverb, []
    else:
        first = middle.pop(clause.front)
    middle.insert(0 if first and clause.front == 0 else 1, adverb)  # after the first role
    return first + finite + flat(middle) + rest


# %%
def german_subordinate(clause: Clause, link: str = "") -> list[Word]:
    """A subordinate clause: everything else, then the whole verb, the finite part last."""
    finite, rest = bracket(clause, link)
    middle, adverb = german_parts(clause, link)
    middle.insert(1, adverb)
    if clause.tense == "present":  # the particle joins the verb again: "aufwacht"
        return flat(middle) + words(clause.verb.particle + finite[0].text, link + "verb")
    return flat(middle) + rest + finite


# %% tags=["active-ipynb"]
# queen, dog, letter = NOUNS[5], NOUNS[6], NOUNS[9]
# gift = Clause(
#     verbs["zeigen"], "present", (NounPhrase(man), NounPhrase(queen), NounPhrase(letter)), ADVERBS[0]
# )
# for front in gift.fronts():
#     print(" ".join(word.text for word in german_main(replace(gift, front=front))))
# print("dass", " ".join(word.text for word in german_subordinate(gift)))
# print(" ".join(word.text for word in english_clause(gift)))
#
# waking = Clause(verbs["aufwachen"], "present", (NounPhrase(dog),))
# for tense in TENSES:
#     clause = replace(waking, tense=tense)
#     main, subordinate = german_main(clause), german_subordinate(clause)
#     print(f"{' '.join(w.text for w in main):24} dass {' '.join(w.text for w in subordinate)}")

# %% [markdown]
# The first lines say the same thing: the man shows the queen the letter today. Only who stands in front
# changes, and the case endings keep everybody's role clear. Then comes the clause after *dass* with
# its verb at the end, and the English. Below, *wacht auf* travels through the tenses: apart on the left,
# together on the right.
#
# ## Sentences
#
# Clauses are joined by *dass*, *weil* and *wenn*: that, because, when. A clause may also stand before the
# main clause. It then counts as the thing in front, and the verb follows its comma.

# %%
CONJUNCTIONS = {"dass": "that", "weil": "because", "wenn": "when"}


@dataclass(frozen=True)
class Sentence:
    """A main clause, perhaps a clause before it, and any number of clauses after it."""

    main: Clause
    before: tuple[str, Clause] | None = None
    after: tuple[tuple[str, Clause], ...] = ()

    def derive(self) -> Derivation:
        """Write the sentence in both languages at once."""
        german: list[Word] = []
        target: list[Word] = []
        if self.before is not None:
            conjunction, clause = self.before
            german += words(conjunction, "b.conjunction") + german_subordinate(clause, "b.")
            target += words(CONJUNCTIONS[conjunction], "b.conjunction") + english_clause(
                clause, "b."
            )
            german += words(",", "b.comma")
            target += words(",", "b.comma")
        german += german_main(self.main, "m.", opened=self.before is not None)
        target += english_clause(self.main, "m.")
        for i, (conjunction, clause) in enumerate(self.after):
            link = f"a{i}."
            german += words(",", link + "comma") + words(conjunction, link + "conjunction")
            german += german_subordinate(clause, link)
            target += words(CONJUNCTIONS[conjunction], link + "conjunction")
            target += english_clause(clause, link)
        return Derivation(
            tuple(word.text for word in german),
            tuple(word.text for word in target),
            tuple(
                (i, j)
                for i, source in enumerate(german)
                for j, word in enumerate(target)
                if source.link == word.link
            ),
        )


# %% mystnb={"figure": {"caption": "Each clause has a crossing of its own: in the first the two verbs change places, in the second the particle comes back from the end.", "name": "fig-toy-derived"}, "image": {"alt": "Two rows of words joined by lines: weil der Hund weglaufen will, l\u00e4dt die Frau heute den Jungen ein; because the dog wants to run away, the woman invites the boy today. Lines cross in both clauses."}} tags=["active-ipynb"]
# ball, boy = NOUNS[14], NOUNS[3]
# says = Clause(verbs["sagen"], "present", (NounPhrase(queen),))
# shows = Clause(verbs["zeigen"], "will", (NounPhrase(man), NounPhrase(child), NounPhrase(ball)))
# derived = Sentence(says, after=(("dass", shows),)).derive()
# assert list(derived.german) == by_hand.german
# assert list(derived.english) == by_hand.english
# assert set(derived.links) == set(by_hand.links)
#
# leaves = Clause(verbs["weglaufen"], "will", (NounPhrase(dog),))
# invites = Clause(verbs["einladen"], "present", (NounPhrase(woman), NounPhrase(boy)), ADVERBS[0])
# draw_alignment(Sentence(invites, before=("weil", leaves)).derive());

# %% [markdown]
# The assertions say that the grammar derives our first sentence exactly as we matched it by hand.
# {numref}`fig-toy-derived` is another. Before the comma *weglaufen will* becomes
# *wants to run away*, the same two verbs in the other order. After it *lädt* stands before its subject and *ein*
# at the end, and both are the one English word *invites*. *Heute* goes the other way.
#
# ## Drawing at random
#
# A random sentence is a chain of random choices. Each is small, and all come from the one generator
# that is handed in, so a seed decides everything.


# %%
def draw_phrase(rng: random.Random, nouns: Sequence[Noun], definite: bool) -> NounPhrase:
    """A noun phrase at random: one in four plural, two in three definite, one in three described."""
    noun = rng.choice(nouns)
    return NounPhrase(
        noun,
        plural=rng.random() < 1 / 4,
        definite=definite or rng.random() < 2 / 3,
        adjective=rng.choice(describing(noun)) if rng.random() < 1 / 3 else None,
    )


def describing(noun: Noun) -> list[Adjective]:
    """The adjectives that may describe a noun."""
    return [a for a in ADJECTIVES if noun.kind in a.kinds.split()]


# %%
def draw_clause(
    rng: random.Random,
    tenses: Sequence[str] = TENSES,
    *,
    takes_clause: bool = False,
    adverbs: bool = True,
    movable: bool = False,
) -> Clause:
    """A clause at random, in one of `tenses`. `movable`: something else may open it."""
    verb = rng.choice(
        [v for v in VERBS if v.takes_clause == takes_clause and set(v.tenses) & set(tenses)]
    )
    possible = [t for t in tenses if t in verb.tenses]
    tense = rng.choices(possible, [1 if t in MODALS else 3 for t in possible])[0]
    roles: list[NounPhrase] = []
    for _, kinds in verb.roles:
        taken = [role.noun for role in roles]
        nouns = [n for n in NOUNS if n.kind in kinds.split() and n not in taken]
        roles.append(draw_phrase(rng, nouns, definite=verb.definite_only))
    adverb = None
    if adverbs and rng.random() < 1 / 3:
        adverb = rng.choice([a for a in ADVERBS if tense in a.tenses])
    clause = Clause(verb, tense, tuple(roles), adverb)
    return replace(clause, front=rng.choice(clause.fronts())) if movable else clause


# %% [markdown]
# Not every pair of clauses makes sense. Nobody laughs yesterday because somebody wants to sleep
# tomorrow. The rules for joining live in one place.

# %%
Join = tuple[str, tuple[str, ...], bool]


def joining(past: bool, takes_clause: bool = False) -> list[Join]:
    """How to join a clause to another: the conjunction, its tenses, whether it may have an adverb.

    What is said or thought follows "dass". A reason for something past is past itself;
    "wenn" (when) is never past and has no adverb.
    """
    if takes_clause:
        return [("dass", TENSES, True)]
    return (
        [("weil", ("perfect",), True)]
        if past
        else [("weil", TENSES, True), ("wenn", NOT_PAST, False)]
    )


# %%
def draw_sentence(rng: random.Random, clauses: int = 1) -> Sentence:
    """A sentence of that many clauses at random."""
    if clauses < 1:
        raise ValueError(f"clauses must be at least 1, got {clauses}")
    opened = clauses > 1 and rng.random() < 1 / 3
    n_after = clauses - 1 - opened
    host = draw_clause(rng, takes_clause=n_after > 0 and rng.random() < 1 / 2, movable=not opened)
    main, before, after = host, None, []
    if opened:
        conjunction, tenses, adverbs = rng.choice(joining(main.past))
        before = conjunction, draw_clause(rng, tenses, adverbs=adverbs)
    for left in reversed(range(n_after)):
        conjunction, tenses, adverbs = rng.choice(joining(host.past, host.verb.takes_clause))
        more = left > 0 and "present" in tenses and rng.random() < 1 / 2
        host = draw_clause(rng, tenses, takes_clause=more, adverbs=adverbs)
        after.append((conjunction, host))
    return Sentence(main, before, tuple(after))


# %%
def derive(rng: random.Random, clauses: int = 1) -> Derivation:
    """One random sentence of that many clauses in both languages, with its alignment."""
    return draw_sentence(rng, clauses).derive()


def sentence(rng: random.Random, clauses: int = 1) -> tuple[str, str]:
    """One random sentence of that many clauses: German, English; words separated by spaces."""
    derivation = derive(rng, clauses)
    return " ".join(derivation.german), " ".join(derivation.english)


# %% tags=["active-ipynb"]
# rng = random.Random(3)
# for _ in range(8):
#     german, english = sentence(rng, clauses=rng.choice([1, 2]))
#     print(f"{german}\n    {english}")

# %% [markdown]
# Every line is grammatical. Some are odd, as in any textbook: the grammar knows who can eat, not why.
#
# ## Does it need a translator?
#
# Perhaps a dictionary would do. We have every alignment, so we can build the best dictionary there is: for
# each German word the English word it was linked to most often. Then we translate word for word.

# %% tags=["active-ipynb"]
# rng = random.Random(2)
# drawn = [derive(rng, clauses=rng.choice([1, 2])) for _ in range(3_000)]
# seen, unseen = drawn[:2_000], drawn[2_000:]
# partners: dict[str, Counter[str]] = {}
# for derivation in seen:
#     for i, j in derivation.links:
#         partners.setdefault(derivation.german[i], Counter())[derivation.english[j]] += 1
# dictionary = {german: found.most_common(1)[0][0] for german, found in partners.items()}
#
# guesses = [[dictionary[word] for word in d.german if word in dictionary] for d in unseen]
# right = sum(tuple(guess) == d.english for guess, d in zip(guesses, unseen, strict=True))
# print(f"sentences with a crossing:             {sum(bool(d.crossing()) for d in unseen):5}")
# print(f"right word for word:                   {right:5}")
# bags = (sorted(guess) == sorted(d.english) for guess, d in zip(guesses, unseen, strict=True))
# print(f"right if the order does not count:     {sum(bags):5}")
# print(f"all:                                   {len(unseen):5}")

# %% [markdown]
# Compare the last three lines. Word for word gets a sentence right now and then, mostly a short one such
# as *der Hund schläft*. Forgiving the order helps, and still most sentences are
# wrong. They are wrong in the words: *hat* is
# no English word of its own here, *will* is two words, and *auf* belongs to a verb elsewhere. A model has to
# choose words by their company and put them elsewhere, both at once.
#
# ## Training and test sentences
#
# `pairs` draws until it has enough distinct sentences of the length asked for. `split` keeps some of
# them away from training, so that a test sentence has never been seen. It shuffles first, because
# short sentences are few and turn up early.

# %%
MAX_WORDS = 14


def pairs(
    n: int,
    seed: int,
    *,
    clauses: tuple[int, int] = (1, 2),
    words: tuple[int, int] = (2, MAX_WORDS),
) -> list[tuple[str, str]]:
    """`n` distinct pairs (German, English), the same ones for the same seed.

    `clauses` and `words` bound the number of clauses and of German words, both ends included.
    For sentences longer than the default ones ask, e.g., `clauses=(3, 4), words=(21, 30)`.
    Raises ValueError for an impossible range, or when no new sentence turns up.
    """
    for name, (low, high) in {"clauses": clauses, "words": words}.items():
        if not 1 <= low <= high:
            raise ValueError(f"{name} must be (low, high) with 1 <= low <= high, got {(low, high)}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    rng = random.Random(seed)
    found: dict[str, str] = {}
    misses = 0
    while len(found) < n:
        german, english = sentence(rng, rng.randint(*clauses))
        if words[0] <= len(german.split()) <= words[1] and german not in found:
            found[german] = english
            misses = 0
        elif (misses := misses + 1) > 20_000:
            raise ValueError(f"n={n}: found only {len(found)} with {clauses=}, {words=}")
    return list(found.items())


# %%
def split(
    n_train: int, n_test: int, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and test pairs of the default length; no German sentence is in both."""
    for name, n in {"n_train": n_train, "n_test": n_test}.items():
        if n < 0:
            raise ValueError(f"{name} must be at least 0, got {n}")
    both = pairs(n_train + n_test, seed)
    random.Random(seed).shuffle(both)  # the short sentences are found first
    return both[:n_train], both[n_train:]


# %% tags=["active-ipynb"]
# train, test = split(5_000, 500, seed=0)
# assert not {german for german, _ in train} & {german for german, _ in test}
# long = pairs(500, seed=0, clauses=(3, 4), words=(21, 30))
# print("longest training sentence:", max(len(g.split()) for g, _ in train), "German words")
# print("shortest long sentence:   ", min(len(g.split()) for g, _ in long), "German words")
# print(long[0][0])
# print(long[0][1])

# %% [markdown]
# The long sentences are at least one and a half times as long as anything in training. They are made of
# the same clauses, only more of them. The next chapter asks both models to translate them.


# %%
def draw_lengths(train: Sequence[tuple[str, str]], long: Sequence[tuple[str, str]]) -> "Figure":
    """Histogram of the number of German words of training and of long sentences."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(7.2, 2.6))
    for label, some, color in (("training", train, 0), ("long", long, 1)):
        lengths = Counter(len(german.split()) for german, _ in some)
        share = [n / len(some) for n in lengths.values()]
        ax.bar(list(lengths), share, color=figures.COLORS[color], label=label)
    ax.set(xlabel="German words in a sentence", ylabel="share of its set")
    ax.legend(loc="upper center")
    return figure


# %% mystnb={"figure": {"caption": "Training sentences have two humps, one clause and two; the long sentences begin where no training sentence reaches.", "name": "fig-toy-lengths"}, "image": {"alt": "Histogram of German sentence lengths. Training lengths peak near six and near thirteen words and stop at fourteen; long sentences lie between twenty-one and thirty."}} tags=["active-ipynb"]
# draw_lengths(train, long);

# %% [markdown]
# {numref}`fig-toy-lengths` shows the gap. The left hump is the single clauses, the right one the pairs of
# clauses, cut at the limit.
#
# ## How many sentences are there?
#
# If there were only a few thousand, the model could learn them by heart, and the test would prove
# nothing. We can count without drawing. The choices inside a clause are independent, so their numbers
# multiply; the one exception is that no noun plays two roles, which the first loop takes care of.


# %%
def ways_to_fill(verb: Verb) -> tuple[int, int]:
    """How many ways there are to fill a verb's roles: in order, and with one object in front."""
    kinds = [[n for n in NOUNS if n.kind in k.split()] for _, k in verb.roles]
    ordered = fronted = 0
    for nouns in product(*kinds):
        if len(set(nouns)) < len(nouns):
            continue
        choices = [possible_phrases(noun, verb.definite_only) for noun in nouns]
        ordered += prod(map(len, choices))
        for i in range(1, len(choices)):
            shown = [p for p in choices[i] if p.unmistakable(verb.roles[i][0])]
            fronted += prod(map(len, choices[:i] + [shown] + choices[i + 1 :]))
    return ordered, fronted


def possible_phrases(noun: Noun, definite: bool) -> list[NounPhrase]:
    """Every noun phrase around a noun."""
    articles = [True] if definite else [True, False]
    adjectives = [None, *describing(noun)]
    return [NounPhrase(noun, *rest) for rest in product([False, True], articles, adjectives)]


# %%
def count(*, main: bool = True, takes_clause: bool = False) -> int:
    """How many different main (or subordinate) clauses there are; nothing is drawn.

    The choices of the grammar are multiplied. Every choice gives another German text.
    """
    total = 0
    for verb in VERBS:
        if verb.takes_clause == takes_clause:
            ordered, fronted = ways_to_fill(verb)
            for tense in verb.tenses:
                n_adverbs = sum(tense in adverb.tenses for adverb in ADVERBS)
                total += (1 + n_adverbs) * ordered
                if main:  # the adverb in front, or an object
                    total += n_adverbs * ordered + (1 + n_adverbs) * fronted
    return total


# %% tags=["active-ipynb"]
# one = count()
# said = count(takes_clause=True) * count(main=False)
# print(f"sentences of one clause:            {one:>19,}")
# print(f"of two clauses joined by dass alone: {said:>18,}")
# print(f"seen in training:                   {len(train):>19,}")

# %% [markdown]
# The first number is exact. The second leaves out *weil* and *wenn*, so the language of two clauses is larger
# still. That each choice gives another German text is not obvious, and the tests make sure of it: they
# write out every clause of a smaller lexicon and compare their number with `count`.
#
# The training set is a vanishing part of the language. What the model gets right on the test set it has
# put together from parts.
#
# ## Can a perfect score be reached?
#
# Only if a German sentence has one English translation. German as it is spoken breaks this: in *die Katze
# sieht die Frau* either may be looking, and *sie* is she, they or you. The grammar has no pronouns, and
# an object stands in front only when its case shows. The other direction is looser: several German
# orders share one English sentence. The section above counted every choice as another German text, and the
# tests enumerate a smaller lexicon to prove it: so each German clause has one derivation and one English
# sentence. As a check on the full lexicon, look at sentences that a large sample drew more than once.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
#
# rng = random.Random(1)
# n = 2_000 if scale() == "short" else 20_000
# translations: dict[str, set[str]] = {}
# for _ in range(n):
#     german, english = sentence(rng, clauses=rng.choice([1, 2, 3]))
#     translations.setdefault(german, set()).add(english)
# assert all(len(found) == 1 for found in translations.values())
# n_english = len({english for found in translations.values() for english in found})
# print(f"{n:,} drawn: {len(translations):,} German, {n_english:,} English sentences")

# %% [markdown]
# ## From words to numbers
#
# A model reads numbers. A **vocabulary** gives each word one, and both languages share the list, because
# the model of chapter 8 uses one embedding table for source, target and output. The most frequent word
# comes first after four special ones: padding, begin, end, unknown. Words that are equally frequent
# are put in alphabetical order, so the same text gives the same numbers on every machine.
#
# A vocabulary is a frozen value: a tuple of words. The dictionary from word to number is derived from it when
# first needed. Nothing in it knows of German or English, and chapter 11 uses it as it is.

# %%
PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """The words a model knows; a word's place is its number. The first four are `SPECIAL`.

    Raises ValueError if `words` does not start with the special words or repeats one.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"words must start with {SPECIAL}, got {self.words[: len(SPECIAL)]}")
        repeated = [word for word, n in Counter(self.words).items() if n > 1]
        if repeated:
            raise ValueError(f"words must be distinct, got {repeated[:5]} more than once")

    @classmethod
    def build(
        cls,
        sentences: Iterable[Sequence[str]],
        min_count: int = 1,
        max_size: int | None = None,
    ) -> "Vocabulary":
        """The words seen at least `min_count` times, the most frequent first, ties by spelling.

        `max_size` bounds the length with the four special words included.
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        if max_size is not None and max_size < len(SPECIAL):
            raise ValueError(f"max_size must be at least {len(SPECIAL)}, got {max_size}")
        seen: Counter[str] = Counter()
        for sentence in sentences:
            if isinstance(sentence, str):
                raise ValueError(f"sentences must be sequences of words, got the text {sentence!r}")
            seen.update(sentence)
        ranked = sorted(
            (word for word, n in seen.items() if n >= min_count and word not in SPECIAL),
            key=lambda word: (-seen[word], word),
        )
        return cls((*SPECIAL, *ranked)[:max_size])

    @cached_property
    def ids(self) -> dict[str, int]:
        """The number of each ordinary word."""
        return {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.ids

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The numbers of some words; a word that is not known becomes UNK."""
        return [self.ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of some numbers: up to the first EOS, without PAD and BOS.

        Raises ValueError for a number outside [0, len(self)).
        """
        tokens: list[str] = []
        for i in map(int, ids):
            if not 0 <= i < len(self):
                raise ValueError(f"ids must be in [0, {len(self)}), got {i}")
            if i == EOS:
                break
            if i not in (PAD, BOS):
                tokens.append(self.words[i])
        return tokens


# %% tags=["active-ipynb"]
# vocabulary = Vocabulary.build(text.split() for pair in train for text in pair)
# print(len(vocabulary), "words:", *vocabulary.words[:12], "...")
# ids = vocabulary.encode("der Hund wacht schnell auf".split())
# print(ids, vocabulary.decode(ids))
# assert vocabulary.decode(vocabulary.encode(train[0][0].split())) == train[0][0].split()

# %% [markdown]
# *Schnell* is no word of this language, and comes back as `<unk>`. That loss cannot be undone, so a real
# corpus needs a better answer; {cite:t}`sennrich2016neural` cut rare words into pieces, and the paper does
# the same.
#
# ## From numbers to a batch
#
# Sentences have different lengths, a tensor has one. We fill up on the right with `PAD` and remember
# what is real in a tensor of booleans. The target is needed twice: shifted right as what the decoder
# reads, unshifted as what it should say.
#
# $$
# \mathrm{tgt\_in} = (\mathrm{BOS}, y_1, \dots, y_n), \qquad
# \mathrm{tgt\_out} = (y_1, \dots, y_n, \mathrm{EOS})
# $$ (eq-toy-shift)
#
# At position $t$ the decoder has read $y_1, \dots, y_{t-1}$ and is asked for $y_t$. By
# {eq}`eq-toy-shift` the last answer is `EOS`: stopping has to be learnt like any word.


# %%
@dataclass(frozen=True)
class Batch:
    """Sentences of one training step, padded on the right. True in `_padding` = a real token."""

    src: Tensor  # (B, S)
    tgt_in: Tensor  # (B, T)   BOS ...
    tgt_out: Tensor  # (B, T)       ... EOS
    src_padding: Tensor  # (B, S)
    tgt_padding: Tensor  # (B, T)

    @property
    def n_tokens(self) -> int:
        """How many real target tokens there are to predict."""
        return int(self.tgt_padding.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


# %%
def padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows of different length as one long tensor, filled with PAD on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """One batch from encoded pairs (source, target).

    The source gets EOS at its end. The decoder reads BOS and the target, and predicts the target
    and EOS. Raises ValueError for no pairs and for ids that are negative, PAD, BOS or EOS.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    for ids in (ids for pair in pairs for ids in pair):
        if any(i < UNK for i in ids):
            raise ValueError(f"pairs must hold ids of words, at least {UNK}, got {ids}")
    src = padded([source + [EOS] for source, _ in pairs])
    tgt_in = padded([[BOS] + target for _, target in pairs])
    tgt_out = padded([target + [EOS] for _, target in pairs])
    return Batch(src, tgt_in, tgt_out, src != PAD, tgt_out != PAD)


# %% tags=["active-ipynb"]
# def encode(some: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
#     """Both sides of each pair as numbers."""
#     return [tuple(vocabulary.encode(text.split()) for text in pair) for pair in some]
#
#
# batch = collate(encode([train[0], ("der Hund schläft", "the dog sleeps")]))
# print("tgt_in ", *[vocabulary.words[i] for i in batch.tgt_in[1]])
# print("tgt_out", *[vocabulary.words[i] for i in batch.tgt_out[1]])
# print("padding", batch.tgt_padding[1].int().tolist())
# assert batch.src.shape == batch.src_padding.shape == (2, len(train[0][0].split()) + 1)
# assert torch.equal(
#     batch.tgt_in[:, 1:][batch.tgt_padding[:, 1:]], batch.tgt_out[:, :-1][batch.tgt_padding[:, 1:]]
# )
# print(batch.n_tokens, "tokens to predict in", batch.tgt_out.numel(), "places")

# %% [markdown]
# The two rows are the same words, one place apart; the assertion says so for the whole batch. The last
# line is the price of padding. One pass over all pairs, in an order that the seed decides:


# %%
def batches(
    pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, *, seed: int
) -> Iterator[Batch]:
    """One pass over the pairs in an order set by `seed`; the last batch may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    starts = range(0, len(order), batch_size)
    return (collate([pairs[i] for i in order[s : s + batch_size]]) for s in starts)


# %% tags=["active-ipynb"]
# some = encode(train)
# epoch = list(batches(some, 64, seed=0))
# real = sum(batch.n_tokens for batch in epoch)
# places = sum(batch.tgt_out.numel() for batch in epoch)
# assert sum(len(batch.src) for batch in epoch) == len(train)
# assert real == sum(len(target) + 1 for _, target in some)
# print(
#     f"{len(epoch)} batches, {real:,} tokens in {places:,} places: {1 - real / places:.0%} padding"
# )

# %% [markdown]
# ## What the paper did
#
# {cite:t}`vaswani2017attention` trained on about 4.5 million German-English sentence pairs with a shared
# vocabulary of about 37,000 word pieces, and grouped pairs by length into batches of roughly 25,000 source
# and 25,000 target tokens (section 5.1). Our vocabulary is whole words and our batches are random. Both
# would be wasteful there; chapter 11 groups by length. Sharing one vocabulary we keep.
#
# ## How it breaks, and how you notice
#
# - **Test sentences in training.** The score is excellent and means nothing. Compare the sets; the cell
#   above asserts it.
# - **No shift.** If the decoder reads the word it should say, the loss goes to zero at once and
#   the translation is rubbish. Print one row of `tgt_in` and `tgt_out`.
# - **Two ends.** If the text already carries `EOS` and the batch adds one, the model learns to
#   predict an end after the end.
#   `collate` refuses special numbers.
# - **An order that changes between runs.** Python shuffles sets of strings anew in every process. A
#   vocabulary built from a set gives other numbers tomorrow, and yesterday's weights no longer fit.
#   `build` sorts.
#
# ## Takeaways
#
# - One derivation writes both languages, so every pair is right and every alignment known.
# - Case tells who does what, the bracket sends the verb away: translating means looking elsewhere.
# - One German sentence, one English sentence: a perfect score exists.
# - The target goes in shifted right, and comes out with `EOS`.
#
# ## Exercises
#
# **Exercise 9.1.** Write the dative plural of *der große Hund* (the big dogs receive), article included.

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check
#
# answer = ...
# check("9.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# dogs = NounPhrase(dog, plural=True, adjective=ADJECTIVES[1])
# check("9.1", " ".join(word.text for word in dogs.german("dat")))

# %% [markdown]
# **Exercise 9.2.** Build the `Sentence` whose German is *den Apfel hat das Mädchen gestern gegessen*. Which
# field of its clause puts the apple in front?

# %% tags=["active-ipynb"]
# answer = ...
# check("9.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# girl, apple = NounPhrase(NOUNS[4]), NounPhrase(NOUNS[12])
# eats = Clause(verbs["essen"], "perfect", (girl, apple), adverb=ADVERBS[2], front=1)
# print(" ".join(Sentence(eats).derive().german))
# check("9.2", Sentence(eats))

# %% [markdown]
# **Exercise 9.3.** Padding costs time. Write `tight(pairs, batch_size)`: a list of batches that holds
# every encoded pair once, no batch larger than `batch_size`, with less than a quarter of the target padding
# of `batches`.

# %% tags=["active-ipynb"]
# answer = ...
# check("9.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def tight(pairs: list[tuple[list[int], list[int]]], batch_size: int) -> list[Batch]:
#     """Batches of pairs whose targets are about equally long."""
#     ranked = sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0])))
#     return [collate(ranked[i : i + batch_size]) for i in range(0, len(ranked), batch_size)]
#
#
# check("9.3", tight)

# %% [markdown]
# Always training from short to long would be a poor order. Chapter 11 shuffles the batches.
