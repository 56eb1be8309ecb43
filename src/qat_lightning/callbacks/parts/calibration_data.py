"""Calibration batches, and calling networks on them through a LightningModule's own step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from qat_lightning.callbacks.parts.example import take_step
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot
from qat_lightning.callbacks.parts.peeking import one_batch, transferred
from qat_lightning.callbacks.parts.streams import generators_kept
from qat_lightning.callbacks.parts.untouched import nothing_moves
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.rehearsal.calibration import calibrating

Kept = TypeVar("Kept")


class _Called(Exception):
    """Raised when all networks were called, because a step with manual optimization must not continue."""


def calibration_loader(trainer: Trainer, pl_module: LightningModule, given: Any) -> Any:
    """Return the calibration loader: the given one, or the training loader.

    Raises:
        ConfigurationError: There is none; the message says what to pass.
    """
    if given is not None:
        return given
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if trainer.state.fn == "fit":
        source: Any = trainer.fit_loop._data_source
        return source.instance.train_dataloader() if source.is_module() else source.instance
    if datamodule is not None and is_overridden("train_dataloader", datamodule):
        datamodule.setup("fit")
        return datamodule.train_dataloader()
    if is_overridden("train_dataloader", pl_module):
        return pl_module.train_dataloader()
    raise ConfigurationError(
        f"Static quantization needs calibration data, and trainer.{_called(trainer)} was given no training data: give "
        "PostTrainingQuantization(calibration_dataloader=<a DataLoader>), pass datamodule= to the Trainer, or use "
        "kind='dynamic' or 'weight_only', which need none."
    )


def evaluation_loaders(trainer: Trainer) -> CombinedLoader | None:
    """Return the loaders of the last validation, or else test, as the Trainer iterates them; None if it had none."""
    loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    return next((loop._combined_loader for loop in loops if holds_loader(loop._combined_loader)), None)


def holds_loader(loaders: Any) -> bool:
    """Whether there is a loader: neither None nor an empty collection.

    Not the truth value of a loader, which is that of its length: some have none, and raise.
    """
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    return any(loader is not None for loader in tree_leaves(loaders))


def _called(trainer: Trainer) -> str:
    """Return the name of the Trainer method that is running."""
    return "fit" if trainer.state.fn is None else str(trainer.state.fn.value)


def _combined(loaders: Any, mode: Literal["max_size_cycle", "sequential"]) -> CombinedLoader:
    """Return loaders as Lightning iterates them, with an iteration of their own.

    Args:
        loaders: One loader, a collection of them, or a CombinedLoader, which keeps its mode.
        mode: Lightning's default: ``"max_size_cycle"`` in training, ``"sequential"`` in evaluation.
    """
    combined = copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
    combined.flattened = [_apart(loader) for loader in combined.flattened]
    combined.limits = None  # of the Trainer's loop
    return combined


def _apart(loader: Any) -> Any:
    """Return a loader with its own iteration, which persistent workers would otherwise share and restart."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def calibrate_in_steps(
    pl_module: LightningModule, slots: Mapping[str, Slot], prepared: Mapping[str, nn.Module], loader: Any, batches: int
) -> int:
    """Calibrate networks on the inputs that the LightningModule's training step passes to them; see `run_in_steps`."""
    return run_in_steps(pl_module, slots, prepared, loader, batches, calibrating)


def calibrated_calls(
    pl_module: LightningModule, slots: Mapping[str, Slot], prepared: Mapping[str, nn.Module], loader: Any, batches: int
) -> tuple[int, dict[str, list[Example]]]:
    """As `calibrate_in_steps`, and record the inputs in the same pass.

    Returns:
        The number of batches, and the calls as `calls_in_steps` returns them.
    """
    return _calls_in_steps(pl_module, slots, prepared, loader, batches, _call_alone, calibrating)


def calls_in_steps(
    pl_module: LightningModule, slots: Mapping[str, Slot], networks: Mapping[str, nn.Module], loader: Any, batches: int
) -> dict[str, list[Example]]:
    """Record the inputs that the LightningModule's training step passes to each network; see `run_in_steps`.

    Returns:
        The calls in order, by network name, on the device of the LightningModule.
    """
    return _calls_in_steps(pl_module, slots, networks, loader, batches, _call_alone, _as_it_is)[1]


