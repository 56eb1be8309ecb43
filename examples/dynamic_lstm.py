"""Make an LSTM int8 with dynamic quantization, without data: python dynamic_lstm.py."""

import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, load_quantized, quantize


class Tagger(nn.Module):
    """Your trained network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length) to scores of shape (batch, length, 5)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def main() -> None:
    """Quantize, compare and save."""
    torch.manual_seed(0)
    network = Tagger().eval()
    tokens = torch.randint(0, 100, (4, 20))

    int8 = quantize(network, Example((tokens,)), Recipe("eager", "fbgemm", kind="dynamic"))
    for row in int8.coverage:
        print(f"{row.name:10} {row.kind:10} {'int8' if row.quantized else 'float: ' + row.reason}")
    with torch.no_grad():
        print("largest difference:", (int8(tokens) - network(tokens)).abs().max().item())

    int8.save("tagger.int8")
    again = load_quantized("tagger.int8", network=Tagger())  # mode eager runs your own forward
    print("loaded:", tuple(again(tokens).shape))


if __name__ == "__main__":
    main()
