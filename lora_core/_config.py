"""What one adapter on one layer is configured to be: one table of settings, and their checks.

A setting is a field of `AdapterConfig`, with all that is known of it, and a line of `Settings` for
type checkers. The keywords of `inject`, `rules`, reports, the file and the command line follow.
"""

import difflib
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

from lora_core._errors import ConfigError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

PARTS = (
    *("lora_A", "lora_B", "lora_mid", "lora_magnitude", "lora_in_magnitude", "lora_bias"),
    *("lora_A0", "lora_B0"),
)  # the tensors that an adapter may consist of

RESERVED = ("guidance", "repeats")  # keywords of `scales`, which takes adapters by keyword too

# a way to draw the first factors -> what it starts from; how is written in `functional.initial`
STARTS = {
    "kaiming": "numbers",
    "gaussian": "numbers",
    "orthogonal": "numbers",
    "pissa": "weight",
    "olora": "weight",
    "eva": "inputs",
}


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


def check_dropout(what: str, value: object) -> float:
    """Returns `value` as a float if it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"`{what}` must be in [0, 1), but is {value!r}.")
    return float(value)


def check_init(what: str, value: object) -> str:
    """Returns `value` if it names a way to draw the first factors."""
    if value not in STARTS:
        names = ", ".join(map(repr, STARTS))
        raise ConfigError(f"`{what}` must be one of {names}, but is {value!r}.")
    return str(value)


def check_dtype(what: str, value: object) -> "torch.dtype | None":
    """Returns `value` if it is None or a floating type that can be trained."""
    import torch

    if value is None:
        return None
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise ConfigError(
            f"`{what}` must be a floating type of 16 bits or more, but is {value!r}."
            " Use torch.float32, torch.bfloat16, torch.float16 or torch.float64."
        )
    return value


def check_flag(what: str, value: object) -> bool:
    """Returns `value` if it is True or False: a truthy value may be a slip."""
    if not isinstance(value, bool):
        raise ConfigError(f"`{what}` must be True or False, but is {value!a}.")
    return value


def path_of(path: object, beside: str = "") -> str:
    """Returns `path` as text if it is one; `beside` is what else would do, for the message."""
    try:
        return os.fsdecode(path)  # type: ignore[arg-type]
    except TypeError:
        said = f"`path` must be a path{beside}, but is {type(path).__name__}."
    raise ConfigError(said)


def check_name(name: object) -> str:
    """Returns `name` if it can name an adapter: never a path, never a dotted module name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"`name` must be 1 to 64 letters, digits, '_' or '-', but is {name!a}.")
    if name in RESERVED:
        raise ConfigError(
            f"`name` must be none of {', '.join(map(repr, RESERVED))}, which `scales` takes beside"
            f" names, but is {name!a}. Choose another, as in {name}_style."
        )
    return name


_NOTES = {
    "numbers": "",
    "weight": "first factors subtracted on the fly",
    "inputs": "first factors from sample inputs",
}


class Recipe(NamedTuple):
    """What of an adapter's settings a forward goes by, as plain values.

    A compiled graph guards on their values, where it would guard on the identity of a config: and
    every load has configs of its own, which may be equal.

    Attributes:
        plain: Whether the update is two factors and a number, at every call.
        room: Ranks that the factors have room for.
        dropout: As in the settings; so are those that follow.
        rank_dropout: See there.
        module_dropout: See there.
        tucker: See there.
        subtracted: See there.
        bias: See there.
        dora: See there.
        dora_in: See there.
    """

    plain: bool
    room: int
    dropout: float
    rank_dropout: float
    module_dropout: float
    tucker: bool
    subtracted: bool
    bias: bool
    dora: bool
    dora_in: bool


class Setting(NamedTuple):
    """What is known of one setting.

    Attributes:
        help: What it does, as documentation says it.
        default: What it is where nobody asks for another.
        check: Gives the value of ``(name, value)`` back, or refuses it; None where that takes a
            layer.
        note: What a report says of an adapter's config; "" for nothing.
        form: What a report calls an adapter with it; "" for nothing.
        filed: Whether a file says it: "always", or "else", where it is not the default; "" for no.
        asked: Whether a user may ask for it; else it comes with files alone.
        plain: Whether an adapter with it is still two factors and a number, at every call.
        trains: Whether it acts in training alone, and other programs' files say nothing of it.
    """

    help: str
    default: Any
    check: Callable[[str, Any], Any] | None = None
    note: Callable[["AdapterConfig"], str] = lambda _: ""
    form: Callable[["AdapterConfig"], str] = lambda _: ""
    filed: str = "else"
    asked: bool = True
    plain: bool = False
    trains: bool = False


