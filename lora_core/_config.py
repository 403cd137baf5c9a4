"""What one adapter on one layer is configured to be, and the checks of each setting."""

import math
import numbers
import re
from dataclasses import dataclass

import torch

from lora_core._errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")
SUBTRACTED = frozenset(("pissa", "olora"))  # those that begin away from zero


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """One adapter's settings on one layer.

    Attributes:
        rank: Inner dimension of the update, at least 1.
        alpha: Numerator of the scale; equal to `rank` where the user gave none.
        dropout: Probability of dropping an input element of the update while training.
        dtype: Type the factors are stored in.
        rslora: Whether the scale divides by the rank's square root.
        dora: Whether the rows of the adapted weight have lengths of their own.
        dora_in: Whether the columns have them instead, as in files of LyCORIS before version 4.
        bias: Whether the adapter adds to the layer's bias.
        tucker: Whether a convolution's update has a core of its own between two 1x1 factors.
        rank_dropout: Probability of dropping one of the ranks for a sample while training.
        module_dropout: Probability of leaving the whole update out of a call while training.
        init: What the first factors were; one of `INITS`.
        reserve_rank: Ranks that the factors have room for; None means `rank`.

    Reference:
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
    """

    rank: int
    alpha: float
    dropout: float
    dtype: torch.dtype
    rslora: bool = False
    dora: bool = False
    dora_in: bool = False
    bias: bool = False
    tucker: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init: str = "kaiming"
    reserve_rank: int | None = None

    @property
    def scale(self) -> float:
        """What the update is multiplied by at strength 1.

        ``alpha / rank``, or ``alpha / sqrt(rank)`` with `rslora`.
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def room(self) -> int:
        """Ranks that the factors have room for."""
        return self.rank if self.reserve_rank is None else self.reserve_rank

    @property
    def subtracted(self) -> bool:
        """Whether the first factors are subtracted on the fly, so that a fresh adapter is zero."""
        return self.init in SUBTRACTED

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that it consists of, by name, those that never train last."""
        return (
            *("lora_A", "lora_B"),
            *(("lora_mid",) if self.tucker else ()),
            *(("lora_magnitude",) if self.dora and not self.dora_in else ()),
            *(("lora_in_magnitude",) if self.dora_in else ()),
            *(("lora_bias",) if self.bias else ()),
            *(("lora_A0", "lora_B0") if self.subtracted else ()),
        )

    @property
    def plain_sum(self) -> bool:
        """Whether the adapter is a product of factors that is added to the weight, and no more."""
        return not self.dora and not self.bias

    @property
    def plain(self) -> bool:
        """Whether the update is two factors and a number, at every call."""
        return len(self.parts) == 2 and not self.rank_dropout and not self.module_dropout


def check_rank(
    rank: object, in_features: int, out_features: int, where: str = "", what: str = "rank"
) -> int:
    """Returns `rank` if it is a whole number in ``1 .. min(in_features, out_features)``."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise ConfigError(f"`{what}` must be a whole number, but is {rank!r}{where}.")
    rank, limit = int(rank), min(in_features, out_features)
    if rank < 1:
        raise ConfigError(f"`{what}` must be at least 1, but is {rank}{where}.")
    if rank > limit:
        bound = f"min(in_features, out_features) = {limit}"
        raise ConfigError(f"`{what}` must be at most {bound}, but is {rank}{where}.")
    return rank


def check_alpha(alpha: object, rank: int) -> float:
    """Returns `alpha` as a float, `rank` where it is None."""
    return float(rank) if alpha is None else check_finite("alpha", alpha)


def check_finite(what: str, value: object) -> float:
    """Returns `value` as a float if it is a finite real number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # of an int beyond every float
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"`{what}` must be a finite number, but is {value!r}.")
    return number


def check_positive(what: str, value: object) -> float:
    """Returns `value` as a float if it is finite and above 0."""
    number = check_finite(what, value)
    if number <= 0:
        raise ConfigError(f"`{what}` must be above 0, but is {value!r}.")
    return number


def check_dropout(dropout: object, what: str = "dropout") -> float:
    """Returns `dropout` as a float if it lies in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"`{what}` must be in [0, 1), but is {dropout!r}.")
    return float(dropout)


def check_init(init: object) -> str:
    """Returns `init` if it names a way to draw the first factors."""
    if init not in INITS:
        names = ", ".join(map(repr, INITS))
        raise ConfigError(f"`init` must be one of {names}, but is {init!r}.")
    return str(init)


def check_dtype(dtype: object) -> torch.dtype | None:
    """Returns `dtype` if it is None or a floating type that can be trained."""
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(
            f"`dtype` must be a floating type of 16 bits or more, but is {dtype!r}."
            " Use torch.float32, torch.bfloat16, torch.float16 or torch.float64."
        )
    return dtype


def check_flag(what: str, value: object) -> bool:
    """Returns `value` if it is True or False: a truthy value may be a slip."""
    if not isinstance(value, bool):
        raise ConfigError(f"`{what}` must be True or False, but is {value!a}.")
    return value


def check_name(name: object) -> str:
    """Returns `name` if it can name an adapter: never a path, never a dotted module name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"`name` must be 1 to 64 letters, digits, '_' or '-', but is {name!a}.")
    return name
