"""The whole model: its counts, its sharing, its pieces and its two ways of being half."""

import pytest
import torch
from torch import nn

from tests.reference import assert_close, draw
from tests.variants import SMALL, VOCABULARY, build, sentence
from transformer_annotated import (
    DECODER_ONLY,
    ENCODER_ONLY,
    PAPER_BASE,
    PAPER_BIG,
    Config,
    Head,
    LayerNorm,
    Mask,
    MultiHeadAttention,
    PostNorm,
    Transformer,
    patch,
    spec,
)


def count(config: Config) -> int:
    """Parameters of the model, built without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def test_parameter_counts() -> None:
    assert count(PAPER_BASE) == 63_082_496
    assert count(PAPER_BIG) == 214_245_376
    bare = patch(
        PAPER_BASE,
        {f"{a}_attention.{b}_bias": False for a in ("self", "cross") for b in ("qkv", "out")},
    )
    # 6 + 6 self-attentions and 6 cross-attentions, each with four biases of width 512
    assert count(bare) == 63_082_496 - 18 * 4 * 512


def test_what_each_seam_adds() -> None:
    base = count(SMALL)
    assert count(patch(SMALL, {"final_norm": True})) == base + 2 * 2 * 16
    assert count(patch(SMALL, {"head": spec(Head, tied=False, bias=True)})) == base + 13 * 17
    assert count(patch(SMALL, {"src_vocab_size": 20})) == base + 20 * 16
    # two key heads of four: half of each key and value projection, in 2 + 3 self-attentions
    assert count(patch(SMALL, {"self_attention.n_kv_heads": 2})) == base - 5 * 2 * 8 * (16 + 1)


def test_one_table_for_three_uses() -> None:
    """Source, target and head share it: its name occurs once, and each use moves its gradient."""
    model = build("paper")
    assert [n for n in model.state_dict() if "embedding" in n or "head" in n] == [
        "embedding.tokens.weight"
    ]
    table = model.embedding.weight
    src, tgt = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    gradient = torch.autograd.grad(model(src, tgt)[..., 5].sum(), table)[0]
    used = gradient.abs().sum(dim=1) > 0
    assert used.tolist() == [i in (1, 2, 3, 4, 5) for i in range(VOCABULARY)]


def test_logits_are_products_with_the_table() -> None:
    model = build("paper", torch.float64)
    hidden = draw(2, 3, 16, seed="hidden", dtype=torch.float64)
    assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)
    untied = build("untied", torch.float64)
    assert untied.head.weight is not None
    assert_close(untied.logits(hidden), hidden @ untied.head.weight.T + untied.head.bias)


def test_two_vocabularies_have_two_tables() -> None:
    model = build("two_vocabularies")
    assert model.src_embedding is not None
    assert model.src_embedding.weight.shape == (VOCABULARY + 4, 16)
    src = torch.tensor([[VOCABULARY + 3, 1]])  # an id that only the source language has
    assert model(src, sentence(3, 0)).shape == (1, 3, VOCABULARY)
    gradient = torch.autograd.grad(model.encode(src).square().sum(), model.src_embedding.weight)[0]
    assert (gradient.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == [1, VOCABULARY + 3]


def test_forward_is_encode_decode_logits() -> None:
    model = build("paper")
    src, tgt = sentence(5, 1), sentence(4, 2)
    real = torch.tensor([[True, True, True, True, False]])
    hidden = model.decode(tgt, model.encode(src, real), real)
    assert torch.equal(model.logits(hidden), model(src, tgt, src_padding=real))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_one_stack(kind: str) -> None:
    """Half a model is the same stack, read alone."""
    config = patch(SMALL, ENCODER_ONLY if kind == "encoder" else DECODER_ONLY)
    model = build(config)
    ids = sentence(5, 1)
    x = model.embedding(ids, torch.arange(5)[None])
    stack = model.encoder or model.decoder
    assert stack is not None
    assert (model.encoder is None) == (kind == "decoder")
    mask = Mask(causal=True) if kind == "decoder" else None
    for layer in stack.layers:
        x = layer(x, mask=mask)
    assert torch.equal(model(ids), model.logits(x))


def test_masks_beyond_padding() -> None:
    """`src_mask` and `tgt_mask` join the rules that are already there."""
    model = build("paper")
    src, tgt = sentence(5, 1), sentence(4, 2)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    memory = model.encode(src, mask=Mask(allowed=blocks))
    changed = torch.cat((src[:, :2], (src[:, 2:] + 1) % VOCABULARY), dim=1)
    other = model.encode(changed, mask=Mask(allowed=blocks))
    assert torch.equal(memory[:, :2], other[:, :2])  # packed sentences do not see each other
    assert not torch.equal(memory[:, 2:], other[:, 2:])
    windowed = model(src, tgt, tgt_mask=Mask(window=2))
    by_config = build(patch(SMALL, {"decoder.self_attention.window": 2}))
    assert torch.equal(windowed, by_config(src, tgt))


def test_positions_may_be_given() -> None:
    """A packed second sentence starts again at 0: the same vectors as alone."""
    model = build("paper")
    one, two = sentence(3, 1), sentence(2, 2)
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    packed = model.encode(
        torch.cat((one, two), dim=1), mask=Mask(allowed=blocks),
        positions=torch.tensor([[0, 1, 2, 0, 1]]),
    )  # fmt: skip
    assert_close(packed[:, :3], model.encode(one))
    assert_close(packed[:, 3:], model.encode(two))


def test_a_pattern_is_tiled_over_the_layers() -> None:
    a, b = (spec(MultiHeadAttention, n_heads=4, window=w) for w in (2, 5))
    model = Transformer(patch(SMALL, {"decoder.self_attention": (a, b)}))
    assert model.decoder is not None
    windows = [layer.self_attention.mask.window for layer in model.decoder.layers]
    assert windows == [2, 5, 2]


def test_a_sublayer_may_be_absent() -> None:
    model = Transformer(patch(SMALL, {"encoder.layers.0.ffn": None}))
    assert model.encoder is not None
    assert model.encoder.layers[0].ffn is None
    assert list(model.encoder.layers[0].residuals) == ["self_attention"]
    assert model.encoder.layers[1].ffn is not None


def test_post_norm_leaves_normalised_vectors() -> None:
    """Without a final norm the last operation is each layer's own: mean 0 and variance 1."""
    model = Transformer(SMALL).double()
    memory = model.encode(sentence(6, 1))
    assert_close(memory.mean(dim=-1), torch.zeros(1, 6).double())
    assert_close(memory.var(dim=-1, correction=0), torch.ones(1, 6).double(), tolerance=1e-3)
    assert not any(name.startswith(("encoder.norm", "decoder.norm")) for name in model.state_dict())


