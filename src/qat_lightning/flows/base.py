"""What the three modes have in common: one small protocol, and the switches that act on any prepared network."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.qat_modules import FreezableBatchNorm
from qat_lightning.recipe import PreparedState, Recipe


@dataclass(frozen=True)
class Example:
    """One real call of the network: what it is traced, prepared and verified with.

    Attributes:
        args: Positional inputs, tensors on the CPU with a batch dimension of 2 or more.
        kwargs: Keyword inputs.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCheck:
    """How well one int8 layer reproduces fake-quant, when fed fake-quant's own input.

    Attributes:
        name: The layer, as the float network names it.
        op: The backend's op that ran.
        sqnr_db: Signal to quantization noise ratio in dB; inf if equal.
        max_steps: Largest difference, in steps of the output's grid; nan for a float output.
        fault: What is wrong with it, in words; empty if its differences are roundings.
        chance_db: What disturbing its inputs by a millionth does to it, where that was asked; inf where not.
    """

    name: str
    op: str
    sqnr_db: float
    max_steps: float = math.nan
    fault: str = ""
    chance_db: float = field(default=math.inf, repr=False, compare=False)


@dataclass(frozen=True)
class WholeCheck:
    """How well the int8 network as a whole reproduces fake-quant on the example.

    A deep network can turn a difference in the last bit of a float into decibels. So where the two differ, fake-quant
    is compared with itself as well, its values disturbed by a millionth: no right network does better than that.

    Attributes:
        sqnr_db: Of int8 against fake-quant, for the output that is farthest from what the draws explain.
        draws: Of fake-quant against itself, disturbed, for the same output; empty if that was not needed.
        output: Which one that is, as Python would write it behind the result; empty if there is only one.
    """

    sqnr_db: float
    draws: tuple[float, ...] = ()
    output: str = ""


@dataclass(frozen=True)
class LayerCoverage:
    """Whether one layer of the float network, or an op between layers, is int8, and if not, why.

    Attributes:
        name: The layer; the op, behind the name of the module whose ``forward`` calls it.
        kind: Its type.
        quantized: Whether it is int8.
        reason: Why it stayed float; empty if it did not.
        what: A layer has weights; an op is all else that computes.
        calls: How often it runs in one call of the network; of a layer, 1.
        macs: Multiply-accumulates for one sample; None if it has none, or they were not counted.
    """

    name: str
    kind: str
    quantized: bool
    reason: str = ""
    what: Literal["layer", "op"] = "layer"
    calls: int = 1
    macs: int | None = None