def calls_and_batches(
    pl_module: LightningModule, slots: Mapping[str, Slot], networks: Mapping[str, nn.Module], loader: Any, batches: int
) -> dict[str, list[tuple[Example, Any]]]:
    """As `calls_in_steps`, with the batch of the step for each call."""
    return _calls_in_steps(pl_module, slots, networks, loader, batches, lambda call, batch: (call, batch), _as_it_is)[1]


def _call_alone(call: Example, batch: Any) -> Example:
    return call


def _calls_in_steps(
    pl_module: LightningModule,
    slots: Mapping[str, Slot],
    networks: Mapping[str, nn.Module],
    loader: Any,
    batches: int,
    kept: Callable[[Example, Any], Kept],
    within: Callable[[nn.Module], AbstractContextManager[Any]],
) -> tuple[int, dict[str, list[Kept]]]:
    calls: dict[nn.Module, list[Kept]] = {network: [] for network in networks.values()}
    present: list[Any] = [None]

    @contextmanager
    def keeping(network: nn.Module) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[network].append(kept(Example(*tree_map(_copied, (args, kwargs))), present[0]))

        calls[network].clear()  # of a step that did not call all networks
        handle = network.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with within(network):
                yield
        finally:
            handle.remove()

    def see(batch: Any) -> None:
        present[0] = batch

    count = run_in_steps(pl_module, slots, networks, loader, batches, keeping, see)
    return count, {name: calls[network] for name, network in networks.items()}


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


class _StepFailed(Exception):
    """Raised if a step cannot be used to call the networks."""


def run_in_steps(
    pl_module: LightningModule,
    slots: Mapping[str, Slot],
    networks: Mapping[str, nn.Module],
    loader: Any,
    batches: int,
    within: Callable[[nn.Module], AbstractContextManager[Any]],
    see: Callable[[Any], None] = lambda batch: None,
) -> int:
    """Run the LightningModule's training step with other networks in place of its own, and restore it afterwards.

    A step that fails in evaluation mode after it has called the networks is sufficient (for example a detector's, which
    gets no losses). If it does not call them, ``validation_step`` is used with validation batches.

    Args:
        pl_module: Its step runs in evaluation mode, without gradients and logging. It is restored afterwards, including
            buffers that networks share with it.
        slots: The slots of the networks.
        networks: The networks to call, by the same names, on the device of the LightningModule.
        loader: Loader of batches for ``training_step``; a collection of loaders is iterated as Lightning trains on it.
        batches: Maximum number of batches.
        within: Returns the context in which each network is called.
        see: Called with each batch before its step.

    Returns:
        The number of batches.

    Raises:
        NetworkError: The step failed, or did not call a network; the message says what to do.
        ConversionError: No value was finite.
    """
    failed: list[str] = []
    for step, source in (("training_step", loader), *_instead(pl_module, loader)):
        combined = _combined(source, "max_size_cycle")
        some = _seen(islice(_batches(pl_module, combined), batches), see)
        try:
            count = _run(pl_module, slots, networks, some, step, within, combined.flattened)
        except _StepFailed as failure:
            failed.append(str(failure))
            continue
        if failed:
            rank_zero_info(f"{'; '.join(failed)}. Batches went through {step} instead.")
        return count
    raise _no_step(pl_module, failed)


def _seen(batches: Iterator[tuple[Any, int]], see: Callable[[Any], None]) -> Iterator[tuple[Any, int]]:
    for batch, index in batches:
        see(batch)
        yield batch, index


def _no_step(pl_module: LightningModule, failed: list[str]) -> NetworkError:
    return NetworkError(
        f"No step of {type(pl_module).__name__} can be used for calibration, which runs it in evaluation mode and "
        f"without gradients: {'; '.join(failed)}. Give PostTrainingQuantization(calls=<a list of calls of the "
        "network: a tensor, a tuple or a dict each>), or calibrate by hand: qat_lightning.calibrate(prepared, calls)."
    )


