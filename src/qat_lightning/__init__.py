"""Quantization-aware training for PyTorch Lightning: one callback from a float model to int8.

Names are imported on first use, so that a program loads only the modes that it uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat_lightning._moved import install

if TYPE_CHECKING:
    from qat_lightning.artifact import load_quantized
    from qat_lightning.artifact.quantized import QuantizedNetwork
    from qat_lightning.callbacks.batchnorm_reestimation import BatchNormReestimation
    from qat_lightning.callbacks.distillation import Distillation
    from qat_lightning.callbacks.parts.checkpoints import LoadsQuantizedCheckpoints, float_state_dict
    from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
    from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
    from qat_lightning.callbacks.quantization_monitor import QuantizationMonitor
    from qat_lightning.callbacks.quantized_model_export import QuantizedModelExport
    from qat_lightning.callbacks.weight_oscillations import WeightOscillations
    from qat_lightning.export.plain_tensors import to_plain_tensors
    from qat_lightning.export.run import export_quantized
    from qat_lightning.graph.example import Example
    from qat_lightning.ladder.search import reach
    from qat_lightning.ladder.target import Target
    from qat_lightning.modes.coverage import coverage_table
    from qat_lightning.plain import convert, prepare, quantize
    from qat_lightning.recipes.adaround import AdaRound
    from qat_lightning.recipes.folding import fuse
    from qat_lightning.rehearsal.calibration import calibrate
    from qat_lightning.rehearsal.rehearse import Rehearsal, rehearse
    from qat_lightning.run.evaluate import evaluate_variants
    from qat_lightning.sensitivity import sensitivity
    from qat_lightning.settings.recipe import Recipe
    from qat_lightning.settings.scheme import Scheme

_HOMES = {
    "AdaRound": "qat_lightning.recipes.adaround",
    "BatchNormReestimation": "qat_lightning.callbacks.batchnorm_reestimation",
    "Distillation": "qat_lightning.callbacks.distillation",
    "Example": "qat_lightning.graph.example",
    "LoadsQuantizedCheckpoints": "qat_lightning.callbacks.parts.checkpoints",
    "PostTrainingQuantization": "qat_lightning.callbacks.post_training_quantization",
    "QuantizationAwareTraining": "qat_lightning.callbacks.quantization_aware_training",
    "QuantizationMonitor": "qat_lightning.callbacks.quantization_monitor",
    "QuantizedModelExport": "qat_lightning.callbacks.quantized_model_export",
    "QuantizedNetwork": "qat_lightning.artifact.quantized",
    "Recipe": "qat_lightning.settings.recipe",
    "Rehearsal": "qat_lightning.rehearsal.rehearse",
    "Scheme": "qat_lightning.settings.scheme",
    "Target": "qat_lightning.ladder.target",
    "WeightOscillations": "qat_lightning.callbacks.weight_oscillations",
    "calibrate": "qat_lightning.rehearsal.calibration",
    "convert": "qat_lightning.plain",
    "coverage_table": "qat_lightning.modes.coverage",
    "evaluate_variants": "qat_lightning.run.evaluate",
    "export_quantized": "qat_lightning.export.run",
    "float_state_dict": "qat_lightning.callbacks.parts.checkpoints",
    "fuse": "qat_lightning.recipes.folding",
    "load_quantized": "qat_lightning.artifact",
    "prepare": "qat_lightning.plain",
    "quantize": "qat_lightning.plain",
    "reach": "qat_lightning.ladder.search",
    "rehearse": "qat_lightning.rehearsal.rehearse",
    "to_plain_tensors": "qat_lightning.export.plain_tensors",
}

install()


def __getattr__(name: str) -> Any:
    if name == "sensitivity":  # a package that can be called, under which the function would be lost to it
        return import_module("qat_lightning.sensitivity")
    if name == "__version__":
        return import_module("importlib.metadata").version("qat-lightning")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdaRound",
    "BatchNormReestimation",
    "Distillation",
    "Example",
    "LoadsQuantizedCheckpoints",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "QuantizationMonitor",
    "QuantizedModelExport",
    "QuantizedNetwork",
    "Recipe",
    "Rehearsal",
    "Scheme",
    "Target",
    "WeightOscillations",
    "calibrate",
    "convert",
    "coverage_table",
    "evaluate_variants",
    "export_quantized",
    "float_state_dict",
    "fuse",
    "load_quantized",
    "prepare",
    "quantize",
    "reach",
    "rehearse",
    "sensitivity",
    "to_plain_tensors",
]
