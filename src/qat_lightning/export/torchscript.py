"""TorchScript: the packed int8 kernels of modes eager and fx, traced and frozen, to run without this package."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from qat_lightning.errors import ExportError
from qat_lightning.export.call import Call
from qat_lightning.export.plain_layers import not_exportable
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.export.traced_reads import TracedReads
from qat_lightning.layers.integer.recurrent import DynamicRecurrent
from qat_lightning.settings.engines import packing_engine, quantized_engine
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import Recipe

_ENGINE = "quantized_engine"


class TorchScript:
    """`Format` of TorchScript, which PyTorch maintains but no longer develops.

    Loading packs the weights for the current quantized engine. The file contains the engine that it was made for in its
    extra file ``quantized_engine``.
    """

    name: ClassVar[str] = "torchscript"
    suffix: ClassVar[str] = ".torchscript.pt"
    runtime: ClassVar[str] = "TorchScript"
    extra: ClassVar[str | None] = None
    batch: ClassVar[int | None] = None

    def require(self) -> None:
        """See `Format.require`: it comes with torch."""

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        if not traits_of(recipe.mode).packs:
            return "TorchScript files hold packed kernels, which mode='pt2e' does not create: use 'pt2', or mode='fx'."
        return ""

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        call = Call.of(source)
        engine = source.quantized.recipe.target.engine if source.quantized is not None else None
        tensors = call.flatten(source.example.args, source.example.kwargs)
        layers = (
            source.network.named_modules() if source.quantized is None else source.quantized.network.named_modules()
        )
        for name, module in layers:
            if isinstance(module, DynamicRecurrent):  # its packed cells cannot be part of a trace
                raise not_exportable(module, name)
        with torch.no_grad(), quantized_engine(engine), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)  # these say less than `TracedReads`
            reads = TracedReads()
            try:
                with reads:
                    flat = _Flat(source.network, call).eval()
                    traced = torch.jit.trace(flat, tuple(tensors), check_trace=False)
                frozen = torch.jit.freeze(traced.eval(), preserved_attrs=_integers(flat))
            except Exception as error:
                why = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
                raise ExportError(f"TorchScript cannot trace the network: {why}.") from error
            torch.jit.save(frozen, str(path), _extra_files={_ENGINE: engine or ""})
        if reads.sizes:
            warnings.warn(
                f"The TorchScript file accepts only input sizes that take the same path through forward as the "
                "example, and raises an error for others, since the network reads sizes in Python: "
                f"{', '.join(reads.sizes)}.",
                stacklevel=2,
            )

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return None

    def load(self, path: Path) -> Runner:
        """See `Format.load`."""
        said: dict[str, Any] = {_ENGINE: ""}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            torch.jit.load(str(path), _extra_files=said)
            engine = said[_ENGINE]
            engine = (engine.decode() if isinstance(engine, bytes) else engine) or None
            with packing_engine(engine):
                loaded = torch.jit.load(str(path))

        def run(tensors: list[Tensor]) -> list[Tensor]:
            with torch.inference_mode(), quantized_engine(engine):
                return list(loaded(*tensors))

        return run


def _integers(network: nn.Module) -> list[str]:
    """Buffers that freezing would otherwise replace by the float weights that are computed from them."""
    dequantizing = (name for name, module in network.named_modules() if getattr(module, "dequantizes", False))
    return [f"{layer}.{name}" for layer in dequantizing for name, _ in network.get_submodule(layer).named_buffers()]


class _Flat(nn.Module):
    """A network with flat tensors as inputs and outputs, for tracing by TorchScript."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.__dict__["_call"] = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call: Call = self.__dict__["_call"]
        args, kwargs = call.arguments(list(tensors))
        return tuple(call.tensors_of(self.network(*args, **kwargs)))
