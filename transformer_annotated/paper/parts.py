# %% [markdown]
r"""
# Parts

A part of a model that is not built yet can be a value: compared, printed, saved, changed.
This chapter makes such values with `spec`, changes them with `patch`, and reads the change back with
`diff`. It is the only machinery in the book.
"""

# %% [markdown]
# The baseline is built. Before we take it apart, one tool. On a first reading, look at the cells that print something and skip the functions between them: you
# need to know how `spec`, `patch` and `diff` are used, not how they work.

# %% mystnb={"figure": {"caption": "Chapter 2 of Part I: parts, before there is anything to build from them.", "name": "fig-map-parts"}, "image": {"alt": "Eleven boxes in a row, one a chapter, from Why attention to A real corpus. The second, Parts, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(2);

# %% [markdown]
# Here is the problem. A six-layer model needs six feed-forward networks, all alike, none shared. Suppose you
# want to try another kind. You could pass a built network and copy it six times: then every copy starts with the
# same random numbers, and the options you built it with are hard to see. You could pass a string, `"relu"` or
# `"swiglu"`: then the model needs a list of all the names there will ever be. You could pass the class: then its
# options need another way in. Watch the first of these go wrong.

# %% tags=["active-ipynb"]
# import copy
#
# import torch
# from torch import nn
#
# built = nn.Linear(2, 2, bias=False)
# layers = [copy.deepcopy(built) for _ in range(3)]
# [bool(torch.equal(layer.weight, built.weight)) for layer in layers]

# %% [markdown]
# Three layers, one set of initial weights. What we wanted to hand over was not a network. It was *how to make
# one*: a class, and the arguments we have already decided on.
#
# ## A part that is not built yet
#
# Python has the pieces. A class is a value, a dictionary of arguments is a value, and `inspect` can tell whether
# they go together. We join them in one small object. It remembers the class (`target`) and the arguments, it
# cannot be changed, and calling it builds the part.

# %%
import dataclasses
import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

M = TypeVar("M")
C = TypeVar("C")

