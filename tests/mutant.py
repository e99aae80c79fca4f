"""The engine that plants a mistake: `plant` takes a function's source, replaces one piece of it and
swaps the compiled code in place, so that every module that uses the function makes the mistake,
until the `with` block ends.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

PACKAGE = "transformer_annotated"


@dataclass(frozen=True)
class Mutant:
    """One mistake: in the code of `target` the text `old` becomes `new`.

    `killed_by` names the test that fails then; `case` is what the test is called with.
    """

    name: str
    mistake: str
    target: str
    old: str
    new: str
    killed_by: str
    case: dict[str, Any] = field(default_factory=dict, hash=False)


def function(target: str) -> FunctionType:
    """The function that `module:qualname` names; for a property, its getter."""
    module, name = target.split(":")
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found)
    assert isinstance(found, FunctionType), f"{target} is no function"
    return found


def compiled(source: str, name: str, like: CodeType) -> CodeType:
    """The code of the function `name` in `source`, compiled inside a class for `super()`."""
    text = f"class Dummy:\n{textwrap.indent(textwrap.dedent(source), '    ')}"

    def search(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_name == name:
                    yield constant
                yield from search(constant)

    code = next(search(compile(text, like.co_filename, "exec")))
    assert code.co_freevars == like.co_freevars, "the mistake closes over other variables"
    return code


@contextmanager
def plant(mutant: Mutant) -> Iterator[None]:
    """Inside the `with` block the mistake is made everywhere."""
    target = function(mutant.target)
    source = inspect.getsource(target)
    assert source.count(mutant.old) == 1, f"{mutant.old!r} occurs {source.count(mutant.old)} times"
    original = target.__code__
    target.__code__ = compiled(source.replace(mutant.old, mutant.new), target.__name__, original)
    try:
        yield
    finally:
        target.__code__ = original