def try_steps(trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot], given: Any) -> None:
    """Check before training, on one batch, that `run_in_steps` will be able to call the networks after it.

    Args:
        trainer: The Trainer, at the beginning of a fit.
        pl_module: The LightningModule, on its device.
        slots: The slots of the networks.
        given: The calibration loader, if it is not the training loader.

    Raises:
        NetworkError: It will not; the message says what to do.
    """
    networks = {name: slot.get() for name, slot in slots.items()}
    if given is not None:
        run_in_steps(pl_module, slots, networks, given, 1, _as_it_is)
        return
    batch, once = one_batch(trainer, pl_module, "fit")
    if once:
        rank_zero_warn(
            "The training loader yields each batch only once, and after training there may be none left to calibrate "
            "with: pass PostTrainingQuantization(calibration_dataloader=) or (calls=)."
        )
    if batch is None:
        return
    failed: list[str] = []
    for step in ("training_step", *(step for step, _ in _instead(pl_module, None))):
        if step == "validation_step" and _validation_loaders(pl_module) is not None:
            batch, _ = one_batch(trainer, pl_module, "validate")
        try:
            _run(pl_module, slots, networks, iter([(batch, 0)]), step, _as_it_is, ())
        except _StepFailed as failure:
            failed.append(str(failure))
            continue
        return
    raise _no_step(pl_module, failed)


def _instead(pl_module: LightningModule, loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield steps to use if ``training_step`` does not call the networks, with their loaders."""
    if is_overridden("validation_step", pl_module):
        validation = _validation_loaders(pl_module)
        yield "validation_step", loader if validation is None else validation


def _validation_loaders(pl_module: LightningModule) -> CombinedLoader | None:
    trainer = pl_module._trainer
    if trainer is None:
        return None
    fits = trainer.state.fn == "fit"
    source: Any = (trainer.fit_loop.epoch_loop.val_loop if fits else trainer.validate_loop)._data_source
    if not source.is_defined():
        return None
    loaders = source.instance.val_dataloader() if source.is_module() else source.instance
    return _combined(loaders, "sequential") if holds_loader(loaders) else None


@contextmanager
def _as_it_is(network: nn.Module) -> Iterator[None]:
    with torch.no_grad():
        yield


def _run(
    pl_module: LightningModule,
    slots: Mapping[str, Slot],
    networks: Mapping[str, nn.Module],
    batches: Iterator[tuple[Any, int]],
    step: str,
    within: Callable[[nn.Module], AbstractContextManager[Any]],
    loaders: Sequence[Any],
) -> int:
    called: set[str] = set()
    ever: set[str] = set()
    count = 0
    with ExitStack() as stack:
        stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))
        for loader in loaders:
            stack.enter_context(generators_kept(loader))
        stack.enter_context(nothing_moves(pl_module))
        for name, network in networks.items():
            stack.enter_context(within(network))
            stack.enter_context(_standing(slots[name], network))
            stack.enter_context(_noted(network, name, called, len(slots), pl_module.automatic_optimization))
        pl_module.eval()
        for batch, index in batches:
            called.clear()
            _step(pl_module, step, batch, index, lambda: len(called) == len(networks))
            ever |= called
            count += 1
        missing = [name for name in networks if name not in ever]
        if count and missing:
            raise _StepFailed(f"{step} did not call {', '.join(map(repr, missing))}")
    return count


def _batches(pl_module: LightningModule, loaders: CombinedLoader) -> Iterator[tuple[Any, int]]:
    """Yield the batches as a step gets them, with the index of their loader."""
    for batch, _, index in loaders:
        yield transferred(pl_module.trainer, pl_module, batch, index), index


def _step(pl_module: LightningModule, step: str, batch: Any, dataloader_idx: int, done: Callable[[], bool]) -> None:
    try:
        take_step(pl_module, step, batch, dataloader_idx)
    except _Called:
        return
    except Exception as error:
        # The result of a step is not checked: in evaluation some networks return no losses.
        if not done():
            raise _StepFailed(f"{step} failed ({type(error).__name__}: {error})") from error


@contextmanager
def _standing(slot: Slot, network: nn.Module) -> Iterator[None]:
    plain = slot.get() if slot.name != OWN_FORWARD else network
    before = slot.run_instead(Stand(network, plain, on_cpu=False, dtype=slot.dtype))
    try:
        yield
    finally:
        slot.run_again(before)


@contextmanager
def _noted(network: nn.Module, name: str, called: set[str], wanted: int, whole: bool) -> Iterator[None]:
    """Record that a network was called; under manual optimization, interrupt the step when all were."""

    def note(*_: Any) -> None:
        called.add(name)
        if not whole and len(called) == wanted:
            raise _Called

    handle = network.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
