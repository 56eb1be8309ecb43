"""A small language model over bytes: a decoder that predicts the next byte at each position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalBlock(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a LayerNorm and with a residual add.

    Args:
        dim: Width of a token.
        heads: Number of attention heads.
        mlp_ratio: Hidden width of the perceptron relative to ``dim``.
        dropout: Dropout probability.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, tokens, dim); each token attends to itself and to earlier ones."""
        normed = self.norm1(x)
        q, k, v = (self._split(part(normed)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result

    def _split(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return parts


class CharTransformer(nn.Module):
    """A decoder (Vaswani et al., 2017, with LayerNorm before each sublayer) of about a million parameters.

    Args:
        num_tokens: Number of different tokens; 256 for bytes.
        context: Maximum number of tokens in a sequence.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Number of attention heads per block.
        mlp_ratio: Hidden width of a perceptron relative to ``dim``.
        dropout: Dropout probability.

    Example:
        >>> CharTransformer(context=8, dim=16, depth=1, heads=2)(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 8, 256])
    """

    def __init__(
        self,
        num_tokens: int = 256,
        context: int = 128,
        dim: int = 128,
        depth: int = 5,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*(CausalBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map integers of shape (batch, tokens) to scores of the next token: (batch, tokens, num_tokens)."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores
