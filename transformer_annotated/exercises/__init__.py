"""The verifiers of the exercises: one small function for each number.

A verifier takes the reader's answer. It returns where the answer is right and raises
``AssertionError`` with a hint where it is not; `transformer_annotated.book.check` prints the rest.
It computes what is right instead of storing it where that is possible, and a hint says what to look
at without giving the answer away::

    @exercise("3.1")
    def _(answer: Any) -> None:
        close(answer, 0.5, hint="Divide by the number of keys, not of queries.")

Chapters are imported inside the verifier that needs them, so that this package stays cheap. Its
modules `paper`, `training` and `modern` hold one part's verifiers each.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CHECKS", "close", "exercise"]

Verifier = Callable[[Any], None]

CHECKS: dict[str, Verifier] = {}
"""Exercise number, such as ``"3.1"``, to its verifier."""


def exercise(number: str) -> Callable[[Verifier], Verifier]:
    """Register a verifier under an exercise's number.

    Raises:
        ValueError: the number is taken.
    """

    def register(verifier: Verifier) -> Verifier:
        if number in CHECKS:
            raise ValueError(f"number={number!r}: there is a verifier for this exercise already")
        CHECKS[number] = verifier
        return verifier

    return register


def close(answer: Any, expected: Any, rel: float = 1e-4, hint: str = "") -> None:
    """Assert that a number or tensor has the expected shape and values, to a relative tolerance.

    The tolerance is relative to the largest expected value. Raises AssertionError with a hint.
    """
    try:
        got = torch.as_tensor(answer).detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"A number or a tensor is asked for. {hint}".strip()) from None
    want = torch.as_tensor(expected).detach().to(torch.float64)
    assert got.shape == want.shape, (
        f"Its shape is {tuple(got.shape)}; expected {tuple(want.shape)}. {hint}".strip()
    )
    room = rel * max(float(want.abs().max()) if want.numel() else 0.0, 1e-12)
    assert torch.allclose(got, want, rtol=0.0, atol=room), hint or "The values differ."


from transformer_annotated.exercises import modern, paper, training  # noqa: E402, F401  (they register)
