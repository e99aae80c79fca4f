"""`spec` and `patch`: values that can be compared, printed, saved, changed and built."""

import copy
import json
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from transformer_annotated import (
    DECODER_ONLY,
    Config,
    FeedForward,
    Head,
    LayerNorm,
    MultiHeadAttention,
    Spec,
    attend,
    diff,
    from_json,
    patch,
    paths,
    sdpa,
    spec,
    to_json,
)


@dataclass(frozen=True)
class Tree:
    """A small tree of two stacks, for paths."""

    d_model: int = 4
    left: Any = None
    right: Any = None


@dataclass(frozen=True)
class Branch:
    """A stack with a depth."""

    n_layers: int = 3
    ffn: Any = spec(FeedForward, d_ff=8)
    only_here: int = 0


@dataclass(frozen=True)
class OtherBranch:
    """A stack without `only_here`."""

    n_layers: int = 2
    ffn: Any = spec(FeedForward, d_ff=8)


TREE = Tree(left=Branch(), right=OtherBranch())


# spec -------------------------------------------------------------------------------------------


def test_a_spec_stores_the_defaults_it_relies_on() -> None:
    s = spec(LayerNorm, eps=1e-6)
    assert s.kwargs == {"eps": 1e-6, "bias": True}
    assert s == spec(LayerNorm, bias=True, eps=1e-6)
    assert hash(s) == hash(spec(LayerNorm, bias=True, eps=1e-6))
    assert s != spec(LayerNorm)
    assert s != spec(nn.LayerNorm, eps=1e-6)
    assert s != "spec(LayerNorm, eps=1e-06)"


def test_a_spec_prints_what_was_changed() -> None:
    assert repr(spec(LayerNorm)) == "spec(LayerNorm)"
    assert repr(spec(LayerNorm, eps=1e-6)) == "spec(LayerNorm, eps=1e-06)"
    assert repr(spec(MultiHeadAttention, attend=sdpa)) == "spec(MultiHeadAttention, attend=sdpa)"
    # the text is the code that makes it
    s = spec(FeedForward, d_ff=7, activation=spec(nn.GELU, approximate="tanh"))
    assert eval(repr(s), {"spec": spec, "FeedForward": FeedForward, "GELU": nn.GELU}) == s


def test_each_call_builds_another_module() -> None:
    s = spec(FeedForward, d_ff=8, dropout=0.25)
    one, other = s(d_model=4), s(d_model=4)
    assert one is not other
    assert one.up.weight is not other.up.weight
    assert (one.up.in_features, one.up.out_features, one.dropout.p) == (4, 8, 0.25)


