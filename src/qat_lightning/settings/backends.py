"""What the int8 kernels of each backend need: one table, read by training and by conversion.

The integer ranges are a property of the kernel that will run, never of the CPU that trains. FBGEMM adds pairs of uint8
x int8 products in 16 bits (``vpmaddubsw``), which saturate unless one of the two uses only half of its range; oneDNN on
a CPU with VNNI, and QNNPACK, accumulate in 32 bits. Upstream halves the range of activations for FBGEMM, but its
kernels do not clamp there, so a value above the observed range still saturates. Here the range of weights is halved
instead: weights are packed once and never exceed their range, and activations keep all 8 bits. The `x86` backend packs
for oneDNN and so has the full range of both.

The table is read without importing torch, which takes seconds: train.py rejects an unsupported pair before that.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

from qat_lightning.errors import CombinationError, ConfigurationError, MissingExtraError
from qat_lightning.settings.quantizers import FORMS, is_path

MODES = ("eager", "fx", "pt2e")
"""The modes that quantize a network as a whole."""

NAMES = (*MODES, "auto", "parts")
"""All values of ``mode=``."""


@dataclass(frozen=True)
class Backend:
    """What one backend needs and supports.

    Attributes:
        name: What the user types.
        modes: The modes that can produce networks for it.
        about: The hardware and runtime, for messages and docs.
        engine: The quantized engine of PyTorch whose kernels pack and run the weights; None for PT2 export, whose
            graphs hold no packed weights.
        activations: ``"uint8"`` or ``"int8"``; the kernels clamp to its limits.
        symmetric: Whether activations always have zero point 0, whatever the scheme says.
        weight_limit: Largest absolute integer of a weight: 127, or 63 where a kernel saturates on the full range.
        tolerance_db: SQNR, in dB, that every layer of a converted network must reach against fake-quant. Correct
            kernels reach 50 dB and more, broken ones 6 to 27 dB.
        extra: The optional dependency it needs, as ``pip install qat-lightning[extra]`` names it.
        own_grids: Whether its quantizer determines the grids, as a user's quantizer does; the scheme can then only make
            them coarser.
        activation_bits: Which of 8 and 16 bits its kernels support; fewer than 8 bits, and unsupported ones, are
            simulated.
        needs: The modules that ``extra`` installs; they are imported as a check before anything is prepared.
        channels_last: Whether its kernels, and so its quantizer, require images in channels-last memory format.
    """

    name: str
    modes: tuple[str, ...]
    about: str
    engine: str | None
    activations: Literal["uint8", "int8"] = "uint8"
    symmetric: bool = False
    weight_limit: int = 127
    tolerance_db: float = 45.0
    extra: str | None = None
    own_grids: bool = False
    activation_bits: tuple[int, ...] = (8,)
    needs: tuple[str, ...] = ()
    channels_last: bool = False

    @property
    def activation_dtype(self) -> torch.dtype:
        """``torch.uint8`` or ``torch.int8``."""
        import torch

        return torch.uint8 if self.activations == "uint8" else torch.int8

    @property
    def activation_limits(self) -> tuple[int, int]:
        """Smallest and largest integer of an activation."""
        return (0, 255) if self.activations == "uint8" else (-128, 127)


def _arm(name: str, about: str, *needs: str) -> Backend:
    """A backend of Arm's; they share one family of quantizers, with 8-bit or 16-bit activations."""
    return Backend(
        name,
        ("pt2e",),
        about,
        None,
        activations="int8",
        extra="arm",
        own_grids=True,
        activation_bits=(8, 16),
        needs=("tosa_serializer", "executorch.backends.arm.quantizer.arm_quantizer", *needs),
    )


