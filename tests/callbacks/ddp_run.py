"""Program of `test_processes`: fits and tests in two processes; writes the final state of each."""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from qat_lightning import Distillation, QuantizationMonitor, Scheme, WeightOscillations
from qat_lightning.callbacks.parts import between_processes, int8_networks
from qat_lightning.errors import QuantizationError, VerificationError
from qat_lightning.modes import compiling
from qat_lightning.modes.compiling import CompiledSteps
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.modes.registry import mode_for
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.rehearsal import faults
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import CLASSES, MODES, Lit, Net, dataset, loader, qat, ranges, statistics, trainer
from tests.callbacks.test_insert import OwnForward

IMAGES = dataset()[:32][0]
LEARNED = Scheme(weight_bits=4, learned_step="lsq+")


def digest(values: dict[str, Any]) -> str:
    return repr([(key, value.double().sum().item()) for key, value in values.items() if isinstance(value, Tensor)])


class EveryStep(Callback):
    """Records the ranges and the phase after each batch."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        quantizers = [fq for _, fq in fake_quantizers(pl_module)]
        counts = [int(fq.batches) for fq in quantizers if fq.source == "moving_average"]
        flags = [(fq.fake_quant_enabled, fq.observer_enabled) for fq in quantizers]
        self.seen.append(f"{digest(ranges(pl_module))} {counts} {flags}")


CONVERSIONS: list[str] = []
"""The modes of the conversions that this process made."""


def counted(recipe: Recipe) -> Any:
    """A mode's flow that records when it converts."""
    flow = mode_for(recipe)
    convert = flow.convert

    def noting(*args: Any) -> Any:
        CONVERSIONS.append(recipe.mode)
        return convert(*args)

    flow.convert = noting  # type: ignore[method-assign]
    return flow


def first() -> bool:
    return torch.distributed.get_rank() == 0


def run(mode: str, module: LightningModule) -> dict[str, Any]:
    """A fit through all schedule points, tests of every variant, and another fit."""
    torch.manual_seed(0)
    callback = qat(mode, start={"step": 1}, freeze_observers={"step": 3}, freeze_batchnorm={"step": 3})
    notes = EveryStep()
    two = trainer(callback, notes, strategy="ddp", devices=2, max_epochs=2, limit_train_batches=2)
    two.fit(module, loader(128, shuffle=True), loader())
    found: dict[str, Any] = {"steps": two.global_step, "ranges": digest(ranges(module))}
    found["statistics"] = digest(statistics(module))
    found["weights"] = digest(module.state_dict())
    found["int8"] = callback.quantized(IMAGES).sum().item()
    for variant in callback.variants:
        callback.use_variant(variant)
        found[variant] = two.test(module, loader(), verbose=False)[0]["test/acc"]
    found["variants"] = callback.variants
    found["fidelity"] = callback.fidelity
    callback.use_variant(None)
    two.validate(module, loader(), verbose=False)
    two.fit(module, loader(128), loader())
    found["again"] = digest(module.state_dict())
    found["every step"] = notes.seen
    return found


def run_monitored(mode: str) -> dict[str, Any]:
    """The same fit with and without the monitor, and where the monitor measured."""
    found: dict[str, Any] = {}
    for name, more in (("alone", []), ("monitored", [QuantizationMonitor(every_n_steps=1)])):
        torch.manual_seed(0)
        module = Lit()
        two = trainer(qat(mode, convert_on_fit_end=False), *more, strategy="ddp", devices=2, max_epochs=1)
        two.fit(module, loader(64))
        found[name] = digest(module.state_dict())
        found["layers"] = [row.layer for monitor in more for row in monitor.layers]
    return found


