"""Longer context: five rules for the frequencies of RoPE, and what a cache may keep under them."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close, draw, redraw
from transformer_annotated import (
    DECODER_ONLY,
    PAPER_BASE,
    ROPE,
    Cache,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RoPE,
    Transformer,
    YaRN,
    patch,
    spec,
)
from transformer_annotated.modern.long_context import rescaled, stretched_base, turns
from transformer_annotated.paper.parts import from_json, to_json

ANY = torch.tensor([[7]])
SMALL = {
    "vocab_size": 13,
    "d_model": 32,
    "self_attention.n_heads": 4,
    "ffn.d_ff": 24,
    "dropout": 0.0,
}
CASES = [  # head_dim, base, original, factor
    (64, 10_000.0, 256, 8.0),
    (128, 500_000.0, 8192, 8.0),
    (128, 10_000.0, 4096, 40.0),
    (16, 10_000.0, 16, 2.5),
    (16, 100.0, 10_000, 4.0),  # no pair turns less than once
    (8, 100.0, 4, 1.0),
]


def by_hand(kind: str, d: int, base: float, L: int, s: float, n: int) -> tuple[list[float], float]:
    """Frequencies and factor, one pair at a time, in double precision."""
    found = []
    for i in range(d // 2):
        w = base ** (-2 * i / d)
        rounds = L * w / (2 * math.pi)  # turns within the original length
        if kind == "linear":
            w = w / s
        elif kind == "ntk":
            w = (base * s ** (d / (d - 2))) ** (-2 * i / d)
        elif kind == "dynamic":
            grown = s * max(n, L) / L - (s - 1)
            w = (base * grown ** (d / (d - 2))) ** (-2 * i / d)
        elif kind == "yarn":
            # the last pair with 32 turns and the first with 1, counted; a straight line between
            turned = [L * base ** (-2 * j / d) / (2 * math.pi) for j in range(d)]
            low = max((j for j, count in enumerate(turned) if count >= 32), default=0)
            high = min((j for j, count in enumerate(turned) if count <= 1), default=d - 1)
            share = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
            w = (1 - share) * w + share * w / s
        elif rounds < 1:  # llama3
            w = w / s
        elif rounds <= 4:
            share = (rounds - 1) / (4 - 1)
            w = (1 - share) * w / s + share * w
        found.append(w)
    return found, 0.1 * math.log(s) + 1 if kind == "yarn" else 1.0


def build(kind: str, s: float, L: int) -> Any:
    """The rule of that name."""
    return {
        "linear": lambda: LinearScaling(s),
        "ntk": lambda: NTKScaling(s),
        "dynamic": lambda: DynamicNTK(s, L),
        "yarn": lambda: YaRN(s, L),
        "llama3": lambda: Llama3Scaling(s, L),
    }[kind]()


KINDS = ("linear", "ntk", "dynamic", "yarn", "llama3")


def model(*patches: Any, n_layers: int = 2, seed: int = 0) -> Transformer:
    """A small decoder-only model with RoPE, every parameter drawn anew, in double precision."""
    config = patch(PAPER_BASE, DECODER_ONLY, SMALL, {"n_layers": n_layers}, ROPE, *patches)
    built = redraw(Transformer(config), seed).double().eval()
    assert isinstance(built, Transformer)
    return built


# The frequencies --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_those_by_hand(kind: str) -> None:
    for d, base, L, s in CASES:
        for n in (1, L, L + 1, 3 * L):
            got, factor = build(kind, s, L)(d, base, torch.tensor([[n]]))
            want, wanted_factor = by_hand(kind, d, base, L, s, n)
            assert got.dtype == torch.float32
            assert abs(factor - wanted_factor) < 1e-12, (factor, wanted_factor)
            error = (got.double().flatten() / torch.tensor(want, dtype=torch.float64) - 1).abs()
            assert error.max() < 3e-6, (d, base, L, s, n, error.max())


@pytest.mark.parametrize(
    ("kind", "ours"),
    [("linear", "linear"), ("dynamic", "dynamic"), ("yarn", "yarn"), ("llama3", "llama3")],
)
def test_frequencies_equal_hugging_face(kind: str, ours: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    for d, base, L, s in CASES:
        parameters = {"rope_type": kind, "rope_theta": base, "factor": s}
        if kind in ("yarn", "llama3"):
            parameters["original_max_position_embeddings"] = L
        if kind == "llama3":
            parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config = LlamaConfig(
            hidden_size=2 * d, num_attention_heads=2, head_dim=d,
            max_position_embeddings=L if kind in ("linear", "dynamic") else int(L * s),
            rope_parameters=parameters,
        )  # fmt: skip
        for n in (1, L, 3 * L):
            got, factor = build(ours, s, L)(d, base, torch.tensor([[n]]))
            want, wanted_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=torch.tensor(n))
            assert factor == pytest.approx(wanted_factor, rel=1e-12)
            assert (got.flatten() / want - 1).abs().max() < 1e-6, (kind, d, base, L, s, n)


def test_hugging_face_has_other_settings_of_yarn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 8.0, "beta_slow": 2.0,
        "original_max_position_embeddings": 512, "attention_factor": 0.9,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=8192,
        rope_parameters=parameters,
    )  # fmt: skip
    got, factor = YaRN(16.0, 512, 8.0, 2.0, attention_factor=0.9)(64, 1e4, ANY)
    want, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert factor == wanted_factor == 0.9
    assert (got / want - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_changes_nothing(kind: str) -> None:
    plain = RoPE(32).frequencies(ANY, ANY)[0]
    got, factor = build(kind, 1.0, 64)(
        32, 10_000.0, torch.tensor([[1000 if kind != "dynamic" else 64]])
    )
    assert factor == 1
    assert_close(got.flatten(), plain)


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest() -> None:
    for d in (8, 64, 128):
        plain = RoPE(d).frequencies(ANY, ANY)[0]
        ratio = plain / NTKScaling(8.0)(d, 10_000.0, ANY)[0]
        assert ratio[0] == 1
        assert abs(ratio[-1].item() - 8) < 1e-4
        assert bool((ratio.diff() > 0).all())


def test_yarn_and_llama3_keep_fast_pairs_and_divide_slow_ones() -> None:
    plain = RoPE(64).frequencies(ANY, ANY)[0]
    rounds = turns(plain, 1024)
    for rule, slow, fast in ((YaRN(8.0, 1024), 0.5, 40.0), (Llama3Scaling(8.0, 1024), 1.0, 4.0)):
        ratio = plain / rule(64, 10_000.0, ANY)[0]
        assert_close(ratio[rounds > fast], torch.ones(int((rounds > fast).sum())))
        assert_close(ratio[rounds < slow], torch.full((int((rounds < slow).sum()),), 8.0))
        between = ratio[(rounds < fast) & (rounds > slow)]
        assert bool((between.diff() >= 0).all() and (between > 1 - 1e-6).all())


# Dynamic ----------------------------------------------------------------------------------------


def test_dynamic_goes_by_each_row_and_at_gives_the_same_for_good() -> None:
    rule = DynamicNTK(2.0, 100)
    lengths = torch.tensor([[1], [100], [101], [1000]])
    got, _ = rule(16, 10_000.0, lengths)
    assert got.shape == (4, 1, 8)
    for row, n in zip(got, lengths.flatten().tolist(), strict=True):
        frozen = rule.at(n)()
        assert isinstance(frozen, NTKScaling)
        assert_close(row[0], frozen(16, 10_000.0, ANY)[0])
        assert_close(row, rule(16, 10_000.0, torch.tensor([[n]]))[0][0])
    assert_close(got[0], got[1])
    assert bool((got[1, 0, 1:] > got[2, 0, 1:]).all())


def test_a_row_does_not_notice_a_longer_one() -> None:
    dynamic = model({"self_attention.position.scaling": spec(DynamicNTK, factor=2.0, original=6)})
    ids = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    real = torch.arange(20) < torch.tensor([[20], [9]])
    both = dynamic(ids, src_padding=real)
    assert_close(both[1:, :9], dynamic(ids[1:, :9]))
    assert_close(both[:1], dynamic(ids[:1]))


# In attention -----------------------------------------------------------------------------------


def test_rope_with_yarn_equals_complex_numbers_output_and_gradient() -> None:
    rope = RoPE(8, scaling=spec(YaRN, factor=4.0, original=64)).double()
    omega, factor = by_hand("yarn", 8, 10_000.0, 64, 4.0, 0)
    at = torch.tensor([[0, 5, 200], [1, 2, 90]])
    q, k = (draw(2, 3, 3, 8, seed=n, dtype=torch.float64).requires_grad_() for n in "qk")

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.unflatten(-1, (2, -1)).unbind(-2))
        angles = at.double()[:, None, :, None] * torch.tensor(omega, dtype=torch.float64)
        pairs = pairs * factor * torch.exp(1j * angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    ours, theirs = rope(q, k, at, at), (turned(q), turned(k))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(
            a, b, tolerance=5e-5
        )  # frequencies are 32 bits, and position 200 multiplies them
    (got,) = torch.autograd.grad((ours[0] @ ours[1].mT).square().sum(), [q])
    (want,) = torch.autograd.grad((theirs[0] @ theirs[1].mT).square().sum(), [q])
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_the_factor_of_yarn_multiplies_every_score_by_its_square() -> None:
    at = torch.arange(5)[None]
    q, k = draw(1, 2, 5, 8, seed="q"), draw(1, 2, 5, 8, seed="k")
    scores = []
    for factor in (1.0, 1.25):
        rope = RoPE(8, scaling=spec(YaRN, factor=4.0, original=64, attention_factor=factor))
        a, b = rope(q, k, at, at)
        scores.append(a @ b.mT)
    assert_close(scores[1], 1.25**2 * scores[0])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_still_depend_on_the_distance_alone(kind: str) -> None:
    rule = build(kind, 4.0, 8)
    omega, factor = rule(8, 10_000.0, torch.tensor([[20]]))
    rope, vector = RoPE(8), draw(1, 1, 1, 8, seed="v").expand(1, 1, 20, 8)
    turned = rope.turn(vector, torch.arange(20)[None], omega, factor)
    scores = (turned @ turned.mT)[0, 0]
    for distance in range(20):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_model_computes_without_a_look_at_the_data() -> None:
    dynamic = model({"self_attention.position.scaling": spec(DynamicNTK, factor=2.0, original=6)})
    ids = torch.arange(10)[None]
    compiled = torch.compile(dynamic, backend="eager", fullgraph=True)
    assert_close(compiled(ids), dynamic(ids))


# The cache --------------------------------------------------------------------------------------


class TurnedKeys(RoPE):
    """RoPE that keeps keys as they were turned when they came: what many caches hold."""

    kept: Tensor

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None, key_positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert positions is not None
        assert key_positions is not None
        omega, factor = self.frequencies(positions, key_positions)
        new = self.turn(k[:, :, -q.shape[2] :], positions, omega, factor)
        begins = k.shape[2] == q.shape[2]  # a new text: no older keys
        self.kept = new if begins else torch.cat((self.kept, new), dim=2)
        return self.turn(q, positions, omega, factor), self.kept


def steps(model: Transformer, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token, step by step, with a cache: `(B, T - prompt + 1, V)`."""
    cache, found, start = Cache(model), [], 0
    for new in ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1):
        at = torch.arange(start, start + new.shape[1])[None]
        found.append(model.logits(model.decode(new, positions=at, cache=cache))[:, -1:])
        start += new.shape[1]
    return torch.cat(found, dim=1)


