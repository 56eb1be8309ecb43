"""The state that a prepared network carries in every mode, and functions that switch it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import CheckpointMismatchError, ConversionError
from qat_lightning.graph.module_order import name_first
from qat_lightning.graph.pruning import copy_with_pruning_done
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.qat_modules import FreezableBatchNorm
from qat_lightning.layers.rounded import RoundedLayer
from qat_lightning.modes.plain_attributes import Attributes, attributes_like, differing
from qat_lightning.modes.protocol import Mode
from qat_lightning.numerics.course import Course
from qat_lightning.numerics.dynamic_fake_quantize import DynamicFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.state_entries import from_entry, to_tensor
from qat_lightning.processes import sum_over_all
from qat_lightning.settings.recipe import Recipe


class PreparedState(nn.Module):
    """The child ``_quantization`` of a prepared network: its recipe, saved as extra state, and data for conversion.

    Attributes:
        mode: The mode that prepared the network and can convert it.
        recipe: The recipe of the preparation.
        prefix: The network's dotted name in the LightningModule, to which the recipe's globs are relative.
        float_network: A copy of the network's modules before preparation, with the parameters of the prepared network.
            Not a child, so it is not saved. To run it, copy it and load `float_weights`.
        added_keys: Keys of the ``state_dict`` that the float network does not have.
        own_order: Whether the order of parameters differs from the float network's, as in a loaded checkpoint.
        float_first: Whether ``parameters()`` lists those of the float network first; not after a checkpoint in which
            learned scales follow their layers.
        left_float: Layers and ops that turned out to have no int8 form, with the reasons: see
            `qat_lightning.modes.left_float`.
        grids: The grid of each FakeQuantize in words, if a user's quantizer determined it; otherwise it follows from
            the recipe, and there is no entry.
        plan: Data that the mode keeps for conversion.
        reworking: The changes made to the float network before preparation, which can be applied to other weights; None
            if there were none.
        course: Whether the network trains, and where its forward passes begin.
        attributes: Plain attributes of the network as it was prepared, which training may change.
        form: For a network that is sharded over processes, its structure without values: see
            `qat_lightning.modes.sharded`.
    """

    mode: Mode
    recipe: Recipe
    prefix: str
    float_network: nn.Module
    plan: Any
    reworking: Any
    attributes: Attributes
    form: nn.Module | None

    def __init__(
        self, mode: Mode, recipe: Recipe, float_network: nn.Module, *, prefix: str = "", plan: Any = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.prefix = prefix
        self.added_keys: list[str] = []
        self.own_order = False
        self.float_first = True
        self.left_float: dict[str, str] = {}
        self.grids: dict[str, str] = {}
        self.__dict__["mode"] = mode
        self.__dict__["float_network"] = float_network
        self.__dict__["plan"] = plan
        self.__dict__["reworking"] = None
        self.__dict__["attributes"] = {}
        self.__dict__["form"] = None
        self.course = Course()

    def forward(self, input: Any) -> Any:
        """Return ``input``: an ``nn.Sequential`` calls all of its children."""
        return input

    def get_extra_state(self) -> Tensor:
        """Recipe, added keys and the rest of the state, as a tensor."""
        folded = self.reworking.folded if self.reworking is not None else {}
        values = {
            "added_keys": self.added_keys,
            "folded": folded,
            "own_order": self.own_order,
            "float_first": self.float_first,
            "left_float": [list(pair) for pair in self.left_float.items()],
        }
        return to_tensor(self.recipe.to_dict() | values | ({"grids": self.grids} if self.grids else {}))

    def set_extra_state(self, state: Any) -> None:
        """Raise an error for ranges of another recipe, or of other grids."""
        check_recipe(self.recipe, state)
        grids = from_entry(state).get("grids", {})
        wrong = [name for name in sorted(self.grids.keys() | grids) if self.grids.get(name) != grids.get(name)]
        if wrong:
            name, quantizer = wrong[0], self.recipe.backend
            raise CheckpointMismatchError(
                f"The checkpoint was written by a run whose {quantizer} defined other grids ('there'), {name} first: "
                f"{self.grids.get(name, 'none')} here, {grids.get(name, 'none')} there. Use the same quantizer."
            )


def check_recipe(recipe: Recipe, entry: Any) -> None:
    """Raise an error unless a checkpoint's recipe equals that of the network.

    Args:
        recipe: Recipe of the network.
        entry: The checkpoint's entry.

    Raises:
        CheckpointMismatchError: They differ; the message names both sides.
    """
    differences = recipe.differences(Recipe.from_dict(from_entry(entry)))
    if differences:
        raise CheckpointMismatchError(
            "The checkpoint was written by a run with other quantization settings ('there'): " + "; ".join(differences)
        )


def prepared_state(prepared: nn.Module) -> PreparedState:
    """The `PreparedState` of a prepared network."""
    state: PreparedState = prepared._quantization  # type: ignore[assignment]
    return state


def is_prepared(network: nn.Module) -> bool:
    """Whether ``network`` is the result of a mode's ``prepare``."""
    return isinstance(network, nn.Module) and isinstance(network._modules.get("_quantization"), PreparedState)


