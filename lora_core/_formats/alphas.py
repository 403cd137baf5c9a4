"""Which alpha a module has: the file's own, the format's, or the one that the caller knows."""

from collections.abc import Mapping

from lora_core._config import check_finite
from lora_core._errors import ConfigError, listed

Source = tuple[float, str]


class Alphas:
    """Chooses each module's alpha, and remembers what the caller's were needed for.

    Args:
        given: A number for every module whose alpha the file doesn't store, a dict by module name,
            or None.
        where: The file, for messages.

    Raises:
        ConfigError: If a given alpha is no finite number.
    """

    def __init__(self, given: object, where: str) -> None:
        self._where = where
        self._by_name: dict[str, float] = {}
        self._all: float | None = None
        if isinstance(given, Mapping):
            self._by_name = {name: check_finite("alpha", value) for name, value in given.items()}
        elif given is not None:
            self._all = check_finite("alpha", given)
        self._names: list[str] = []
        self._missing: list[str] = []
        self._stored: dict[str, str] = {}
        self._taken = False

    def choose(self, name: str, stored: Source | None, default: Source | None) -> Source:
        """A module's alpha and where it is from.

        Args:
            name: The module.
            stored: What the file says, which nothing overrides.
            default: What holds where neither file nor caller say; None where the caller must.
        """
        self._names.append(name)
        if stored is not None:
            self._stored[name] = stored[1]
            return stored
        given = self._by_name.get(name, self._all)
        if given is not None:
            self._taken = True
            return given, "the caller"
        if default is None:
            self._missing.append(name)
            return 1.0, ""
        return default

    def check(self) -> None:
        """Refuses alphas that the file stores, of modules that it lacks, or that are missing.

        Raises:
            ConfigError: If there are any.
        """
        unknown = [name for name in self._by_name if name not in set(self._names)]
        if unknown:
            raise ConfigError(
                f"`alpha` must name modules of {self._where!r}, but {listed(unknown)} are none of"
                f" its {len(self._names)}: {listed(self._names)}."
            )
        twice = [name for name in self._by_name if name in self._stored]
        if twice or (self._all is not None and not self._taken):
            names = twice or list(self._stored)
            has = f"that of {listed(names)} in {self._stored[names[0]]}" if names else "no factors"
            raise ConfigError(
                f"`alpha` must be left out where a file stores it, but {self._where!r} has {has}."
                " Pass alpha=None, and a strength where the adapter is to act more or less."
            )
        if self._missing:
            raise ConfigError(
                f"`alpha` must be given for {self._where!r}, but is missing for"
                f" {listed(self._missing)}: this kind of file stores none, and the scale is"
                " alpha / rank. Pass alpha=, a number or a dict by module, as it was trained."
            )
