"""The exercises of Part II."""

from itertools import pairwise
from typing import Any

import torch

from transformer_annotated.exercises import close, exercise

# Chapter 12, Corpora


@exercise("12.1")
def _(answer: Any) -> None:
    close(answer, 1 - 0.1 * 0.1, hint="It is unseen only if both other lines are in the test, too.")


@exercise("12.2")
def _(answer: Any) -> None:
    text = "a\x0cb\r\nc\u2028d\n\x85\n"
    by_newline = text.count("\n")
    hint = "Cut at the newline alone first. Then at U+000C, U+2028 and U+0085, too."
    close(answer, [by_newline, len(text.splitlines())], hint=hint)


@exercise("12.3")
def _(answer: Any) -> None:
    from transformer_annotated.training.corpora import components

    alphabet = [chr(65 + i) for i in range(26)]
    chain = [(x, x.lower()) for x in alphabet if x != "M"]
    chain += [(y, x.lower()) for x, y in pairwise(alphabet)]
    groups = len(components(chain))
    close(answer, groups, hint="A chain that loses one link.")


@exercise("12.4")
def _(answer: Any) -> None:
    header, crossed = answer
    assert header == "bytes=750000-", "What is the first byte that is missing?"
    close(crossed, 1_000_000, rel=1e-9, hint="No byte came twice.")


# Chapter 12: corpora (end)


