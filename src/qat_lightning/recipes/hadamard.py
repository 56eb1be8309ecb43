"""Orthogonal matrices with entries of about equal size: rotating by one spreads an outlier over all channels.

If a Hadamard matrix of the size is easily constructed, it is used: Sylvester's for powers of two, Paley's (1933, "On
orthogonal matrices", https://doi.org/10.1002/sapm1933121311) for a prime plus one, and products of them. The remaining
factor of the size uses Hartley's matrix, cos + sin of a discrete Fourier transform, which exists for every size and
whose entries are up to sqrt(2) times larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SEED = 20240400456 % 2**31


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix with entries of at most ``sqrt(2 / size)``; ``sqrt(1 / size)`` for a Hadamard matrix.

    Args:
        size: Size of the matrix, 1 or more.

    Returns:
        ``(size, size)``, float64; its product with its transpose is the identity.

    Example:
        >>> hadamard(2) * 2**0.5
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
        >>> bool((hadamard(12).abs() * 12**0.5 - 1).abs().max() < 1e-9)
        True
    """
    powers = 0
    while (size >> powers) % 2 == 0:
        powers += 1
    # 24 is 2 times Paley's of 12: try the largest power of two that leaves a size of Paley's.
    for taken in range(powers, -1, -1):
        rest = _paley(size >> taken)
        if rest is not None:
            return torch.kron(_sylvester(taken), rest)
    return torch.kron(_sylvester(powers), _hartley(size >> powers))


def rotation(size: int, *, keeps_ones: bool = False) -> Tensor:
    """`hadamard` with random signs of rows and columns, the same in each call.

    Args:
        size: Size of the matrix.
        keeps_ones: Whether it maps ones to ones, so that the mean of a vector does not change, as LayerNorm requires: a
            reflection maps them back, which changes entries by about ``2 / size``.

    Returns:
        ``(size, size)``, float64, orthogonal.

    Example:
        >>> q = rotation(6, keeps_ones=True)
        >>> torch.allclose(q @ q.T, torch.eye(6).double()), torch.allclose(q.sum(1), torch.ones(6).double())
        (True, True)
    """
    generator = torch.Generator().manual_seed(_SEED + size)
    signs = torch.randint(0, 2, (2, size), generator=generator).double() * 2 - 1
    matrix = signs[0, :, None] * hadamard(size) * signs[1]
    if not keeps_ones:
        return matrix
    ones = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    away = matrix @ ones - ones
    length = float(away.dot(away))
    return matrix if length < 1e-12 else matrix - (2 / length) * torch.outer(away, away @ matrix)


def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(power):
        matrix = torch.kron(matrix, two)
    return matrix


def _paley(size: int) -> Tensor | None:
    """Paley's two constructions; None if neither has this size."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):  # 3 modulo 4, where the matrix of residues is skew-symmetric
        matrix = _bordered(size - 1, -1) + torch.eye(size, dtype=torch.float64)
        return matrix / math.sqrt(size)
    half = size // 2
    if half % 4 == 2 and _is_prime(half - 1):  # 1 modulo 4, where it is symmetric
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(_bordered(half - 1, 1), two) + torch.kron(torch.eye(half, dtype=torch.float64), other)
        return matrix / math.sqrt(size)
    return None


def _bordered(prime: int, sign: int) -> Tensor:
    """The Jacobsthal matrix of a prime, bordered by a row of ones and a column of ``sign``."""
    residues = -torch.ones(prime, dtype=torch.float64)
    residues[torch.arange(1, prime).pow(2) % prime] = 1
    residues[0] = 0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = residues[(index[:, None] - index) % prime]
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    return matrix


def _hartley(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * (torch.outer(index, index) % size) / size
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
