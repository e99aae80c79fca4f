"""The exercises of Part I."""

from typing import Any

import torch

from transformer_annotated.exercises import close, exercise

# Chapter 1: recurrent ---------------------------------------------------------------------------


@exercise("1.1")
def _(answer: Any) -> None:
    d_model = 512
    n = next(n for n in range(1, 10_000) if 2 * n * n * d_model >= 6 * n * d_model**2)
    close(answer, n, hint="One sentence costs n · 6 D² against 2 · n² D; set them equal.")


@exercise("1.2")
def _(answer: Any) -> None:
    keep = torch.tensor(0.5, dtype=torch.float64) ** (1 / 63)
    hint = "What is left after 63 steps is z to the power of 63, and z = σ(b)."
    close(answer, torch.logit(keep), rel=5e-3, hint=hint)


@exercise("1.3")
def _(answer: Any) -> None:
    from transformer_annotated.paper.recurrent import AdditiveAttention

    assert callable(answer), "A function of queries, keys and v is asked for."
    generator = torch.Generator().manual_seed(13)
    queries, keys = (torch.randn(2, n, 4, generator=generator) for n in (3, 5))
    v = torch.randn(4, generator=generator)
    layer = AdditiveAttention(4)
    with torch.no_grad():
        layer.W.weight.copy_(torch.eye(4))
        layer.v.weight.copy_(v.unsqueeze(0))
        rows = [layer(query, keys, keys)[1] for query in queries.unbind(dim=1)]
        close(
            answer(queries, keys, v), torch.stack(rows, dim=1), rel=1e-4,
            hint="Give queries an axis for S and keys an axis for T; softmax over S, the last.",
        )  # fmt: skip


# Chapter 9: toy ---------------------------------------------------------------------------------


@exercise("9.1")
def _(answer: Any) -> None:
    from transformer_annotated.paper import toy

    assert isinstance(answer, str), "A text of three words is asked for."
    dog = next(noun for noun in toy.NOUNS if noun.english == "dog")
    big = next(adjective for adjective in toy.ADJECTIVES if adjective.english == "big")
    phrase = toy.NounPhrase(dog, plural=True, adjective=big)
    right = [word.text for word in phrase.german("dat")]
    got = answer.split()
    assert len(got) == len(right), "Article, adjective and noun: three words."
    for name, word, expected in zip(("article", "adjective", "noun"), got, right, strict=True):
        assert word == expected, f"Look again at the {name}: fourth column, last row."


@exercise("9.2")
def _(answer: Any) -> None:
    assert hasattr(answer, "derive"), "A Sentence is asked for; its main clause is a Clause."
    derivation = answer.derive()
    german, english = " ".join(derivation.german), " ".join(derivation.english)
    right = "den Apfel hat das Mädchen gestern gegessen"
    assert sorted(german.split()) == sorted(right.split()), f"Its words are: {german}."
    assert german == right, f"The words are right, their order is not: {german}."
    assert english == "the girl ate the apple yesterday", f"In English it says: {english}."


@exercise("9.3")
def _(answer: Any) -> None:
    from transformer_annotated.paper import toy

    assert callable(answer), "A function of pairs and batch_size is asked for."
    both = toy.pairs(1_000, seed=93)
    vocabulary = toy.Vocabulary.build(text.split() for pair in both for text in pair)
    encoded = [
        (vocabulary.encode(german.split()), vocabulary.encode(english.split()))
        for german, english in both
    ]

    def rows(batches: Any) -> list[tuple[list[str], list[str]]]:
        return sorted(
            (vocabulary.decode(source), vocabulary.decode(target))
            for batch in batches
            for source, target in zip(batch.src.tolist(), batch.tgt_out.tolist(), strict=True)
        )

    def padding(batches: Any) -> int:
        return sum(int((~batch.tgt_padding).sum()) for batch in batches)

    usual = list(toy.batches(encoded, 50, seed=0))
    got = list(answer(encoded, 50))
    assert all(len(batch.src) <= 50 for batch in got), "A batch is larger than batch_size."
    assert rows(got) == rows(usual), "Every pair must be in exactly one batch."
    ratio = padding(got) / padding(usual)
    assert ratio < 0.25, f"There is still {ratio:.0%} of the padding of random batches."


# Chapter 2, Parts


@exercise("2.1")
def _(answer: Any) -> None:
    assert isinstance(answer, dict), "The answer is a dictionary from paths to values."
    hint = "Two paths, both beginning with the name of the stack."
    assert answer == {"left.n_layers": 3, "left.net.width": 16}, hint


@exercise("2.2")
def _(answer: Any) -> None:
    assert list(answer) == [1, 2, 1, 2], "The pattern starts again when it has run out."


@exercise("2.3")
def _(answer: Any) -> None:
    hint = "What can be compared, printed and saved, and cannot be changed by someone else?"
    assert list(answer) == [True, False, True, True, False], hint


# Chapter 3, Scaled dot-product attention


@exercise("3.1")
def _(answer: Any) -> None:
    close(answer, [1 / 4, 1 / 3], hint="Equal scores share one unit equally among visible keys.")


@exercise("3.2")
def _(answer: Any) -> None:
    close(answer, 16.0, hint="What is the variance of one product, and of the sum of 64?")


