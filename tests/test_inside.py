"""Chapter 24: attention maps with the right labels, what heads do, and removing them."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, draw, redraw
from tests.variants import SMALL
from transformer_annotated import (
    SDPA,
    MultiHeadAttention,
    Transformer,
    Vocabulary,
    cross_entropy,
    patch,
)
from transformer_annotated.exercises import CHECKS
from transformer_annotated.paper.toy import Derivation, collate
from transformer_annotated.training.inside import (
    RELATIONS,
    AttentionMap,
    attention_maps,
    draw_attention,
    draw_removals,
    draw_statistics,
    greedy_removal,
    grouped,
    head_name,
    head_statistics,
    kind_of,
    mean_loss,
    rank_correlation,
    relations,
    remove_heads,
    word_effects,
)

WAKES = Derivation(
    ("er", "wacht", "auf"), ("he", "wakes", "up"), ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))
)
SHOWS = Derivation(("er", "geht"), ("now", "he", "goes"), ((0, 1), (1, 2)))
WORDS = Vocabulary.build([[*d.german, *d.english] for d in (WAKES, SHOWS)])
SIZES = {"vocab_size": len(WORDS)}
MODULES = {
    "encoder.layers.0.self_attention": "encoder",
    "encoder.layers.1.self_attention": "encoder",
    "decoder.layers.0.self_attention": "decoder",
    "decoder.layers.0.cross_attention": "cross",
}


def model(seed: int = 0, **changes: Any) -> Transformer:
    """A model with every parameter at random, in evaluation mode."""
    return redraw(Transformer(patch(SMALL, {**SIZES, **changes})), seed=seed).eval()


def batch(derivations: Sequence[Derivation] = (WAKES, SHOWS)) -> Any:
    return collate([(WORDS.encode(d.german), WORDS.encode(d.english)) for d in derivations])


# Maps and their labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["written out", "sdpa"])
def test_maps_against_queries_and_keys(kernel: str) -> None:
    """Each row computed again from the projections of what entered the module."""
    net = model(dropout=0.0)
    if kernel == "sdpa":
        net = redraw(Transformer(patch(SMALL, SIZES, SDPA)))
    net.train()
    entered: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            source = kwargs.get("memory")
            entered[name] = torch.cat((args[0], args[0] if source is None else source), dim=1)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, MultiHeadAttention):
            module.register_forward_hook(keep(name), with_kwargs=True)
    maps = attention_maps(net, WORDS, SHOWS.german, SHOWS.english)
    assert net.training
    assert set(MODULES) <= set(maps)
    for name, m in maps.items():
        module = net.get_submodule(name)
        assert isinstance(module, MultiHeadAttention)
        T, S = len(m.rows), len(m.cols)
        x = entered[name][0]
        q, k = module.q_proj(x[:T]), module.k_proj(x[T:])
        d = module.head_dim
        for h in range(module.n_heads):
            mine, its = q[:, h * d : (h + 1) * d], k[:, h * d : (h + 1) * d]
            for t in range(T):
                seen = t + 1 if m.kind == "decoder" else S
                scores = (its[:seen] @ mine[t] / math.sqrt(d)).exp()
                row = torch.cat((scores / scores.sum(), torch.zeros(S - seen)))
                assert_close(m.weights[h, t], row.detach(), f"{name}, head {h}, row {t}")


def test_labels_are_the_ids_that_went_in() -> None:
    maps = attention_maps(model(), WORDS, SHOWS.german, SHOWS.english)
    german, said = ("er", "geht", "<eos>"), ("now", "he", "goes", "<eos>")
    read = ("<bos>", "now", "he", "goes")
    wanted = {"encoder": (german, german), "decoder": (said, read), "cross": (said, german)}
    for name, m in maps.items():
        assert (m.rows, m.cols) == wanted[m.kind]
        assert m.kind == kind_of(name)
    assert maps["decoder.layers.2.cross_attention"].weights.shape == (4, 4, 3)


def test_unknown_words_are_shown_as_the_model_saw_them() -> None:
    maps = attention_maps(model(), WORDS, ("er", "lacht"), ("he",))
    assert maps["encoder.layers.0.self_attention"].cols == ("er", "<unk>", "<eos>")


def test_swapped_labels_are_refused() -> None:
    """Labels exchanged or shifted in number, and a square map that was turned."""
    good = attention_maps(model(), WORDS, SHOWS.german, SHOWS.english)
    cross, square = (
        good["decoder.layers.0.cross_attention"],
        good["encoder.layers.0.self_attention"],
    )
    for wrong in (
        lambda: AttentionMap("cross", cross.weights, cross.cols, cross.rows),
        lambda: AttentionMap("cross", cross.weights, cross.rows[1:], cross.cols),
        lambda: AttentionMap("cross", cross.weights[0], cross.rows, cross.cols),
    ):
        with pytest.raises(ValueError, match="weights must be "):
            wrong()
    with pytest.raises(ValueError, match="row of weights must sum to 1"):
        AttentionMap("encoder", square.weights.transpose(1, 2), square.rows, square.cols)
    with pytest.raises(ValueError, match="row of weights must sum to 1"):
        AttentionMap("encoder", 0.9 * square.weights, square.rows, square.cols)
    nan = torch.full((1, 3, 3), math.nan)
    with pytest.raises(ValueError, match="row of weights must sum to 1"):
        AttentionMap("encoder", nan, square.rows, square.cols)
    future = torch.full((1, 3, 3), 1 / 3)
    AttentionMap("encoder", future, square.rows, square.cols)
    with pytest.raises(ValueError, match="above the diagonal"):
        AttentionMap("decoder", future, square.rows, square.cols)


def test_names_of_modules() -> None:
    assert {name: kind_of(name) for name in MODULES} == MODULES
    with pytest.raises(ValueError, match=r"got 'encoder\.layers\.0\.ffn'"):
        kind_of("encoder.layers.0.ffn")
    assert head_name("decoder.layers.0.cross_attention", 3) == "cross 1.4"


def test_pictures_show_labels_and_weights_of_the_map() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    net = model()
    maps = attention_maps(net, WORDS, SHOWS.german, SHOWS.english)
    cross = maps["decoder.layers.0.cross_attention"]
    figure = draw_attention([cross, maps["encoder.layers.0.self_attention"]], head=1)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(cross.rows)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(cross.cols)
    assert_close(torch.tensor(ax.images[0].get_array()), cross.weights[1].double())
    with pytest.raises(ValueError, match=r"head must be in \[0, 4\), got 4"):
        draw_attention([cross], head=4)
    with pytest.raises(ValueError, match="maps must hold at least one"):
        draw_attention([])
    heads = head_statistics(net, WORDS, [WAKES])
    chance = head_statistics(net, WORDS, [WAKES], uniform=True)
    assert len(draw_statistics(heads, chance).axes) == 3
    assert draw_removals({(h.module, h.head): 0.1 for h in heads}).axes
    plt.close("all")


# Statistics ---------------------------------------------------------------------------------------


def marked(relation: Tensor) -> set[tuple[int, int]]:
    return {(int(q), int(k)) for q, k in relation.nonzero()}


def test_relations_by_hand() -> None:
    encoder, decoder, cross = (relations(WAKES, kind) for kind in ("encoder", "decoder", "cross"))
    assert marked(encoder["linked"]) == {(1, 2), (2, 1)}  # wacht and auf
    assert marked(decoder["linked"]) == {(2, 2)}  # to say "up", key 2 read "wakes"
    assert marked(cross["linked"]) == {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    assert marked(encoder["sign"]) == {(q, 3) for q in range(4)}
    assert marked(decoder["sign"]) == {(q, 0) for q in range(4)}
    assert marked(encoder["before"]) == {(1, 0), (2, 1), (3, 2)}
    assert marked(encoder["after"]) == {(0, 1), (1, 2), (2, 3)}
    assert marked(decoder["after"]) == set()
    assert marked(cross["same"]) == {(t, t) for t in range(4)}
    cross = relations(SHOWS, "cross")  # (4, 3)
    assert marked(cross["linked"]) == {(1, 0), (2, 1)}
    assert marked(cross["after"]) == {(0, 1), (1, 2)}
    assert tuple(cross) == RELATIONS


def test_statistics_against_a_loop() -> None:
    """Summed over queries of both sentences, one weight at a time."""
    net = model()
    found = {(h.module, h.head): h for h in head_statistics(net, WORDS, [WAKES, SHOWS])}
    assert len(found) == 4 * (2 + 3 + 3)
    for (name, head), statistics in found.items():
        entropies, shares = [], {relation: [] for relation in RELATIONS}  # type: ignore[var-annotated]
        for d in (WAKES, SHOWS):
            m = attention_maps(net, WORDS, d.german, d.english)[name]
            for t, row in enumerate(m.weights[head].tolist()):
                entropies.append(-sum(w * math.log(w) for w in row if w > 0))
                for relation, keys in relations(d, m.kind).items():
                    own = [w for w, mark in zip(row, keys[t].tolist(), strict=True) if mark]
                    if own:
                        shares[relation].append(sum(own))
        assert statistics.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
        for relation, values in shares.items():
            if values:
                mean = sum(values) / len(values)
                assert statistics.shares[relation] == pytest.approx(mean, rel=1e-4)
            else:
                assert math.isnan(statistics.shares[relation])


def test_equal_weights_by_hand() -> None:
    heads = {h.module: h for h in head_statistics(model(), WORDS, [WAKES], uniform=True)}
    encoder, decoder = (heads[f"{side}.layers.0.self_attention"] for side in ("encoder", "decoder"))
    assert encoder.shares["before"] == pytest.approx(1 / 4)
    assert encoder.entropy == pytest.approx(math.log(4))
    assert decoder.shares["same"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert decoder.shares["linked"] == pytest.approx(1 / 3)
    assert heads["decoder.layers.0.cross_attention"].shares["linked"] == pytest.approx(5 / 4 / 3)


def test_no_sentences() -> None:
    with pytest.raises(ValueError, match="derivations must hold at least one"):
        head_statistics(model(), WORDS, [])


# Removing heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("numbers", [[0], [2], [1, 3]])
def test_removing_is_dropping_columns(name: str, numbers: list[int]) -> None:
    """Logits and every gradient equal those of a model whose out_proj does not read the heads."""
    net, data = model().double(), batch()
    shorter = copy.deepcopy(net)
    module = shorter.get_submodule(name)
    assert isinstance(module, MultiHeadAttention)
    with torch.no_grad():
        for head in numbers:
            d = module.head_dim
            module.out_proj.weight[:, head * d : (head + 1) * d] = 0
    before = net(data.src, data.tgt_in, src_padding=data.src_padding)
    with remove_heads(net, {name: numbers}):
        ours = net(data.src, data.tgt_in, src_padding=data.src_padding)
    theirs = shorter(data.src, data.tgt_in, src_padding=data.src_padding)
    assert_close(ours, theirs)
    assert not torch.allclose(ours, before)
    assert torch.equal(before, net(data.src, data.tgt_in, src_padding=data.src_padding))
    for logits in (ours, theirs):
        cross_entropy(logits, data.tgt_out, data.tgt_padding).backward()
    for (key, mine), its in zip(net.named_parameters(), shorter.parameters(), strict=True):
        if mine.grad is None or key == f"{name}.out_proj.weight":
            continue
        assert its.grad is not None
        assert_close(mine.grad, its.grad, f"gradient of {key}")
    gone = net.get_submodule(name).out_proj.weight.grad
    for head in numbers:
        assert gone[:, head * 4 : (head + 1) * 4].abs().max() == 0


def test_the_output_is_a_sum_over_heads() -> None:
    """Equation of the chapter: the parts that single heads add, and the bias, are the whole."""
    attention = MultiHeadAttention(12, 3).double()
    redraw(attention)
    x = draw(2, 5, 12, seed="x", dtype=torch.float64)
    total = torch.zeros_like(x)
    for head in range(3):
        with remove_heads(attention, {"": [h for h in range(3) if h != head]}):
            total = total + attention(x) - attention.out_proj.bias
    assert_close((total + attention.out_proj.bias).detach(), attention(x).detach())
    with remove_heads(attention, {"": range(3)}):
        assert_close(attention(x).detach(), attention.out_proj.bias.detach().expand_as(x))


def test_removals_nest_and_end_after_an_error() -> None:
    net, data = model(), batch()
    both, first = (
        {"encoder.layers.0.self_attention": [0, 1]},
        {"encoder.layers.0.self_attention": [0]},
    )
    with remove_heads(net, both):
        wanted = net.encode(data.src, data.src_padding)
    with remove_heads(net, first), remove_heads(net, {"encoder.layers.0.self_attention": [1]}):
        assert torch.equal(net.encode(data.src, data.src_padding), wanted)
    with pytest.raises(RuntimeError, match="stop"), remove_heads(net, both):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"encoder.layers.9.self_attention": [0]}, "got 'encoder.layers.9.self_attention'"),
        ({"encoder.layers.0.ffn": [0]}, "heads must name attention modules"),
        ({"encoder.layers.0.self_attention": [4]}, r"must be in \[0, 4\), got 4"),
        ({"encoder.layers.0.self_attention": [-1]}, r"must be in \[0, 4\), got -1"),
    ],
)
def test_bad_heads(heads: dict[str, list[int]], message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message), remove_heads(net, heads):
        pytest.fail("the block must not run")
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_mean_loss_counts_real_tokens() -> None:
    """In one batch or two, the same mean; and dropout is off."""
    net = model(dropout=0.5).train()
    one = mean_loss(net, [batch()])
    assert net.training
    assert mean_loss(net, [batch([WAKES]), batch([SHOWS])]) == pytest.approx(one, rel=1e-5)
    data, total = batch(), 0.0
    logits = net.eval()(data.src, data.tgt_in, src_padding=data.src_padding)
    for b, d in enumerate((WAKES, SHOWS)):
        for t, word in enumerate([*WORDS.encode(d.english), 2]):
            total -= logits[b, t].log_softmax(dim=-1)[word].item()
    assert one == pytest.approx(total / 8, rel=1e-5)


def test_greedy_removal_against_every_choice() -> None:
    """At each step no other head would have done better; the model comes back as it was."""
    net, data = model(), [batch()]
    heads = [("encoder.layers.0.self_attention", h) for h in range(2)]
    heads += [("decoder.layers.1.cross_attention", h) for h in (0, 3)]
    whole = mean_loss(net, data)
    curve = greedy_removal(net, heads, lambda: mean_loss(net, data))
    order = [head for head, _ in curve]
    assert sorted(order) == sorted(heads)
    for n, (_, loss) in enumerate(curve):
        tried = {}
        for head in heads:
            if head not in order[:n]:
                with remove_heads(net, grouped([*order[:n], head])):
                    tried[head] = mean_loss(net, data)
        assert loss == min(tried.values()) == tried[order[n]]
    assert mean_loss(net, data) == whole
    with pytest.raises(ValueError, match="heads must be distinct"):
        greedy_removal(net, [heads[0]] * 2, lambda: 0.0)


# Weights and effects ------------------------------------------------------------------------------


def test_word_effects_one_word_at_a_time() -> None:
    """Each effect again, with the word really absent from what attention is given."""
    net = model().double()
    weights, vector, word = word_effects(net, WORDS, WAKES.german, WAKES.english)
    assert weights.shape == (3 * 4, 4, 4)
    assert vector.shape == word.shape == (4, 4)
    maps = attention_maps(net, WORDS, WAKES.german, WAKES.english)
    assert torch.equal(weights[4:8], maps["decoder.layers.1.cross_attention"].weights)
    data = batch([WAKES])
    with torch.no_grad():
        memory = net.encode(data.src)
        p = net.logits(net.decode(data.tgt_in, memory)).softmax(dim=-1)[0]
        for s in range(4):
            rest = [i for i in range(4) if i != s]
            places = torch.tensor([rest])
            shorter = net.encode(data.src[:, rest], positions=places)
            for found, m in ((vector, memory[:, rest]), (word, shorter)):
                q = net.logits(net.decode(data.tgt_in, m)).softmax(dim=-1)[0]
                for t in range(4):
                    distance = torch.clamp(p[t] - q[t], min=0).sum()  # another form of the same
                    assert found[t, s].item() == pytest.approx(distance.item(), abs=1e-9)
    assert not torch.allclose(vector, word)


def test_rank_correlation() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    # By hand, with a tie: ranks 1, 2.5, 2.5, 4, 5 and 5, 1, 2, 3, 4.
    ranks = ([1, 2.5, 2.5, 4, 5], [5, 1, 2, 3, 4])
    wanted = torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1].item()
    tied, other = torch.tensor([0.0, 7.0, 7.0, 8.0, 9.0]), torch.tensor([9.0, 0.1, 0.2, 0.3, 0.4])
    assert rank_correlation(tied, other) == pytest.approx(wanted)


# Exercises ----------------------------------------------------------------------------------------


def rollout(maps: Sequence[Tensor]) -> Tensor:
    result = torch.eye(len(maps[0]))
    for weights in maps:
        result = (weights + torch.eye(len(weights))) / 2 @ result
    return result


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("24.1", [1.5 * math.log(2), math.log(3)], [1.5, math.log2(3)]),
        ("24.2", [144, 10440], [96, 4656]),
        ("24.4", rollout, lambda maps: rollout(maps[::-1])),
    ],
)
def test_exercises(number: str, right: Any, wrong: Any) -> None:
    CHECKS[number](right)
    with pytest.raises(AssertionError):
        CHECKS[number](wrong)


def test_exercise_on_all_heads() -> None:
    torch.manual_seed(1)
    attention = MultiHeadAttention(d_model=16, n_heads=4).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    CHECKS["24.3"](attention.out_proj.bias)
    with pytest.raises(AssertionError):
        CHECKS["24.3"](torch.zeros(16))
