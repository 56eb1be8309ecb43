"""The quantizer of a recipe: upstream's for a built-in backend, configured by the scheme, or the user's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig

from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.pt2e.executorch_quantizers import MAKERS
from qat_lightning.modes.qconfig import activation_qscheme, activation_settings, weight_qscheme, weight_settings
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.quantizers import QuantizerSource, imported
from qat_lightning.settings.recipe import Recipe


def make_quantizer(recipe: Recipe) -> Quantizer:
    """The quantizer of the recipe's backend: built-in and configured by the recipe's scheme, or the user's own.

    Raises:
        ConfigurationError: A user's quantizer cannot be created.
    """
    if recipe.quantizer is not None:
        return own_quantizer(recipe.quantizer)
    if recipe.backend in MAKERS:
        return MAKERS[recipe.backend](recipe)
    if recipe.backend == "xnnpack":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

        xnnpack = XNNPACKQuantizer()
        # Patterns with BatchNorm never match here, and building each of them needs an export.
        xnnpack.SUPPORTED_PATTERNS = [p for p in xnnpack.SUPPORTED_PATTERNS if "_bn" not in p.name]
        xnnpack.set_global(make_config(recipe))
        return xnnpack
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    # Also for TensorRT, whose kernels also fuse a residual addition and an activation with a convolution.
    return X86InductorQuantizer().set_global(make_config(recipe))


def own_quantizer(source: QuantizerSource) -> Quantizer:
    """Create a user's quantizer, a new one each time: quantizers remember the graphs that they annotated.

    Raises:
        ConfigurationError: It cannot be created, or is not a PT2E quantizer; the message says why, and what to pass
            instead.
    """
    if source.made is not None:
        made = _copy_of(source)
    elif source.arguments is None:
        raise ConfigurationError(
            f"backend={source.path!r} was given as an instance, which checkpoints and files cannot store: give "
            "backend= again, as the instance, or as {'_target_': 'package.module.Class', ...}, which is stored."
        )
    else:
        made = _build(source.path, source.keywords)
    if not isinstance(made, Quantizer):
        raise ConfigurationError(
            f"backend={source.path!r} makes {type(made).__module__}.{type(made).__qualname__}, and not a "
            "torchao.quantization.pt2e.quantizer.Quantizer: derive its class from that one, or name a function that "
            "returns one. (Quantizers for torch.ao's own PT2E, which is gone from PyTorch, are other classes.)"
        )
    return made


def _copy_of(source: QuantizerSource) -> Any:
    try:
        return copy.deepcopy(source.made)
    except Exception as error:
        raise ConfigurationError(
            f"backend={source.made!r} cannot be copied ({type(error).__name__}: {error}), and each network that is "
            "prepared needs a fresh one: give a function that returns one, as backend=make_quantizer."
        ) from error


def _build(path: str, arguments: Mapping[str, Any]) -> Any:
    """Call the object at a path, after instantiating mappings with ``_target_`` among its arguments."""
    factory = imported(path)
    given = {name: _built(value) for name, value in arguments.items()}
    try:
        return factory(**given)
    except ConfigurationError:
        raise
    except Exception as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ConfigurationError(
            f"{path}({shown}) fails ({type(error).__name__}: {error}): give the arguments that it takes, as "
            f"backend={{'_target_': {path!r}, 'name': value}}."
        ) from error


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    inside = {name: inner for name, inner in value.items() if name != "_target_"}
    return _build(value["_target_"], inside) if "_target_" in value else {k: _built(v) for k, v in inside.items()}


def make_config(recipe: Recipe) -> QuantizationConfig:
    """The recipe in the form of upstream's quantizers, with our FakeQuantize."""
    scheme = recipe.scheme
    activation_low, activation_high = recipe.activation_limits
    weight_low, weight_high = recipe.weight_limits
    activation = QuantizationSpec(
        dtype=recipe.target.activation_dtype,
        quant_min=activation_low,
        quant_max=activation_high,
        qscheme=activation_qscheme(recipe),
        observer_or_fake_quant_ctr=Constructor("FakeQuantize", **activation_settings(recipe)),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=weight_low,
        quant_max=weight_high,
        # The quantizers refuse affine weights, which are only simulated and never reach their converter.
        qscheme=torch.per_channel_symmetric if scheme.per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if scheme.per_channel else None,
        observer_or_fake_quant_ctr=Constructor(
            "PerChannelFakeQuantize" if scheme.per_channel else "FakeQuantize",
            qscheme=weight_qscheme(scheme),
            **weight_settings(recipe),
        ),
    )
    # Not is_qat: it enables the patterns with BatchNorm, which is hidden from the quantizer.
    return QuantizationConfig(activation, activation, weight, None, is_qat=False)


class Constructor:
    """Creates a FakeQuantize from a QuantizationSpec, like upstream's ``Observer.with_args``.

    Upstream passes ``ch_axis`` only to classes with "PerChannel" in their names.
    """

    def __init__(self, name: str, **fixed: Any) -> None:
        self.__name__ = name
        self.fixed = fixed

    def with_args(self, **given: Any) -> functools.partial[FakeQuantize]:
        """A factory for the spec's fields and the fixed arguments."""
        return functools.partial(FakeQuantize, **(given | self.fixed))


_KNOWN_TO_X86 = "Conv1d, Conv2d, {}Linear, products of equal shapes, and pooling, cat and flatten between them"
_KNOWN = {
    "x86": _KNOWN_TO_X86.format("ConvTranspose1d, ConvTranspose2d, "),
    "tensorrt": _KNOWN_TO_X86.format(""),
    "xnnpack": "Conv1d, Conv2d, ConvTranspose, Linear, add, mul, cat, adaptive_avg_pool2d and reshaping between them",
}
"""The rules of each quantizer in words."""


def known_rules(recipe: Recipe, quantizer: Quantizer) -> str:
    """The rules of a quantizer in words."""
    name = type(quantizer).__name__
    return (
        f"{name} knows {_KNOWN[recipe.backend]}"
        if recipe.backend in _KNOWN
        else (f"{name} annotated none of its operations")
    )