@dataclass
class Converted:
    """What a flow makes of a prepared network.

    Attributes:
        network: The int8 module, on the CPU.
        coverage: Which layers became int8 and which stayed float.
        checks: The comparison with fake-quant, layer by layer.
        notes: What a user should be told, such as a fallback taken.
        operations: Likewise for the ops between the layers.
        whole: The comparison of the whole; None if there is no output to compare.
    """

    network: nn.Module
    coverage: list[LayerCoverage]
    checks: list[LayerCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    operations: list[LayerCoverage] = field(default_factory=list)
    whole: WholeCheck | None = None


class Flow(Protocol):
    """One mode: plain modules in, plain modules out, no Lightning."""

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """Put fake-quant into ``network``.

        Parameters are shared with ``network`` and keep their names, so that a float ``state_dict`` is a part of the
        prepared one. The result has a child ``_quantization`` of type `PreparedState`, which keeps a float copy.

        Raises:
            TraceError: The network cannot be captured in this mode.
            NetworkError: There is nothing in it to quantize.
        """
        ...

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Make an int8 network of ``prepared``, a CPU copy that may be used up, and verify it on ``example``.

        Raises:
            ConversionError: A range was never observed, or upstream's converter failed.
            VerificationError: A layer does not reproduce fake-quant within the backend's tolerance.
        """
        ...

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """What of a prepared network conversion is going to make int8: a row for each layer, then one for each op.

        Args:
            prepared: A CPU copy in evaluation (`cpu_copy`), which may be used up.
            example: One call.
        """
        ...

    def parts(self, prepared: nn.Module) -> list[str]:
        """What of a prepared network can be left float by itself: layers by their names, and ops, as they run."""
        ...

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """Leave some of `parts` float; called by `qat_lightning.flows.left_float.leave_float`, which notes why."""
        ...


def get_flow(mode: str) -> Flow:
    """The flow of ``"eager"``, ``"fx"`` or ``"pt2e"``.

    Raises:
        ConfigurationError: There is no such mode. For ``"auto"`` see `qat_lightning.decision.choose_mode`.
    """
    # Imported here, so that one mode does not pay for the imports of another.
    if mode == "fx":
        from qat_lightning.flows.fx import FxFlow

        return FxFlow()
    if mode == "eager":
        from qat_lightning.flows.eager import EagerFlow

        return EagerFlow()
    if mode != "pt2e":
        raise ConfigurationError(f"mode={mode!r} has no flow: use 'eager', 'fx' or 'pt2e'.")
    from qat_lightning.flows.pt2e import Pt2eFlow

    return Pt2eFlow()


def prepared_state(prepared: nn.Module) -> PreparedState:
    """The recipe and the float copy that a prepared network carries."""
    state: PreparedState = prepared._quantization  # type: ignore[assignment]
    return state


def is_prepared(network: nn.Module) -> bool:
    """Whether ``network`` came out of a flow's ``prepare``."""
    return isinstance(network._modules.get("_quantization"), PreparedState)


def fake_quantizers(network: nn.Module) -> Iterable[tuple[str, FakeQuantize]]:
    """Every FakeQuantize and its name, each once."""
    for name, module in network.named_modules():
        if isinstance(module, FakeQuantize):
            yield name, module


def materialize_weights(prepared: nn.Module) -> None:
    """Let the FakeQuantizes of layers' weights make what they keep for each channel, before a training begins."""
    for module in prepared.modules():
        fq, weight = getattr(module, "weight_fake_quant", None), getattr(module, "weight", None)
        if isinstance(fq, FakeQuantize) and isinstance(weight, torch.Tensor):
            fq.materialize(weight)


def refuse_simulated(recipe: Recipe) -> None:
    """Refuse to convert what no kernel can run.

    Raises:
        ConversionError: With the reason.
    """
    if recipe.simulated:
        raise ConversionError(
            f"This scheme is simulated in training and has no int8 network: {recipe.simulated}. Use the prepared "
            "network (fake-quant), or a scheme that the backend can run, such as Scheme()."
        )


def set_phase(network: nn.Module, *, fake_quant: bool, observers: bool, batchnorm_frozen: bool) -> None:
    """Switch rounding, the moving of ranges and the freezing of BatchNorm, in any prepared network."""
    for module in network.modules():
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = fake_quant
            module.observer_enabled = observers
        elif isinstance(module, FreezableBatchNorm):
            module.frozen = batchnorm_frozen


def observe_in_evaluation(network: nn.Module, observe: bool) -> None:
    """Let ranges move in evaluation as well while observers are on, or in training only."""
    for _, fq in fake_quantizers(network):
        fq.observe_in_evaluation = observe


def follow_course(prepared: nn.Module) -> None:
    """Let all FakeQuantizes of a prepared network know whether it trains as a whole."""
    course = prepared_state(prepared).course
    for _, fq in fake_quantizers(prepared):
        fq.__dict__["course"] = course  # no child: it is one of the network already


def in_training_step(prepared: nn.Module, begins: bool) -> None:
    """Say that a training step begins, in which ranges move also where a part is kept in evaluation, or that it ended.

    Between steps, and without these calls, a network trains while its own flag says so.
    """
    prepared_state(prepared).course.in_training_step = begins


def reduce_ranges(network: nn.Module, reduce: bool) -> None:
    """Let every batch's ranges be taken over all processes of a distributed training, as they are observed, or not."""
    for _, fq in fake_quantizers(network):
        fq.reduce_across_processes = reduce


@torch.no_grad()
def merge_ranges(network: nn.Module) -> None:
    """Give all processes the least of their lows and the greatest of their highs, in one collective."""
    moving = [fq for _, fq in fake_quantizers(network) if fq.observed]
    if not moving:
        return
    bounds = torch.stack([torch.stack([-fq.min_val, fq.max_val, fq.batches.to(fq.max_val)]) for fq in moving])
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    for fq, (low, high, batches) in zip(moving, bounds, strict=True):
        fq.min_val.copy_(-low)
        fq.max_val.copy_(high)
        fq.batches.copy_(batches)


def copy_of_modules(network: nn.Module) -> nn.Module:
    """A copy of all modules that shares their parameters and buffers: what it was, at the cost of no tensor.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> copied = copy_of_modules(layer)
        >>> copied is layer, copied.weight is layer.weight
        (False, True)
    """
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def float_keys(prepared: nn.Module) -> set[str]:
    """The keys of a prepared network's ``state_dict`` that the float network has as well."""
    return set(prepared_state(prepared).float_network.state_dict())


def cpu_copy(prepared: nn.Module) -> nn.Module:
    """A detached copy on the CPU, in eval mode and in float32, with rounding on: what conversion starts from."""
    copied = copy.deepcopy(prepared).cpu().float().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    set_phase(copied, fake_quant=True, observers=False, batchnorm_frozen=True)
    return copied


def sqnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """See `qat_lightning.measure.sqnr_db`; imported late because measuring imports torchmetrics."""
    from qat_lightning.measure import sqnr_db as measure_sqnr_db

    return float(measure_sqnr_db(reference, actual))