def run_asked_in_one(mode: str) -> dict[str, Any]:
    """The int8 network is requested in one process only, within the fit and after it; then all processes test it."""
    torch.manual_seed(0)
    module, callback = Lit(), qat(mode)
    saving = LambdaCallback(on_train_end=lambda *_: callback.quantized if first() else None)
    trainer(saving, callback, strategy="ddp", devices=2, max_epochs=1).fit(module, loader(128))
    copied = pickle.loads(pickle.dumps(callback))
    found: dict[str, Any] = {"asked in the fit": callback.quantized(IMAGES).sum().item()}
    for asked in (0, 1):
        copied = pickle.loads(pickle.dumps(copied))
        if torch.distributed.get_rank() == asked:
            assert copied.quantized is not None
        two = trainer(copied, strategy="ddp", devices=2)
        found[f"asked in {asked}"] = two.test(module, loader(), verbose=False)[0]["test/acc"]
    found["int8"] = copied.quantized(IMAGES).sum().item()
    return found


@contextlib.contextmanager
def failing(where: str) -> Iterator[None]:
    """An error in one process only."""
    if where == "first" and first():
        error = VerificationError("layer 'net.head' is at 9.0 dB")
        with mock.patch.object(faults, "mode_for", side_effect=error):
            yield
    elif where == "second" and not first():
        with mock.patch.object(int8_networks, "unpack", side_effect=OSError("no memory")):
            yield
    else:
        yield


def run_failing(where: str) -> dict[str, Any]:
    """The conversion fails; nothing afterwards waits for another process."""
    torch.manual_seed(0)
    module, callback = Lit(), qat("fx", rehearse=False)
    found: dict[str, Any] = {"int8 before": callback.quantized is not None}
    with failing(where):
        trainer(callback, strategy="ddp", devices=2, max_epochs=1).fit(module, loader(128))
    try:
        callback.use_variant("int8")
    except QuantizationError as error:
        found["why not"] = str(error)
    two = trainer(callback, strategy="ddp", devices=2)
    found["acc"] = two.test(module, loader(), verbose=False)[0]["test/acc"]
    found["int8"] = callback.quantized(IMAGES).sum().item()
    return found


def run_without_file(mode: str) -> dict[str, Any]:
    """The file format cannot hold the network: each process converts its own."""
    torch.manual_seed(0)
    module, callback, before = Lit(), qat(mode, rehearse=False), len(CONVERSIONS)
    error = between_processes.ArtifactError("The int8 network cannot be saved: it is of wood.")
    with mock.patch.object(between_processes, "artifact_bytes", side_effect=error):
        trainer(callback, strategy="ddp", devices=2, max_epochs=1).fit(module, loader(128))
    return {"int8": callback.quantized(IMAGES).sum().item(), "conversions": len(CONVERSIONS) - before}


def run_compiled() -> dict[str, Any]:
    """Both processes test the compiled network; count which of them compiled it."""
    torch.manual_seed(0)
    module, callback, compiled = Lit(), qat("pt2e"), []
    really = torch._inductor.aoti_compile_and_package

    def compile(*args: Any, **settings: Any) -> str:
        compiled.append(True)
        return really(*args, **settings)

    torch._inductor.aoti_compile_and_package = compile  # type: ignore[assignment]
    two = trainer(callback, strategy="ddp", devices=2, max_epochs=1)
    two.fit(module, loader(128))
    acc = two.test(module, loader(), verbose=False)[0]["test/acc"]
    two.predict(module, loader())
    network = callback.quantized.network
    return {"acc": acc, "runs": network.runs, "compiled": len(compiled), "int8": network(IMAGES).sum().item()}


class OneWayOrTheOther(Net):
    """Which layers run depends on the data, and differs between the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright = nn.Linear(72, 72), nn.Linear(72, 72)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        x = self.dark(x) if first else self.bright(x)
        return self.head(self.norm(x))


def run_different_ways() -> dict[str, Any]:
    torch.manual_seed(0)
    callback, notes, module = qat("eager", start={"step": 1}), EveryStep(), Lit(OneWayOrTheOther())
    two = trainer(callback, notes, strategy="ddp_find_unused_parameters_true", devices=2, max_epochs=1)
    two.fit(module, loader(128))
    return {"every step": notes.seen, "weights": digest(module.state_dict())}


def observe_nothing() -> list[float]:
    """The second process has an empty batch; then no process has a finite one."""
    rank = torch.distributed.get_rank()
    fq = FakeQuantize(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    fq.reduce_across_processes = True
    fq(torch.tensor([-1.0, 2.0]) if rank == 0 else torch.empty(0))
    fq(torch.tensor([torch.nan, 5.0]) if rank == 0 else torch.empty(0))
    return [float(value) for value in (*fq.range(), fq.batches)]


class Plain(nn.Module):
    """A network whose results do not depend on how samples are grouped into batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.other = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head((x + self.other(x)).flatten(1))


