"""Recording a real call of a network before training, used to prepare and verify it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature as takes
from torch import nn

from qat_lightning.callbacks.parts.find_networks import has_quantizable
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot, forward_replaced
from qat_lightning.callbacks.parts.peeking import one_batch
from qat_lightning.callbacks.parts.precision import precision_of_new_tensors
from qat_lightning.callbacks.parts.untouched import nothing_moves
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example, few_of, from_user, whole_call
from qat_lightning.graph.scopes import join

_STEP_OF_STAGE = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}


class _Caught(Exception):
    """Raised to stop a step once all networks have been called."""


def catch_examples(
    trainer: pl.Trainer, pl_module: pl.LightningModule, slots: list[Slot], stage: str
) -> tuple[dict[str, Example], Any]:
    """Record the inputs with which the LightningModule's step calls each network on a real batch.

    ``example_input_array`` is tried first; otherwise one batch of the stage's data goes through its step, which stops
    as soon as all networks have been called. The LightningModule is restored; the caller has to restore random states.

    Returns:
        The examples by the names of the networks, and the batch that was read for them; None if there was none.

    Raises:
        NetworkError: The step failed before a network was called, or called none. If it calls parts of one instead, the
            message names them; otherwise it says to give ``example_inputs``.
    """
    reasons: list[str] = []
    steps: list[Callable[[], Any]] = []
    array = pl_module.example_input_array
    if array is not None:
        given = from_user(array)
        if len(slots) == 1 and slots[0].name == OWN_FORWARD:
            return {OWN_FORWARD: given}, None
        caught = _catch(slots, pl_module, lambda: pl_module.forward(*given.args, **given.kwargs), reasons)
        if len(caught) == len(slots):
            return caught, None
    for name, (step, loader) in sorted(_STEP_OF_STAGE.items(), key=lambda item: item[0] != stage):
        if name != stage and not (stage == "fit" and name == "validate"):
            continue
        try:
            batch, _ = one_batch(trainer, pl_module, name)
        except Exception as error:  # noqa: BLE001 - reported in the message if no other source gives an example
            reasons.append(f"no batch from {loader} ({type(error).__name__}: {error})")
            continue
        if batch is None:
            reasons.append(f"no batch from {loader}")
            continue
        steps.append(partial(take_step, pl_module, step, batch))
        caught = _catch(slots, pl_module, steps[-1], reasons)
        if len(caught) == len(slots):
            return caught, batch
    names = ", ".join(repr(slot.name) for slot in slots)
    parts = next(filter(None, (_called_instead(slots, pl_module, step) for step in steps)), None)
    if parts is not None:
        raise NetworkError(
            f"The step calls only parts of {names}. Each of these parts can be quantized as a network of its own: give "
            f"module={parts}."
        )
    raise NetworkError(
        f"No example of a call of {names} could be found: {'; '.join(reasons)}. Give example_inputs=<a tensor, a tuple "
        "of the positional inputs, or a dict of the keyword inputs>, or set example_input_array on the LightningModule."
    )


def try_test_step(pl_module: pl.LightningModule, slots: list[Slot], batch: Any) -> None:
    """Warn before training if ``test_step`` calls prepared networks in a way in which they cannot be called.

    The step ends when all networks have been called with a few samples. Its other errors are not reported, since the
    batches of a test may have another form.

    Args:
        pl_module: The LightningModule with the prepared networks.
        slots: The slots of the networks.
        batch: A batch of the training data.
    """
    if not is_overridden("test_step", pl_module):
        return
    with ExitStack() as stack:
        stack.enter_context(nothing_moves(pl_module))
        pl_module.eval()
        called: dict[str, Example] = {}
        for slot in slots:
            stack.enter_context(_forward_watched(slot, called, len(slots), runs_last=True))
        try:
            take_step(pl_module, "test_step", batch)
        except NetworkError as error:
            rank_zero_warn(
                f"test_step fails with a batch of the training data: {error} Ignore this if batches of test data have "
                "another form."
            )
        except Exception:  # noqa: BLE001 - among them _Caught; see above
            return


def take_step(pl_module: pl.LightningModule, step: str, batch: Any, dataloader_idx: int = 0) -> Any:
    """Call a step as Lightning does, with ``batch_idx`` and ``dataloader_idx`` only if its signature has them."""
    method = getattr(pl_module, step)
    given = {"batch_idx": 0, "dataloader_idx": dataloader_idx}
    indices = [index for n, (name, index) in enumerate(given.items()) if takes(method, name, min_args=n + 2)]
    with precision_of_new_tensors(pl_module):
        return method(batch, *indices)


def _catch(slots: list[Slot], pl_module: pl.LightningModule, run: Any, reasons: list[str]) -> dict[str, Example]:
    caught: dict[str, Example] = {}
    with ExitStack() as stack:
        stack.enter_context(nothing_moves(pl_module))
        for slot in slots:
            stack.enter_context(_forward_watched(slot, caught, len(slots)))
        try:
            run()
        except _Caught:
            pass
        except Exception as error:  # noqa: BLE001 - reported in the message if no other source gives an example
            reasons.append(f"{type(error).__name__} before the network was called: {error}")
        else:
            missing = [slot.name for slot in slots if slot.name not in caught]
            if missing:
                reasons.append(f"the step did not call {', '.join(map(repr, missing))}")
    return caught


def _called_instead(slots: list[Slot], pl_module: pl.LightningModule, run: Callable[[], Any]) -> list[str]:
    """Names for ``module`` with which a step can be caught: a network that it does not call is replaced by its parts.

    Parts are the outermost submodules with layers to quantize that the step calls, in the order of their calls.

    Returns:
        The names; none if the step fails, or calls neither a network nor a part of it.
    """
    called: dict[str, dict[str, None]] = {slot.name: {} for slot in slots}
    with ExitStack() as stack:
        stack.enter_context(nothing_moves(pl_module))
        for slot in slots:
            within: list[str] = []
            for name, module in list(slot.get().named_modules()):
                if name and has_quantizable(module):
                    full_name = join(slot.prefix, name)
                    stack.enter_context(_noted(module, full_name, called[slot.name], within))
            owner = pl_module if slot.name == OWN_FORWARD else slot.get()
            stack.enter_context(_noted(owner, slot.name, called[slot.name], within))
        try:
            run()
        except Exception:  # noqa: BLE001 - then the reason is in the message already
            return []
    found: list[str] = []
    for slot in slots:
        names = [slot.name] if slot.name in called[slot.name] else list(called[slot.name])
        found += [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        if not names:
            return []
    return found


@contextmanager
def _noted(module: nn.Module, name: str, called: dict[str, None], within: list[str]) -> Iterator[None]:
    """Note the calls of a module that do not happen ``within`` another one's."""
    plain = module.forward

    def note(*args: Any, **kwargs: Any) -> Any:
        if not within:
            called.setdefault(name)
        within.append(name)
        try:
            return plain(*args, **kwargs)
        finally:
            within.pop()

    with forward_replaced(module, note):
        yield


@contextmanager
def _forward_watched(slot: Slot, caught: dict[str, Example], wanted: int, *, runs_last: bool = False) -> Iterator[None]:
    """Record the first call of a network, and interrupt the step when all networks are called.

    Args:
        slot: The slot of the network.
        caught: Gets the call.
        wanted: The number of networks.
        runs_last: Whether the network that is called last runs before the interruption, on a few samples, or on all of
            them if it does not run on a part of the call.
    """
    owner: Any = slot.pl_module if slot.name == OWN_FORWARD else slot.get()
    plain = owner.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        call = caught.setdefault(slot.name, whole_call(Example(args, kwargs)))
        if len(caught) < wanted:
            return plain(*args, **kwargs)
        if runs_last:
            few = few_of(call)
            try:
                plain(*few.args, **few.kwargs)
            except Exception:
                if few is call:
                    raise
                plain(*call.args, **call.kwargs)
        raise _Caught

    with forward_replaced(owner, watch):
        yield
