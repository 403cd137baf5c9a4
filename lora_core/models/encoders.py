"""Encoders tau(y): from a condition of any kind to the tokens a U-Net attends to."""

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from lora_core.models._checks import check_indices, check_sizes


class LabelEncoder(nn.Module):
    """Several learned tokens per class label, and as many for no label at all.

    One token would leave cross-attention nothing to choose from (its softmax is 1 whatever the
    query), hence several. The *null label* stands for "no condition": training replaces some
    labels by it, and classifier-free guidance contrasts it with the label asked for.

    Args:
        labels: Number of classes.
        dim: Width of a token.
        tokens: Tokens per label.

    Shape:
        - labels: integers from 0 to `null_label`, ``(batch,)``
        - Output: ``(batch, tokens, dim)``

    Raises:
        ValueError: If a label is out of range or the shape does not fit.
        TypeError: If labels are not integers.

    Reference:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, section 3.

    Example:
        >>> import torch
        >>> encoder = LabelEncoder(labels=10, dim=64)
        >>> encoder(torch.tensor([3, 1, encoder.null_label])).shape
        torch.Size([3, 4, 64])
    """

    def __init__(self, labels: int, dim: int, tokens: int = 4) -> None:
        super().__init__()
        check_sizes(labels=labels, dim=dim, tokens=tokens)
        self.tokens = tokens
        self.embedding = nn.Embedding(labels + 1, tokens * dim)

    @property
    def null_label(self) -> int:
        """The label that means "no condition": one past the last class."""
        return self.embedding.num_embeddings - 1

    def forward(self, labels: Tensor) -> Tensor:
        """Look the tokens of each label up."""
        if labels.ndim != 1:
            raise ValueError(f"`labels` must have shape (batch,), but has {tuple(labels.shape)}.")
        check_indices("labels", labels, self.embedding.num_embeddings)
        looked_up: Tensor = self.embedding(labels)
        return rearrange(looked_up, "b (n d) -> b n d", n=self.tokens)

    def null(self, batch: int) -> Tensor:
        """The context that stands for no condition, ``(batch, tokens, dim)``."""
        device = self.embedding.weight.device
        labels = torch.full((batch,), self.null_label, dtype=torch.long, device=device)
        out: Tensor = self(labels)
        return out


class TokenEncoder(nn.Module):
    """One learned vector per token id, plus a learned vector per position.

    Args:
        vocabulary: Number of token ids.
        dim: Width of a token.
        max_tokens: Longest sequence.

    Shape:
        - ids: integers below `vocabulary`, ``(batch, n)`` with ``n <= max_tokens``
        - Output: ``(batch, n, dim)``

    Raises:
        ValueError: If an id is out of range or the shape does not fit.
        TypeError: If ids are not integers.

    Example:
        >>> import torch
        >>> TokenEncoder(vocabulary=1000, dim=64)(torch.tensor([[5, 7, 999]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(self, vocabulary: int, dim: int, max_tokens: int = 77) -> None:
        super().__init__()
        check_sizes(vocabulary=vocabulary, dim=dim, max_tokens=max_tokens)
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(max_tokens, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Look tokens up and tell each its place."""
        longest = self.position.num_embeddings
        if ids.ndim != 2 or ids.shape[1] > longest:
            raise ValueError(
                f"`ids` must have shape (batch, n) with n at most {longest}, "
                f"but has {tuple(ids.shape)}."
            )
        check_indices("ids", ids, self.embedding.num_embeddings)
        out: Tensor = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        return out