def test_a_spec_is_immutable() -> None:
    s = spec(LayerNorm)
    for name in ("target", "arguments", "new"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(s, name, 1)
    s.kwargs["eps"] = 7.0  # a copy
    assert s == spec(LayerNorm)


def test_a_spec_can_be_copied_and_pickled() -> None:
    s: Spec[Any] = spec(MultiHeadAttention, n_heads=2, attend=sdpa, qk_norm=spec(LayerNorm))
    for other in (copy.copy(s), copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert other == s
        assert hash(other) == hash(s)


# patch ------------------------------------------------------------------------------------------


def test_a_path_of_the_root() -> None:
    assert patch(TREE, {"d_model": 6}) == replace(TREE, d_model=6)
    assert Tree(left=Branch(), right=OtherBranch()) == TREE  # the original is what it was


def test_a_path_without_its_stack_reaches_each_stack_that_has_it() -> None:
    new = patch(TREE, {"ffn.d_ff": 9, "only_here": 5})
    assert new.left == Branch(ffn=spec(FeedForward, d_ff=9), only_here=5)
    assert new.right == OtherBranch(ffn=spec(FeedForward, d_ff=9))


def test_a_path_with_its_stack_reaches_that_one() -> None:
    new = patch(TREE, {"right.ffn.d_ff": 9})
    assert new.left == TREE.left
    assert new.right.ffn == spec(FeedForward, d_ff=9)


def test_a_path_through_a_tuple_reaches_every_entry_that_has_it() -> None:
    tree = patch(TREE, {"left.ffn": (spec(FeedForward, d_ff=8), None, spec(LayerNorm))})
    new = patch(tree, {"left.ffn.d_ff": 9})
    assert new.left.ffn == (spec(FeedForward, d_ff=9), None, spec(LayerNorm))


def test_a_path_to_one_layer() -> None:
    new = patch(TREE, {"left.layers.1.ffn.d_ff": 9})
    usual = spec(FeedForward, d_ff=8)
    assert new.left.ffn == (usual, spec(FeedForward, d_ff=9), usual)
    assert new.right == TREE.right
    # a shorter pattern is tiled over the depth first
    two = patch(TREE, {"left.ffn": (usual, spec(FeedForward, d_ff=5))})
    new = patch(two, {"left.layers.2.ffn": None})
    assert new.left.ffn == (usual, spec(FeedForward, d_ff=5), None)


def test_a_path_into_a_nested_spec() -> None:
    config = patch(Config(), {"ffn.activation": spec(nn.ELU)})
    new = patch(config, {"encoder.ffn.activation.alpha": 0.5})
    assert new.encoder is not None
    assert new.decoder is not None
    assert new.encoder.ffn == spec(FeedForward, activation=spec(nn.ELU, alpha=0.5))  # type: ignore[comparison-overlap]
    assert new.decoder.ffn == spec(FeedForward, activation=spec(nn.ELU))  # type: ignore[comparison-overlap]


def test_short_paths_come_before_long_ones() -> None:
    """A part and what is inside it may be patched together, in any order."""
    whole, inside = {"ffn": spec(FeedForward, d_ff=5)}, {"ffn.dropout": 0.5}
    layer = {"left.layers.0.ffn.dropout": 0.25}
    for patches in ((whole, inside, layer), (layer, inside, whole), (inside, layer, whole)):
        new = patch(TREE, *patches)
        other = spec(FeedForward, d_ff=5, dropout=0.5)
        assert new.right.ffn == other
        assert new.left.ffn == (spec(FeedForward, d_ff=5, dropout=0.25), other, other)


def test_the_same_value_twice_is_no_conflict() -> None:
    assert patch(TREE, {"d_model": 6}, {"d_model": 6}) == patch(TREE, {"d_model": 6})


def test_two_values_for_one_path_are_an_error() -> None:
    for patches in (({"d_model": 6}, {"d_model": 7}), ({"ffn.d_ff": 6}, {"left.ffn.d_ff": 7})):
        for ordered in (patches, patches[::-1]):
            with pytest.raises(ValueError, match=r"two values for .*(6 and 7|7 and 6)"):
                patch(TREE, *ordered)


def test_diff_shows_what_changed_and_nothing_else() -> None:
    new = patch(Config(), {"encoder.ffn.d_ff": 7, "norm": spec(LayerNorm, eps=1e-6)})
    assert diff(Config(), new).splitlines() == [
        "- norm.eps = 1e-05",
        "+ norm.eps = 1e-06",
        "- encoder.ffn.d_ff = 2048",
        "+ encoder.ffn.d_ff = 7",
    ]
    assert diff(new, new) == ""
    assert diff(Config(), patch(Config(), {"encoder.ffn": None})).splitlines() == [
        "- encoder.ffn = spec(FeedForward)",
        "+ encoder.ffn = None",
    ]


def test_every_path_leads_somewhere() -> None:
    """Each listed path can be patched with the value that it has, and changes nothing."""

    def value(node: Any, names: list[str]) -> Any:
        for name in names:
            node = node.kwargs[name] if isinstance(node, Spec) else getattr(node, name)
        return node

    config = Config()
    assert len(paths(config)) > 60
    for path in paths(config):
        assert patch(config, {path: value(config, path.split("."))}) == config


# JSON -------------------------------------------------------------------------------------------


def test_json_holds_defaults_and_names() -> None:
    document = json.loads(to_json(Config()))
    assert document["version"] == 1
    assert document["config"]["norm"] == {"spec": "LayerNorm", "eps": 1e-5, "bias": True}
    assert document["config"]["decoder"]["cross_attention"]["attend"] == {"function": "attend"}
    assert "0x" not in to_json(Config())


def test_json_round_trip_keeps_types() -> None:
    config = patch(
        Config(),
        {
            "self_attention": (spec(MultiHeadAttention, window=3), spec(MultiHeadAttention)),
            "head": spec(Head, softcap=30.0),
            "cross_attention.attend": sdpa,
        },
    )
    again = from_json(to_json(config))
    assert again == config
    assert isinstance(again.encoder.self_attention, tuple)
    assert again.decoder.cross_attention.kwargs["attend"] is sdpa
    assert again.encoder.self_attention[0].kwargs["attend"] is attend


def test_json_survives_a_new_default() -> None:
    """A saved config still builds what it built: the old default is in the file."""
    text = to_json(Config()).replace('"eps": 1e-05', '"eps": 0.5')
    assert from_json(text).norm == spec(LayerNorm, eps=0.5)


def test_a_built_config_gives_what_it_says() -> None:
    module = spec(FeedForward, d_ff=6, bias=False)(d_model=4)
    assert sum(p.numel() for p in module.parameters()) == 2 * 4 * 6
    assert module(torch.zeros(1, 4)).shape == (1, 4)


def test_a_path_into_a_part_that_every_stack_leaves_out_changes_nothing() -> None:
    alone = patch(Config(), DECODER_ONLY)
    both = {"self_attention.attend": sdpa, "cross_attention.attend": sdpa}
    together = patch(Config(), DECODER_ONLY, both)
    assert together == patch(alone, both) == patch(patch(Config(), both), DECODER_ONLY)
    assert together != alone
    for path in ("encoder.n_layers", "cross_atention.attend"):
        with pytest.raises(ValueError, match=f"unknown path '{path}'"):
            patch(alone, {path: 3})


def test_a_part_that_every_stack_leaves_out_can_be_put_in() -> None:
    config = patch(Config(), {"bias": spec(nn.Identity)})
    assert config.encoder is not None
    assert config.decoder is not None
    assert config.encoder.bias == config.decoder.bias == spec(nn.Identity)


def test_a_class_that_its_name_would_not_find_again_is_not_saved() -> None:
    assert from_json(to_json(spec(LayerNorm))) == spec(LayerNorm)
    with pytest.raises(ValueError, match=r"torch.*LayerNorm cannot be saved by name"):
        to_json(spec(nn.LayerNorm, normalized_shape=8))
