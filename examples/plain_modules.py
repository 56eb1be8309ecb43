"""Quantization-aware training in your own training loop, without Lightning: python plain_modules.py."""

import torch
from torch import nn

from qat_lightning import Example, Recipe, convert, load_quantized, prepare


def main() -> None:
    """Prepare, train, convert, save and load."""
    torch.manual_seed(0)
    images = torch.randn(256, 3, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0).long()
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 2))
    example = Example((images[:2],))

    prepared = prepare(network, example, Recipe("fx", "x86"))  # fake-quantization is enabled
    optimizer = torch.optim.Adam(prepared.parameters(), lr=0.005)
    for _ in range(5):
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            loss = nn.functional.cross_entropy(prepared(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    int8 = convert(prepared.eval(), Example((images[:32],)))  # verified on these images
    with torch.no_grad():
        print("accuracy of int8:", (int8(images).argmax(1) == labels).float().mean().item())
    int8.save("network.int8")
    print("loaded:", tuple(load_quantized("network.int8")(images[:4]).shape))


if __name__ == "__main__":
    main()
