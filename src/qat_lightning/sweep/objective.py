"""What ``objective=`` names: refused before training where a sampler could not get it, and read after it."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from qat_lightning.errors import CombinationError


def check_objective(cfg: DictConfig) -> None:
    """Refuse a trial whose method cannot have the objective, for a sampler, which learns nothing without it.

    In a grid nothing depends on the objective: such a trial is, for example, the float run that others are compared
    with.

    Args:
        cfg: The composed configuration of train.py.

    Raises:
        CombinationError: The objective is of a variant that the method does not create.
    """
    for name in _names(cfg):
        if why := _why_never(cfg, name):
            raise CombinationError(f"{why} The sampler needs its value: choose another objective= or method=.")


def objective_of(cfg: DictConfig, metrics: Mapping[str, float]) -> tuple[list[float] | None, str]:
    """Return the values of the objective, and if there are none although it was given, why.

    Args:
        cfg: The composed configuration of train.py.
        metrics: All metrics of the run.
    """
    names = _names(cfg)
    for name in names:
        if name not in metrics:
            usable = f"objective={name} is not a metric of this run: use {', '.join(sorted(metrics)) or 'none'}."
            return None, _why_never(cfg, name) or usable
    return [float(metrics[name]) for name in names] or None, ""


def _names(cfg: DictConfig) -> list[str]:
    if cfg.objective is None:
        return []
    return [cfg.objective] if isinstance(cfg.objective, str) else list(cfg.objective)


def _why_never(cfg: DictConfig, name: str) -> str:
    """Why no run with these settings has a metric; empty if it may have."""
    variant = name.partition("/")[0]
    if variant not in _never(cfg):
        return ""
    what = f"{variant} network" if "/" in name else "int8 network to measure"
    return f"There is no objective={name}: method={cfg.method.name} creates no {what} with these settings."


def _never(cfg: DictConfig) -> tuple[str, ...]:
    """The variants, and metrics of the int8 network, that no run with these settings has."""
    part, of_int8 = cfg.get("quantization"), ("int8", "speedup", "size_ratio")
    if part is None:
        return (*of_int8, "fake_quant")
    if part.get("convert_on_fit_end") is False:
        return of_int8
    post_training = str(part.get("_target_")).endswith("PostTrainingQuantization")
    return ("fake_quant",) if post_training and part.get("kind", "static") != "static" else ()
