"""The adapted embedding."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig, NamedSettings
from lora_core._layers.attachment import adopt, plain_attributes
from lora_core._layers.kind import KINDS, NAMED, Kind, Shape, Update, peek
from lora_core._layers.mixin import ADAPTED, LoRAMixin


class EmbeddingKind(Kind):
    """Adapters on a table of vectors.

    ``lora_A_<name>`` (rank, num_embeddings) holds a short vector for each entry, ``lora_B_<name>``
    (embedding_dim, rank) maps it to the table's width. The entry at `padding_idx` gets no update:
    its column of ``lora_A`` is zero and gets no gradient. Another program's file may hold numbers
    there, which are then applied as that program does.
    """

    name = "embedding"
    also = ()
    words = "an embedding"
    formats = ("lora_core", "peft")
    is_matrix = False
    takes_indices = True

    def sizes(self, host: Any) -> tuple[int, int]:
        """Entries, and numbers per entry."""
        num_embeddings, embedding_dim = peek(host).shape
        return num_embeddings, embedding_dim

    def blank(self, shape: Shape) -> nn.Module:
        """A table without padding."""
        entries, size = shape
        return nn.Embedding(entries, size, device="meta")

    def refusal(self, host: Any, config: AdapterConfig) -> str:  # noqa: ARG002
        """There is no input to drop elements of, nor a bias."""
        asked = {
            "`dropout`": (config.dropout, "drops numbers of an input, and this one is of indices"),
            "`bias`": (config.bias, "adds to a bias, and an embedding has none"),
            "`tucker`": (config.tucker, "is for convolutions"),
            "`init='eva'`": (
                config.starts_from == "inputs",
                "needs an input of numbers, not of indices",
            ),
        }
        wrong = [f"{what} {why}" for what, (value, why) in asked.items() if value]
        return wrong[0] if wrong else ""

    def fan_in(self, size: int) -> int:  # noqa: ARG002
        """One: of a one-hot input a single entry is not zero."""
        return 1

    def tidy(self, host: Any, values: dict[str, Tensor]) -> None:
        """Leaves the entry at `padding_idx` without an update."""
        if host.padding_idx is not None:
            values["lora_A"][:, host.padding_idx] = 0

    def matrix(self, weight: Tensor) -> Tensor:
        """The table transposed: an index is a one-hot input."""
        return weight.T

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The transposed matrix."""
        return dense.T

    def update(self, layer: Any, x: Tensor, update: Update, *more: Any) -> Tensor:  # noqa: ARG002
        """The update of each index."""
        lora_A, lora_B, gain, _ = update
        return functional.embedding_update(
            x,
            lora_A,
            lora_B,
            gain,
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
        )

    def samples(self, layer: Any, x: Tensor) -> int | None:  # noqa: ARG002
        """The first dimension of the indices."""
        return x.shape[0] if x.ndim else None

    def probe(self, layer: Any, generator: torch.Generator) -> Tensor:
        """Some indices."""
        weight = peek(layer)
        return torch.randint(weight.shape[0], (16,), generator=generator).to(weight.device)


EMBEDDING = KINDS[nn.Embedding] = NAMED["embedding"] = EmbeddingKind()


class LoRAEmbedding(LoRAMixin, nn.Embedding):
    """A frozen embedding plus a trainable low-rank update.

    Computes ``weight[i] + scale * lora_B @ lora_A[:, i]``. `padding_idx`, `scale_grad_by_freq` and
    `sparse` are the host's and hold for ``lora_A`` too; a host with `max_norm` is refused, because
    it rewrites its own weight. The new module adopts the Parameter of the host and freezes it;
    `inject` does the same in place.

    Args:
        host: The embedding to adapt.
        rank: Inner dimension of the update.
        alpha: Numerator of the scale; None means `rank`, a scale of 1.
        settings: As in `inject`.

    Shape:
        - Input: ``(...)``, indices
        - Output: ``(..., embedding_dim)``

    Raises:
        ConfigError: If a setting is out of range for this layer.
        UnsupportedLayerError: If `host` is no plain `nn.Embedding`, or has a `max_norm`.

    Example:
        >>> layer = LoRAEmbedding(nn.Embedding(100, 8), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 100]), torch.Size([8, 2]))
    """

    lora_host_class, lora_kind = nn.Embedding, EMBEDDING
    lora_plain_attributes = plain_attributes(
        nn.Embedding(1, 1, _weight=torch.empty(1, 1, device="meta"))
    )

    def __init__(
        self,
        host: nn.Embedding,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[NamedSettings],
    ) -> None:
        adopt(self, host, rank, alpha, settings)


ADAPTED[nn.Embedding] = LoRAEmbedding
