"""Checks that run before torch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qat_lightning.errors import QuantizationError
from qat_lightning.run.mistakes import explained, in_one_panel
from qat_lightning.settings.backends import get_backend
from qat_lightning.settings.quantizers import backend_and_source
from qat_lightning.sweep.result import FILE, TrialResult, identity, written


def refuse_impossible_pair(cfg: DictConfig) -> None:
    """Exit with an error for an incompatible mode and backend, in a single run.

    In a sweep such a trial is skipped, and the others continue.

    Args:
        cfg: The composed configuration of train.py.

    Raises:
        SystemExit: They are incompatible. The folder then has a ``result.json`` that says so, unless a finished run
            left one.
    """
    hydra = HydraConfig.get()
    mode, backend = (OmegaConf.select(cfg, f"quantization.{name}") for name in ("mode", "backend"))
    if hydra.mode != RunMode.RUN or mode is None or backend is None or OmegaConf.is_missing(cfg.backend, "quantizer"):
        return
    with in_one_panel():
        try:
            get_backend(backend_and_source(backend)[0], mode)
        except QuantizationError as error:
            folder = Path(hydra.runtime.output_dir)
            if not (folder / FILE).exists():
                overrides = identity(written(hydra.overrides.task))
                TrialResult("failed", overrides, error=explained(error)).write(folder)
            raise
