"""Random crops, scales and flips of whole batches, drawn from a generator that is seeded for every batch."""

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad


def batch_generator(*key: int) -> torch.Generator:
    """Return a generator seeded by the key only, so that a resumed run draws the same numbers.

    Args:
        key: For example seed, epoch, index of the batch, rank.

    Returns:
        A CPU generator.

    Example:
        >>> first, other, again = (torch.rand(3, generator=batch_generator(0, epoch, 7)) for epoch in (0, 1, 0))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    mixed = 0
    for part in key:  # splitmix64, so that similar keys give unrelated random numbers
        mixed = ((mixed ^ part) + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)


def augment(
    images: Tensor, generator: torch.Generator, *, crop_padding: int = 0, flip: bool = False, fill: float = 0.0
) -> Tensor:
    """Randomly crop and flip each image; the shape is kept.

    Generators in the same state give the same crops and flips, so an image and its mask can be augmented alike.

    Args:
        images: Images of shape (N, C, H, W), on any device.
        generator: A CPU generator, so that results do not depend on the device.
        crop_padding: Pad each side by this many pixels, then crop to the original size at a random position.
        flip: Flip each image horizontally with probability 0.5.
        fill: Padding value.

    Returns:
        The new images.

    Example:
        >>> images = torch.arange(18.0).view(2, 1, 3, 3)
        >>> augment(images, batch_generator(0), crop_padding=1, flip=True).shape
        torch.Size([2, 1, 3, 3])
    """
    count, _, height, width = images.shape
    if crop_padding:
        top, left = torch.randint(2 * crop_padding + 1, (2, count, 1), generator=generator).to(images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        padded = pad(images, [crop_padding] * 4, value=fill)
        which = torch.arange(count, device=images.device)
        # indexing around the channels puts them last
        images = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


KEPT = 0.25
"""Smallest share of a box that must be inside the image to keep the box."""


def augment_boxes(
    images: Tensor,
    boxes: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    scale_jitter: float = 0.0,
    flip: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomly scale and flip each image with its boxes; shapes are kept.

    Args:
        images: Images of shape (N, C, H, W), on any device.
        boxes: Left, upper, right and lower edges in pixels, of shape (N, M, 4).
        labels: int64 of shape (N, M); -1 for no box.
        generator: A CPU generator, so that results do not depend on the device.
        scale_jitter: Each image is scaled up or down by up to this fraction, and cropped or placed at a random
            position. Pixels outside the image are 0.
        flip: Flip each image horizontally with probability 0.5.

    Returns:
        The new images, boxes and labels. Boxes are clipped to the image; those with a smaller remaining share than
        `KEPT` are removed.

    Example:
        >>> images, boxes, labels = torch.zeros(1, 3, 8, 8), torch.tensor([[[0.0, 0, 4, 4]]]), torch.tensor([[1]])
        >>> images, boxes, labels = augment_boxes(images, boxes, labels, batch_generator(2), flip=True)
        >>> boxes.tolist()
        [[[4.0, 0.0, 8.0, 4.0]]]
    """
    count, _, height, width = images.shape
    sides = torch.tensor([width, height], dtype=boxes.dtype, device=boxes.device)
    if scale_jitter:
        drawn = torch.rand(count, 3, generator=generator).to(images.device)
        scale = 1 + scale_jitter * (2 * drawn[:, :1] - 1)
        corner = (1 - scale) * drawn[:, 1:]  # of the image's upper left corner, relative to its size
        images = _scaled(images, scale, corner)
        boxes = boxes * scale[..., None] + (corner * sides).repeat(1, 2)[:, None]
        boxes, labels = _cut_off(boxes, labels, sides)
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        left, upper, right, lower = boxes.unbind(-1)
        turned = torch.stack([width - right, upper, width - left, lower], -1)
        boxes = torch.where(mirrored[:, None, None] & (labels >= 0)[..., None], turned, boxes)
    return images, boxes, labels


def _scaled(images: Tensor, scale: Tensor, corner: Tensor) -> Tensor:
    """Scale each image bilinearly, from a corner given relative to its size."""
    matrices = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1 / scale[:, 0]
    matrices[:, :, 2] = (1 - 2 * corner) / scale - 1  # torch's coordinates are from -1 to 1 across the image
    grid = affine_grid(matrices, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _cut_off(boxes: Tensor, labels: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    inside = torch.minimum(boxes.clamp(min=0), sides.repeat(2))
    before, after = ((each[..., 2:] - each[..., :2]).prod(-1) for each in (boxes, inside))
    kept = (labels >= 0) & (after >= KEPT * before) & (after > 0)
    return inside * kept[..., None], labels.masked_fill(~kept, -1)
