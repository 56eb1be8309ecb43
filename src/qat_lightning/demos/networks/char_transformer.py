"""A small language model over bytes: a decoder that predicts the next one at each position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalBlock(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a LayerNorm and with a residual add.

    Args:
        dim: Width of a token.
        heads: How many parts of it attend on their own.
        mlp_ratio: How many times wider the middle of the perceptron is.
        dropout: Share of activations that training sets to zero.
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
    """A decoder (Vaswani et al., 2017, with the LayerNorms in front) of about a million parameters.

    Args:
        num_tokens: How many tokens there are: 256 bytes.
        context: Most tokens of a sequence.
        dim: Width of a token.
        depth: Blocks.
        heads: Of each attention.
        mlp_ratio: How many times wider the middle of a perceptron is.
        dropout: Share of activations that training sets to zero.

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
        """Integers of shape (batch, tokens) in, scores of each next token out: (batch, tokens, num_tokens)."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores
