"""The exercises of Part III."""

import math
from typing import Any

import torch

from transformer_annotated.exercises import close, exercise

# Chapter 25, A language model


@exercise("25.1")
def _(answer: Any) -> None:
    hint = "Nats a token, times tokens a byte, and then from nats to bits."
    close(answer, sorted([1.5 / math.log(2), 3.2 / 2.5 / math.log(2)]), hint=hint)


@exercise("25.2")
def _(answer: Any) -> None:
    attention, network = 4, 8  # in units of D * D
    both = 6 * (attention + network) + 6 * (2 * attention + network)
    hint = "Count in units of D * D: an attention has four matrices, the network is 2 D F."
    close(answer, both / (attention + network), hint=hint)


@exercise("25.3")
def _(answer: Any) -> None:
    from transformer_annotated import Mask

    ids = torch.tensor([[5, 0, 6, 7, 0, 8], [0, 0, 3, 4, 5, 6]])
    mask = answer(ids, 0)
    assert isinstance(mask, Mask), "A Mask is asked for."
    seen = (mask & Mask(causal=True)).dense(2, 6, 6)
    assert seen is not None
    for b, t, s in torch.ones(2, 6, 6).tril().nonzero().tolist():
        got, own = bool(seen.expand(2, 1, 6, 6)[b, 0, t, s]), 0 not in ids[b, s:t]
        assert got == own, (
            f"In {ids[b].tolist()}, may place {t} see place {s}? Which text does the end close?"
        )


@exercise("25.4")
def _(answer: Any) -> None:
    from transformer_annotated import Transformer, language_model

    lengths: list[int] = []

    class Watched(Transformer):
        def decode(self, tgt: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            lengths.append(tgt.shape[1])
            return super().decode(tgt, *args, **kwargs)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Watched(language_model(11, d_model=16, n_heads=2, d_ff=32)).eval()
        ids = torch.randint(11, (2, 3))
    got = torch.stack(list(answer(model, ids, 9, 5)), dim=1)
    assert lengths, "The model was never asked."
    assert max(lengths) <= 5, f"The model was shown {max(lengths)} tokens at once."
    assert got.shape == (2, 9), f"Nine tokens a row are asked for, got {tuple(got.shape)}."
    for t in range(9):
        with torch.no_grad():
            token = model(ids[:, -5:])[:, -1].argmax(dim=-1)
        assert torch.equal(got[:, t], token), f"Token {t + 1} is another one."
        ids = torch.cat([ids, token[:, None]], dim=1)


# Chapter 25: language_model (end)

@exercise("26.1")
def _(answer: Any) -> None:
    top = (1 + 2 * 24) ** 0.5
    hint = "Variances of unrelated numbers add up; standard deviations do not."
    close(answer, [top, (5**2 - 1) / 2], hint=hint)


@exercise("26.2")
def _(answer: Any) -> None:
    norm, sublayers = 2 * 512, 6 * 2 + 6 * 3
    hint = "A norm has 2 D numbers. Count stacks for the first, and frames too for the second."
    close(answer, [2 * norm, (2 + sublayers) * norm], rel=1e-9, hint=hint)


@exercise("26.3")
def _(answer: Any) -> None:
    from transformer_annotated import FeedForward, LayerNorm, spec

    assert isinstance(answer, type), "A class is asked for."
    torch.manual_seed(0)
    x, ffn = torch.randn(2, 3, 8), FeedForward(8, 16)
    frame = answer(d_model=8, norm=spec(LayerNorm), dropout=0.0)
    norms = [module for module in frame.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 1, f"It has {len(norms)} norms, and should have one."
    with torch.no_grad():
        norms[0].weight.normal_()
        norms[0].bias.normal_()
        inner = ffn(x)
        wanted = x + torch.nn.functional.layer_norm(inner, (8,), norms[0].weight, norms[0].bias)
        hint = "Which of x, the sub-layer's output and the sum is normalised?"
        close(frame(x, ffn), wanted, hint=hint)
        dropped = answer(d_model=8, norm=spec(LayerNorm), dropout=0.5).train()(x, ffn)
        assert bool((dropped == x).any()), "In training, dropout comes last, just before the sum."


@exercise("26.4")
def _(answer: Any) -> None:
    vector = torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64)
    wanted = (vector - vector.mean()) / vector.std(correction=0)
    hint = "What does a norm do to three times a vector that is normalised already?"
    close(answer, wanted, rel=2e-3, hint=hint)


# Chapter 26: pre_ln (end)


@exercise("27.1")
def _(answer: Any) -> None:
    x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    hint = "The mean stays in. What is the mean of the three squares?"
    close(answer, x / (x @ x / 3).sqrt(), rel=1e-3, hint=hint)


@exercise("27.2")
def _(answer: Any) -> None:
    largest = torch.tensor([[16.0], [64.0]], dtype=torch.float64).sqrt()
    scores = torch.cat((largest, -largest.expand(2, 999)), dim=1)
    hint = "Softmax of one score at the bound and 999 at minus the bound, to five digits."
    close(answer, scores.softmax(dim=1)[:, 0], rel=1e-5, hint=hint)


@exercise("27.3")
def _(answer: Any) -> None:
    assert callable(answer), "A function of a tensor is asked for."
    for shape in ((5,), (2, 3, 8)):
        x = 0.1 * torch.randn(shape, dtype=torch.float64) + 0.05
        expected = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5)
        hint = "Which longer vector has the mean 0 and the same mean square?"
        close(answer(x), expected, rel=1e-6, hint=hint)


@exercise("27.4")
def _(answer: Any) -> None:
    from transformer_annotated import PAPER_BASE, PRE_LN, QK_NORM, RMS_NORM, patch
    from transformer_annotated.paper.transformer import count_parameters

    before = count_parameters(patch(PAPER_BASE, PRE_LN))["total"]
    after = count_parameters(patch(PAPER_BASE, PRE_LN, RMS_NORM, QK_NORM))["total"]
    hint = "Which norms lose a shift, and which attentions gain weights, of what width?"
    close(answer, float(before - after), rel=1e-9, hint=hint)


# Chapter 27: rms_norm (end)


@exercise("28.1")
def _(answer: Any) -> None:
    from transformer_annotated.modern.gated import GatedFeedForward
    from transformer_annotated.paper.feed_forward import FeedForward

    plain = sum(p.numel() for p in FeedForward(768, 3072).parameters())
    one, two = (
        sum(p.numel() for p in GatedFeedForward(768, width, bias=True).parameters())
        for width in (1, 2)
    )
    width = 1 + (plain - one) // (two - one)
    hint = "Three layers share what two had. How many biases has each of them?"
    close(answer, float(width), rel=1e-9, hint=hint)


@exercise("28.2")
def _(answer: Any) -> None:
    hint = "A GatedFeedForward(2, 1) is asked for."
    assert isinstance(answer, torch.nn.Module), hint
    for layer in (answer.gate, answer.up):
        assert isinstance(layer, torch.nn.Linear), hint
        assert layer.weight.shape == (1, 2), hint
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    hint = "Which number is 0 for two equal inputs, and has the square 1 for two that differ?"
    close(answer(x)[:, 0], [0.0, 1.0, 1.0, 0.0], rel=1e-3, hint=hint)


@exercise("28.3")
def _(answer: Any) -> None:
    assert callable(answer), "A function of one matrix is asked for."
    gate, up = torch.randn(2, 12, 8, dtype=torch.float64)
    stored = torch.stack((gate, up), dim=1).flatten(0, 1)  # gate, up, gate, up, ...
    found = answer(stored)
    assert isinstance(found, (tuple, list)), "Two matrices are asked for."
    assert len(found) == 2, "Two matrices are asked for."
    for name, got, wanted in zip(("gate", "up"), found, (gate, up), strict=True):
        close(got, wanted, rel=1e-9, hint=f"Which rows belong to `{name}`, and in which order?")


