"""The adapted embedding."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._layers.adopting import Adopting, plain_attributes
from lora_core._layers.anatomy import peek
from lora_core._layers.mixin import ADAPTED, KINDS, LoRAMixin
from lora_core._layers.state import Update


class EmbeddingMixin(LoRAMixin):
    """Adapters on a table of vectors.

    ``lora_A_<name>`` (rank, num_embeddings) holds a short vector for each entry, ``lora_B_<name>``
    (embedding_dim, rank) maps it to the table's width. The entry at `padding_idx` gets no update:
    its column of ``lora_A`` is zero and gets no gradient. Another program's file may hold numbers
    there, which are then applied as that program does.
    """

    lora_kind: ClassVar[str] = "embedding"

    @classmethod
    def lora_sizes(cls, host: nn.Module) -> tuple[int, int]:
        """Entries, and numbers per entry."""
        num_embeddings, embedding_dim = peek(host).shape
        return num_embeddings, embedding_dim

    @classmethod
    def lora_refusal(cls, host: nn.Module, config: AdapterConfig) -> str:  # noqa: ARG003
        """There is no input to drop elements of, nor a bias."""
        asked = {
            "`dropout`": (config.dropout, "drops numbers of an input, and this one is of indices"),
            "`bias`": (config.bias, "adds to a bias, and an embedding has none"),
            "`tucker`": (config.tucker, "is for convolutions"),
            "`init='eva'`": (config.init == "eva", "needs an input of numbers, not of indices"),
        }
        wrong = [f"{what} {why}" for what, (value, why) in asked.items() if value]
        return wrong[0] if wrong else ""

    @classmethod
    def lora_matrix(cls, weight: Tensor) -> Tensor:
        """The table transposed: an index is a one-hot input."""
        return weight.T

    @classmethod
    def lora_like_weight(cls, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG003
        """The transposed matrix."""
        return dense.T

    @classmethod
    def lora_fan_in(cls, size: int) -> int:  # noqa: ARG003
        """One: of a one-hot input a single entry is not zero."""
        return 1

    @classmethod
    def lora_tidy(cls, host: nn.Module, values: dict[str, Tensor]) -> None:
        """Leaves the entry at `padding_idx` without an update."""
        entry: Any = host.padding_idx
        if entry is not None:
            values["lora_A"][:, entry] = 0

    def lora_reset(self, name: str) -> None:
        """As for any layer, but for the entry at `padding_idx`."""
        super().lora_reset(name)
        self.lora_tidy(self, {"lora_A": self.lora_factors(name)[0].data})

    def lora_update(self, x: Tensor, update: Update) -> Tensor:
        """The update of each index."""
        host: Any = self
        lora_A, lora_B, gain, _ = update
        return functional.embedding_update(
            x,
            lora_A,
            lora_B,
            gain,
            padding_idx=host.padding_idx,
            scale_grad_by_freq=host.scale_grad_by_freq,
            sparse=host.sparse,
        )

    def lora_probe(self, generator: torch.Generator) -> Tensor:
        """Some indices."""
        weight = peek(self)
        return torch.randint(weight.shape[0], (16,), generator=generator).to(weight.device)

    def lora_samples(self, x: Tensor) -> int | None:
        """The first dimension of the indices."""
        return x.shape[0] if x.ndim else None


class LoRAEmbedding(Adopting, EmbeddingMixin, nn.Embedding):
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

    host_class = nn.Embedding
    plain_attributes = plain_attributes(
        nn.Embedding(1, 1, _weight=torch.empty(1, 1, device="meta"))
    )


ADAPTED[nn.Embedding] = LoRAEmbedding
KINDS[nn.Embedding] = EmbeddingMixin