@exercise("13.1")
def _(answer: Any) -> None:
    from transformer_annotated.training.tokens import learn_merges

    right = learn_merges({"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}, 3)
    assert isinstance(answer, list | tuple), "A list of three pairs is asked for."
    assert len(answer) == 3, "A list of three pairs is asked for."
    for i, (pair, expected) in enumerate(zip(answer, right, strict=True), 1):
        assert isinstance(pair, list | tuple), "Each merge is a pair of pieces."
        hint = "Add up the words that hold the pair, each as often as it was seen, and count anew."
        assert tuple(pair) == expected, f"Merge {i} is another one. {hint}"


@exercise("13.2")
def _(answer: Any) -> None:
    from transformer_annotated.training.tokens import spaced

    hint = "Count bytes: the space in front, and how many UTF-8 needs for ë."
    close(answer, len(spaced("Zoë").encode()), rel=1e-6, hint=hint)


@exercise("13.3")
def _(answer: Any) -> None:
    import random

    from transformer_annotated.training.tokens import apply_merges, learn_merges

    assert callable(answer), "A function of a word, merges, p and a random.Random is asked for."
    merges = learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 8)
    rng = random.Random(0)
    for word in ("lowest", "newest", "slow", "wider"):
        kept = tuple(answer(word, merges, 0.0, rng))
        assert kept == apply_merges(word, merges), "With p = 0 it must equal apply_merges."
        assert tuple(answer(word, merges, 1.0, rng)) == tuple(word), "With p = 1: characters."
    cuts = [tuple(answer("lowest", merges, 0.5, rng)) for _ in range(2_000)]
    assert all("".join(cut) == "lowest" for cut in cuts), "The pieces must spell the word."
    pieces = {*"lowest", *("".join(pair) for pair in merges)}
    assert {piece for cut in cuts for piece in cut} <= pieces, "Only pieces that a merge makes."
    assert len(set(cuts)) > 4, "With p = 0.5 the word must be cut in several ways."
    whole = apply_merges("lowest", [("l", "o"), ("e", "s")])
    pairs = [("l", "o"), ("e", "s")]
    share = sum(tuple(answer("lowest", pairs, 0.5, rng)) == whole for _ in range(4_000)) / 4_000
    # the first round keeps at least one of two joins (3/4), the next keeps the other (1/2)
    close(share, 3 / 8, rel=0.1, hint="Draw anew for every pair in every round.")


# Chapter 13: tokens (end)


@exercise("14.1")
def _(answer: Any) -> None:
    sizes = [4, 12, 5, 4]
    splits = [([0, i], [j for j in (1, 2, 3) if j != i]) for i in (1, 2, 3)]
    places = [sum(len(b) * max(sizes[i] for i in b) for b in split) for split in splits]
    right = [1 - sum(sizes) / (4 * max(sizes)), 1 - sum(sizes) / min(places)]
    hint = "Words divided by places, taken from 1. The two longest belong together."
    close(answer, right, rel=5e-3, hint=hint)


@exercise("14.2")
def _(answer: Any) -> None:
    close(answer, 25_000 // (max(39, 49) + 1), hint="Both sides must fit, with one sign more each.")


@exercise("14.3")
def _(answer: Any) -> None:
    from transformer_annotated.training.batching import TokenBatchSampler

    assert callable(answer), "A function of a sampler and a number of batches is asked for."
    generator = torch.Generator().manual_seed(14)
    sampler = TokenBatchSampler(torch.randint(1, 30, (900, 2), generator=generator), 60, seed=3)
    n = [len(sampler.epoch_batches(epoch)) for epoch in range(3)]
    for done, right in (
        (0, (0, 0)),
        (n[0] - 1, (0, n[0] - 1)),
        (n[0], (1, 0)),
        (n[0] + n[1] + 5, (2, 5)),
    ):
        got = tuple(answer(sampler, done))
        assert got == right, f"After {done} batches of epochs with {n} it says {got}."


# Chapter 14: batching (end)


@exercise("15.1")
def _(answer: Any) -> None:
    q = torch.full((8000,), 0.2 / 8000, dtype=torch.float64)
    q[0] += 0.8
    close(answer, -(q * q.log()).sum(), rel=1e-3, hint="Where p = q the loss is the entropy of q.")


@exercise("15.2")
def _(answer: Any) -> None:
    words, means = torch.tensor([10.0, 30.0, 60.0]), torch.tensor([4.0, 3.0, 2.0])
    right = [(words * means).sum() / words.sum(), means.mean()]
    close(answer, right, rel=5e-3, hint="First turn each mean back into a sum.")


@exercise("15.3")
def _(answer: Any) -> None:
    assert callable(answer), "A function of logits and weight is asked for."
    generator = torch.Generator().manual_seed(15)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    penalty = 0.3 * logits.logsumexp(dim=-1).square().sum()
    (slope,) = torch.autograd.grad(penalty, logits)
    hint = "The slope of ln sum exp z is the softmax of z; the square brings the chain rule."
    with torch.no_grad():
        close(answer(logits.detach(), 0.3), slope, rel=1e-6, hint=hint)


# Chapter 15: objective (end)


@exercise("16.1")
def _(answer: Any) -> None:
    hint = "The first mean is 0.1 g and the first mean square 0.02 g²; the corrections undo both."
    close(answer, [1e-3, 1e-3 * 0.1 / 0.02**0.5], hint=hint)


@exercise("16.2")
def _(answer: Any) -> None:
    expected = []
    for beta2 in (0.98, 0.999):
        square, steps = 1.0, 0
        while square >= 0.01:
            square, steps = square * beta2, steps + 1
        expected.append(steps)
    close(answer, expected, rel=1e-9, hint="Each step multiplies the mean square by beta2.")


@exercise("16.3")
def _(answer: Any) -> None:
    hint = "The paper's peak is 1/sqrt(D · warm_up); how many times as high is 0.001?"
    close(answer, 1e-3 * (256 * 1000) ** 0.5, hint=hint)


@exercise("16.4")
def _(answer: Any) -> None:
    assert callable(answer), "A function of a list of tensors and max_norm is asked for."
    long, short = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.3, 0.4])]
    got = answer([g.clone() for g in long], 1.0)
    assert len(got) == 2, "As many tensors should come back as were given."
    for g, expected in zip(got, long, strict=True):
        close(g, expected / 5, hint="Its length is that of all tensors together, here 5.")
    close(answer(short, 1.0)[0], short[0], hint="What is short enough stays as it is.")
    nothing = answer([torch.zeros(3)], 1.0)[0]
    close(nothing, torch.zeros(3), hint="A gradient of zeros must stay zeros, not become NaN.")


# Chapter 16: schedule (end)