@exercise("28.4")
def _(answer: Any) -> None:
    width = 256 * -(-int(1.3 * int(2 * 4 * 5120 / 3)) // 256)
    hint = "Cut twice, to whole numbers; round up once, to a multiple."
    close(answer, float(width), rel=1e-9, hint=hint)


# Chapter 28: gated (end)

# Chapter 29: rope


@exercise("29.1")
def _(answer: Any) -> None:
    sine = 2 * torch.tensor(1.0).sin().item()
    hint = "Turn the query by its position and the key by its own; watch the sign."
    close(answer, [sine, -sine], rel=1e-3, hint=hint)


@exercise("29.2")
def _(answer: Any) -> None:
    waves = [2 * torch.pi * base ** (torch.arange(64.0) / 64) for base in (1e4, 5e5)]
    expected = [int((wave > 4096).sum()) for wave in waves]
    close(answer, expected, rel=1e-9, hint="A pair comes round after 2 pi / omega positions.")


@exercise("29.3")
def _(answer: Any) -> None:
    from transformer_annotated.modern.rope import halves_order

    for heads, d in ((1, 4), (3, 6), (2, 16)):
        before = torch.arange(heads * d * 5.0).view(heads, d, 5)
        halves = before[:, halves_order(d)].flatten(0, 1)
        got = answer(halves, d)
        assert tuple(got.shape) == (heads * d, 5), "The shape stays as it is."
        hint = "Work on one head at a time, and undo `halves_order`."
        assert torch.equal(got, before.flatten(0, 1)), hint


# Chapter 29: rope (end)

@exercise("30.1")
def _(answer: Any) -> None:
    from transformer_annotated.modern.relative_bias import alibi_slopes

    hint = "First all slopes of 8 heads; then of 16, the next power of two, every other one."
    close(answer, alibi_slopes(12), hint=hint)


@exercise("30.2")
def _(answer: Any) -> None:
    from transformer_annotated.modern.relative_bias import t5_bucket

    assert isinstance(answer, list | tuple), "A list of whole numbers is asked for."
    reached = t5_bucket(-torch.arange(64), bidirectional=False).tolist()
    hint = "The longest distance in 64 tokens is 63. Which bucket is that?"
    assert [int(row) for row in answer] == sorted(set(range(32)) - set(reached)), hint


@exercise("30.3")
def _(answer: Any) -> None:
    back = torch.arange(40_000).double()
    means = [float((torch.softmax(-m * back, dim=0) * back).sum()) for m in (1 / 2, 1 / 256)]
    hint = "The weights are a geometric series: each is e^-m times the one before."
    close(answer, means, hint=hint)


@exercise("30.4")
def _(answer: Any) -> None:
    from transformer_annotated.modern.relative_bias import ALiBi, T5Bias

    assert isinstance(answer, torch.Tensor), "A tensor is asked for."
    assert answer.shape == (16, 4), "The table has a row a bucket and a column a head."
    learned = T5Bias(4, n_buckets=16, max_distance=64, bidirectional=False)
    with torch.no_grad():
        learned.table.weight.copy_(answer)
        query, keys = torch.tensor([[7]]), torch.arange(8)[None]
        ours, theirs = (bias(query, keys).dense() for bias in (learned, ALiBi(4)))
    close(ours, theirs, hint="Row n holds what ALiBi adds at n steps, and that is never positive.")


# Chapter 30: relative_bias (end)


@exercise("31.1")
def _(answer: Any) -> None:
    from transformer_annotated.modern.long_context import stretched_base

    hint = "Multiply the base by a power of 4; the exponent is a little more than 1."
    close(answer, stretched_base(10_000.0, 4.0, 128), hint=hint)


@exercise("31.2")
def _(answer: Any) -> None:
    from transformer_annotated.modern.long_context import Llama3Scaling
    from transformer_annotated.paper.embedding import frequencies

    anywhere = torch.zeros(1, 1, dtype=torch.long)
    plain = frequencies(128, 500_000.0)
    sigma = plain / Llama3Scaling(8.0, 8192)(128, 500_000.0, anywhere)[0]
    kept, divided = int((sigma < 1 + 1e-5).sum()), int((sigma > 8 - 1e-4).sum())
    hint = "Count the turns of each pair within 8,192 positions; 4 and 1 are the limits."
    close(answer, [kept, divided, 64 - kept - divided], rel=1e-9, hint=hint)


@exercise("31.3")
def _(answer: Any) -> None:
    from transformer_annotated.modern.long_context import YaRN

    hint = "The factor is on the queries and on the keys, and a score is a product of both."
    close(answer, YaRN(40.0, 4096).attention_factor ** 2, hint=hint)


@exercise("31.4")
def _(answer: Any) -> None:
    from transformer_annotated.modern.long_context import NTKScaling

    assert isinstance(answer, type), "A class is asked for."
    lengths = torch.tensor([[1], [100], [101], [200], [201], [399], [801]])
    got, factor = answer(original=100)(16, 10_000.0, lengths)
    assert factor == 1, "It returns two things; the factor on cosines and sines is 1."
    want = [NTKScaling(s)(16, 10_000.0, lengths)[0] for s in (1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 16.0)]
    hint = "Each row by its own length: 100 tokens need 1, 101 need 2, 201 need 4, 801 need 16."
    close(got, torch.stack(want)[:, None], hint=hint)


# Chapter 31: long_context (end)

@exercise("32.1")
def _(answer: Any) -> None:
    token = [2 * 80 * 8 * 128 * 2, 60 * (512 + 64) * 2]
    hint = "A key and a value, layers, heads, numbers in a head, bytes; the second keeps no pair."
    close(answer, token, rel=1e-9, hint=hint)


@exercise("32.2")
def _(answer: Any) -> None:
    H, K = 12, 3
    shared = [h // (H // K) for h in range(H)]
    close(answer, shared, rel=1e-9, hint="Neighbours share; four heads of queries to each.")


@exercise("32.3")
def _(answer: Any) -> None:
    H, K = 8, 2
    order = [int(h) for h in answer]
    assert sorted(order) == list(range(H)), "All eight heads are loaded, each once."
    reads, wanted = [h % K for h in order], [h * K // H for h in range(H)]
    assert reads == wanted, "Here neighbours share. Which heads of the file share a key head?"


# Chapter 32: grouped_query (end)

@exercise("33.1")
def _(answer: Any) -> None:
    positions = [200_000]
    for _layer in range(32):  # the oldest position that the oldest one sees
        positions.append(positions[-1] - (4096 - 1))
    hint = "Each layer goes back by W - 1, since one of the W keys is the position itself."
    close(answer, positions[0] - positions[-1], rel=1e-9, hint=hint)


@exercise("33.2")
def _(answer: Any) -> None:
    T = 131_072
    rows = [min(T, 1024 - 1) if layer % 6 < 5 else T for layer in range(48)]
    hint = "A windowed layer holds W - 1 tokens, a full one all; divide by 48 full ones."
    close(answer, sum(rows) / (48 * T), hint=hint)


@exercise("33.3")
def _(answer: Any) -> None:
    assert callable(answer), "A function of T, window and stride is asked for."
    for T, window, stride in ((9, 2, 4), (5, 1, 1), (8, 3, 100)):
        right = [
            [0 <= i - j < window or (j <= i and (i - j) % stride == 0) for j in range(T)]
            for i in range(T)
        ]
        got = torch.as_tensor(answer(T, window, stride))
        assert got.shape == (T, T), "The tensor must be (T, T)."
        assert got.dtype == torch.bool, "A bool tensor is asked for: True is visible."
        assert got.tolist() == right, "No query sees a later key; distances count, not positions."


# Chapter 33: window (end)

# Chapter 34: experts


@exercise("34.1")
def _(answer: Any) -> None:
    from transformer_annotated import GatedFeedForward, MixtureOfExperts, spec

    with torch.device("meta"):
        layer = MixtureOfExperts(4096, 8, 2, expert=spec(GatedFeedForward, d_ff=14_336))
    total = sum(p.numel() for p in layer.parameters())
    idle = 6 * sum(p.numel() for p in layer.experts[0].parameters())
    hint = "Three matrices an expert, and one row of D numbers for each expert in the router."
    close(answer, [total, total - idle], rel=1e-9, hint=hint)


@exercise("34.2")
def _(answer: Any) -> None:
    wanted, found = [8, 4, 4, 0], [5.0]
    for places in (5, 4):
        found.append(sum(max(0, tokens - places) for tokens in wanted))
    hint = "An even share is four tokens. Multiply, round up, and look at expert 0."
    close(answer, found, hint=hint)


@exercise("34.3")
def _(answer: Any) -> None:
    found = [
        4 * sum(f * p for f, p in zip((0.5, 0.5, 0, 0), means, strict=True))
        for means in ((0.4, 0.4, 0.1, 0.1), (0.25,) * 4)
    ]
    close(answer, found, hint="Multiply share by probability for each expert, add, times four.")


@exercise("34.4")
def _(answer: Any) -> None:
    from transformer_annotated import FeedForward, MixtureOfExperts, spec

    torch.manual_seed(0)
    layer = answer(8, 4, 2, expert=spec(FeedForward, d_ff=6))
    plain = MixtureOfExperts(8, 4, 2, expert=spec(FeedForward, d_ff=6))
    assert hasattr(layer, "shared"), "The expert for everybody should be called self.shared."
    sizes = [sum(p.numel() for p in m.parameters()) for m in (layer, plain, plain.experts[0])]
    assert sizes[0] == sizes[1] + sizes[2], "The shared expert has weights of its own."
    weights = {k: v for k, v in layer.state_dict().items() if not k.startswith("shared.")}
    plain.load_state_dict(weights)
    x = torch.randn(2, 5, 8)
    hint = "Each token gets the mixture's answer plus the shared expert's, with a weight of one."
    close(layer(x), plain(x) + layer.shared(x), hint=hint)


# Chapter 34: experts (end)

@exercise("35.1")
def _(answer: Any) -> None:
    paper, row = (2.38, 2.43, 2.35), (2.31, 2.40, 2.36)
    differences = [b - a for a, b in zip(paper, row, strict=True)]
    mean, won = answer
    close(mean, sum(differences) / 3, hint="Subtract seed by seed, row minus paper.")
    close(won, sum(d < 0 for d in differences), hint="A lower loss wins.")


@exercise("35.2")
def _(answer: Any) -> None:
    from transformer_annotated.modern.gated import matched_width

    close(answer, matched_width(512), hint="Three matrices of D x F', or two of D x F.")


@exercise("35.3")
def _(answer: Any) -> None:
    from transformer_annotated import PRE_LN, ROPE, Config, count_parameters, diff
    from transformer_annotated.modern.ablation import SCALES, base, build

    assert isinstance(answer, Config), "The answer is a Config: what `build` returns."
    wanted = build(SCALES["smoke"], "translation", 500, (PRE_LN, ROPE))
    total = count_parameters(base(SCALES["smoke"], "translation", 500))["total"]
    change = diff(wanted, answer)
    parameters = count_parameters(answer)["total"]
    assert abs(parameters / total - 1) < 0.005, "It does not have the paper's parameters."
    assert not change, f"It differs from pre-LN with RoPE:\n{change}"


@exercise("35.4")
def _(answer: Any) -> None:
    one, some = answer
    close(one, 0.5**3, hint="Each seed is the toss of a coin.")
    close(some, 1 - (1 - 0.5**3) ** 20, hint="First: how probable is it that none of them does?")


# Chapter 35: ablation (end)

@exercise("36.1")
def _(answer: Any) -> None:
    from transformer_annotated import as_config, count_parameters, patch

    config = as_config("Qwen3 8B")
    plain = count_parameters(patch(config, {"self_attention.qk_norm": None}))["total"]
    hint = "Each norm has one weight for each number of a head, and all heads share it."
    close(answer, count_parameters(config)["total"] - plain, hint=hint)


@exercise("36.2")
def _(answer: Any) -> None:
    from transformer_annotated import PAPER_BASE, cache_bytes, patch
    from transformer_annotated.modern.ablation import SCALES, rows

    names = "pre_ln rms_norm qk_norm swiglu rope alibi gqa window experts".split()
    known, plain = rows(SCALES["smoke"]), cache_bytes(PAPER_BASE, 100)
    right = {n for n in names if cache_bytes(patch(PAPER_BASE, *known[n]), 100) != plain}
    hint = "The cache holds keys and values: how many heads of them, and how many tokens back?"
    assert set(answer) == right, hint


@exercise("36.3")
def _(answer: Any) -> None:
    from transformer_annotated import Config, as_config, count_parameters, diff, patch

    changed = {"n_layers": 28, "d_model": 1024, "ffn.d_ff": 3072, "head.tied": True}
    heads = {"self_attention.n_heads": 16, "self_attention.head_dim": 128}
    right = patch(as_config("Qwen3 8B"), changed, heads)
    assert isinstance(answer, Config), "A Config is asked for: patch the one of the 8B model."
    removed = [line for line in diff(right, answer).splitlines() if line.startswith("- ")]
    wrong = ", ".join(line[2:].split(" = ")[0] for line in removed)
    total = count_parameters(right)["total"]
    assert not wrong, f"Look at {wrong}. The published weights have {total:,} parameters."


@exercise("36.4")
def _(answer: Any) -> None:
    from transformer_annotated import as_config, cache_bytes, patch

    config = as_config("Gemma 3 1B")
    full = patch(config, {"self_attention.window": None})
    hint = "26 layers; every sixth has no window, and the others keep 511 tokens."
    close(answer, cache_bytes(full, 32_768) / cache_bytes(config, 32_768), rel=0.01, hint=hint)


# Chapter 36: production (end)
