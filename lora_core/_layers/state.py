"""What a layer knows of its adapters, as values that are replaced whole."""

from typing import NamedTuple

from torch import Tensor, nn

# attribute of a module: adapter -> parameters that it keeps frozen, and whether each trained before
FROZEN = "lora_frozen"

Strength = float | tuple[float, ...]  # one for all samples, or one for each


class Gain(NamedTuple):
    """What one active adapter is multiplied by.

    Attributes:
        value: ``strength * scale``: a number, () or (batch,).
        strength: The strength alone, likewise, where a bias or magnitudes need it; else None.
    """

    value: Tensor | float
    strength: Tensor | float | None = None


class Selection(NamedTuple):
    """The active adapters of one layer; replaced whole, so that a forward sees one or another.

    Attributes:
        names: The active adapters, in the order in which they were chosen.
        strengths: What the user multiplies each by: a number, or one for each sample.
        gains: The same times the scales, as tensors: a new value recompiles nothing.
        bank: The gains of all adapters on the layer, zero where one is inactive: what a compiled
            graph reads, so that another choice recompiles nothing either.
    """

    names: tuple[str, ...]
    strengths: tuple[Strength, ...]
    gains: tuple[Gain, ...]
    bank: tuple[Gain, ...]


NOTHING = Selection((), (), (), ())  # of a layer without adapters


class Merged(NamedTuple):
    """What a merge did to one layer.

    Attributes:
        strengths: The adapters that were added, and how strongly.
        kept: The original values, None where the merge kept no copy.
        merged: The merged values while `disabled` shows the originals, else None.
        parameter: The layer's own Parameter where the merge had to untie it, else None.
        bias: The bias's original values where the merge changed it, else None.
        merged_bias: As `merged`, of the bias.
    """

    strengths: dict[str, float]
    kept: Tensor | None
    merged: Tensor | None = None
    parameter: nn.Parameter | None = None
    bias: Tensor | None = None
    merged_bias: Tensor | None = None


class Change(NamedTuple):
    """A change of a layer's values, or the end of one; each is an object of its own.

    Attributes:
        thread: Who is at it; None where it is over.
    """

    thread: int | None


def bare_state() -> dict[str, object]:
    """What an adapted layer has of its own, still without an adapter.

    Its adapters' settings by name; what tells each from another of its name that came before or
    after (one object on all its layers, kept where a file takes its place); what is active; what
    was merged; and the last change of its values.
    """
    return {
        "lora_configs": {},
        "lora_slots": {},
        "lora_selection": NOTHING,
        "lora_merged": None,
        "lora_changes": Change(None),
    }


class Update(NamedTuple):
    """A low-rank update as one pair of products.

    Attributes:
        lora_A: Down-projection, its rank first.
        lora_B: Up-projection, its rank second.
        gain: What each rank is multiplied by: a number, (), (R,) or (batch, R).
        dropout: Probability of dropping an element of its input.
    """

    lora_A: Tensor
    lora_B: Tensor
    gain: Tensor | float
    dropout: float


class Active(NamedTuple):
    """What a forward adds to its host's output.

    Attributes:
        updates: Low-rank updates.
        stretch: How much of the host's output without its bias is added to it, (out,).
        bias: What is added to every position, (out,) or (batch, out).
        columns: How much of each input feature the host's matrix takes once more, (in,).
    """

    updates: list[Update]
    stretch: Tensor | None = None
    bias: Tensor | None = None
    columns: Tensor | None = None