@exercise("17.1")
def _(answer: Any) -> None:
    P100, hour = 9.5e12, 3600
    hint = "Cards, times seconds, times operations a second."
    close(answer, [8 * 12 * hour * P100, 24 * hour * P100], rel=0.02, hint=hint)


@exercise("17.2")
def _(answer: Any) -> None:
    def faster(f: float, s: float) -> float:
        return 1 / (1 - f + f / s)

    hint = "Add up the time that is left, as a share of the old one, and turn it over."
    close(answer, [faster(0.12, 5), faster(0.12, float("inf"))], rel=5e-3, hint=hint)


@exercise("17.3")
def _(answer: Any) -> None:
    k = min(range(256), key=lambda k: abs(k / 256 - 0.1))
    close(answer, [k / 256, 256 / (256 - k)], hint="How many of 256 values mean drop?")


@exercise("17.4")
def _(answer: Any) -> None:
    words = torch.empty(100_000, dtype=torch.int64).random_(generator=torch.Generator())
    low = round(0.1 * 2**16) - 2**15
    dropped = float((words.view(torch.int16) < low).float().mean())
    close(answer, dropped, rel=0.03, hint="In which quarter of a word is that bit, and what is it?")


# Chapter 17: speed (end)


@exercise("18.1")
def _(answer: Any) -> None:
    from transformer_annotated import PAPER_BASE, count_parameters

    n = count_parameters(PAPER_BASE)["total"]
    close(answer, 3 * 4 * n, rel=1e-6, hint="The weights and two moments: three numbers a weight.")


@exercise("18.2")
def _(answer: Any) -> None:
    best = (2 * 20 * 86_400) ** 0.5 / 60
    close(answer, best, rel=0.02, hint="Both times in seconds, then the root, then minutes.")


@exercise("18.3")
def _(answer: Any) -> None:
    right = ["write", "fsync files", "rename", "fsync parent", "delete"]
    assert sorted(answer) == sorted(right), "A list of the five operations is asked for."
    place = list(answer).index
    assert place("rename") > place("fsync files") > place("write"), (
        "After the rename everyone reads the files. What must the disk have by then?"
    )
    assert list(answer) == right, (
        "Deleting comes when the new checkpoint can no longer be lost, not even its name."
    )


@exercise("18.4")
def _(answer: Any) -> None:
    assert callable(answer), "A function of mean, new and n is asked for."
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(18), dtype=torch.float64)
    mean = rows[0].clone()
    for n, row in enumerate(rows[1:], start=2):
        mean = answer(mean, row, n)
        hint = "The old mean counts n - 1 times, the new tensor once."
        close(mean, rows[:n].mean(dim=0), rel=1e-6, hint=hint)


# Chapter 18: checkpoints (end)


@exercise("19.1")
def _(answer: Any) -> None:
    step, means = (10 * 4.0 + 90 * 2.0) / 100, (4.0 + 2.0) / 2
    close(answer, [step, means], hint="Weigh each mean by its number of words; then do not.")


@exercise("19.2")
def _(answer: Any) -> None:
    micro = 500 * 4 // 2
    hint = "`accumulate` counts the micro-batches of all processes; the schedule counts steps."
    close(answer, [float(micro), 500.0], hint=hint)


@exercise("19.3")
def _(answer: Any) -> None:
    from itertools import islice

    from transformer_annotated.training.trainer import index_stream

    def batches(epoch: int) -> list[list[int]]:
        return [[100 * epoch + i] for i in range(3 + epoch % 3)]

    stream = [rows[0] for rows in islice(index_stream(batches, 0, 0), 200)]
    for accumulate in (1, 2, 7):
        for step in range(20):
            epoch, index = answer(batches, step, accumulate)
            epoch, index = int(epoch), int(index)
            assert 0 <= index < len(batches(epoch)), (
                f"After {step} steps of {accumulate}: epoch {epoch} has no batch {index}. "
                "The batch after an epoch's last one is number 0 of the next epoch."
            )
            assert batches(epoch)[index][0] == stream[step * accumulate], (
                f"After {step} steps of {accumulate}: not the batch that comes next."
            )


