"""Every planted mistake is noticed by the test that its row names."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutant import Mutant, function, plant
from tests.mutants import MUTANTS
from tools import mutant_page

ROOT = Path(__file__).resolve().parent.parent


def killer(mutant: Mutant) -> Callable[[], None]:
    """The named test, as a call without arguments."""
    path, name = mutant.killed_by.split("::")
    test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    return lambda: test(**mutant.case)


PASSED: set[tuple[str, str]] = set()  # several mistakes have the same test: once is enough


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant) -> None:
    """The test passes, and fails by an assertion while the mistake is made; the code comes back."""
    test, code = killer(mutant), function(mutant.target).__code__
    if (key := (mutant.killed_by, repr(mutant.case))) not in PASSED:
        test()
        PASSED.add(key)
    with plant(mutant), pytest.raises((AssertionError, pytest.fail.Exception)):
        test()
    assert function(mutant.target).__code__ is code


def test_each_mistake_is_another() -> None:
    assert len({m.name for m in MUTANTS}) == len({m.mistake for m in MUTANTS}) == len(MUTANTS)
    assert len({(m.target, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert len(MUTANTS) >= 24


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "book" / "mutants.md").read_text(encoding="utf-8")
    assert page == mutant_page.render(), "run: python -m tools.mutant_page"