class Halves(Sampler[list[int]]):
    """The part of one process of each batch of 16."""

    def __init__(self, rank: int, processes: int) -> None:
        self.size, self.rank, self.processes = 16 // processes, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(4):
            start = (batch * self.processes + self.rank) * self.size
            yield list(range(start, start + self.size))

    def __len__(self) -> int:
        return 4


class LitHalves(Lit):
    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_sampler=Halves(self.trainer.global_rank, self.trainer.world_size))


class Normalized(nn.Module):
    """BatchNorm after a convolution, after a linear layer, and alone, there with another momentum."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.alone = nn.BatchNorm1d(72, momentum=momentum)
        self.hidden, self.norm = nn.Linear(72, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone(self.features(x).flatten(1))
        return self.head(self.norm(self.hidden(x)).relu())


def run_halves(
    mode: str,
    devices: int,
    *others: Callback,
    network: Callable[[], nn.Module] = Plain,
    of_trainer: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **settings_of_callback: Any,
) -> dict[str, Tensor]:
    """A fit whose steps see the same samples for any number of processes, and its final state."""
    torch.manual_seed(0)
    module = LitHalves(network())
    # The example is given, since it would be caught from a half.
    schedule = {"start": {"step": 2}, "freeze_observers": {"step": 6}}
    callback = qat(mode, example_inputs=IMAGES, **schedule | settings_of_callback)
    settings: dict[str, Any] = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    settings |= {"use_distributed_sampler": False} | (of_trainer or {})
    trainer(callback, *others, **settings).fit(module, ckpt_path=ckpt_path)
    tensors = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    return tensors | {"int8": callback.quantized(IMAGES)}


def run_synchronized(mode: str, devices: int, *, sync_batchnorm: bool = True) -> dict[str, Tensor]:
    """BatchNorm synchronized over all processes until it freezes."""
    return run_halves(
        mode,
        devices,
        network=lambda: Normalized(0.1 if mode == "pt2e" else None),  # which pt2e refuses
        of_trainer={"sync_batchnorm": sync_batchnorm, "max_epochs": 3},
        freeze_batchnorm={"step": 9},
    )


def run_oscillating(mode: str) -> dict[str, Tensor]:
    """Oscillating weights are frozen and dampened, with separate BatchNorm statistics per process."""
    oscillations = WeightOscillations(freezing=0.05, dampening=(0.0, 0.5), momentum=0.1)
    ended = run_halves(
        mode,
        2,
        oscillations,
        network=Normalized,
        of_trainer={"max_epochs": 5},
        scheme=Scheme(weight_bits=3, weight_granularity="per_tensor"),
    )
    states = oscillations.state_dict()["weights"]
    return ended | {f"{name} {key}": tensor for name, of in states.items() for key, tensor in of.items()}


def run_few_bits() -> dict[str, Tensor]:
    """Scales of 4-bit activations start from the first process's part of a batch."""
    torch.manual_seed(0)
    module = LitHalves(Plain())
    scheme = Scheme(weight_bits=4, activation_bits=4, learned_step="lsq")
    callback = qat("fx", example_inputs=IMAGES, scheme=scheme, learn_scales={"step": 3})
    trainer(callback, strategy="ddp", devices=2, use_distributed_sampler=False).fit(module)
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