# Chapter 19: trainer (end)


@exercise("20.1")
def _(answer: Any) -> None:
    layers, width, number, tokens = 6, 512, 4, 100 + 80
    hint = "For each layer and token two vectors of D numbers; the memory's tokens count too."
    close(answer, layers * 2 * width * number * tokens, rel=1e-9, hint=hint)


@exercise("20.2")
def _(answer: Any) -> None:
    prompt, total = 12, 20
    cached = prompt**2 + sum(prompt + n for n in range(1, total - prompt + 1))
    again = sum(n**2 for n in range(prompt, total + 1))
    hint = "One call with T queries and S keys scores T · S pairs."
    close(answer, [cached, again], rel=1e-9, hint=hint)


@exercise("20.3")
def _(answer: Any) -> None:
    assert callable(answer), "A function of logits and min_p is asked for."
    generator = torch.Generator().manual_seed(203)
    logits = 2 * torch.randn(20, 12, generator=generator)
    for min_p in (0.05, 0.3, 1.0):
        p = logits.softmax(dim=-1)
        keep = p >= min_p * p.amax(dim=-1, keepdim=True) * (1 - 1e-6)
        found = answer(logits.clone(), min_p)
        assert found.shape == logits.shape, "The logits keep their shape."
        assert torch.equal(found > -torch.inf, keep), (
            "p_i >= min_p · p_max is a statement about differences of logits."
        )
        assert torch.equal(found[keep], logits[keep]), "Tokens that stay keep their logits."


# Chapter 20: decoding (end)


@exercise("21.1")
def _(answer: Any) -> None:
    ratio = torch.tensor([4.5 / 4.0, (5 + 9) / (5 + 6)], dtype=torch.float64).log()
    hint = "Set the two scores equal; alpha is then a quotient of two logarithms."
    close(answer, ratio[0] / ratio[1], rel=2e-3, hint=hint)


@exercise("21.2")
def _(answer: Any) -> None:
    words, tokens, beam = 1000, 4, 4
    everything = sum(words**n for n in range(tokens))
    candidates = (words + 1) * (1 + beam * (tokens - 1))
    hint = "EOS takes one place; each hypothesis is continued by every word and by EOS."
    close(answer, [everything, candidates], rel=1e-12, hint=hint)


@exercise("21.3")
def _(answer: Any) -> None:
    from transformer_annotated.training.beam import GNMT

    assert callable(answer), "A function of log_p, lengths and alpha is asked for."
    generator = torch.Generator().manual_seed(213)
    lengths = torch.randint(1, 30, (40, 5), generator=generator)
    log_p = -0.4 * lengths - torch.rand(40, 5, generator=generator)
    for alpha in (0.0, 0.6, 1.5):
        best = GNMT(alpha).score(log_p, lengths).argmax(dim=-1)
        found = torch.as_tensor(answer(log_p, lengths, alpha))
        assert found.shape == best.shape, "One number for each sentence."
        assert torch.equal(found, best), "Divide by ((5 + n) / 6) to the power of alpha."


# Chapter 21: beam (end)

# Chapter 22: bleu -------------------------------------------------------------------------------


@exercise("22.1")
def _(answer: Any) -> None:
    from transformer_annotated.training.bleu import clipped, n_grams

    hypothesis, reference = "the the cat on the mat".split(), "a cat sleeps on the mat".split()
    shares = [clipped(hypothesis, reference, n) / n_grams(hypothesis, n).total() for n in (1, 2)]
    close(answer, shares, hint="The reference has one *the*, so only one counts.")


@exercise("22.2")
def _(answer: Any) -> None:
    penalty = torch.exp(torch.tensor(1 - 10 / 8, dtype=torch.float64))
    close(answer, 100 * penalty, hint="All shares are 1; what is left is the brevity penalty.")


