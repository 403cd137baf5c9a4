"""Which layers of two adapters are one module's, by whatever names they call it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_core._errors import MismatchError, listed
from lora_core._formats import Adapter
from lora_core._formats.spelling import TEXT_MODEL, Place, places_of


class Key(NamedTuple):
    """What a layer is for, as far as both adapters say it: factors, or a whole difference."""

    place: Place
    whole: bool


Names = dict[Key, str]


def names_of(one: Adapter, other: Adapter) -> tuple[Names, Names]:
    """The layers of each by what they mean, as far as both say it: what one module is is one key.

    Raises:
        MismatchError: If names in one of them mean several layers.
    """
    mine, theirs = _paired(one), _paired(other)
    if not all(_has_parts(found) for found in (mine, theirs)):
        mine, theirs = _without_parts(mine), _without_parts(theirs)
    if not all(_is_dotted(found) for found in (mine, theirs)):
        mine, theirs = _as_stems(mine), _as_stems(theirs)
    return mine, theirs


def check_names(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters that call one module by two names, of which a sum would have both.

    Raises:
        MismatchError: If they do.
    """
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = names_of(first, other)
        both = [(mine[key], theirs[key]) for key in mine if key in theirs]
        apart = [pair for pair in both if pair[0] != pair[1]]
        if apart:
            raise MismatchError(
                f"Adapters must call a module by one name to be combined, but {apart[0][0]!a} and"
                f" {apart[0][1]!a} are one, and so are {len(apart) - 1} more pairs. Load each into"
                " the models and save it again, or give lora-core --base PART=CHECKPOINT."
            )


def _paired(adapter: Adapter) -> Names:
    return _unique(
        (Key(place._replace(path=_unwrapped(place)), adapter.layers[name].config is None), name)
        for name, place in places_of(adapter.layers).items()
    )


def _unwrapped(place: Place) -> str:
    stem = place.spelling == "stem"
    return place.path.removeprefix(TEXT_MODEL.replace(".", "_") if stem else TEXT_MODEL)


def _has_parts(names: Names) -> bool:
    return all(key.place.component for key in names)


def _is_dotted(names: Names) -> bool:
    return all(key.place.spelling == "dotted" for key in names)


def _without_parts(names: Names) -> Names:
    return _unique(
        (key._replace(place=key.place._replace(component="")), name) for key, name in names.items()
    )


def _as_stems(names: Names) -> Names:
    return _unique((key._replace(place=_stem(key.place)), name) for key, name in names.items())


def _stem(place: Place) -> Place:
    dotted = place.spelling == "dotted"
    return place._replace(path=place.stem, spelling="stem") if dotted else place


def _unique(pairs: Iterable[tuple[Key, str]]) -> Names:
    found: Names = {}
    for key, name in pairs:
        if key in found:
            raise MismatchError(
                f"A name must mean one layer to be compared, but {listed([found[key], name])} may"
                " both be the other adapter's. Load each into the models and save it again, or give"
                " lora-core --base PART=CHECKPOINT."
            )
        found[key] = name
    return found
