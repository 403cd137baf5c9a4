"""The settings that PEFT keeps beside an adapter: what a reader must know of them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lora_core._config import check_finite
from lora_core._errors import ConfigError, CorruptFileError, UnsupportedFileError, listed
from lora_core._formats.showing import shown

DEFAULT_ALPHA = 8.0  # PEFT's own where a file names none, whatever the rank
# settings under which an adapter is more than its factors
_OTHER_FORMS = (
    *("layer_replication", "megatron_config", "arrow_config", "use_qalora", "velora_config"),
    *("alora_invocation_tokens", "kasa_config", "monteclora_config", "use_bdlora"),
    *("trainable_token_indices", "target_parameters"),
)
# ways to begin that change the base's own weights
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "use_dora", "qalora_group_size", "lora_bias"),
    *("ensure_weight_tying", "enable_lora", "runtime_config"),
)
_MAX_PATTERNS = 4096
_MAX_PATTERN = 512  # characters, of a path too
_MAX_WAYS = 64  # to choose among alternatives and what may be left out
_MAX_WORK = 10**9  # steps of a matcher, for all patterns and paths of a file together
_ESCAPED = re.compile(r"\\\D", re.DOTALL)
# a part that repeats and stands in a part that repeats may take a matcher for ever
_NESTED = re.compile(r"\)[*+?{]|\\|\(\?(?!:)")
_REPEATS = re.compile(r"[*+{]")


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """What of a PEFT config the numbers depend on.

    Attributes:
        alpha: The numerator of the scale; None where the config names none.
        rslora: Whether the scale divides by the rank's square root.
        transposed: Whether it says that weights are stored ``(in, out)``.
        patterns: Alphas of modules whose path a pattern matches, the first that does, each with
            the ways that it can match and the parts of it that repeat.
        source: Where these settings are from, in words for a report.
        unknown: Settings of a name that this reader doesn't know.
    """

    alpha: float | None
    rslora: bool
    transposed: bool
    patterns: tuple[tuple[re.Pattern[str], float, int, int], ...]
    source: str
    unknown: tuple[str, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str, source: str) -> "PeftSettings":
        """Settings out of a parsed config.

        Raises:
            CorruptFileError: If a setting is malformed.
            UnsupportedFileError: If one asks for what plain LoRA is not.
        """
        kind = config.get("peft_type")
        if not isinstance(kind, str):
            raise CorruptFileError(
                f"{where!r} must name its `peft_type`, but has {shown(ascii(kind))} in {source}."
                " Save it again."
            )
        if kind.upper() != "LORA":
            raise UnsupportedFileError(
                f"{where!r} must hold LoRA, but is of PEFT's kind {shown(ascii(kind))}. Merge it"
                " there."
            )
        refused = [key for key in _OTHER_FORMS if config.get(key)]
        if refused:
            raise UnsupportedFileError(
                f"{where!r} must be plain LoRA, but sets {listed(refused)} in {source}. Merge it"
                " with PEFT."
            )
        begin = config.get("init_lora_weights")
        if isinstance(begin, str) and begin.lower().startswith(_CHANGED_BASES):
            raise UnsupportedFileError(
                f"{where!r} must be made for the base as it is, but began with"
                f" `init_lora_weights` = {shown(ascii(begin))}, which changed the base. Convert it"
                " on saving with PEFT's `path_initial_model_for_weight_conversion`."
            )
        try:
            alpha = config.get("lora_alpha")
            patterns = config.get("alpha_pattern") or {}
            if not isinstance(patterns, Mapping) or len(patterns) > _MAX_PATTERNS:
                raise ConfigError(f"`alpha_pattern` must be a dict, but is {type(patterns)}.")
            return cls(
                None if alpha is None else check_finite("lora_alpha", alpha),
                bool(config.get("use_rslora")),
                bool(config.get("fan_in_fan_out")),
                tuple(_pattern(p, check_finite(p, a)) for p, a in patterns.items()),
                source,
                tuple(sorted({shown(key) for key in set(config) - {*_PLAIN, *_OTHER_FORMS}})),
            )
        except ConfigError as error:
            raise CorruptFileError(
                f"{where!r} must be well-formed in {source}: {shown(error)}"
            ) from None

    def alpha_of(self, path: str) -> tuple[float, str] | None:
        """A module's alpha and where it is from; None where the config names none."""
        for pattern, alpha, _, _ in self.patterns if len(path) <= _MAX_PATTERN else ():
            if pattern.match(path):
                return alpha, f"{self.source}, alpha_pattern"
        return None if self.alpha is None else (self.alpha, self.source)

    def check_work(self, paths: Collection[str], where: str) -> None:
        """Refuses patterns that were made to keep a matcher busy.

        Raises:
            CorruptFileError: If these paths might take it far longer than honest ones do.
        """
        most = [0, 0, 0]
        for _, _, ways, repeats in self.patterns:
            most[repeats] += ways
        work = 0
        for path in paths:
            long = len(path) if len(path) <= _MAX_PATTERN else 0
            # a pattern is tried after every dot
            work += (path.count(".") + 1) * (most[0] + long * (most[1] + long * most[2] // 2))
        if work > _MAX_WORK:
            raise CorruptFileError(
                f"{where!r} must be quick to match, but its {len(self.patterns)} patterns may take"
                f" {work:,} steps for {len(paths)} modules. Name paths in place of patterns."
            )

    def default(self) -> tuple[float, str]:
        """The alpha of a config that names none."""
        return DEFAULT_ALPHA, f"PEFT's default, as {self.source} names none"


def _pattern(key: str, alpha: float) -> tuple[re.Pattern[str], float, int, int]:
    """A pattern of PEFT's, which matches a path's end after a dot, or the whole of it."""
    bare = _ESCAPED.sub("x", key)
    ways = 2 ** min(20, bare.count("?") - bare.count("(?"))
    for group in bare.split(")"):
        ways *= group.count("|") + 1
    repeats = len(_REPEATS.findall(bare))
    if len(key) > _MAX_PATTERN or _NESTED.search(bare) or repeats > 2 or ways > _MAX_WAYS:
        raise ConfigError(f"A pattern must be simple to match, but is {key[:80]!a}. Name paths.")
    try:
        return re.compile(rf"(.*\.)?({key})$"), alpha, ways, repeats
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"A pattern must be a regular expression, but {key[:80]!a}: {error}."
        ) from None