# %%
class Spec(Generic[M]):
    """A component that is not built yet: a class and its keyword arguments.

    Made by `spec`, which checks the arguments and fills in the defaults. A spec is immutable;
    two are equal when their class and their arguments are. Calling it builds the component.
    """

    __slots__ = ("arguments", "target")
    target: Callable[..., M]
    arguments: tuple[tuple[str, Any], ...]

    def __init__(self, target: Callable[..., M], arguments: Mapping[str, Any]) -> None:
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "arguments", tuple(sorted(arguments.items())))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a spec is immutable: patch it instead of setting {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Spec, (self.target, self.kwargs)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments, defaults included."""
        return dict(self.arguments)

    def __call__(self, **sizes: Any) -> M:
        """Build the component. `sizes` are the arguments that only the model around it knows.

        Raises ValueError for a size that is missing, unknown, or already fixed by the spec.
        """
        twice = sorted(sizes.keys() & self.kwargs.keys())
        if twice:
            raise ValueError(f"{self!r} already fixes {', '.join(twice)}")
        arguments = {**self.kwargs, **sizes}
        check_arguments(self.target, arguments, complete=True)
        return self.target(**arguments)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        return (self.target, self.arguments) == (other.target, other.arguments)

    def __hash__(self) -> int:
        return hash((self.target, self.arguments))

    def __repr__(self) -> str:
        usual = defaults(self.target)
        changed = {k: v for k, v in self.arguments if k not in usual or usual[k] != v}
        written = [f"{name}={show(value)}" for name, value in changed.items()]
        return f"spec({', '.join([self.target.__name__, *written])})"

# %% [markdown]
# `spec` is the way to make one. It checks the arguments *here*, where you wrote them, and not later inside a
# model that is half built. It also stores the defaults you relied on.

# %%
def spec(target: Callable[..., M], /, **arguments: Any) -> Spec[M]:
    """Return a checked `Spec` of the class `target` with these keyword arguments.

    Arguments left out take the class's defaults, which are stored, so that a saved spec still
    builds the same component after a default has changed. Sizes without a default (`d_model`)
    are given when the spec is called.

    Raises ValueError for an argument that `target` does not take, or a value that is not plain
    (a number, a string, None, a spec, a function, or a tuple of those).
    """
    if not callable(target) or isinstance(target, Spec):
        raise ValueError(f"target must be a class, got {target!r}")
    check_arguments(target, arguments, complete=False)
    for name, value in arguments.items():
        check_plain(f"{target.__name__}'s {name}", value)
    return Spec(target, {**defaults(target), **arguments})

# %% [markdown]
# Two helpers do the checking. `check_arguments` compares the arguments with the class's signature. `check_plain` refuses
# values that could not be compared, printed or saved, above all a module that is already built.

# %%
def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], *, complete: bool
) -> None:
    """Raise ValueError unless `target` takes these arguments (and, if `complete`, no more)."""
    parameters = inspect.signature(target).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise ValueError(
            f"{target.__name__} has no argument {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(parameters)}"
        )
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if name not in arguments
    ]
    if complete and missing:
        raise ValueError(f"{target.__name__} still needs {', '.join(missing)}")


def defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """The default of each argument of `target` that has one."""
    parameters = inspect.signature(target).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def check_plain(name: str, value: Any) -> None:
    """Raise ValueError unless `value` can be compared, printed and saved."""
    if isinstance(value, tuple):
        for entry in value:
            check_plain(name, entry)
    elif isinstance(value, Spec) or inspect.isfunction(value) or value is None:
        return
    elif not isinstance(value, (bool, int, float, str)):
        raise ValueError(
            f"{name} must be a number, a string, None, a spec, a function or a tuple of those, "
            f"got {type(value).__name__}: a built object would be shared by every layer"
        )


def show(value: Any) -> str:
    """`repr`, but a function is shown by its name alone."""
    return value.__name__ if inspect.isfunction(value) else repr(value)

# %% [markdown]
# Try it on a tiny part: a network of two layers that we will not need again.

# %% tags=["active-ipynb"]
# class Tiny(nn.Module):
#     def __init__(self, d_model: int, width: int = 8, act: Spec[nn.Module] = spec(nn.ReLU)) -> None:
#         super().__init__()
#         self.net = nn.Sequential(nn.Linear(d_model, width), act(), nn.Linear(width, d_model))
#
#     def forward(self, x: torch.Tensor) -> torch.Tensor:
#         return self.net(x)
#
#
# tiny = spec(Tiny, width=4)
# print(tiny)
# print(tiny.kwargs)

# %% [markdown]
# The printed form shows only what differs from the defaults. The stored form holds everything: if the default
# activation changes next year, this spec still builds what it built today. `d_model` is missing on purpose. It
# is a *size*, and sizes are known to the model, not to the part. They are given when the part is built.

# %% tags=["active-ipynb"]
# one, two = tiny(d_model=2), tiny(d_model=2)
# print(one)
# print("same weights:", torch.equal(one.net[0].weight, two.net[0].weight))

# %% [markdown]
# Two calls, two parts, different random weights. And specs are equal when they would build the same thing:

# %% tags=["active-ipynb"]
# print(spec(Tiny, width=4) == spec(Tiny, width=4), spec(Tiny) == spec(Tiny, width=8))
# print(spec(Tiny, width=4) == spec(Tiny, width=5))

# %% [markdown]
# A wrong argument fails on the line that holds it, by name:

# %% tags=["active-ipynb"]
# for attempt in (
#     lambda: spec(Tiny, widht=4),
#     lambda: spec(Tiny, act=nn.ReLU()),
#     lambda: spec(Tiny)(),
#     lambda: spec(Tiny, d_model=2)(d_model=3),
# ):
#     try:
#         attempt()
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## A tree of parts
#
# A model is described by a tree: numbers at the root, specs below, specs inside specs. A frozen dataclass makes
# a good root. This one is a toy with two stacks, `left` and `right`. The real one comes in Chapter 8.

# %% tags=["active-ipynb"]
# from dataclasses import dataclass
#
#
# @dataclass(frozen=True)
# class Side:
#     n_layers: int = 4
#     net: Spec[nn.Module] | tuple[Spec[nn.Module], ...] = spec(Tiny)
#
#
# @dataclass(frozen=True)
# class Plan:
#     d_model: int = 2
#     left: Side | None = Side()
#     right: Side | None = Side(n_layers=2)
#
#
# plan = Plan()
# plan

# %% [markdown]
# A **stack** is a branch like `left`: a number of layers that are built alike. Each place in the tree has a *path*: the names on the way to it, joined by dots. `children` gives the names below
# a node, and `paths` walks them all.

# %%
def children(node: Any) -> dict[str, Any]:
    """The named parts of a config (a dataclass) or of a spec; nothing for any other value."""
    if isinstance(node, Spec):
        return node.kwargs
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return {}


def paths(node: Any) -> list[str]:
    """Every dotted path below `node`, in reading order."""
    if isinstance(node, tuple):
        return list(dict.fromkeys(path for entry in node for path in paths(entry)))
    found = []
    for name, child in children(node).items():
        found += [name, *(f"{name}.{path}" for path in paths(child))]
    return found

# %% tags=["active-ipynb"]
# print("\n".join(paths(plan)))

# %% [markdown]
# Paths should be short to write. Two rules make them so. A path that does not begin at the root, such as `net.width`,
# means *every* stack that has it. A path that meets a tuple means every entry of it: a tuple is a pattern
# that the model repeats over its layers. `find` and `resolve` implement this, and `right.layers.0.net` picks one layer.

# %%
def find(node: Any, names: list[str]) -> list[tuple[str, ...]]:
    """Every address that `names` leads to below `node`: one, or none if a name is unknown.

    A tuple (a pattern tiled over the layers) is looked through; `layers.3` picks one layer.
    """
    if not names:
        return [()]
    if isinstance(node, tuple):
        return list(dict.fromkeys(a for entry in node for a in find(entry, names)))
    head, rest, known = names[0], names[1:], children(node)
    if head in known:
        return [(head, *address) for address in find(known[head], rest)]
    if head == "layers" and "n_layers" in known and len(rest) > 1:
        if rest[0].isdecimal() and int(rest[0]) < known["n_layers"]:
            return [(head, rest[0], *address) for address in find(node, rest[1:])]
    return []


def resolve(config: Any, path: str) -> list[tuple[str, ...]]:
    """The addresses that `path` means: itself, or the same path in each stack that has the part.

    Raises ValueError, listing the paths there are, if no stack even knows the part.
    """
    names = path.split(".")
    addresses = find(config, names)
    if not addresses and names[0] not in children(config):
        stacks = {k: v for k, v in children(config).items() if dataclasses.is_dataclass(v)}
        addresses = [(k, *address) for k, v in stacks.items() for address in find(v, names)]
        holders = [v for v in stacks.values() if names[0] in children(v)]
        if not addresses and holders and all(children(v)[names[0]] is None for v in holders):
            return []  # every stack leaves this part out: there is nothing in it to change
    if addresses:
        return addresses
    known = paths(config)
    near = difflib.get_close_matches(path, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown path {path!r}{hint} The paths are: {', '.join(known)}")

# %% tags=["active-ipynb"]
# for path in ("d_model", "net.width", "right.layers.0.net"):
#     print(path, "->", resolve(plan, path))

# %% [markdown]
# ## Changing the tree
#
# `patch` takes a tree and one or more dictionaries from paths to new values, and returns a changed copy. The
# original stays as it is.

# %%
def put(node: Any, address: tuple[str, ...], value: Any) -> Any:
    """A copy of `node` with the part at `address` replaced by `value`."""
    if not address:
        return value
    if isinstance(node, tuple):
        return tuple(put(e, address, value) if find(e, list(address)) else e for e in node)
    head, *rest = address
    known = children(node)
    if head == "layers" and head not in known:
        index, name, depth = int(rest[0]), rest[1], known["n_layers"]
        old = known[name] if isinstance(known[name], tuple) else (known[name],)
        tiled = [old[i % len(old)] for i in range(depth)]
        tiled[index] = put(tiled[index], tuple(rest[2:]), value)
        return dataclasses.replace(node, **{name: tuple(tiled)})
    new = put(known[head], tuple(rest), value)
    if isinstance(node, Spec):
        return spec(node.target, **{**known, head: new})
    return dataclasses.replace(node, **{head: new})


def patch(config: C, *patches: Mapping[str, Any]) -> C:
    """Return a copy of `config` with the dotted paths of all `patches` replaced.

    A path that does not begin at the root applies to every stack that has it; one that leads
    through a tuple applies to every entry; `decoder.layers.0.ffn` applies to one layer.
    Short paths are applied before long ones and single layers last, so the order of the patches
    does not matter.

    Raises ValueError for an unknown path, and for two different values at one place.
    """

    def order(entry: tuple[str, Any]) -> tuple[bool, int]:
        names = entry[0].split(".")
        return "layers" in names, len(names) + (names[0] not in children(config))

    done: dict[tuple[str, ...], Any] = {}
    new: C = config
    for path, value in sorted((e for p in patches for e in p.items()), key=order):
        for address in resolve(new, path):
            if address in done and done[address] != value:
                name = ".".join(address)
                raise ValueError(f"two values for {name}: {show(done[address])} and {show(value)}")
            done[address] = value
            new = put(new, address, value)
    return new

# %% [markdown]
# What changed can be computed as well. `diff` walks two trees side by side and prints the paths where they differ.

# %%
def diff(before: Any, after: Any, name: str = "") -> str:
    """What changed between two configs: a `-` line and a `+` line for each path."""
    if type(before) is type(after) and show_class(before) == show_class(after):
        old, new = children(before), children(after)
        if old:
            pairs = [(f"{name}.{k}" if name else k, old[k], new[k]) for k in old]
            return "\n".join(filter(None, (diff(a, b, path) for path, a, b in pairs)))
    return "" if before == after else f"- {name} = {show(before)}\n+ {name} = {show(after)}"


def show_class(node: Any) -> str:
    """The class that a spec builds, or the class of any other value."""
    return node.target.__name__ if isinstance(node, Spec) else type(node).__name__

# %% [markdown]
# A later chapter will end in a dictionary like this one. It says what the chapter changed, and nothing else.

# %% tags=["active-ipynb"]
# WIDE = {"net.width": 32}
# GELU = {"net.act": spec(nn.GELU)}
# changed = patch(plan, WIDE, GELU)
# print(diff(plan, changed))

# %% [markdown]
# Two short patches, two changes in each of the two stacks. The text was produced from the two trees, so it cannot
# disagree with them.
#
# One layer of one stack can differ too. The spec becomes a pattern as long as the stack is deep:

# %% tags=["active-ipynb"]
# print(patch(plan, {"right.layers.0.net.width": 1}).right)

# %% [markdown]
# Does the order of patches matter? It must not: a reader should be able to combine chapters freely. Short paths are
# applied before long ones and single layers last, so one layer may differ from its stack. Two different values for one place are an error, also when one
# path names all stacks and the other one of them: then write out both.

# %% tags=["active-ipynb"]
# assert patch(plan, WIDE, GELU) == patch(plan, GELU, WIDE) == patch(patch(plan, GELU), WIDE)
# for wrong in ({"net.widht": 3}, {"net.width": 3, "left.net.width": 4}):
#     try:
#         patch(plan, wrong)
#     except ValueError as error:
#         print(error, end="\n\n")

# %% [markdown]
# The first error answers with the path you may have meant, and all the paths there are. The second names both
# values.
#
# ## Writing it down
#
# A saved model is useless without the description that built it. `to_json` writes a tree as text. Classes go in by
# name, so the name must find the same class again. Defaults are written out, and a version number says which
# rules the text follows.

# %%
def look_up(name: str, wanted: Callable[[Any], bool]) -> Any:
    """The object called `name` in this package or in `torch.nn`."""
    if not isinstance(name, str):
        raise ValueError(f"a name in a config must be text, got {name!r}")
    package = importlib.import_module("transformer_annotated")
    for namespace in (package, torch.nn):
        found = getattr(namespace, name, None)
        if name.isidentifier() and not name.startswith("_") and wanted(found):
            return found
    raise ValueError(f"unknown name {name!r} in a config")


def check_findable(node: Any) -> None:
    """Raise ValueError if reading the class's name back would find another class."""
    target = node.target if isinstance(node, Spec) else type(node)
    if target.__module__ != "__main__" and look_up(target.__name__, callable) is not target:
        raise ValueError(f"{target.__module__}.{target.__name__} cannot be saved by name: this "
                         "package has another class of that name")  # fmt: skip


# %%
CONFIG_VERSION = 1


def to_json(config: Any) -> str:
    """Write a config as JSON text: classes by name, defaults included."""

    def plain(node: Any) -> Any:
        if isinstance(node, tuple):
            return [plain(entry) for entry in node]
        if inspect.isfunction(node):
            return {"function": node.__name__}
        if isinstance(node, Spec) or dataclasses.is_dataclass(node):
            check_findable(node)
            kind = "spec" if isinstance(node, Spec) else "config"
            return {kind: show_class(node), **{k: plain(v) for k, v in children(node).items()}}
        return node

    document = {"version": CONFIG_VERSION, "config": plain(config)}
    return json.dumps(document, indent=2, allow_nan=False)

# %% tags=["active-ipynb"]
# print(to_json(spec(nn.GELU, approximate="tanh")))

# %% [markdown]
# Reading is the dangerous direction: text from somewhere else decides what runs. `from_json` looks names up in this
# package and in `torch.nn`, nowhere else, and refuses what it does not know.

# %%
def from_json(text: str) -> Any:
    """Read a config written by `to_json`.

    Names are looked up in this package, then in `torch.nn`, and nowhere else, so a file cannot
    name arbitrary code. Raises ValueError for another version, an unknown name or argument,
    and for NaN or Infinity.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"a config holds finite numbers only, got {constant}")

    def build(node: Any) -> Any:
        if isinstance(node, list):
            return tuple(build(entry) for entry in node)
        if not isinstance(node, dict):
            return node
        if "function" in node:
            return look_up(node["function"], inspect.isfunction)
        arguments = {k: build(v) for k, v in node.items() if k not in ("spec", "config")}
        if "spec" in node:
            return spec(look_up(node["spec"], inspect.isclass), **arguments)
        target = look_up(node.get("config", ""), dataclasses.is_dataclass)
        check_arguments(target, arguments, complete=False)
        return target(**arguments)

    document = json.loads(text, parse_constant=refuse)
    known = isinstance(document, dict) and document.get("version") == CONFIG_VERSION
    if not known or "config" not in document:
        raise ValueError(f"expected a config of version {CONFIG_VERSION}, got {text[:60]!r}")
    return build(document["config"])


# %% tags=["active-ipynb"]
# text = to_json(spec(nn.GELU, approximate="tanh"))
# assert from_json(text) == spec(nn.GELU, approximate="tanh")
# for wrong in (
#     text.replace("GELU", "os.system"),
#     text.replace("approximate", "approx"),
#     text.replace('"version": 1', '"version": 9'),
# ):
#     try:
#         from_json(wrong)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## Numbers that make sense
#
# Two checks come back in every part: sizes are whole numbers from 1 up, and a dropout rate lies in $[0, 1)$.
# They live here, next to the other checks. Errors in this book name the argument, the value and the allowed range,
# and are raised before anything is changed.

# %%
def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError for a size that is not a whole number of at least 1 (None is skipped)."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError for a probability outside [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {rate!r}")

# %% tags=["active-ipynb"]
# for attempt in (lambda: check_sizes(d_model=0), lambda: check_rate("dropout", 1.5)):
#     try:
#         attempt()
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## What others do
#
# The choice is old and the field has not settled it. Some codebases keep one flat record of options and a ladder
# of `if`s; it reads well until the fiftieth option. Some resolve strings in a table of names, which every new part
# must then enter. Some subclass the model for each variant, which multiplies: three changes make eight classes. A
# tree of unbuilt parts puts each change where it belongs. `functools.partial` comes close, but two equal partials
# compare unequal, and a partial accepts a wrong argument until the day it is called:

# %% tags=["active-ipynb"]
# from functools import partial
#
# print("equal partials are equal:", partial(Tiny, width=4) == partial(Tiny, width=4))
# print("a typo passes silently:", partial(Tiny, widht=4).keywords)

# %% [markdown]
# ## How it breaks
#
# - *A part is used twice by accident.* You see two layers with the same weights after training. A spec cannot do
#   this, since each call builds anew; a built module passed around can.
# - *A path changes nothing.* It never does so silently here: an unknown path is an error. In code with
#   `getattr(config, name, default)` a misspelt name just takes the default.
# - *A default changes under a saved model.* The spec stored the old one, and `repr` starts to show it.
#
# ## Takeaways
#
# - A spec is a class with arguments, checked where it is written, built where it is used.
# - A config is a tree of specs. `patch` changes it by path, `diff` shows the change, `to_json` keeps it.
# - Patches do not depend on their order, and a contradiction is an error.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 2.1.** Write a patch that makes the left stack of `Plan` 3 layers deep and gives its nets, and only its nets, a
# width of 16. The answer is a dictionary.

# %% tags=["active-ipynb"]
# answer = ...
# check("2.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = {"left.n_layers": 3, "left.net.width": 16}
# check("2.1", answer)

# %% [markdown]
# **Exercise 2.2.** `Plan()` is patched with `{"net": (spec(Tiny, width=1), spec(Tiny, width=2))}`. The pattern is tiled over four
# layers on the left and two on the right. Which widths do the four left layers get, in order? The answer is
# a list of four numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("2.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# pattern = (spec(Tiny, width=1), spec(Tiny, width=2))
# answer = [pattern[i % len(pattern)].kwargs["width"] for i in range(4)]
# check("2.2", answer)

# %% [markdown]
# **Exercise 2.3.** Which of these may be an argument in a spec: the number `0.1`, the list `[1, 2]`, the tuple `(1, 2)`, a function
# you defined with `def`, the module `nn.ReLU()`? Answer with a list of five booleans, in this order.

# %% tags=["active-ipynb"]
# answer = ...
# check("2.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def allowed(value: object) -> bool:
#     try:
#         check_plain("value", value)
#     except ValueError:
#         return False
#     return True
#
#
# def f(x):
#     return x
#
#
# answer = [allowed(value) for value in (0.1, [1, 2], (1, 2), f, nn.ReLU())]
# check("2.3", answer)
