"""What is no LoRA, by its name: other algorithms, embeddings, whole models."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from lora_core._config import PARTS
from lora_core._errors import UnsupportedFileError, listed

# factor keys, never alpha or dora_scale: those belong to all
_ALGORITHMS = tuple(
    (re.compile(rf"(?:.*\.)?(?:{pattern})"), name)
    for pattern, name in (
        (r"hada_(?:w[12]_[ab]|t[12])(?:\..+)?", "LoHa"),
        (r"lokr_(?:w[12](?:_[ab])?|t[12])(?:\..+)?", "LoKr"),
        (r"(?:[ab][12]|bm)\.weight", "GLoRA"),
        (r"boft_[RS](?:\..+)?|boft_s(?:\..+)?", "BOFT"),
        (r"oft_(?:blocks|diag|R|r)(?:\..+)?|rescale", "OFT"),
        (r"on_input|ia3_l(?:\..+)?", "(IA)^3"),
        (r"lambda_layer|[pq]_layer\.weight", "T-LoRA"),
        (r"lora_E(?:\..+)?|ranknum(?:\..+)?", "AdaLoRA"),
        (r"vera_(?:lambda_[bd]|[AB])(?:\..+)?", "VeRA"),
        (r"randlora_.+", "RandLoRA"),
        (r"fourierft_spectrum(?:\..+)?", "FourierFT"),
        (r"hra_u(?:\..+)?", "HRA"),
        (r"prompt_embeddings(?:\..+)?", "prompt tuning"),
        (r"token_adapter\.trainable_tokens_delta(?:\..+)?", "trained tokens"),
        (r"(?:reshape|set)_weight", "ComfyUI's replaced weights"),
        (r"lora_C(?:\..+)?", "a LoRA of three factors"),
        (r"lora_controlnet", "Control-LoRA"),
    )
)
_EMBEDDING = re.compile(
    r"bundle_emb\..+|<.+>|(?:.*\.)?string_to_(?:param|token).*|emb_params|clip_[lg]|\*"
)
_CHECKPOINT = re.compile(
    r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|state_dict)\..+"
)
# how the parameters of an adapter are called on a model
_OURS = re.compile(rf"(?:.*\.)?(?:{'|'.join(PARTS)})_[A-Za-z0-9_-]+")
_WEIGHT = re.compile(r"(?:.*\.)?(?:weight|bias|original\d*|running_mean|running_var)")


def algorithm_of(key: str, tensor: Tensor) -> str:
    """The algorithm that a key is of; "" where it is none that is known."""
    for pattern, name in _ALGORITHMS:
        if pattern.fullmatch(key):
            return "BOFT" if key.endswith("oft_blocks") and tensor.ndim == 4 else name
    return ""


def is_embedding(key: str) -> bool:
    """Whether a key holds a trained token of textual inversion."""
    return _EMBEDDING.fullmatch(key) is not None


def refuse_checkpoint(where: str, keys: Collection[str]) -> None:
    """Says so where keys are those of a whole pipeline.

    Raises:
        UnsupportedFileError: If they are.
    """
    whole = [key for key in keys if _CHECKPOINT.fullmatch(key)]
    if whole:
        raise UnsupportedFileError(
            f"{where!r} must hold an adapter, but is a full checkpoint of {len(keys)} tensors:"
            f" {listed(whole)}. Load it as a model; `extract` makes adapters out of two."
        )


def refuse(
    where: str, others: Mapping[str, Tensor], modules: Sequence[str], embeddings: Sequence[str]
) -> NoReturn:
    """Says what a file with these keys is, or holds beside LoRA.

    Args:
        where: The file.
        others: Its tensors that are of no LoRA.
        modules: Its modules that have LoRA.
        embeddings: Its keys that are trained tokens.

    Raises:
        UnsupportedFileError: Always.
    """
    kinds: dict[str, list[str]] = {}
    for key, tensor in others.items():
        if name := algorithm_of(key, tensor):
            kinds.setdefault(name, []).append(key)
    if kinds and modules:
        parts = "; ".join(
            f"{name} ({len(keys)}: {listed(keys, 2)})" for name, keys in kinds.items()
        )
        raise UnsupportedFileError(
            f"{where!r} must be LoRA throughout, but beside {len(modules)} modules of LoRA it has"
            f" keys of {parts}. Merge it with the program that wrote it."
        )
    if kinds:
        name, keys = next(iter(kinds.items()))
        raise UnsupportedFileError(
            f"{where!r} must hold LoRA, but holds {name}: {listed(keys)}. Merge it with the program"
            " that wrote it."
        )
    if embeddings and not others and not modules:
        raise UnsupportedFileError(
            f"{where!r} must hold LoRA, but holds embeddings of textual inversion:"
            f" {listed(embeddings)}. Load them into the tokenizer and the text encoder."
        )
    ours = [key for key in others if _OURS.fullmatch(key)]
    if ours:
        raise UnsupportedFileError(
            f"{where!r} must hold an adapter, but holds the state dict of an adapted model, with"
            f" keys as {ours[0]!a}. Inject what it was trained with, then"
            " `model.load_state_dict(...)`; `save` writes files that `load` reads."
        )
    refuse_checkpoint(where, others)
    if others and all(_WEIGHT.fullmatch(key) for key in others):
        raise UnsupportedFileError(
            f"{where!r} must hold an adapter alone, but holds {len(others)} parameters of the model"
            f" itself: {listed(others)}. Save the adapter's own state dict."
        )
    if modules:
        raise UnsupportedFileError(
            f"{where!r} must be LoRA throughout, but beside {len(modules)} modules of LoRA it has"
            f" {len(others)} keys of no format that is known: {listed(others)}. Read it with the"
            " program that wrote it, or leave them out with strict=False."
        )
    raise UnsupportedFileError(
        f"{where!r} must hold LoRA, but its keys are of no format that is known:"
        f" {listed(others) or 'it has none'}. Read it with the program that wrote it."
    )
