"""One real fit in its own process, which may be killed in the middle.

`fit` trains a small network with everything that a resume could lose: BatchNorm statistics, dropout, ranges, Adam's
moments, a learning rate that decreases with each step, a shuffled loader, accumulated gradients. It saves
continually, resumes from the last checkpoint in its folder if there is one, and writes a digest of its final state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.demos.data.resumable import resumable_loader
from tests.callbacks.lit import dataset
from tests.stress.kinds import MORE_STEPS, parts

BATCHES = 4
STEPS = 12
EPOCHS = {1: 3, 2: 6, 3: 6}
"""For each accumulation the epochs that make `STEPS` optimizer steps; 3 does not divide the batches of an epoch."""

DIGEST = "digest.json"


@dataclass(frozen=True)
class Kill:
    """Where to kill a fit.

    Attributes:
        part: ``"prepare"``, ``"step"``, ``"save"``, ``"save_last"``, ``"validate"`` or ``"convert"``.
        at: Which part of that kind, counted from the beginning of a fit; for steps and saves the number of steps done.
        calls: Number of function calls (Python or C) in the part after which the fit kills itself.
        seconds: Time after the beginning of the part at which it is killed from outside.
        stops: Whether it stops in the part, to test detection of hanging fits.
    """

    part: str
    at: int
    calls: int | None = None
    seconds: float | None = None
    stops: bool = False


@dataclass(frozen=True)
class Run:
    """A fit.

    Attributes:
        mode: Quantization mode.
        folder: Folder of its checkpoints and its digest.
        accumulate: Batches per optimizer step.
        save_every: Optimizer steps per checkpoint.
        kind: One of `kinds.KINDS`.
        kill: Where to kill it.
        count: Whether to count the calls in each part, for later kills.
        temporary: Python's folder for temporary files, if not the default.
    """

    mode: str
    folder: str
    accumulate: int = 1
    save_every: int = 1
    kind: str = "plain"
    kill: Kill | None = None
    count: bool = False
    temporary: str | None = None


class Witness(Callback):
    """Reports the current part of the fit, and kills it there."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self.run = run
        self.tell = tell
        self.calls: dict[str, int] = {}
        self.seen: dict[str, int] = {}

    def say(self, part: str, at: int) -> None:
        """Enter a part."""
        sys.setprofile(None)
        self.tell(f"{part} {at}")
        kill = self.run.kill
        here = kill is not None and (kill.part, kill.at) == (part, at)
        if kill is not None and here and kill.calls is not None:
            sys.setprofile(_Killer(kill.calls))
        elif kill is not None and here and kill.stops:
            threading.Event().wait()
        elif self.run.count:
            sys.setprofile(_Counter(self.calls, f"{part} {at}"))

    def next(self, part: str) -> None:
        """Enter a part with its own counter."""
        self.seen[part] = self.seen.get(part, -1) + 1
        self.say(part, self.seen[part])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.say("prepare", 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.say("step", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.next("validate")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.next("convert")


@dataclass
class _Killer:
    left: int

    def __call__(self, *event: Any) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class _Counter:
    calls: dict[str, int]
    key: str

    def __call__(self, *event: Any) -> None:
        self.calls[self.key] = self.calls.get(self.key, 0) + 1


@dataclass
class Saving:
    """The Trainer's ``save_checkpoint``, with reports before and after."""

    witness: Witness
    save: Callable[..., None]
    trainer: Trainer

    def __call__(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        self.witness.say("save_last" if Path(filepath).name.startswith("last") else "save", self.trainer.global_step)
        self.save(filepath, *args, **kwargs)
        self.witness.say("saved", self.trainer.global_step)


def fit(run: Run, tell: Callable[[str], None]) -> None:
    """Run the fit from the last checkpoint in its folder or from the beginning, and return its digest.

    Args:
        run: The fit.
        tell: Called with each part of the fit when it begins.
    """
    folder = Path(run.folder)
    resumed = any(folder.glob("last*.ckpt"))
    # A resumed run is seeded otherwise: what it ends with must come from the checkpoint.
    seed_everything(1 if resumed else 0, verbose=False)
    witness = Witness(run, tell)
    module, callback, others = parts(run.kind, run.mode)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS[run.accumulate],
        accumulate_grad_batches=run.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            witness,
            callback,
            *others,
            ModelCheckpoint(folder, every_n_train_steps=run.save_every, save_last=True),
        ],
    )
    trainer.save_checkpoint = Saving(witness, trainer.save_checkpoint, trainer)  # type: ignore[method-assign]
    train = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
    validate = resumable_loader(dataset(32), batch_size=16, seed=1, shuffle=False)
    trainer.fit(module, train, validate, ckpt_path="last")
    sys.setprofile(None)
    wanted = STEPS + MORE_STEPS.get(run.kind, 0)
    if trainer.global_step != wanted:
        raise RuntimeError(f"the fit ended at step {trainer.global_step}, not {wanted}")
    write(folder / DIGEST, {"digest": digest(trainer, module, callback), "calls": witness.calls})
    tell("done 0")


def digest(trainer: Trainer, module: LightningModule, callback: QuantizationCallback) -> dict[str, str]:
    """A hash of every tensor of a fit's final state."""
    ended: dict[str, Any] = dict(module.state_dict())
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        ended |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    ended["lr"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
    ended |= dict(_flat("callback", callback.state_dict()))
    networks = callback.quantized if isinstance(callback.quantized, dict) else {"": callback.quantized}
    ended |= {f"int8 {name}".strip(): network(dataset()[:32][0]) for name, network in networks.items()}
    return {key: _hash(value) for key, value in ended.items()}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    else:
        yield name, value


def _hash(value: Any) -> str:
    data = value.detach().contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def write(path: Path, values: Any) -> None:
    """Write atomically."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(values))
    beside.replace(path)


@contextlib.contextmanager
def output_to(path: Path) -> Any:
    """Redirect all output of this process, including C code's, to a file."""
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
