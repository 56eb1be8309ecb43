"""Quantization-aware training for PyTorch Lightning: one callback from a float model to int8."""

from qat_lightning.artifact import load_quantized
from qat_lightning.calibration import calibrate
from qat_lightning.callbacks.batchnorm_reestimation import BatchNormReestimation
from qat_lightning.callbacks.distillation import Distillation
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.callbacks.quantization_monitor import QuantizationMonitor
from qat_lightning.callbacks.quantized_model_export import QuantizedModelExport
from qat_lightning.checkpoints import LoadsQuantizedCheckpoints, float_state_dict
from qat_lightning.evaluate import evaluate_variants
from qat_lightning.export.run import export_quantized
from qat_lightning.flows.base import Example
from qat_lightning.flows.coverage import coverage_table
from qat_lightning.fusion import fuse
from qat_lightning.plain import convert, prepare, quantize
from qat_lightning.quantized import QuantizedNetwork
from qat_lightning.recipe import Recipe
from qat_lightning.recipes.adaround import AdaRound
from qat_lightning.rehearsal import Rehearsal, rehearse
from qat_lightning.scheme import Scheme
from qat_lightning.sensitivity import sensitivity

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
    "rehearse",
    "sensitivity",
]
