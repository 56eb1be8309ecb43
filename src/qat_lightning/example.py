"""A real call of the network, caught before training: what it is prepared and verified with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature as takes
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import NetworkError
from qat_lightning.flows.base import Example
from qat_lightning.network import OWN_FORWARD, Slot, forward_replaced
from qat_lightning.peeking import MAX_BATCH, one_batch
from qat_lightning.structures import look_into

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
        NetworkError: It is none of these, or holds no tensor, or one without values.
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        example = Example((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        example = Example(tuple(example_inputs), {})
    else:
        example = Example((example_inputs,), {})
    look_into(example.args, example.kwargs)
    tensors = [leaf for leaf in tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise NetworkError(
            f"example_inputs holds no tensor (it is a {type(example_inputs).__name__}): give one tensor, a tuple of "
            "the positional inputs, or a dict of the keyword inputs of the network's forward."
        )
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta or not tensors[0].numel():
            raise NetworkError(
                f"example_inputs holds {describe(tensor)}, which no network can be prepared on: give dense tensors "
                "with values, of two samples or more."
            )
    return _tidy(example)


def examples_from_user(example_inputs: Any, names: list[str]) -> dict[str, Example]:
    """The example of each network: for one network as it is, for several a mapping by their names.

    Raises:
        NetworkError: An example holds no tensor, or the names are others.
    """
    if len(names) == 1:
        return {names[0]: from_user(example_inputs)}
    if not isinstance(example_inputs, Mapping) or set(example_inputs) != set(names):
        given = list(example_inputs) if isinstance(example_inputs, Mapping) else f"a {type(example_inputs).__name__}"
        raise NetworkError(
            f"example_inputs is {given}: for several networks give a dict of each one's example, with the keys "
            f"{', '.join(map(repr, names))}."
        )
    return {name: from_user(example_inputs[name]) for name in names}


def check_example(network: nn.Module, example: Example, *, name: str, given: bool) -> None:
    """Call a copy of the float network with its example, before anything is changed.

    Args:
        network: The float network.
        example: One call of it.
        name: Its name in the LightningModule.
        given: Whether the example was the user's, or was caught from the data.

    Raises:
        NetworkError: The call fails; the message has the reason and the shapes.
    """
    try:
        with torch.no_grad():
            copy.deepcopy(network)(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    except Exception as error:  # a network may fail in any way
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        source = "example_inputs" if given else "a batch of the data"
        raise NetworkError(
            f"{name!r} ({type(network).__name__}) fails when it is called with {source}, "
            f"{describe((example.args, example.kwargs))} ({reason}). "
            + ("Give" if given else "If the training calls it otherwise, give")
            + " example_inputs=<a tensor, a tuple of the positional inputs, or a dict of the keyword inputs of its "
            "forward>."
        ) from error


def refuse_old_norms(network: nn.Module, name: str) -> None:
    """Refuse the hooks that compute a weight before each call: such a weight is no parameter and cannot be copied.

    Args:
        network: The float network.
        name: Its name in the LightningModule.

    Raises:
        NetworkError: There are some; the message names the layers, and what to use instead.
    """
    layers = {
        layer: "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
        for layer, module in network.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, (WeightNorm, SpectralNorm))
    }
    if layers:
        where = ", ".join(f"{function} on {layer!r}" for layer, function in layers.items())
        instead = " and ".join(f"torch.nn.utils.parametrizations.{function}" for function in sorted({*layers.values()}))
        raise NetworkError(
            f"{name!r} ({type(network).__name__}) has hooks of torch.nn.utils ({where}), whose weight is no parameter "
            f"and can be neither copied nor quantized. Use {instead} instead, with the same arguments."
        )


def describe(value: Any) -> str:
    """Inputs in words: kinds, shapes and dtypes, without values.

    Example:
        >>> describe((torch.zeros(2, 3), {"scale": 1.0}))
        '(float32 tensor [2, 3], {scale: float})'
    """
    if isinstance(value, Tensor):
        kind = "meta " if value.is_meta else "" if value.layout == torch.strided else "sparse "
        return f"{kind}{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def catch_examples(
    trainer: pl.Trainer, pl_module: pl.LightningModule, slots: list[Slot], stage: str
) -> dict[str, Example]:
    """What each network is called with when the LightningModule takes a step on a real batch.

    The LightningModule's ``example_input_array`` comes first; else one batch of the stage's data goes through its step,
    which is broken off as soon as the networks were called. Buffers and training flags are left as found; random states
    are for the caller to keep.

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
            batch, _ = one_batch(trainer, pl_module, name)
        except Exception as error:  # noqa: BLE001 - it is in the message, if nothing else gives an example
            reasons.append(f"no batch from {loader} ({type(error).__name__}: {error})")
            continue
        if batch is None:
            reasons.append(f"no batch from {loader}")
            continue
        caught = _catch(slots, pl_module, lambda batch=batch, step=step: take_step(pl_module, step, batch), reasons)
        if len(caught) == len(slots):
            return caught
    raise NetworkError(
        f"No example of a call of {', '.join(repr(slot.name) for slot in slots)} could be found: {'; '.join(reasons)}. "
        "Give example_inputs=<a tensor, a tuple of the positional inputs, or a dict of the keyword inputs>, or set "
        "example_input_array on the LightningModule."
    )


def take_step(pl_module: pl.LightningModule, step: str, batch: Any) -> Any:
    """Call a step as Lightning does: with ``batch_idx`` and ``dataloader_idx`` only where it takes them."""
    method = getattr(pl_module, step)
    indices = [0 for n, name in enumerate(("batch_idx", "dataloader_idx")) if takes(method, name, min_args=n + 2)]
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
        except Exception as error:  # noqa: BLE001 - it is in the message, if nothing else gives an example
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

    with forward_replaced(owner, watch):
        yield


@contextmanager
def nothing_moves(pl_module: pl.LightningModule) -> Iterator[None]:
    """Silence logging, and put buffers and flags back."""
    buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
    flags = {module: module.training for module in pl_module.modules()}
    silenced = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        with torch.no_grad():
            yield
    finally:
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


def _tidy(example: Example) -> Example:
    """Detached copies on the CPU, of at most `MAX_BATCH` and at least 2 samples (a batch of 1 is doubled)."""
    look_into(example.args, example.kwargs)
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
