"""Old import paths: modules of earlier releases whose contents are elsewhere now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "app": ("run.app",),
    "backends": ("settings.backends",),
    "calibration": ("rehearsal.calibration",),
    "callbacks.base": ("callbacks.quantization_callback",),
    "callbacks.parts.converting": ("callbacks.parts.int8_networks", "callbacks.quantization_callback"),
    "callbacks.parts.preparing": (
        "callbacks.parts.networks",
        "callbacks.parts.placement",
        "callbacks.parts.preparation",
        "callbacks.quantization_callback",
    ),
    "callbacks.parts.sharing": ("callbacks.parts.between_processes",),
    "checkpoint_io": ("callbacks.parts.checkpoint_io",),
    "checkpoints": ("callbacks.parts.checkpoints", "modes.float_state"),
    "evaluate": ("run.evaluate",),
    "example": ("callbacks.parts.example", "graph.example"),
    "export.base": ("export.protocol",),
    "fake_quantize": ("numerics.fake_quantize",),
    "flows": (),
    "flows.base": ("modes.protocol", "modes.registry", "modes.prepared", "graph.example", "numerics.sqnr"),
    "flows.coverage": ("modes.coverage",),
    "fusion": ("recipes.folding",),
    "grid": ("numerics.grid",),
    "kinds": ("settings.kinds",),
    "learned_step": ("numerics.learned_step",),
    "monitoring": ("measure.monitoring",),
    "network": ("callbacks.parts.network",),
    "observers": ("numerics.observers",),
    "qat_modules": ("layers.qat_modules", "layers.batchnorm"),
    "quantized": ("artifact.quantized",),
    "recipe": ("settings.recipe", "modes.prepared"),
    "recipes.fusion": ("recipes.folding",),
    "schedule": ("settings.schedule",),
    "scheme": ("settings.scheme",),
    "variants": ("settings.variants", "measure.fidelity", "callbacks.parts.variants"),
    "wandb_views": ("measure.wandb_views",),
}
"""For each old module, the modules that hold its contents now; all names are relative to ``qat_lightning``."""

_RENAMED = {
    "ConvertingCallback": "QuantizationCallback",
    "Flow": "Mode",
    "PreparingCallback": "QuantizationCallback",
    "get_flow": "get_mode",
}
_ROOT = f"{__package__}."


class _Homes(Loader):
    """Creates a module that looks up each name in the modules that hold it now.

    Args:
        homes: The modules that hold the names.
    """

    def __init__(self, homes: Sequence[str]) -> None:
        self.homes = homes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """A plain module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Install a ``__getattr__`` that looks names up."""

        def lookup(name: str) -> Any:
            for home in self.homes:
                found = import_module(_ROOT + home)
                if hasattr(found, _RENAMED.get(name, name)):
                    return getattr(found, _RENAMED.get(name, name))
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        if self.homes:
            warnings.warn(
                f"{module.__name__} is {' and '.join(_ROOT + home for home in self.homes)} now; what users need has "
                "its name in qat_lightning itself.",
                DeprecationWarning,
                stacklevel=2,
            )
        module.__getattr__ = lookup  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    """Finds the modules of `MOVED`; it comes after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        name = fullname.removeprefix(_ROOT)
        if name == fullname or name not in MOVED:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED)
        return ModuleSpec(fullname, _Homes(MOVED[name]), is_package=is_package)


def install() -> None:
    """Make the old import paths work."""
    sys.meta_path.append(_Finder())
