"""Timing saved int8 networks and their float networks again after training, alternating on an idle machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.compare.noise import network_settings
from qat_lightning.compare.quantizing import NAME, under_one_name
from qat_lightning.compare.run import Run
from qat_lightning.compare.settings import flatten
from qat_lightning.errors import ConfigurationError, QuantizationError, in_brief
from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import one_sample
from qat_lightning.measure.metrics import latency_interleaved
from qat_lightning.run.evaluate import SPREAD

BUSY = 0.5
"""Largest share of busy processors before timing; above it, other work is running."""


@dataclass(frozen=True)
class _Timed:
    """The networks of one run to time; ``network`` identifies the float network and what it is given."""

    run: int
    int8: QuantizedNetwork
    floating: nn.Module | None
    network: str


def remeasure(runs: Sequence[Run], say: Callable[[str], None], *, rounds: int = 15) -> list[Run]:
    """Time the int8 files of runs and their float networks again, in alternating rounds in this process.

    Networks with the same input shapes are timed in the same rounds, so that disturbances affect all of them alike. The
    float network is built from the run's configuration, which imports the code that it names; if that fails, the run
    gets no float latency and no speedup.

    Args:
        runs: The runs.
        say: Called with messages about what could not be timed, and how busy the machine is.
        rounds: Number of timings of each network.

    Returns:
        The runs with the new figures. Latencies of runs that could not be timed are removed, because they are not
        comparable with the new ones.

    Raises:
        ConfigurationError: No run has an int8 file that can be loaded.
    """
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        say(f"The machine is busy ({load:.0%} of its processors are in use), so timings will vary.")
    groups: dict[str, list[_Timed]] = {}
    faults: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        if run.status == "finished" and run.model_file:
            timed, found_faults = _load(place, run)
            for fault in found_faults:
                faults.setdefault(fault, []).append(run.folder)
            if timed is not None:
                groups.setdefault(_inputs(timed.int8.example), []).append(timed)
    for fault, folders in faults.items():
        say(f"{folders[0]}{f' and {len(folders) - 1} more' if len(folders) > 1 else ''}: {fault}")
    if not groups:
        raise ConfigurationError(
            "--remeasure found no int8 file to time: train.py saves one as model.int8 in the folder of a run "
            "(save_int8=true), and another program with qat.save('<folder of the run>/model.int8')."
        )
    found: dict[int, dict[str, float]] = {}
    for group in groups.values():
        found |= _time(group, rounds)
    floats = _floats(runs, groups, found)
    return [_with(run, found.get(place, floats.get(place))) for place, run in enumerate(runs)]


def _load(place: int, run: Run) -> tuple[_Timed | None, list[str]]:
    """Load the networks of a run; return messages about those that are missing (equal faults give equal messages)."""
    faults: list[str] = []
    floating: nn.Module | None = None
    try:
        floating = float_network(run)
    except Exception as error:  # noqa: BLE001 - the configuration runs the user's own code
        faults.append(
            f"the float network cannot be made ({in_brief(error)}), so it is not timed. If its code is "
            "not found: run this in the folder of the program, or add that folder to PYTHONPATH."
        )
    try:
        int8 = load_quantized(run.model_file, network=floating)
    except QuantizationError as error:
        faults.append(f"{Path(run.model_file).name} is not timed: {str(error).replace(run.model_file, 'it')}")
        return None, faults
    if not tree_leaves((int8.example.args, int8.example.kwargs)):
        faults.append(f"{Path(run.model_file).name} is not timed: it does not contain the shapes of its inputs.")
        return None, faults
    if why := _why_not_run(int8, int8.example):
        faults.append(f"{Path(run.model_file).name} is not timed: it cannot run one sample ({why}).")
        return None, faults
    if floating is not None and (why := _why_not_run(floating, int8.example)):
        faults.append(f"the float network is not timed: it cannot run one sample ({why}).")
        floating = None
    return _Timed(place, int8, floating, _network(run, floating)), faults


def _why_not_run(network: nn.Module, example: Example) -> str:
    """Return why a network does not run on one sample of an example; empty if it does."""
    one = one_sample(example)
    try:
        with torch.no_grad():
            network(*one.args, **one.kwargs)
    except Exception as error:  # noqa: BLE001 - the network is the user's own code
        return in_brief(error)
    return ""


def float_network(run: Run) -> nn.Module | None:
    """Build the untrained float network of a run from its configuration; its latency does not depend on the weights.

    Returns:
        The network; None if the configuration has no LightningModule under ``model`` or ``model.module``.
    """
    cfg = OmegaConf.create(dict(run.config))
    parts = (OmegaConf.select(cfg, name, default=None) for name in ("model.module", "model"))
    part = next((part for part in parts if OmegaConf.is_dict(part) and "_target_" in part), None)
    if part is None:
        return None
    module: Any = instantiate(part)
    if isinstance(module, LightningModule):
        said = under_one_name(flatten(run.config)).get(f"{NAME}.module", "null")
        (name, *_) = find_networks(module, None if said == "null" else said)
        module = Slot(module, name).get()
    found: nn.Module = module
    return found.cpu().float().eval()


def _network(run: Run, floating: nn.Module | None) -> str:
    """Identify a float network; not all that its latency depends on is in its `repr`, and its inputs are not."""
    return f"{floating!r} {network_settings(run)}"


def _inputs(example: Example) -> str:
    """Return the inputs of one sample as text, with shapes and types in the place of tensors."""
    one = one_sample(example)

    def described(leaf: Any) -> Any:
        return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return repr(tree_map(described, (one.args, one.kwargs)))


def _time(group: Sequence[_Timed], rounds: int) -> dict[int, dict[str, float]]:
    """Return the new figures of each run; runs with the same float network share one timing."""
    one = one_sample(group[0].int8.example)
    networks: dict[str, nn.Module] = {f"int8 {timed.run}": timed.int8 for timed in group}
    same: dict[str, str] = {}
    for timed in group:
        if timed.floating is not None:
            networks.setdefault(same.setdefault(timed.network, f"float {timed.run}"), timed.floating)
    latencies = latency_interleaved(networks, one.args, one.kwargs, rounds)
    found = {}
    for timed in group:
        int8 = latencies[f"int8 {timed.run}"]
        figures = {"int8/latency_ms": int8.median_ms, SPREAD: int8.spread}
        if timed.floating is not None:
            floating = latencies[same[timed.network]]
            figures |= {
                "float/latency_ms": floating.median_ms,
                "speedup": floating.median_ms / int8.median_ms,
                SPREAD: max(int8.spread, floating.spread),
            }
        found[timed.run] = figures
    return found


def _floats(
    runs: Sequence[Run], groups: Mapping[str, Sequence[_Timed]], found: Mapping[int, Mapping[str, float]]
) -> dict[int, dict[str, float]]:
    """Return latencies for float runs, from the same network timed beside int8 networks."""
    timed = {part.network: found[part.run] for group in groups.values() for part in group if part.floating is not None}
    figures = {}
    for place, run in enumerate(runs):
        if run.model_file or run.status != "finished":
            continue
        try:
            known = timed.get(_network(run, float_network(run)))
        except Exception:  # noqa: BLE001 - a network that cannot be built gets no new figure, which the table shows
            known = None
        if known is not None:
            figures[place] = {"float/latency_ms": known["float/latency_ms"], SPREAD: known[SPREAD]}
    return figures


def _with(run: Run, figures: Mapping[str, float] | None) -> Run:
    """Return a copy of a run with new latencies."""
    kept = {k: v for k, v in run.metrics.items() if not k.endswith("/latency_ms") and k not in ("speedup", SPREAD)}
    return replace(run, metrics={**kept, **(figures or {})})
