"""Names that have moved: see `qat_lightning.modes` and `qat_lightning.graph`."""

from qat_lightning.graph.example import Example, in_float32
from qat_lightning.modes.prepared import (
    copy_of_modules,
    cpu_copy,
    fake_quantizers,
    float_keys,
    follow_course,
    in_training_step,
    is_prepared,
    materialize_weights,
    merge_ranges,
    observe_in_evaluation,
    prepared_state,
    reduce_ranges,
    refuse_simulated,
    set_phase,
)
from qat_lightning.modes.protocol import Converted, Flow, LayerCheck, LayerCoverage, WholeCheck
from qat_lightning.modes.registry import get_flow
from qat_lightning.numerics.sqnr import sqnr_db

__all__ = [
    "Converted",
    "Example",
    "Flow",
    "LayerCheck",
    "LayerCoverage",
    "WholeCheck",
    "copy_of_modules",
    "cpu_copy",
    "fake_quantizers",
    "float_keys",
    "follow_course",
    "get_flow",
    "in_float32",
    "in_training_step",
    "is_prepared",
    "materialize_weights",
    "merge_ranges",
    "observe_in_evaluation",
    "prepared_state",
    "reduce_ranges",
    "refuse_simulated",
    "set_phase",
    "sqnr_db",
]
