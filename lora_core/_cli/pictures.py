"""The picture of an adapter: the norm of its update in each block."""

import importlib.util
from collections.abc import Sequence
from io import BytesIO

from lora_core._cli.measures import Block
from lora_core._errors import LoRAError

_ROW = 0.24  # inches of one block
_MARGIN = 1.5
_TALLEST = 60.0


class PictureError(LoRAError, ImportError):
    """The package that draws is not installed."""


def check_drawing() -> None:
    """Refuses to draw without matplotlib.

    Raises:
        PictureError: If it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError(
            "--plot must have 'matplotlib' to draw with, but it is not installed. Run: pip install"
            " 'lora_core[demo]'"
        )


def norms_by_block(blocks: Sequence[Block], title: str) -> bytes:
    """A bar for each block: the norm of all its updates, and that of the largest in it.

    Returns:
        The bytes of a PNG file; the same for the same adapter.
    """
    from matplotlib.figure import Figure

    height = min(_MARGIN + _ROW * len(blocks), _TALLEST)
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    panel = figure.subplots()
    rows = range(len(blocks))
    panel.barh(rows, [b.norm for b in blocks], color="0.8", label="whole block")
    panel.barh(rows, [b.largest for b in blocks], height=0.4, color="C0", label="largest layer")
    # a dollar sign in a name is no formula
    names = [f"{b.name} ({b.layers})".replace("$", r"\$") for b in blocks]
    panel.set_yticks(rows, names, fontsize=8)
    panel.set_ylim(len(blocks) - 0.4, -0.6)
    panel.set_xlim(0, None)
    panel.set_xlabel("Frobenius norm of the update, scale included")
    panel.set_title(title.replace("$", r"\$"), fontsize=10, loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