@exercise("22.3")
def _(answer: Any) -> None:
    from transformer_annotated.training.bleu import n_grams

    assert callable(answer), "A function of a hypothesis, references and n is asked for."
    hypothesis = "the cat and the dog and the bird".split()
    references = [
        "the dog and the bird".split(), "a cat and a dog and the bird".split(), ["and"] * 3,
    ]  # fmt: skip
    for n in (1, 2, 3):
        counts = [n_grams(reference, n) for reference in references]
        expected = sum(
            min(times, max(count[gram] for count in counts))
            for gram, times in n_grams(hypothesis, n).items()
        )
        assert answer(hypothesis, references, n) == expected, (
            f"It is wrong for n = {n}. Take the largest count of each n-gram over the references, "
            "then the smaller of that and the hypothesis's own."
        )
    assert answer(["a"], [["b"], ["c"]], 1) == 0, "A word that no reference has does not count."


@exercise("22.4")
def _(answer: Any) -> None:
    hint = "The spread of a mean shrinks with the root of the number of sentences."
    close(answer, 1000 * (1.2 / 0.6) ** 2, rel=0.05, hint=hint)


# Chapter 22: bleu (end)


@exercise("23.1")
def _(answer: Any) -> None:
    hours = 100_000 * 25_000 / 250_000 / 3600
    close(answer, hours, rel=1e-2, hint="Steps times tokens a step, over tokens an hour.")


@exercise("23.2")
def _(answer: Any) -> None:
    import torch

    from transformer_annotated.paper.transformer import Transformer
    from transformer_annotated.training.reproduction import SMALL, replace

    def parameters(share: bool) -> int:
        recipe = replace(SMALL, model=replace(SMALL.model, share=share))
        with torch.device("meta"):
            model = Transformer(recipe.config(6000))
        return sum(p.numel() for p in model.parameters())

    more = float(parameters(False) - parameters(True))
    close(answer, more, hint="One table is `vocab_size` times `d_model`.")


@exercise("23.3")
def _(answer: Any) -> None:
    from dataclasses import asdict, is_dataclass

    from transformer_annotated.training.reproduction import SMALL, replace

    hint = "A Recipe is asked for; `replace` makes one from another."
    assert is_dataclass(answer), hint
    assert not isinstance(answer, type), hint
    train = replace(SMALL.train, steps=SMALL.train.steps // 5, seed=7)
    right = asdict(
        replace(SMALL, source="fr", target="en", warm_up=SMALL.warm_up // 5, train=train)
    )
    given = asdict(answer)
    assert given.get("train") == right["train"], "Look at the steps and the seed."
    assert given == right, "The training is right. Look at the languages and the warm-up."


# Chapter 23: reproduction (end)


@exercise("24.1")
def _(answer: Any) -> None:
    rows = torch.tensor([[0.5, 0.25, 0.25], [1 / 3] * 3], dtype=torch.float64)
    close(answer, -(rows * rows.log()).sum(dim=1), hint="Minus the sum of w · ln w, natural log.")


@exercise("24.2")
def _(answer: Any) -> None:
    heads = sum(8 for module in range(6 + 2 * 6))
    tries = sum(heads - gone for gone in range(heads))
    hint = "A decoder layer has two attentions; the first step tries every head, the last one."
    close(answer, [heads, tries], rel=1e-9, hint=hint)


@exercise("24.3")
def _(answer: Any) -> None:
    from transformer_annotated.paper.multi_head import MultiHeadAttention

    torch.manual_seed(1)
    attention = MultiHeadAttention(d_model=16, n_heads=4).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hint = "Every head's slice is zero, so of the last projection only one thing is left."
    close(answer, attention.out_proj.bias, hint=hint)


@exercise("24.4")
def _(answer: Any) -> None:
    assert callable(answer), "A function of a list of (T, T) weights is asked for."
    generator = torch.Generator().manual_seed(24)
    first, second = torch.rand(2, 4, 4, generator=generator).softmax(dim=-1)
    one = torch.eye(4)
    expected = (0.5 * second + 0.5 * one) @ (0.5 * first + 0.5 * one)
    hint = "Halve each layer's sum with the identity; the last layer stands on the left."
    close(answer([first, second]), expected, hint=hint)


# Chapter 24: inside (end)
