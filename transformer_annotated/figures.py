"""The book's figures: one style, and the few drawings that several chapters share.

Only demo cells import this module, so `import transformer_annotated` never loads matplotlib.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

# Blue, orange, green, red-purple, grey: distinguishable without red-green vision
# (Okabe and Ito's palette), and dark enough to read on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#AA4499", "#666666"]
SEQUENTIAL = "Blues"
DIVERGING = "RdBu_r"

_STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 3.2),
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": cycler(color=COLORS),
    "image.cmap": SEQUENTIAL,
}


def use_style() -> None:
    """Set the book's matplotlib style for this process (sizes in inches, type in points)."""
    plt.rcParams.update(_STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # not in a notebook: the style alone is enough
        return
    set_matplotlib_formats("png", dpi=150)


def heatmap(
    ax: Axes,
    matrix: Tensor | np.ndarray,
    *,
    rows: Sequence[str] | None = None,
    cols: Sequence[str] | None = None,
    row_label: str = "",
    col_label: str = "",
    title: str = "",
    values: str | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = SEQUENTIAL,
) -> Any:
    """Draw `matrix` `(rows, cols)` with one label per row and column, and return the image.

    `values` is a format such as `".2f"`; given, each cell also shows its number.
    Row and column labels are checked against the shape, since a heat map with
    swapped axes looks just as convincing as a right one.
    """
    data = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, dtype=float)
    if data.ndim != 2:
        raise ValueError(f"matrix must be 2-D, got shape {data.shape}")
    for name, labels, size in (("rows", rows, data.shape[0]), ("cols", cols, data.shape[1])):
        if labels is not None and len(labels) != size:
            raise ValueError(f"{name} has {len(labels)} labels for {size} {name} of the matrix")
    image = ax.imshow(data, cmap=cmap, vmin=vmin, vmax=vmax, aspect="auto")
    ax.grid(False)
    if max(data.shape) <= 24:  # thin lines between cells
        ax.set_xticks(np.arange(-0.5, data.shape[1]), minor=True)
        ax.set_yticks(np.arange(-0.5, data.shape[0]), minor=True)
        ax.grid(which="minor", color="#BBBBBB", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    if rows is not None:
        ax.set_yticks(range(len(rows)), rows)
    if cols is not None:
        ax.set_xticks(range(len(cols)), cols)
        if max((len(label) for label in cols), default=0) > 3:
            ax.tick_params(axis="x", labelrotation=60)
    ax.set(xlabel=col_label, ylabel=row_label, title=title)
    if values is not None:
        low, high = image.get_clim()
        for (i, j), value in np.ndenumerate(data):
            dark = value > (low + high) / 2 if cmap == SEQUENTIAL else False
            ink = "white" if dark else "black"
            ax.text(j, i, format(value, values), ha="center", va="center", color=ink, fontsize=8)
    return image


_PARTS: tuple[tuple[str, ...], ...] = (
    (  # Part I
        "Why\nattention", "Parts", "Attention", "Multi-\nhead", "Feed-\nforward", "Add &\nNorm",
        "Embed-\ndings", "Whole\nmodel", "Small\nlanguage", "First\ntranslation", "Real\ncorpus",
    ),
    (  # Part II
        "Corpora", "Tokens", "Batches", "Objec-\ntive", "Sched-\nule", "Speed", "Check-\npoints",
        "Trainer", "Decod-\ning", "Beam\nsearch", "BLEU", "The paper\nagain", "Looking\ninside",
    ),
    (  # Part III
        "Language\nmodel", "Pre-LN", "RMSNorm", "Gates", "RoPE", "Score\nbiases", "Long\ncontext",
        "Grouped\nqueries", "Sliding\nwindow", "Experts", "All\npatches", "Produc-\ntion",
    ),
)  # fmt: skip


def reading_map(chapter: int) -> Axes:
    """Draw the part that holds `chapter` as a row of boxes, with its box filled."""
    first, part = 1, _PARTS[0]
    for part in _PARTS:
        if 1 <= chapter < first + len(part):
            break
        first += len(part)
    else:
        raise ValueError(f"chapter must be 1 to {first - 1}, got {chapter}")
    ax = plt.subplots(figsize=(7.2, 0.75))[1]
    ax.set_axis_off()
    ax.set(xlim=(0, len(part)), ylim=(0, 1))
    for i, name in enumerate(part):
        here = first + i == chapter
        box = FancyBboxPatch(
            (i + 0.08, 0.06), 0.84, 0.88, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLORS[0] if here else "#F3F6FA", edgecolor="#888888", linewidth=0.8,
        )  # fmt: skip
        ax.add_patch(box)
        ink = "white" if here else "black" if first + i < chapter else "#666666"
        ax.text(i + 0.5, 0.74, str(first + i), ha="center", va="center", fontsize=7, color=ink)
        ax.text(i + 0.5, 0.36, name, ha="center", va="center", fontsize=6.2, color=ink)
    return ax


# The model as boxes: (name of the seam, text, x, y, width, height). Both stacks, bottom to top.
_BOXES = [
    ("embedding", "embedding\nids, positions", 0.5, 0.0, 3.4, 0.9),
    ("self_attention", "self-attention\nposition · attend", 0.5, 1.7, 3.4, 0.9),
    ("residual", "residual · norm", 0.5, 2.8, 3.4, 0.5),
    ("ffn", "ffn", 0.5, 3.9, 3.4, 0.6),
    ("residual", "residual · norm", 0.5, 4.7, 3.4, 0.5),
    ("final_norm", "final norm (2017: none)", 0.5, 5.9, 3.4, 0.5),
    ("embedding", "embedding\nids, positions", 6.1, 0.0, 3.4, 0.9),
    ("self_attention", "self-attention, causal\nposition · attend", 6.1, 1.7, 3.4, 0.9),
    ("residual", "residual · norm", 6.1, 2.8, 3.4, 0.5),
    ("cross_attention", "cross-attention\nattend", 6.1, 3.9, 3.4, 0.9),
    ("residual", "residual · norm", 6.1, 5.0, 3.4, 0.5),
    ("ffn", "ffn", 6.1, 6.1, 3.4, 0.6),
    ("residual", "residual · norm", 6.1, 6.9, 3.4, 0.5),
    ("final_norm", "final norm (2017: none)", 6.1, 8.1, 3.4, 0.5),
    ("head", "head", 6.1, 9.1, 3.4, 0.6),
]
SEAMS = tuple(dict.fromkeys(box[0] for box in _BOXES)) + ("bias",)


def seams(lit: Sequence[str] = (), *, ax: Axes | None = None) -> Axes:
    """Draw the model with its seams; those named in `lit` are coloured.

    The same picture recurs in every chapter that changes something, with the changed seam lit.
    Allowed names are `figures.SEAMS`.
    """
    unknown = [name for name in lit if name not in SEAMS]
    if unknown:
        raise ValueError(f"unknown seams {unknown}; there are {', '.join(SEAMS)}")
    if ax is None:
        ax = plt.subplots(figsize=(7.2, 6.0))[1]
    ax.set_axis_off()
    ax.set(xlim=(-0.9, 10.9), ylim=(-0.9, 10.4))
    for name, text, x, y, width, height in _BOXES:
        on, absent = name in lit, "none" in text
        box = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=COLORS[1] if on else "white" if absent else "#F3F6FA",
            edgecolor="#555555", linewidth=1.0, linestyle="--" if absent and not on else "-",
        )  # fmt: skip
        ax.add_patch(box)
        ax.text(
            x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5,
            color="white" if on else "black",
        )  # fmt: skip
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.0}

    def up(x: float, start: float, end: float) -> None:
        ax.annotate("", (x, end), (x, start), arrowprops=arrow)

    def around(x: float, start: float, end: float) -> None:
        ax.plot([x + 1.7, x - 0.14, x - 0.14], [start, start, end], color="#555555", linewidth=0.9)
        ax.annotate("", (x, end), (x - 0.14, end), arrowprops={**arrow, "linewidth": 0.9})

    for x, start, end in (
        (0.5, 1.5, 3.05), (0.5, 3.6, 4.95), (6.1, 1.5, 3.05), (6.1, 3.6, 5.25), (6.1, 5.8, 7.15),
    ):  # fmt: skip
        around(x, start, end)
    for x in (2.2, 7.8):
        up(x, -0.6, 0.0)
    shared: dict[str, Any] = {"color": COLORS[0], "linestyle": ":", "linewidth": 1.4}
    ax.plot([3.95, 6.05], [0.45, 0.45], **shared)
    ax.plot([9.55, 10.6, 10.6, 9.55], [0.45, 0.45, 9.4, 9.4], **shared)
    ax.text(5.0, 0.2, "one table", fontsize=8.5, color=COLORS[0], ha="center", va="center")
    for start, end in ((0.9, 1.7), (2.6, 2.8), (3.3, 3.9), (4.5, 4.7), (5.2, 5.9)):
        up(2.2, start, end)
    spans = ((0.9, 1.7), (2.6, 2.8), (3.3, 3.9), (4.8, 5.0), (5.5, 6.1), (6.7, 6.9), (7.4, 8.1))
    for start, end in (*spans, (8.6, 9.1), (9.7, 10.3)):
        up(7.8, start, end)
    ax.plot([2.2, 2.2, 5.0, 5.0], [6.4, 7.0, 7.0, 4.35], color="#555555", linewidth=1.0)
    ax.annotate("", (6.1, 4.35), (5.0, 4.35), arrowprops=arrow)
    ax.text(5.1, 7.15, "memory", fontsize=8.5, ha="right")
    for x, top, label in ((0.2, 5.35, "encoder layer × N"), (5.8, 7.55, "decoder layer × N")):
        frame = FancyBboxPatch(
            (x, 1.3), 4.0, top - 1.3, boxstyle="round,pad=0.02,rounding_size=0.15",
            facecolor="none", edgecolor="#999999", linestyle="--", linewidth=1.0,
        )  # fmt: skip
        ax.add_patch(frame)
        side = x - 0.15 if x < 5 else x + 4.2
        turn = "right" if x < 5 else "left"
        ax.text(
            side, (1.35 + top) / 2, label, fontsize=8.5, rotation=90, va="center", ha=turn,
        )  # fmt: skip
    ink = COLORS[1] if "bias" in lit else "#555555"
    ax.annotate(
        "bias\n(2017: none)", (3.9, 2.15), (5.0, 1.2), fontsize=8.5, color=ink, ha="center",
        va="center", arrowprops={**arrow, "color": ink},
    )  # fmt: skip
    ax.annotate("", (6.1, 2.15), (5.0, 1.55), arrowprops={**arrow, "color": ink})
    ax.text(2.2, -0.8, "source ids", ha="center", fontsize=9)
    ax.text(7.8, -0.8, "target ids", ha="center", fontsize=9)
    ax.text(7.8, 10.3, "logits", ha="center", va="bottom", fontsize=9)
    return ax