def test_initialisation() -> None:
    """Glorot for every linear layer, zeros for biases, D^-1/2 for the table, fresh norms."""
    torch.manual_seed(0)
    model = Transformer(patch(SMALL, {"d_model": 64, "ffn.d_ff": 128}))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().max().item() <= bound
            assert module.weight.abs().max().item() > 0.95 * bound, name
            assert not module.bias.any()
        if isinstance(module, LayerNorm):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()  # type: ignore[union-attr]
    assert abs(model.embedding.weight.std().item() * 8 - 1) < 0.1


def test_dropout_is_where_the_paper_has_it() -> None:
    """One for the embedding's sum and one for each sub-layer's output; none on weights or ReLU."""
    model = Transformer(patch(SMALL, {"dropout": 0.3}))
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates.pop("embedding.dropout") == 0.3
    residual = {n: p for n, p in rates.items() if ".residuals." in n}
    assert len(residual) == 2 * 2 + 3 * 3
    assert set(residual.values()) == {0.3}
    assert {p for n, p in rates.items() if n not in residual} == {0.0}
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert {m.dropout for m in attentions} == {0.0}
    assert sum(isinstance(m, PostNorm) for m in model.modules()) == 2 * 2 + 3 * 3


def test_training_mode_drops_and_evaluation_does_not() -> None:
    model = Transformer(patch(SMALL, {"dropout": 0.3}))
    src, tgt = sentence(5, 1), sentence(4, 2)
    assert not torch.equal(model(src, tgt), model(src, tgt))
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


def test_redraw_reaches_everything() -> None:
    """The helper of these tests: no parameter keeps its fresh value, least of all a norm's."""
    for name, parameter in build("final_norm").named_parameters():
        assert parameter.numel() < 2 or parameter.std().item() > 0.05, name
