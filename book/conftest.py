"""Lets nbval run cells as Jupyter does: with a history, by which a final ``;`` hides a value."""

from typing import Any

try:
    from nbval.kernel import RunningKernel
except ImportError:  # pytest without nbval collects nothing here
    RunningKernel = None


def execute_cell_input(self: Any, cell_input: str, allow_stdin: bool | None = None) -> Any:
    """Send a cell to the kernel and return the message's id."""
    return self.kc.execute(
        cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


if RunningKernel is not None:
    RunningKernel.execute_cell_input = execute_cell_input