@exercise("3.3")
def _(answer: Any) -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    visible = torch.ones(4, 5, dtype=torch.bool).tril()
    visible[2] = False
    weights = answer(scores, visible)
    expected = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    close(weights[[0, 1, 3]], expected[[0, 1, 3]], hint="A row that sees some should stay.")
    close(weights[2], torch.zeros(5), hint="A row that sees nothing should be zero.")
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert bool(gradient.isfinite().all()), "The values are right, but a gradient is not finite."


@exercise("3.4")
def _(answer: Any) -> None:
    close(answer, 12, hint="Count row by row: the first rows see fewer than three.")


# Chapter 4, Multi-head attention


@exercise("4.1")
def _(answer: Any) -> None:
    close(answer, [1_050_624, 1_050_624], hint="Four matrices and four biases. Do heads add any?")


@exercise("4.2")
def _(answer: Any) -> None:
    assert abs(float(answer)) <= 1e-3, "A weighted average does not ask for an order."


@exercise("4.3")
def _(answer: Any) -> None:
    close(answer, [2048, 8192], hint="A key and a value for each key head.")


# Chapter 5, Position-wise feed-forward


@exercise("5.1")
def _(answer: Any) -> None:
    close(answer, 62_914_560, hint="Two matrices, and every position goes through both.")


@exercise("5.2")
def _(answer: Any) -> None:
    close(answer, 1365, rel=1e-9, hint="Three matrices share what two had.")


@exercise("5.3")
def _(answer: Any) -> None:
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    with torch.no_grad():
        outputs = answer(inputs)[:, 0]
    close(outputs, torch.tensor([0.0, 1.0, 1.0, 0.0]), hint="Count, and subtract the excess twice.")


# Chapter 6, Add & Norm


@exercise("6.1")
def _(answer: Any) -> None:
    wanted = torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3) ** 0.5
    close(answer, wanted, rel=1e-3, hint="The mean is 3. Divide the sum of squares by 3, not by 2.")


@exercise("6.2")
def _(answer: Any) -> None:
    hint = "What happens to a factor, and to a constant, when the mean and the deviation go?"
    assert [round(float(value), 1) for value in answer] == [0.0, 0.0], hint


@exercise("6.3")
def _(answer: Any) -> None:
    from transformer_annotated import LayerNorm, spec

    frame = answer(d_model=8, norm=spec(LayerNorm), dropout=0.0)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = x + 2 * torch.nn.functional.layer_norm(x, (8,))
    close(frame(x, lambda y: 2 * y), expected, hint="Norm first, sub-layer, dropout, then add x.")


# Chapter 7, Embeddings and positions


@exercise("7.1")
def _(answer: Any) -> None:
    slow = 2 * torch.pi * 10_000 ** (510 / 512)
    close(answer, [2 * torch.pi, slow], rel=1e-3, hint="Once around is 2 pi radians.")


@exercise("7.2")
def _(answer: Any) -> None:
    close(answer, 16.0, rel=1e-3, hint="Each pair of sine and cosine has length 1.")


@exercise("7.3")
def _(answer: Any) -> None:
    close(answer, 37_888_000, rel=1e-9, hint="One table remains.")


# Chapter 8, The whole model


@exercise("8.1")
def _(answer: Any) -> None:
    from transformer_annotated.paper.transformer import PAPER_BASE, count_parameters, patch

    expected = count_parameters(patch(PAPER_BASE, {"n_layers": 12}))["total"]
    close(answer, expected, rel=1e-9, hint="Six more layers in each of the two stacks.")


@exercise("8.2")
def _(answer: Any) -> None:
    from transformer_annotated.paper.transformer import count_parameters

    assert answer.encoder is None, "Leave out the encoder, and what reads it."
    count = count_parameters(answer)
    hint = "Width 768, 12 layers, 12 heads, hidden width 3072, vocabulary 50,257."
    assert (count["decoder"], count["embedding"]) == (85_054_464, 38_597_376), hint
    assert answer.decoder.self_attention.kwargs["n_heads"] == 12, hint


@exercise("8.3")
def _(answer: Any) -> None:
    close(answer, 12 * 2_099_712 / 63_082_496, rel=1e-3, hint="Twelve layers have one each.")


# Chapter 10, First translation


@exercise("10.1")
def _(answer: Any) -> None:
    close(answer, 0.6931472, rel=1e-4, hint="Minus the natural logarithm of the probability.")


@exercise("10.2")
def _(answer: Any) -> None:
    close(answer, [6, 6], hint="BOS is read, EOS is predicted, and the last word must be followed.")


@exercise("10.3")
def _(answer: Any) -> None:
    hint = "Count the positive outputs of the activation, at real positions only."
    assert 0.02 < float(answer) < 0.6, hint


# Chapter 11, A real corpus


@exercise("11.1")
def _(answer: Any) -> None:
    close(answer, (512 * 4000) ** -0.5, hint="At the end of the warm-up both branches meet.")


@exercise("11.2")
def _(answer: Any) -> None:
    wrong, right = 0.1 / 37_000, 0.9 + 0.1 / 37_000
    q = torch.tensor([right] + [wrong] * 36_999, dtype=torch.float64)
    close(answer, -(q * q.log()).sum(), rel=1e-3, hint="The best p is q itself: its entropy.")


@exercise("11.3")
def _(answer: Any) -> None:
    close(answer, 123, rel=1e-9, hint="Thirteen positions a sentence, and no half sentences.")
