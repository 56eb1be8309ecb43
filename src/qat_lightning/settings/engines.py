"""The quantized engine of PyTorch that runs, and whether this CPU computes exactly with it."""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STAND_IN = "qnnpack"
"""The engine that runs instead of oneDNN where oneDNN saturates: QNNPACK adds products in 32 bits on every CPU."""

LARGEST_EXACT_WEIGHT = 64
"""Two products of uint8 with such weights add up to at most 2 * 255 * 64, which 16 bits hold."""

NO_VNNI = (
    "This CPU has no VNNI, without which oneDNN's int8 kernels add pairs of products in 16 bits, which overflow with "
    "8-bit weights"
)


def engine_here(name: str | None) -> str | None:
    """The engine that runs on this CPU what was converted for an engine.

    Args:
        name: The engine of a backend; None for a backend without one.

    Returns:
        ``name``, or `STAND_IN` for oneDNN where its kernels saturate.

    Example:
        >>> engine_here("fbgemm")
        'fbgemm'
    """
    return STAND_IN if name == "onednn" and not onednn_is_exact() else name


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN adds the products of its int8 kernels without overflow here; tried once on the largest products.

    What decides is the instructions that oneDNN uses: those of the CPU, or fewer with ``ONEDNN_MAX_CPU_ISA``.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    with ThreadPoolExecutor(1) as thread:  # the modes of a thread, such as a recording of ops, do not see it
        return thread.submit(_adds_the_largest_products).result()


def _adds_the_largest_products() -> bool:
    import torch

    if "onednn" not in torch.backends.quantized.supported_engines:
        return True
    channels = 32
    weight = torch.full((channels, channels, 1, 1), 127, dtype=torch.int8)
    images = torch.full((1, channels, 8, 8), 255, dtype=torch.uint8)
    ops: Any = torch.ops.onednn
    ones, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    after: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    with torch.no_grad():
        sizes = ([1, 1], [0, 0], [1, 1], 1)
        packed = ops.qconv_prepack(weight, ones, 1.0, 0, *sizes, None)
        image = ops.qconv_pointwise.default(images, 1.0, 0, packed, ones, zeros, None, *sizes, *after)
        packed = ops.qlinear_prepack(weight.flatten(1), None)
        row = ops.qlinear_pointwise.default(images[..., 0, 0], 1.0, 0, packed, ones, zeros, None, *after)
    return all(bool((result == 255 * 127 * channels).all()) for result in (image, row))


def overflows(weight: Tensor) -> bool:
    """Whether a layer with this int8 weight and uint8 inputs may overflow in oneDNN's kernels on this CPU.

    Args:
        weight: int8, of any shape.
    """
    if onednn_is_exact() or not weight.numel():
        return False
    least, largest = weight.aminmax()
    return max(-int(least), int(largest)) > LARGEST_EXACT_WEIGHT


def detour(engine: str | None, *, packs: bool) -> str:
    """How this CPU computes what an engine's kernels would, if they overflow on it, in words; empty if they do not.

    Args:
        engine: The engine of a backend.
        packs: Whether its layers hold packed weights, unlike those of mode pt2e.
    """
    if engine_here(engine) == engine:
        return ""
    return (
        f"{NO_VNNI}. {'QNNPACK computes' if packs else 'Float ops compute'} the same integers "
        "here instead: exactly, but more slowly. The same int8 file runs oneDNN on a CPU with VNNI. If int8 is to be "
        "fast on CPUs like this one, choose backend='fbgemm' with mode='fx' or 'eager': its weights have 7 bits."
    )


@dataclass(eq=False)
class _Engine:
    """An engine that a ``with`` block requested; the first in `_ENGINES` is the one that was set before all of them."""

    name: str


_ENGINES: list[_Engine] = []
_ENGINES_LOCK = threading.Lock()


@contextmanager
def packing_engine(name: str | None = None) -> Iterator[None]:
    """Select the engine that packs quantized weights, within a ``with`` block.

    Packed weights keep the kernel they were packed for, but a copy or a load packs them again for the current engine,
    so these have to happen inside such a block. On CPUs where oneDNN overflows, QNNPACK is selected instead of it.

    Args:
        name: The engine of a backend; by default the current one.
    """
    import torch

    name = torch.backends.quantized.engine if name is None else name
    with _selected(str(engine_here(name))):
        yield


@contextmanager
def quantized_engine(name: str | None) -> Iterator[None]:
    """Select the engine that runs ops without packed weights, such as sums and pooling, within a ``with`` block.

    Layers run the kernels that they were packed for. For None, nothing is selected.
    """
    if name is None:
        yield
        return
    with _selected(name):
        yield


@contextmanager
def _selected(name: str) -> Iterator[None]:
    """Select an engine.

    It is global to the process: it stays selected while any thread is inside a block, and the last block to end
    restores the engine that was set before the first.
    """
    import torch

    mine = _Engine(name)
    with _ENGINES_LOCK:
        if not _ENGINES:
            _ENGINES.append(_Engine(torch.backends.quantized.engine))
        _ENGINES.append(mine)
        torch.backends.quantized.engine = name
    try:
        yield
    finally:
        with _ENGINES_LOCK:
            _ENGINES.remove(mine)
            torch.backends.quantized.engine = _ENGINES[-1].name
            if len(_ENGINES) == 1:
                _ENGINES.clear()
