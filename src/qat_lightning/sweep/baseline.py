"""The float run that trials share: trained once, and identified by everything that could change it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict

from qat_lightning.callbacks.median_pruning import why_pruned
from qat_lightning.callbacks.parts.checkpoint_io import read_float_state
from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json, write_json
from qat_lightning.run import app
from qat_lightning.run.float_run import OF_QUANTIZATION, OF_SEARCH, OF_THE_LAUNCH
from qat_lightning.storage import place

USES = ("none", "compare", "start")
_RUN = "RUN"  # stands for the folder of a run
_LIBRARIES = ("torch", "lightning", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Baseline:
    """A cached float run.

    Attributes:
        cfg: Its configuration.
        folder: Its folder, named by the digest of its fingerprint.
    """

    cfg: DictConfig
    folder: Path

    @classmethod
    def of(cls, cfg: DictConfig) -> Baseline:
        """The float run that belongs to a trial."""
        float_cfg = float_configuration(cfg)
        words = json.dumps(fingerprint(float_cfg), sort_keys=True)
        folder = Path(cfg.baseline.folder).absolute() / hashlib.sha256(words.encode()).hexdigest()[:20]
        with open_dict(float_cfg):
            float_cfg.paths.output_dir = str(folder / "run")
        return cls(float_cfg, folder)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint with its final weights."""
        return self.folder / "float.ckpt"

    @property
    def there(self) -> bool:
        """Whether it was trained to the end, and its checkpoint is unchanged."""
        about = self.folder / "baseline.json"
        if not about.is_file() or not self.checkpoint.is_file():
            return False
        return bool(read_json(about)["sha256"] == _digest([self.checkpoint]))

    def lock(self) -> FileLock:
        """Held by the process that trains it; the system releases it when that process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "lock")

    def publish(self, run: app.Objects) -> None:
        """Publish the training result of `run` for other trials."""
        run.trainer.save_checkpoint(self.checkpoint)
        about = {"sha256": _digest([self.checkpoint]), "fingerprint": fingerprint(self.cfg)}
        write_json(self.folder / "baseline.json", about)

    def ensure(self) -> Path:
        """Train it unless it exists; wait while another process trains it.

        Returns:
            The checkpoint.
        """
        with self.lock():
            if not self.there:
                shutil.rmtree(self.folder / "run", ignore_errors=True)  # left by a process that was killed
                seed_everything(self.cfg.seed, workers=True, verbose=False)
                run = app.build(self.cfg)
                app.fit(self.cfg, run)
                self.publish(run)
                app.close(run.loggers)
        return self.checkpoint


def with_baseline(cfg: DictConfig) -> DictConfig:
    """The configuration of a trial with its shared float run, which is trained now if it does not exist yet.

    Args:
        cfg: The composed configuration of train.py. ``baseline.use`` is ``"none"``; ``"compare"``: int8 is compared
            with the shared run; or ``"start"``: training also starts from it. A trial of ``method=float`` is that run
            itself; a method with ``post_training`` uses it and trains nothing.

    Returns:
        The configuration, with ``float_checkpoint`` set.

    Raises:
        ConfigurationError: The baseline's settings are invalid.
    """
    if cfg.baseline.use not in USES:
        raise ConfigurationError(f"baseline.use={cfg.baseline.use} is not valid: use one of {', '.join(USES)}.")
    if cfg.baseline.use == "none":
        return cfg
    if cfg.trainer.devices not in (1, "1", "auto") or OmegaConf.select(cfg, "trainer.num_nodes", default=1) != 1:
        raise ConfigurationError(
            "baseline=shared and baseline=start need trials of one process: train the float run separately with "
            "method=float, and give its checkpoint as float_checkpoint=."
        )
    shared = cfg.copy()
    with open_dict(shared):
        if shared.method.name == "float":
            return _merged(shared)
        if shared.float_checkpoint is None:
            shared.float_checkpoint = str(Baseline.of(shared).ensure())
    return shared


def fit(cfg: DictConfig, run: app.Objects) -> None:
    """Train from the shared float run, or as the shared float run, if ``baseline`` says so.

    Args:
        cfg: Result of `with_baseline`.
        run: The objects built from it.
    """
    if cfg.baseline.use == "none":
        app.fit(cfg, run)
    elif cfg.method.name == "float":
        _fit_float(cfg, run)
    else:
        post_training = cfg.method.get("post_training", False)
        if cfg.ckpt_path is None and (post_training or cfg.baseline.use == "start"):
            run.model.load_state_dict(read_float_state(place(cfg.float_checkpoint)))
        if post_training:
            run.trainer.validate(run.model, datamodule=run.datamodule, verbose=False)
            app.keep_metrics(run)
        else:
            app.fit(cfg, run)


def _fit_float(cfg: DictConfig, run: app.Objects) -> None:
    """Train the shared run with the loggers of this trial, or restore it without training."""
    baseline = Baseline.of(cfg)
    with baseline.lock():
        if baseline.there:
            cfg = cfg.copy()
            cfg.ckpt_path = str(baseline.checkpoint)
            app.fit(cfg, run)
        else:
            app.fit(cfg, run)
            if not why_pruned(run.callbacks):  # other trials need the whole training
                baseline.publish(run)


def float_configuration(cfg: DictConfig) -> DictConfig:
    """The configuration of a trial's float run: without quantization, and with its own settings.

    Callbacks of this package are left out, because they are for quantization or for sweeps.
    """
    part = _merged(cfg.copy())
    with open_dict(part):
        part.method = {"name": "float"}
        part.pop("quantization", None)
        part.callbacks = {
            name: callback
            for name, callback in (part.get("callbacks") or {}).items()
            if callback is not None and not str(callback.get("_target_", "")).startswith("qat_lightning.")
        }
        part.logger = {
            "csv": {
                "_target_": "lightning.pytorch.loggers.CSVLogger",
                "save_dir": "${paths.output_dir}",
                "name": "csv",
                "version": "",
            }
        }
        part.ckpt_path = part.float_checkpoint = None
    return part


def fingerprint(cfg: DictConfig) -> dict[str, Any]:
    """Everything that could change a float run: settings, code, libraries, data on disk, and kind of machine.

    Args:
        cfg: The configuration of a float run.

    Returns:
        Plain values.
    """
    part = cfg.copy()
    with open_dict(part):
        part.paths.output_dir = _RUN
        for key in (*OF_QUANTIZATION, *OF_SEARCH, *OF_THE_LAUNCH):
            section, _, name = key.rpartition(".")
            holder = OmegaConf.select(part, section) if section else part
            if OmegaConf.is_dict(holder):
                holder.pop(name, None)
    settings = OmegaConf.to_container(part, resolve=True)
    packages = {"qat_lightning", *(str(target).partition(".")[0] for target in _values(settings, "_target_"))}
    return {
        "settings": settings,
        "code": {name: _code(name) for name in sorted(packages)},
        "data": {path: _stand(Path(path)) for path in sorted(set(_paths(settings)))},
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "machine": [platform.machine(), torch.get_num_threads(), *_devices()],
    }


def _merged(cfg: DictConfig) -> DictConfig:
    """The configuration merged with ``baseline.float``, settings for the float run only."""
    with open_dict(cfg):
        merged = OmegaConf.merge(cfg, cfg.baseline.float)
    assert isinstance(merged, DictConfig)
    return merged


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _values(node: Any, key: str) -> Iterator[Any]:
    """All values under a key, at any depth."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == key:
            yield value
        else:
            yield from _values(value, key)


def _paths(settings: Any) -> Iterator[str]:
    """The files and folders from which data is read."""
    parts = [settings.get("data")] if isinstance(settings, dict) else []
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str) and ("/" in part or Path(part).is_file()) and Path(part).exists():
            yield part


def _stand(path: Path) -> str:
    """Names, sizes and modification times of the files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    words = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _code(package: str) -> str:
    """The version of an installed package; for an editable one, a digest of its files."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "unknown"
    origin = Path(spec.origin)
    if "site-packages" in origin.parts:
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in _distributions().get(package, ()))
    if package in sys.stdlib_module_names:
        return platform.python_version()
    return _digest(sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin])


@functools.cache
def _distributions() -> dict[str, list[str]]:
    """The installed distribution of each importable package; reading this takes a second."""
    return {name: sorted(set(found)) for name, found in importlib.metadata.packages_distributions().items()}


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
