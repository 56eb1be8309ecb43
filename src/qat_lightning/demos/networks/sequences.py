"""Networks for sequences and tokens, for dynamic and weight-only quantization."""

from typing import Literal

from torch import Tensor, nn


class RecurrentClassifier(nn.Module):
    """Reads an image row by row with an LSTM or a GRU, and classifies the final state.

    Args:
        num_classes: Number of outputs.
        in_channels: 1 for grayscale images, 3 for color.
        image_size: Side of the images, in pixels.
        cell: `lstm` or `gru`.
        hidden: Size of the state.
        layers: Number of stacked layers.
        bidirectional: Whether to read in both directions.

    Example:
        >>> import torch
        >>> RecurrentClassifier(num_classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        image_size: int = 8,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        cls = {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
        self.recurrent = cls(in_channels * image_size, hidden, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to one score per class."""
        rows = images.transpose(1, 2).flatten(2)
        scores: Tensor = self.head(self.recurrent(rows)[0][:, -1])
        return scores


class BagOfTokens(nn.Module):
    """Averages the embeddings of all tokens, and classifies the average with a perceptron.

    Args:
        num_tokens: Number of rows of the embedding.
        num_classes: Number of outputs.
        dim: Size of an embedding.
        hidden: Hidden width of the perceptron.

    Example:
        >>> import torch
        >>> BagOfTokens(num_tokens=100, num_classes=10)(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_tokens: int, num_classes: int, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(num_tokens, dim, mode="mean")
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape `(batch, length)` to one score per class."""
        scores: Tensor = self.layers(self.embedding(tokens))
        return scores
