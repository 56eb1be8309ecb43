"""Random crops and flips of whole batches, drawn from a generator that is made anew for every batch."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def batch_generator(*key: int) -> torch.Generator:
    """A generator that depends on the key and on nothing else, so that a resumed run draws the same numbers.

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
    for part in key:  # multiplication and xor-shift (splitmix64), so that neighbouring keys give unrelated streams
        mixed = ((mixed ^ part) + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)


def augment(images: Tensor, generator: torch.Generator, *, crop_padding: int = 0, flip: bool = False) -> Tensor:
    """Crop and mirror each image at random; the shape stays.

    Args:
        images: Of shape (N, C, H, W), on any device.
        generator: A CPU generator, so that the device does not change what is drawn.
        crop_padding: Pad each side by so many zeros, then crop to the old size at a random place.
        flip: Mirror each image with probability one half.

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
        padded = pad(images, [crop_padding] * 4)
        which = torch.arange(count, device=images.device)
        # indexing around the channels puts them last
        images = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images