def prepared_parts(prepared: nn.Module) -> dict[str, nn.Module]:
    """The separately prepared submodules in mode ``"parts"``, by their first names; empty in other modes."""
    return {name: module for name, module in prepared.named_modules() if name and is_prepared(module)}


def fake_quantizers(network: nn.Module) -> Iterable[tuple[str, FakeQuantize]]:
    """All FakeQuantizes with their names, each once."""
    for name, module in network.named_modules():
        if isinstance(module, FakeQuantize):
            yield name, module


@contextmanager
def weights_unrounded(network: nn.Module) -> Iterator[None]:
    """Within the block weights are not rounded, so that no range is chosen from them before the first step."""
    rounding = [fq for _, fq in fake_quantizers(network) if fq.source == "present" and fq.fake_quant_enabled]
    for fq in rounding:
        fq.enable_fake_quant(False)
    try:
        yield
    finally:
        for fq in rounding:
            fq.enable_fake_quant()


def materialize_weights(prepared: nn.Module) -> None:
    """Create the per-channel state of the FakeQuantizes of weights, before training begins."""
    # In evaluation: in training, computing a parametrized weight may change the state of its parametrization.
    with evaluating(prepared):
        for module in prepared.modules():
            _materialize_weight(module)


def _materialize_weight(module: nn.Module) -> None:
    if isinstance(module, RoundedLayer):
        module.materialize()
        return
    # Its own children only: a wrapper may expose those of the wrapped layer.
    fq = module._modules.get("weight_fake_quant")
    weight = getattr(module, "weight", None) if isinstance(fq, FakeQuantize) else None
    if isinstance(fq, FakeQuantize) and isinstance(weight, torch.Tensor):
        # In eager mode, the rounded tensor may have another shape than the parameter.
        kernel: Any = getattr(module, "kernel", None)
        fq.materialize(weight if kernel is None else kernel()[0])


def refuse_simulated(recipe: Recipe) -> None:
    """Refuse to convert a scheme that no kernel can run.

    Raises:
        ConversionError: The scheme is simulated; the message says why.
    """
    if recipe.simulated:
        raise ConversionError(
            f"This scheme is simulated in training and has no int8 network: {recipe.simulated}. Use the prepared "
            "network (fake-quant), or a scheme that the backend can run, such as Scheme()."
        )


def set_phase(
    network: nn.Module, *, fake_quant: bool, observers: bool, batchnorm_frozen: bool, scales_learn: bool = True
) -> None:
    """Set whether fake-quant is enabled, ranges are updated, BatchNorm is frozen, and scales may begin to learn."""
    for module in network.modules():
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = fake_quant
            module.observer_enabled = observers
            module.may_learn = scales_learn
        elif isinstance(module, DynamicFakeQuantize):
            module.fake_quant_enabled = fake_quant
        elif isinstance(module, FreezableBatchNorm):
            module.frozen = batchnorm_frozen


def observe_in_evaluation(network: nn.Module, observe: bool) -> None:
    """Set whether enabled observers update ranges in evaluation as well, or in training only."""
    for _, fq in fake_quantizers(network):
        fq.observe_in_evaluation = observe