class CountCompiled(Callback):
    """Number of compiled steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        forward = pl_module.net.forward
        if isinstance(forward, CompiledSteps) and not hasattr(forward, "counted"):
            run = forward._compiled
            forward.counted = True  # type: ignore[attr-defined]

            def counting(*args: Any, **kwargs: Any) -> Any:
                self.steps += 1
                return run(*args, **kwargs)

            forward._compiled = counting


def run_compiled_steps(folder: Path, mode: str, sync_batchnorm: str, compiler: str) -> None:
    """The same fit uncompiled and compiled, and resumed in the middle."""
    compiling.BACKEND = compiler
    sync = bool(int(sync_batchnorm))

    def fit(*others: Callback, compile: bool, ckpt_path: str | None = None, **of_trainer: Any) -> dict[str, Tensor]:
        return run_halves(
            mode,
            2,
            *others,
            network=Normalized,
            of_trainer={"sync_batchnorm": sync, "max_epochs": 4} | of_trainer,
            ckpt_path=ckpt_path,
            freeze_batchnorm={"step": 11},
            compile=compile,
        )

    counter = CountCompiled()
    results = {"plain": fit(compile=False)}
    checkpoints = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    results["compiled"] = fit(counter, checkpoints, compile=True, enable_checkpointing=True)
    results["resumed"] = fit(compile=True, ckpt_path=str(folder / "checkpoints" / "epoch=1.ckpt"))
    # One process looks at a layer: then neither runs compiled, and both wait for the same.
    seen = CountCompiled()
    results["looked at"] = fit(seen, *([Looking()] if first() else []), compile=True)
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps({"compiled": counter.steps, "looked at": seen.steps}))
    torch.save(results, folder / f"{rank}.pt")


class Looking(Callback):
    """Registers a hook on a layer."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = pl_module.net.register_forward_hook(lambda module, args, output: None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle.remove()


def run_all(folder: Path) -> None:
    results: dict[str, Any] = {"different ways": run_different_ways()}
    halves = {mode: run_halves(mode, 2) for mode in MODES}
    halves |= {f"{mode} distilled": run_halves(mode, 2, Distillation(2.0, 0.5)) for mode in MODES}
    halves |= {f"learned {mode}": run_halves(mode, 2, scheme=LEARNED) for mode in ("fx", "pt2e")}
    faults.mode_for = counted
    for mode in MODES:
        for make in (Lit, OwnForward):
            results[f"{mode} {make.__name__}"] = run(mode, make())
        results[f"{mode} monitored"] = run_monitored(mode)
    results["conversions"] = list(CONVERSIONS)
    faults.mode_for = mode_for
    results["nothing"] = observe_nothing()
    results["asked in one"] = {mode: run_asked_in_one(mode) for mode in MODES}
    for where in ("first", "second"):
        results[f"fails in the {where}"] = run_failing(where)
    faults.mode_for = counted
    results["without file"] = run_without_file("fx")
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.save(halves, folder / f"{rank}.pt")


if __name__ == "__main__":
    if sys.argv[2:] == ["compiled"]:
        found = run_compiled()
        Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    elif sys.argv[2:] == ["halves"]:
        ended = {"fx": run_halves("fx", 2)}
        torch.save(ended, Path(sys.argv[1], f"{torch.distributed.get_rank()}.pt"))
    elif sys.argv[2:] == ["oscillating"]:
        ended = {mode: run_oscillating(mode) for mode in MODES}
        ended["few bits"] = run_few_bits()
        torch.save(ended, Path(sys.argv[1], f"{torch.distributed.get_rank()}.pt"))
    elif sys.argv[2:3] == ["synchronized"]:
        ended = {mode: run_synchronized(mode, 2) for mode in sys.argv[3:]}
        torch.save(ended, Path(sys.argv[1], f"{torch.distributed.get_rank()}.pt"))
    elif sys.argv[2:3] == ["compiled steps"]:
        run_compiled_steps(Path(sys.argv[1]), *sys.argv[3:])
    else:
        run_all(Path(sys.argv[1]))
