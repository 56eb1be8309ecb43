"""Batches to calibrate with, and a LightningModule's own step to send them through its networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torchmetrics import Metric

from qat_lightning.calibration import calibrating
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.example import nothing_moves, take_step
from qat_lightning.flows.base import Example
from qat_lightning.network import OWN_FORWARD, Slot
from qat_lightning.streams import generators_kept
from qat_lightning.variants import Stand


class _Called(Exception):
    """All the networks were called: a step with optimizers of its own must not go on."""


def calibration_loader(trainer: Trainer, pl_module: LightningModule, given: Any) -> Any:
    """The loader to calibrate with: the one that was given, or the training's.

    Raises:
        ConfigurationError: There is none; the message says what to give.
    """
    if given is not None:
        return given
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if trainer.state.fn == "fit":
        source: Any = trainer.fit_loop._data_source
        return _apart(source.instance.train_dataloader() if source.is_module() else source.instance)
    if datamodule is not None and is_overridden("train_dataloader", datamodule):
        datamodule.setup("fit")
        return datamodule.train_dataloader()
    if is_overridden("train_dataloader", pl_module):
        return pl_module.train_dataloader()
    raise ConfigurationError(
        f"Static quantization takes its ranges from data, and trainer.{_called(trainer)} was given no training data: "
        "give PostTrainingQuantization(calibration_dataloader=<a DataLoader>), pass datamodule= to the Trainer, or use "
        "kind='dynamic' or 'weight_only', which need none."
    )


def _called(trainer: Trainer) -> str:
    """The method of the Trainer that runs."""
    return "fit" if trainer.state.fn is None else str(trainer.state.fn.value)


def _apart(loader: Any) -> Any:
    """A loader whose iteration does not begin anew when this one's does, as that of persistent workers would."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def calibrate_in_steps(
    pl_module: LightningModule, slots: Mapping[str, Slot], prepared: Mapping[str, nn.Module], loader: Any, batches: int
) -> int:
    """Calibrate networks on what the LightningModule's training step calls them with; see `run_in_steps`."""
    return run_in_steps(pl_module, slots, prepared, loader, batches, calibrating)


def calls_in_steps(
    pl_module: LightningModule, slots: Mapping[str, Slot], networks: Mapping[str, nn.Module], loader: Any, batches: int
) -> dict[str, list[Example]]:
    """What the LightningModule's training step calls each network with, in as many batches; see `run_in_steps`.

    Returns:
        By the networks' names, the calls in their order, on the device of the LightningModule.
    """
    calls: dict[nn.Module, list[Example]] = {network: [] for network in networks.values()}

    @contextmanager
    def keeping(network: nn.Module) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[network].append(Example(*tree_map(_copied, (args, kwargs))))

        handle = network.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                yield
        finally:
            handle.remove()

    run_in_steps(pl_module, slots, networks, loader, batches, keeping)
    return {name: calls[network] for name, network in networks.items()}


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def run_in_steps(
    pl_module: LightningModule,
    slots: Mapping[str, Slot],
    networks: Mapping[str, nn.Module],
    loader: Any,
    batches: int,
    within: Callable[[nn.Module], AbstractContextManager[Any]],
) -> int:
    """Call networks as the LightningModule's training step calls its own, and leave it as it was.

    Args:
        pl_module: Its ``training_step`` runs in evaluation, without gradients, and logs nothing. Its buffers, also
            those that networks share with it, are put back in the end.
        slots: Where the networks are.
        networks: By the same names, what is called, on the device of the LightningModule.
        loader: Of batches.
        batches: As many at most.
        within: Gives the context in which each network is called.

    Returns:
        How many batches there were.

    Raises:
        NetworkError: The step failed, or called a network never; the message says what to do.
        ConversionError: There was nothing finite.
    """
    called: set[str] = set()
    count = 0
    with ExitStack() as stack:
        stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))
        stack.enter_context(generators_kept(loader))
        stack.enter_context(nothing_moves(pl_module))
        stack.enter_context(_metrics_kept(pl_module))
        for name, network in networks.items():
            stack.enter_context(within(network))
            stack.enter_context(_standing(slots[name], network))
            stack.enter_context(_noted(network, name, called, len(slots), pl_module.automatic_optimization))
        pl_module.eval()
        for batch in islice(_batches(pl_module, loader), batches):
            _step(pl_module, batch)
            count += 1
        missing = [name for name in networks if name not in called]
        if count and missing:
            raise NetworkError(f"training_step did not call {', '.join(map(repr, missing))}, so it got no data.")
    return count


def _batches(pl_module: LightningModule, loader: Any) -> Iterator[Any]:
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    device = pl_module.device
    for batch, _, index in combined:
        # With the hooks of the LightningDataModule, if it has them.
        moved = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
        yield pl_module._apply_batch_transfer_handler(moved, device=device, dataloader_idx=index)


def _step(pl_module: LightningModule, batch: Any) -> None:
    try:
        take_step(pl_module, "training_step", batch)
    except _Called:
        return
    except Exception as error:
        raise NetworkError(
            f"{type(pl_module).__name__}.training_step failed on a batch for calibration "
            f"({type(error).__name__}: {error}). It runs in evaluation and without gradients there; if it cannot, "
            "calibrate by hand: qat_lightning.calibrate(prepared, batches)."
        ) from error


@contextmanager
def _standing(slot: Slot, network: nn.Module) -> Iterator[None]:
    plain = slot.get() if slot.name != OWN_FORWARD else network
    before = slot.run_instead(Stand(network, plain, on_cpu=False))
    try:
        yield
    finally:
        slot.run_again(before)


@contextmanager
def _noted(network: nn.Module, name: str, called: set[str], wanted: int, whole: bool) -> Iterator[None]:
    """Note that a network was called; where the step steps optimizers itself, break it off when all were."""

    def note(*_: Any) -> None:
        called.add(name)
        if not whole and len(called) == wanted:
            raise _Called

    handle = network.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _metrics_kept(pl_module: LightningModule) -> Iterator[None]:
    """Put back what metrics have counted, which are not all buffers."""
    kept = [(metric, _state(metric)) for metric in pl_module.modules() if isinstance(metric, Metric)]
    try:
        yield
    finally:
        for metric, state in kept:
            metric.__dict__.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    states = {name: list(value) if isinstance(value, list) else value for name, value in metric.metric_state.items()}
    private = {name: metric.__dict__[name] for name in ("_update_count", "_computed", "_forward_cache")}
    return states | private