def afresh(model: Transformer, ids: Tensor, prompt: int) -> Tensor:
    """The same logits, each from a pass over all tokens so far."""
    ends = range(prompt, ids.shape[1] + 1)
    return torch.cat([model(ids[:, :end])[:, -1:] for end in ends], dim=1)


IDS = torch.randint(13, (2, 24), generator=torch.Generator().manual_seed(3))
DYNAMIC = {"self_attention.position.scaling": spec(DynamicNTK, factor=2.0, original=8)}
TURNED = {
    "self_attention.position": spec(TurnedKeys, scaling=spec(DynamicNTK, factor=2.0, original=8))
}


def test_in_one_layer_unturned_keys_are_exact() -> None:
    one = model(DYNAMIC, n_layers=1)
    assert_close(steps(one, IDS, 5), afresh(one, IDS, 5))


def test_turned_keys_are_wrong_once_the_rule_has_changed() -> None:
    config = patch(
        PAPER_BASE, DECODER_ONLY, SMALL, {"n_layers": 1, "embedding.position": None}, TURNED
    )
    kept = redraw(Transformer(config)).double().eval()
    assert isinstance(kept, Transformer)
    error = (
        (steps(kept, IDS, 5) - afresh(model(DYNAMIC, n_layers=1), IDS, 5)).abs().amax(dim=(0, 2))
    )
    assert error[:4].max() < 1e-10  # 5 to 8 tokens: the rule has not begun to change
    assert error[4:].min() > 1e-4