class ImageEncoder(nn.Module):
    """Square patches of an image, each projected to a token, plus a learned place.

    Args:
        channels: Channels of the image.
        size: Height and width of the image in pixels.
        patch: Height and width of a patch in pixels; must divide `size`.
        dim: Width of a token.

    Shape:
        - images: ``(batch, channels, size, size)``
        - Output: ``(batch, (size / patch) ** 2, dim)``

    Raises:
        ValueError: If `patch` does not divide `size`, or the shape does not fit.

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.1.

    Example:
        >>> import torch
        >>> ImageEncoder(channels=1, size=28, patch=7, dim=64)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 16, 64])
    """

    def __init__(self, channels: int, size: int, patch: int, dim: int) -> None:
        super().__init__()
        check_sizes(channels=channels, size=size, patch=patch, dim=dim)
        if size % patch:
            raise ValueError(f"`patch` must divide `size` = {size}, but is {patch}.")
        self.image_shape = (channels, size, size)
        self.projection = nn.Sequential(
            Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch),
            nn.Linear(channels * patch * patch, dim),
        )
        self.position = nn.Embedding((size // patch) ** 2, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Cut into patches and project."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"`images` must have shape (batch, {expected}), but has {tuple(images.shape)}."
            )
        out: Tensor = self.projection(images) + self.position.weight
        return out


class SemanticMapEncoder(nn.Module):
    """An integer map of classes, one token per patch: what the patch holds, and where it is.

    Every pixel's class has a learned vector; a patch is the projection of its pixels' mean, so a
    token tells in which proportions the classes occur there.

    Args:
        classes: Number of classes.
        size: Height and width of the map in pixels.
        patch: Height and width of a patch in pixels; must divide `size`.
        dim: Width of a token.

    Shape:
        - maps: integers below `classes`, ``(batch, size, size)``
        - Output: ``(batch, (size / patch) ** 2, dim)``

    Raises:
        ValueError: If a class is out of range or a shape or size does not fit.
        TypeError: If the map is not of integers.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        section 3.3 (semantic maps as a condition).

    Example:
        >>> import torch
        >>> maps = torch.randint(0, 5, (2, 28, 28))
        >>> SemanticMapEncoder(classes=5, size=28, patch=7, dim=64)(maps).shape
        torch.Size([2, 16, 64])
    """

    def __init__(self, classes: int, size: int, patch: int, dim: int) -> None:
        super().__init__()
        check_sizes(classes=classes, size=size, patch=patch, dim=dim)
        if size % patch:
            raise ValueError(f"`patch` must divide `size` = {size}, but is {patch}.")
        self.size = size
        self.embedding = nn.Embedding(classes, dim)
        self.pool = nn.AvgPool2d(patch)
        self.projection = nn.Linear(dim, dim)
        self.position = nn.Embedding((size // patch) ** 2, dim)

    def forward(self, maps: Tensor) -> Tensor:
        """Average the classes over each patch and project."""
        if maps.ndim != 3 or tuple(maps.shape[1:]) != (self.size, self.size):
            raise ValueError(
                f"`maps` must have shape (batch, {self.size}, {self.size}), "
                f"but has {tuple(maps.shape)}."
            )
        check_indices("maps", maps, self.embedding.num_embeddings)
        pooled = self.pool(rearrange(self.embedding(maps), "b h w d -> b d h w"))
        tokens: Tensor = self.projection(rearrange(pooled, "b d h w -> b (h w) d"))
        return tokens + self.position.weight


class EmbeddingEncoder(nn.Module):
    """Ready-made embeddings, such as a text encoder's, projected to the context's width.

    Where the widths agree already and `project` is None, they pass through untouched.

    Args:
        embedding_dim: Width of the embeddings given.
        dim: Width of a token.
        project: Whether to project; by default only where the widths differ.

    Shape:
        - embeddings: ``(batch, n, embedding_dim)``
        - Output: ``(batch, n, dim)``

    Raises:
        ValueError: If the widths differ and `project` is False, or the shape does not fit.

    Example:
        >>> import torch
        >>> EmbeddingEncoder(embedding_dim=512, dim=64)(torch.randn(2, 77, 512)).shape
        torch.Size([2, 77, 64])
        >>> EmbeddingEncoder(embedding_dim=64, dim=64).projection
        Identity()
    """

    def __init__(self, embedding_dim: int, dim: int, project: bool | None = None) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim, dim=dim)
        if project is False and embedding_dim != dim:
            raise ValueError(
                f"`project` must be True or None when `embedding_dim` = {embedding_dim} differs "
                f"from `dim` = {dim}, but is False."
            )
        projects = embedding_dim != dim if project is None else project
        self.embedding_dim = embedding_dim
        self.projection = nn.Linear(embedding_dim, dim) if projects else nn.Identity()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Project, or pass through."""
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"`embeddings` must have shape (batch, n, {self.embedding_dim}), "
                f"but has {tuple(embeddings.shape)}."
            )
        out: Tensor = self.projection(embeddings)
        return out