def follow_course(prepared: nn.Module) -> None:
    """Let all FakeQuantizes of a prepared network share its `Course`."""
    course = prepared_state(prepared).course
    for _, fq in fake_quantizers(prepared):
        fq.__dict__["course"] = course  # not a child: the network has it already


def name_float_tensors_first(prepared: nn.Module) -> None:
    """List the float network's parameters, buffers and entries before ranges and scales, which it does not have."""
    name_first(prepared, prepared_state(prepared).float_network)
    prepared.register_state_dict_post_hook(_added_entries_last)


def _added_entries_last(prepared: nn.Module, entries: Any, prefix: str, *args: Any) -> None:
    known = {prefix + key for key in float_keys(prepared)}
    for key in [key for key in entries if key.startswith(prefix) and key not in known]:
        entries[key] = entries.pop(key)


def remember_attributes(prepared: nn.Module) -> None:
    """Record the plain attributes of a network whose own ``forward`` runs, when it is prepared."""
    state = prepared_state(prepared)
    state.__dict__["attributes"] = attributes_like(prepared, state.float_network)


def changed_attributes(prepared: nn.Module) -> Attributes:
    """The plain attributes that have other values than when the network was prepared."""
    state = prepared_state(prepared)
    return differing(state.attributes, attributes_like(prepared, state.float_network))


def in_training_step(prepared: nn.Module, begins: bool) -> None:
    """Mark the begin or end of a training step, in which ranges are updated even in parts that are kept in evaluation.

    Between steps, and without these calls, the network's own flag says whether it trains.
    """
    prepared_state(prepared).course.in_training_step = begins


def reduce_ranges(network: nn.Module, reduce: bool) -> None:
    """Set whether the ranges of every batch are reduced over all processes of a distributed training."""
    for _, fq in fake_quantizers(network):
        fq.reduce_across_processes = reduce


@torch.no_grad()
def merge_ranges(network: nn.Module) -> None:
    """Merge the ranges of all processes, in one collective: the smallest low and the largest high.

    Ranges that are chosen from each batch are averaged instead, in a second one: the widest would be that of the
    process with the worst choice.
    """
    moving = [fq for _, fq in fake_quantizers(network) if fq.observed]
    if not moving:
        return
    bounds = torch.stack([torch.stack([-fq.min_val, fq.max_val, fq.batches.to(fq.max_val)]) for fq in moving])
    of_batch = [fq for fq in moving if fq.of_batch]
    means = _means_over_all(of_batch) if of_batch else []
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    for fq, (low, high, batches) in zip(moving, bounds, strict=True):
        fq.min_val.copy_(-low)
        fq.max_val.copy_(high)
        fq.batches.copy_(batches)
    for fq, (low, high, known) in zip(of_batch, means, strict=True):
        fq.min_val.copy_(torch.where(known > 0, low / known, fq.min_val))
        fq.max_val.copy_(torch.where(known > 0, high / known, fq.max_val))


def _means_over_all(moving: list[FakeQuantize]) -> Iterable[Tensor]:
    """Sums of lows and highs over the processes that know a range, and the number of these processes."""
    ranges = torch.stack([torch.stack([fq.min_val, fq.max_val, torch.ones_like(fq.max_val)]) for fq in moving])
    known = ranges[:, :1] <= ranges[:, 1:2]
    return sum_over_all(torch.where(known, ranges, 0.0))


def copy_of_modules(network: nn.Module) -> nn.Module:
    """A copy of all modules that shares their parameters and buffers, so it costs no memory for tensors.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> copied = copy_of_modules(layer)
        >>> copied is layer, copied.weight is layer.weight
        (False, True)
    """
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def float_keys(prepared: nn.Module) -> set[str]:
    """Keys of a prepared network's ``state_dict`` that the float network has as well."""
    return set(prepared_state(prepared).float_network.state_dict())


def cpu_copy(prepared: nn.Module) -> nn.Module:
    """A detached copy on the CPU, in eval mode and float32, with fake-quant enabled: the input of conversion."""
    copied = copy_with_pruning_done(prepared).cpu().float().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    set_phase(copied, fake_quant=True, observers=False, batchnorm_frozen=True)
    return copied
