"""Random generators that a network has among its attributes, such as a `torch.Generator` for its noise."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def generators_of(network: nn.Module) -> list[Any]:
    """The generators of PyTorch, NumPy and Python that are attributes of a network or its submodules.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> network.noise = torch.Generator()
        >>> len(generators_of(network))
        1
    """
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found = (value for module in network.modules() for value in vars(module).values() if isinstance(value, kinds))
    return list({id(value): value for value in found}.values())


def states_of(generators: list[Any]) -> list[Any]:
    """The states of generators, which are equal if the generators will draw the same numbers."""
    return [[_comparable(leaf) for leaf in tree_leaves(_state(generator))] for generator in generators]


def _comparable(leaf: Any) -> Any:
    return np.asarray(leaf).tobytes() if isinstance(leaf, (Tensor, np.ndarray)) else leaf


def random_state() -> tuple[Any, ...]:
    """The state of the global generators of Python, PyTorch and NumPy, if that is imported."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    return (
        random.getstate(),
        bytes(torch.random.get_rng_state().numpy()),
        tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in drawn),
    )


@contextmanager
def python_and_numpy_kept() -> Iterator[None]:
    """Restore the states of the global generators of Python and NumPy at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def generators_kept(network: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Within the block, a network may draw from its own generators; their states are restored at the end.

    Args:
        network: The network.
        seed: Begin with this seed, so that another network with such generators draws the same; None for their states.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> network.noise = random.Random(0)
        >>> with generators_kept(network):
        ...     first = network.noise.random()
        >>> network.noise.random() == first
        True
    """
    before = [(generator, _state(generator)) for generator in generators_of(network)]
    try:
        if seed is not None:
            for generator, _ in before:
                _seed(generator, seed)
        yield
    finally:
        for generator, state in before:
            _restore(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)