def test_from_the_second_layer_on_no_cache_of_keys_is_exact() -> None:
    two = model(DYNAMIC)
    error = (steps(two, IDS, 5) - afresh(two, IDS, 5)).abs().amax(dim=(0, 2))
    assert error[:4].max() < 1e-10
    assert error[4:].min() > 1e-5


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_a_length_chosen_beforehand_is_exact_at_any_depth(n_layers: int) -> None:
    dynamic = model(DYNAMIC, n_layers=n_layers)
    frozen = rescaled(dynamic, scaling=DynamicNTK(2.0, 8).at(24))
    assert_close(steps(frozen, IDS, 5), afresh(frozen, IDS, 5))
    assert_close(frozen(IDS), dynamic(IDS), tolerance=1e-4)  # the whole text, all 24 tokens


# The same weights, other angles -----------------------------------------------------------------


def test_rescaled_copies_the_weights_and_nothing_else_changes() -> None:
    plain = model().float()
    other = rescaled(plain, scaling=spec(NTKScaling, factor=4.0), base=500.0)
    assert not other.training
    assert next(other.parameters()).dtype == torch.float32
    for (name, a), (same, b) in zip(
        plain.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert from_json(to_json(other.config)) == other.config
    assert_close(rescaled(other, scaling=None, base=10_000.0)(IDS), plain(IDS))
    assert (other(IDS) - plain(IDS)).abs().max() > 1e-3
    assert rescaled(plain.train()).training


def test_a_larger_base_is_ntk_scaling_under_another_name() -> None:
    base = stretched_base(10_000.0, 4.0, 8)
    assert isinstance(base, float)
    raised = rescaled(model(), base=base)
    assert_close(raised(IDS), rescaled(model(), scaling=spec(NTKScaling, factor=4.0))(IDS))


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda s: LinearScaling(s), lambda s: NTKScaling(s), lambda s: YaRN(s, 64),
    lambda s: Llama3Scaling(s, 64), lambda s: DynamicNTK(s, 64),
])  # fmt: skip
@pytest.mark.parametrize("factor", [0.5, -1.0, math.nan, math.inf, True])
def test_a_factor_below_one_is_refused(make: Any, factor: float) -> None:
    with pytest.raises(ValueError, match="factor must be"):
        make(factor)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: YaRN(2.0, 0), "original must be"),
    (lambda: DynamicNTK(2.0, 0), "original must be"),
    (lambda: Llama3Scaling(2.0, 0), "original must be"),
    (lambda: YaRN(2.0, 64, 1.0, 32.0), "beta_fast must be above beta_slow"),
    (lambda: YaRN(2.0, 64, 1.0, 0.0), "above 0; got 1.0, 0.0"),
    (lambda: YaRN(2.0, 64, attention_factor=0.0), "attention_factor must be above 0, got 0.0"),
    (lambda: Llama3Scaling(2.0, 64, 4.0, 4.0), "low must be above 0 and below high"),
    (lambda: Llama3Scaling(2.0, 64, 0.0, 4.0), "low must be"),
    (lambda: DynamicNTK(2.0, 64).at(0), "length must be"),
    (lambda: NTKScaling(2.0)(2, 10_000.0, ANY), "head_dim must be at least 4 .* got 2"),
    (lambda: DynamicNTK(2.0, 64)(2, 10_000.0, ANY), "head_dim must be at least 4"),
    (lambda: rescaled(Transformer(patch(PAPER_BASE, DECODER_ONLY, SMALL)), base=5.0), "position"),
    (lambda: rescaled(model(), bse=5.0), "bse"),
])  # fmt: skip
def test_bad_arguments_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
