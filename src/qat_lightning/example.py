"""A real call of the network, caught before training: what it is prepared and verified with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning.errors import NetworkError
from qat_lightning.flows.base import Example
from qat_lightning.network import OWN_FORWARD, Slot

MAX_BATCH = 32
"""As many samples of a batch are kept: enough to verify with, and no burden to hold."""

_STEP_OF_STAGE = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}


class _Caught(Exception):
    """All the networks were called: the step need not go on."""


def from_user(example_inputs: Any) -> Example:
    """The example a user gave: a tuple or list of positional inputs, a mapping of keyword inputs, or one tensor.

    Raises:
        NetworkError: It is none of these, or holds no tensor.
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        example = Example((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        example = Example(tuple(example_inputs), {})
    else:
        example = Example((example_inputs,), {})
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((example.args, example.kwargs))):
        raise NetworkError(
            f"example_inputs holds no tensor (it is a {type(example_inputs).__name__}): give one tensor, a tuple of the "
            "positional inputs, or a dict of the keyword inputs of the network's forward."
        )
    return _tidy(example)


def catch_examples(
    trainer: pl.Trainer, pl_module: pl.LightningModule, slots: list[Slot], stage: str
) -> dict[str, Example]:
    """What each network is called with when the LightningModule takes a step on a real batch.

    The LightningModule's ``example_input_array`` comes first; else one batch of the stage's data goes through its step,
    which is broken off as soon as the networks were called. Random states, buffers and training flags are left as found.

    Raises:
        NetworkError: The step failed before a network was called, or called none; the message says to give
            ``example_inputs``.
    """
    reasons: list[str] = []
    array = pl_module.example_input_array
    if array is not None:
        given = from_user(array)
        if len(slots) == 1 and slots[0].name == OWN_FORWARD:
            return {OWN_FORWARD: given}
        caught = _catch(slots, pl_module, lambda: pl_module.forward(*given.args, **given.kwargs), reasons)
        if len(caught) == len(slots):
            return caught
    for name, (step, loader) in sorted(_STEP_OF_STAGE.items(), key=lambda item: item[0] != stage):
        if name != stage and not (stage == "fit" and name == "validate"):
            continue
        try:
            batch = _one_batch(trainer, pl_module, name, loader)
        except Exception as error:
            reasons.append(f"no batch from {loader} ({type(error).__name__}: {error})")
            continue
        if batch is None:
            reasons.append(f"no batch from {loader}")
            continue
        caught = _catch(slots, pl_module, lambda batch=batch, step=step: _take_step(pl_module, step, batch), reasons)
        if len(caught) == len(slots):
            return caught
    raise NetworkError(
        f"No example of a call of {', '.join(repr(slot.name) for slot in slots)} could be found: {'; '.join(reasons)}. "
        "Give example_inputs=<a tensor, a tuple of the positional inputs, or a dict of the keyword inputs>, or set "
        "example_input_array on the LightningModule."
    )


def _take_step(pl_module: pl.LightningModule, step: str, batch: Any) -> Any:
    method = getattr(pl_module, step)
    try:
        return method(batch, 0)
    except TypeError as error:
        # A step may leave out batch_idx, as Lightning allows.
        if "positional argument" not in str(error):
            raise
        return method(batch)


def _catch(slots: list[Slot], pl_module: pl.LightningModule, run: Any, reasons: list[str]) -> dict[str, Example]:
    caught: dict[str, Example] = {}
    with ExitStack() as stack:
        stack.enter_context(_nothing_moves(pl_module))
        for slot in slots:
            stack.enter_context(_forward_watched(slot, caught, len(slots)))
        try:
            run()
        except _Caught:
            pass
        except Exception as error:
            reasons.append(f"{type(error).__name__} before the network was called: {error}")
        else:
            missing = [slot.name for slot in slots if slot.name not in caught]
            if missing:
                reasons.append(f"the step did not call {', '.join(map(repr, missing))}")
    return caught


@contextmanager
def _forward_watched(slot: Slot, caught: dict[str, Example], wanted: int) -> Iterator[None]:
    owner: Any = slot.pl_module if slot.name == OWN_FORWARD else slot.get()
    plain = owner.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        caught.setdefault(slot.name, _tidy(Example(args, kwargs)))
        if len(caught) == wanted:
            raise _Caught
        return plain(*args, **kwargs)

    had = owner.__dict__.get("forward")
    owner.__dict__["forward"] = watch
    try:
        yield
    finally:
        if had is None:
            del owner.__dict__["forward"]
        else:
            owner.__dict__["forward"] = had


@contextmanager
def _nothing_moves(pl_module: pl.LightningModule) -> Iterator[None]:
    """Fork every random state, silence logging, and put buffers and flags back."""
    buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers() if isinstance(buffer, Tensor)}
    flags = {module: module.training for module in pl_module.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    silenced = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in silenced.items():
            if value is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = value
        for module, flag in flags.items():
            module.training = flag
        now = dict(pl_module.named_buffers())
        for name, buffer in buffers.items():
            if name in now and now[name].shape == buffer.shape:
                now[name].copy_(buffer)


def _one_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, loader_name: str) -> Any:
    loops = {
        "fit": trainer.fit_loop,
        "validate": trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    source: Any = loops[stage]._data_source
    with torch.random.fork_rng():
        states = random.getstate(), np.random.get_state()
        try:
            loader = source.instance if not source.is_module() else getattr(source.instance, loader_name)()
            batch = _peek(_first_loader(loader))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
    if batch is None:
        return None
    device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
    batch = pl_module.on_before_batch_transfer(batch, 0)
    batch = pl_module.transfer_batch_to_device(batch, device, 0)
    return pl_module.on_after_batch_transfer(batch, 0)


def _first_loader(loaders: Any) -> Any:
    if stage_loaders := getattr(loaders, "flattened", None):
        return stage_loaders[0]
    if isinstance(loaders, (list, tuple)):
        return loaders[0] if loaders else None
    return loaders


def _peek(loader: Any) -> Any:
    """One batch, without moving the position or the random state of a loader over a map-style dataset."""
    if loader is None:
        return None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        dataset: Any = loader.dataset
        size = min(loader.batch_size, MAX_BATCH, len(dataset))
        # Spread over the dataset, which may be sorted by class.
        return loader.collate_fn([dataset[index * len(dataset) // size] for index in range(size)]) if size else None
    return next(iter(loader), None)


def _tidy(example: Example) -> Example:
    """Detached copies on the CPU, of at most `MAX_BATCH` and at least 2 samples (a batch of 1 is doubled)."""
    tensors = [leaf for leaf in tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {tensor.shape[0] for tensor in tensors}
    batch = tensors[0].shape[0] if tensors else 0

    def tidy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu().clone()
        if leaf.is_floating_point():
            leaf = leaf.float()
        if leaf.dim() and leaf.shape[0] == batch and (len(sizes) == 1 or batch > 1):
            leaf = torch.cat([leaf, leaf]) if batch == 1 else leaf[:MAX_BATCH].clone()
        return leaf

    return Example(tree_map(tidy, example.args), tree_map(tidy, example.kwargs))
