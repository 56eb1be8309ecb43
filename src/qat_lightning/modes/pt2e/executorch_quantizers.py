"""The quantizers of ExecuTorch's backends, unchanged, for named targets whose grids they determine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchao.quantization.pt2e.quantizer import Quantizer

from qat_lightning.settings.recipe import Recipe


def _openvino(recipe: Recipe) -> Quantizer:
    """NNCF's quantizer, with one activation scale per tensor also before depthwise convolutions."""
    from executorch.backends.openvino.quantizer import OpenVINOQuantizer
    from nncf.quantization.advanced_parameters import QuantizationParameters

    made: Quantizer = OpenVINOQuantizer(activations_quantization_params=QuantizationParameters(per_channel=False))
    return made


def arm_compile_spec(backend: str, bits: int) -> Any:
    """The target description for Arm's quantizers and partitioners.

    Args:
        backend: ``"tosa"``, ``"ethosu"`` or ``"vgf"``.
        bits: Number of bits of activations, 8 or 16.
    """
    if backend == "ethosu":
        from executorch.backends.arm.ethosu import EthosUCompileSpec

        return EthosUCompileSpec("ethos-u55-128")
    if backend == "vgf":
        from executorch.backends.arm.vgf import VgfCompileSpec

        return VgfCompileSpec()
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    return TosaCompileSpec("TOSA-1.0+INT" if bits == 8 else "TOSA-1.0+INT+int16")


def _arm(recipe: Recipe) -> Quantizer:
    from executorch.backends.arm.quantizer import arm_quantizer as arm

    bits = recipe.scheme.activation_bits
    makers = {"tosa": arm.TOSAQuantizer, "ethosu": arm.EthosUQuantizer, "vgf": arm.VgfQuantizer}
    config = arm.get_symmetric_a16w8_quantization_config if bits == 16 else arm.get_symmetric_quantization_config
    quantizer = makers[recipe.backend](arm_compile_spec(recipe.backend, bits))
    made: Quantizer = quantizer.set_global(config(is_per_channel=recipe.scheme.per_channel))
    return made


def _cortex_m(recipe: Recipe) -> Quantizer:
    from executorch.backends.cortex_m.quantizer.quantizer import CortexMQuantizer

    made: Quantizer = CortexMQuantizer()
    return made


def _vulkan(recipe: Recipe) -> Quantizer:
    from executorch.backends.vulkan.quantizer import vulkan_quantizer as vulkan

    made: Quantizer = vulkan.VulkanQuantizer().set_global(vulkan.get_symmetric_quantization_config())
    return made


MAKERS: dict[str, Callable[[Recipe], Quantizer]] = {
    "openvino": _openvino,
    "tosa": _arm,
    "ethosu": _arm,
    "vgf": _arm,
    "cortex_m": _cortex_m,
    "vulkan": _vulkan,
}
"""The quantizer of each backend."""