def _setting(help: str, default: Any, *, given: bool = False, **more: Any) -> Any:  # noqa: A002
    """A field of `AdapterConfig`; one that is `given` has no default there."""
    setting = {"setting": Setting(help, default, **more)}
    return field(metadata=setting) if given else field(default=default, metadata=setting)


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter's settings on one layer; what each of them means stands in `SETTINGS`.

    One object serves all layers that are alike, so what follows from the settings is kept.

    Reference:
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
    """

    rank: int = _setting(
        "Inner dimension of the updates.", 4, given=True, filed="always", plain=True
    )
    alpha: float = _setting(
        "Numerator of the scale, not 0; None means each layer's rank, a scale of 1.",
        None,
        given=True,
        filed="always",
        plain=True,
    )
    dropout: float = _setting(
        "Probability of dropping an input element of the update while training.",
        0.0,
        given=True,
        check=check_dropout,
        plain=True,
        trains=True,
    )
    dtype: "torch.dtype" = _setting(  # noqa: RUF009  # it makes a field
        "Type of the factors; None means the weight's, but float32 at least.",
        None,
        given=True,
        check=check_dtype,
        filed="",
        plain=True,
    )
    rslora: bool = _setting(
        "Whether the scale is alpha / sqrt(rank), so that a larger rank learns as fast; with alpha"
        " left out it is then sqrt(rank).",
        False,
        check=check_flag,
        note=lambda c: "scale: alpha / sqrt(rank)" * c.rslora,
        plain=True,
    )
    dora: bool = _setting(
        "Whether each row of the adapted weight gets a length of its own (DoRA).",
        False,
        check=check_flag,
        note=lambda c: "DoRA: lengths of rows" * (c.dora and not c.dora_in),
        form=lambda c: "DoRA" * (c.dora and not c.dora_in),
    )
    dora_in: bool = _setting(
        "Whether the columns have lengths instead, as in files of LyCORIS before version 4.",
        False,
        check=check_flag,
        note=lambda c: "DoRA: lengths of columns" * c.dora_in,
        form=lambda c: "DoRA of columns" * c.dora_in,
        asked=False,
    )
    bias: bool = _setting(
        "Whether the adapter adds to the bias of the layers that have one.",
        False,
        check=check_flag,
        note=lambda c: "bias" * c.bias,
        form=lambda c: "bias" * c.bias,
    )
    tucker: bool = _setting(
        "Whether a convolution's update has a core of its own between two 1x1 factors.",
        False,
        check=check_flag,
        note=lambda c: "Tucker core" * c.tucker,
        form=lambda c: "Tucker" * c.tucker,
    )
    rank_dropout: float = _setting(
        "Probability of dropping one of the ranks for a sample while training.",
        0.0,
        check=check_dropout,
        note=lambda c: "dropout of whole ranks" * (c.rank_dropout > 0),
        trains=True,
    )
    module_dropout: float = _setting(
        "Probability of leaving a layer's update out of a call while training.",
        0.0,
        check=check_dropout,
        note=lambda c: "dropout of whole layers" * (c.module_dropout > 0),
        trains=True,
    )
    init: str = _setting(
        'How the first factors are made: "kaiming", "gaussian" or "orthogonal" for `lora_A` with'
        ' `lora_B` zero; "pissa" or "olora" from the weight, subtracted on the fly so that a fresh'
        ' adapter still changes nothing; "eva" for `lora_A` from sample inputs.',
        "kaiming",
        check=check_init,
        note=lambda c: _NOTES[c.starts_from],
        form=lambda c: "subtracted" * c.subtracted,
        filed="always",
        plain=True,
    )
    read: bool = _setting(
        "Whether the weight itself reads as the sum, whoever reads it, where else the update stands"
        " beside what the layer gives; a layer that allows nothing else is read without asking.",
        False,
        check=check_flag,
        form=lambda c: "read" * c.read,
        plain=True,
    )
    reserve_rank: int | None = _setting(
        "Ranks to make room for, so that a file of another rank can be loaded into the adapter's"
        " place.",
        None,
        note=lambda c: "room for more ranks" * (c.room > c.rank),
        filed="",
        plain=True,
    )

    @cached_property
    def scale(self) -> float:
        """What the update is multiplied by at strength 1.

        ``alpha / rank``, or ``alpha / sqrt(rank)`` with `rslora`.
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @cached_property
    def room(self) -> int:
        """Ranks that the factors have room for."""
        return self.rank if self.reserve_rank is None else self.reserve_rank

    @cached_property
    def subtracted(self) -> bool:
        """Whether the first factors are subtracted on the fly, so that a fresh adapter is zero."""
        return self.starts_from == "weight"

    @cached_property
    def starts_from(self) -> str:
        """What the first factors are made from: "numbers", "weight" or "inputs"."""
        return STARTS[self.init]

    @cached_property
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

    @cached_property
    def plain_sum(self) -> bool:
        """Whether the adapter is a product of factors that is added to the weight, and no more."""
        return not self.dora and not self.bias

    @cached_property
    def plain(self) -> bool:
        """Whether the update is two factors and a number, at every call."""
        told = vars(self)
        return len(self.parts) == 2 and not [k for k, v in _USUAL.items() if told[k] != v]

    @cached_property
    def recipe(self) -> Recipe:
        """What a forward goes by."""
        return Recipe(*[getattr(self, key) for key in Recipe._fields])

    @property
    def form(self) -> str:
        """What kind of update it is: "LoRA", or with its additions as in "LoRA, DoRA"."""
        having = (setting.form(self) for setting in SETTINGS.values())
        return ", ".join(["LoRA", *filter(None, having)])

    @cached_property
    def shown(self) -> str:
        """What a layer's `repr` says of it."""
        flags = [key for key, setting in SETTINGS.items() if setting.default is False]
        own = ", ".join(["", *(key for key in flags if getattr(self, key))])
        return f"rank={self.rank}, alpha={self.alpha:g}{own}"


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(AdapterConfig)}
_USUAL = {key: setting.default for key, setting in SETTINGS.items() if not setting.plain}
DROPOUTS = tuple(key for key, setting in SETTINGS.items() if setting.check is check_dropout)
ASKED = tuple(key for key, setting in SETTINGS.items() if setting.asked)