_TABLE = (
    Backend(
        "x86", ("eager", "fx", "pt2e", "parts"), "server CPUs with VNNI, through oneDNN (Inductor in pt2e)", "onednn"
    ),
    Backend("onednn", ("eager", "fx", "parts"), "server CPUs, through oneDNN", "onednn"),
    Backend("fbgemm", ("eager", "fx", "parts"), "x86 CPUs without VNNI, through FBGEMM", "fbgemm", weight_limit=63),
    Backend("qnnpack", ("eager", "fx", "parts"), "Arm CPUs, through QNNPACK", "qnnpack", tolerance_db=40.0),
    Backend(
        "xnnpack",
        ("pt2e",),
        "phones, through ExecuTorch and XNNPACK",
        None,
        activations="int8",
        extra="xnnpack",
        needs=("executorch.backends.xnnpack.quantizer.xnnpack_quantizer",),
    ),
    Backend(
        "tensorrt",
        ("pt2e",),
        "NVIDIA GPUs, through TensorRT and ONNX",
        None,
        activations="int8",
        symmetric=True,
    ),
    Backend(
        "openvino",
        ("pt2e",),
        "Intel CPUs, GPUs and NPUs, through ExecuTorch and OpenVINO",
        None,
        extra="executorch-openvino",
        own_grids=True,
        needs=("executorch.backends.openvino.quantizer",),
    ),
    _arm("tosa", "whatever runs TOSA, through ExecuTorch"),
    _arm("ethosu", "Arm's Ethos-U NPUs, through ExecuTorch and Vela", "ethosu.vela"),
    _arm("vgf", "GPUs with Arm's ML extensions for Vulkan, through ExecuTorch and VGF", "model_converter"),
    Backend(
        "cortex_m",
        ("pt2e",),
        "Arm Cortex-M microcontrollers, through ExecuTorch and CMSIS-NN",
        None,
        activations="int8",
        extra="arm",
        own_grids=True,
        needs=("tosa_serializer", "executorch.backends.cortex_m.quantizer.quantizer"),
        channels_last=True,
    ),
    Backend(
        "vulkan",
        ("pt2e",),
        "GPUs of phones, through ExecuTorch and Vulkan: the weights of linear layers",
        None,
        activations="int8",
        extra="xnnpack",
        own_grids=True,
        needs=("executorch.backends.vulkan.quantizer.vulkan_quantizer",),
    ),
)

_OTHER_FORMS = FORMS.removeprefix("a built-in name, ")

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _TABLE}


def pairs() -> list[tuple[str, str]]:
    """Every supported pair of mode and backend.

    Example:
        >>> ("pt2e", "xnnpack") in pairs()
        True
    """
    return [(mode, backend.name) for mode in MODES for backend in _TABLE if mode in backend.modes]


def get_backend(name: str, mode: str) -> Backend:
    """The row of ``name``, checked to support ``mode``.

    Args:
        name: A backend's name, or the dotted path of a PT2E quantizer.
        mode: ``"eager"``, ``"fx"``, ``"pt2e"``, ``"parts"``, or ``"auto"``, which is compatible with every backend.

    Raises:
        ConfigurationError: The mode or the backend is unknown.
        CombinationError: The mode does not support the backend.

    Example:
        >>> get_backend("qnnpack", "fx").engine
        'qnnpack'
    """
    if mode not in NAMES:
        raise ConfigurationError(f"mode={mode!r} is unknown: use one of {', '.join(NAMES)}.")
    if is_path(name):
        backend = Backend(
            name, ("pt2e",), f"what {name} is for", None, activations="int8", own_grids=True, activation_bits=(8, 16)
        )
    elif name in BACKENDS:
        backend = BACKENDS[name]
    else:
        raise ConfigurationError(
            f"backend={name!r} is unknown: use one of {', '.join(BACKENDS)}; in mode='pt2e' also {_OTHER_FORMS}."
        )
    if mode != "auto" and mode not in backend.modes:
        for_mode = ", ".join(row.name for row in _TABLE if mode in row.modes)
        raise CombinationError(
            f"mode={mode!r} does not support backend={name!r}: for {name} use "
            f"{' or '.join(f'mode={other!r}' for other in backend.modes)}; the backends of {mode} are {for_mode}."
        )
    return backend


def require(backend: Backend) -> None:
    """Check that the packages and the engine that ``backend`` needs are available.

    Raises:
        MissingExtraError: An optional dependency is not installed.
        ConfigurationError: This build of PyTorch has no such quantized engine.
    """
    import torch

    for module in backend.needs:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(
                f"backend={backend.name!r} needs {module.partition('.')[0]}: pip install "
                f"'qat-lightning[{backend.extra}]' ({error})."
            ) from error
    if backend.engine is not None and backend.engine not in torch.backends.quantized.supported_engines:
        have = ", ".join(engine for engine in torch.backends.quantized.supported_engines if engine != "none")
        raise ConfigurationError(
            f"backend={backend.name!r} needs the quantized engine {backend.engine!r}, which this build of PyTorch does "
            f"not have (it has {have}): choose another backend, or convert on another machine."
        )
