"""A small vision transformer whose attention is written in basic ops, so that every mode can capture it."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention from linear layers and matrix products.

    `nn.MultiheadAttention` checks shapes in Python and has a fused path, neither of which FX can trace.

    Args:
        dim: Width of a token.
        heads: Number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens of shape (batch, tokens, dim) to the same shape."""
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        weights = torch.softmax(torch.matmul(q * self.scale, k.transpose(-2, -1)), dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out(mixed)
        return result

    def _split(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return parts


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and with a residual add.

    Args:
        dim: Width of a token.
        heads: Number of attention heads.
        mlp_ratio: Hidden width of the perceptron relative to ``dim``.
        dropout: Dropout probability.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens to tokens of the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


class SmallViT(nn.Module):
    """A vision transformer for small images that classifies the mean of the tokens.

    Args:
        num_classes: Number of outputs.
        in_channels: 1 for grayscale images, 3 for color.
        image_size: Side of the images, in pixels; a multiple of `patch_size`.
        patch_size: Side of the square that becomes one token.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Number of attention heads per block.
        mlp_ratio: Hidden width of a perceptron relative to ``dim``.
        dropout: Dropout probability.

    Raises:
        ValueError: `image_size` is not a multiple of `patch_size`, or `dim` not of `heads`.

    Example:
        >>> SmallViT(image_size=8, patch_size=2, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size or dim % heads:
            raise ValueError(
                f"image_size={image_size} must be a multiple of patch_size={patch_size}, "
                f"and dim={dim} a multiple of heads={heads}."
            )
        self.patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to one score per class."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(1))
        return scores