class Settings(TypedDict, total=False):
    """What `inject` takes by keyword, for type checkers; rank and alpha stand before."""

    dropout: float
    dtype: "torch.dtype | None"
    rslora: bool
    dora: bool
    bias: bool
    tucker: bool
    rank_dropout: float
    module_dropout: float
    init: str
    read: bool
    reserve_rank: int | None


_ALL = frozenset(ASKED)
_BESIDE = ("targets", "exclude", "rules", "name", "freeze", "samples")  # keywords of `inject`


def check_asked(given: Iterable[str]) -> None:
    """Refuses settings that there are not.

    Raises:
        TypeError: If there is none of such a name.
    """
    if unknown := [key for key in given if key not in ASKED]:
        close = difflib.get_close_matches(unknown[0], (*ASKED, *_BESIDE), n=1, cutoff=0.5)
        raise TypeError(
            f"{unknown[0]!r} must be a setting of an adapter, but is none. Use"
            f" {', '.join(ASKED)}." + (f" Did you mean {close[0]!r}?" if close else "")
        )


def checked_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter, checked as far as that takes no layer; what is left out is default.

    Raises:
        TypeError: If there is none of such a name.
        ConfigError: If one is out of range.
    """
    if not given.keys() <= _ALL:
        check_asked(given)
    checked = {}
    for key, setting in SETTINGS.items():
        value = given.get(key, setting.default)
        checked[key] = value if setting.check is None else setting.check(key, value)
    return checked


class NamedSettings(Settings, total=False):
    """The same with the adapter's name, as `LoRALinear` and its kin take them."""

    name: str


_F = TypeVar("_F", bound=Callable[..., Any])


def with_settings(function: _F) -> _F:
    """Gives a function with ``**settings`` the keywords of the table, for `help` and editors."""
    own = inspect.signature(function)
    before = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    there = [p.name for p in before]
    keywords = [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            default=SETTINGS[key].default,
            annotation=Settings.__annotations__[key],
        )
        for key in ASKED
        if key not in there
    ]
    signature = own.replace(parameters=[*before, *keywords])
    function.__signature__ = signature  # type: ignore[attr-defined]
    lines = [f"        {p.name}: {SETTINGS[p.name].help}" for p in keywords]
    function.__doc__ = (function.__doc__ or "").replace(
        "        settings:\n", "\n".join([*lines, ""])
    )
    return function
