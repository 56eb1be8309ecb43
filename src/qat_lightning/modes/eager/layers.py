"""Layers of a network prepared in eager mode; each rounds where the user's own ``forward`` calls it.

A chain is a convolution or linear layer (its head) and the BatchNorm and activation that follow it (its links). In the
int8 network the head computes the whole chain as one kernel. So training rounds the head's folded weight, and rounds
activations only after the last link. Which tensor belongs to which chain is recorded by a mark on the tensor itself:
the forward may branch, loop, and call a module for several chains, and a link that gets any other tensor behaves like
the original module. A mark is valid for one version of a tensor, so an in-place operation in between invalidates it;
within one network, because another one gets plain values; and until the end of the forward pass, for the same reason.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from qat_lightning.layers.batchnorm import factor_of, fake_quantize_folded, folded_bias, folded_weight, for_each_row
from qat_lightning.layers.qat_modules import (
    FreezableBatchNorm,
    FreezableBatchNorm1d,
    FreezableBatchNorm2d,
    FreezableBatchNorm3d,
)
from qat_lightning.layers.relu_rounding import is_looked_at, relu_limit
from qat_lightning.layers.transformer import RowsOfAttention
from qat_lightning.modes.eager.calls import LATER, CountsCalls, Grids, adapt_entries
from qat_lightning.numerics.course import Course
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.recomputation import decided_once


@dataclass
class Tap:
    """One call of a chain, recorded for verification.

    Attributes:
        grid: The FakeQuantize of the input.
        input: The rounded input.
        source: The input before rounding; None if it was already on this grid, or on that of another chain.
        exact: The output before rounding.
        output: The rounded output; None if the call did not go through the whole chain.
        number: Index of the call, among those of the layer with grids of their own.
    """

    grid: FakeQuantize
    input: Tensor
    source: Tensor | None = None
    exact: Tensor | None = None
    output: Tensor | None = None
    number: int = 0


@dataclass(frozen=True)
class _Mark:
    """Position of a tensor in a chain: after ``stage`` links, in the call with these grids and in this forward pass."""

    chain: ChainHead
    grids: ChainHead | Grids
    stage: int
    version: int
    tap: Tap | None
    passes: int = 0

    @property
    def complete(self) -> bool:
        """Whether the tensor is the rounded output of the chain."""
        return self.stage == len(self.chain.links)


# Stored beside the tensors and not on them: an attribute of a tensor would be copied, pickled and saved with it.
_marks: Any = WeakTensorKeyDictionary()


# While a graph is traced, tensors can only be compared by identity. Within `MarksWhileTraced` the list is never empty;
# elsewhere it always is, because marks must not outlive their step.
_traced: list[tuple[Tensor | None, _Mark | None]] = []


class MarksWhileTraced(TorchFunctionMode):
    """Keeps marks while Dynamo traces a network, where tensors have no version: it detects in-place changes itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and drop the mark of a tensor that it changes."""
        output = func(*args, **(kwargs or {}))
        if args and (output is args[0] or func is torch.relu_ or (kwargs or {}).get("inplace") is True):
            _forget(args[0])
        return output

    def __enter__(self) -> MarksWhileTraced:
        """Start keeping marks."""
        _traced.append((None, None))
        return cast("MarksWhileTraced", super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        """Drop all marks."""
        _traced.clear()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


def _forget(x: Any) -> None:
    _keep([(tensor, mark) for tensor, mark in _traced if tensor is not x])


def _keep(kept: list[tuple[Tensor | None, _Mark | None]]) -> None:
    if len(kept) < len(_traced):
        _traced.clear()
        _traced.extend(kept)


def _set_mark(x: Tensor, chain: ChainHead, grids: ChainHead | Grids, stage: int, tap: Tap | None) -> None:
    if _traced:
        _forget(x)
        _traced.append((x, _Mark(chain, grids, stage, 0, None)))
    else:
        _marks[x] = _Mark(chain, grids, stage, x._version, tap, chain.course.passes)


def _mark_of(x: Tensor) -> _Mark | None:
    if _traced:
        return next((mark for tensor, mark in _traced if tensor is x), None)
    return decided_once(lambda: _mark_beside(x))


def _mark_beside(x: Tensor) -> _Mark | None:
    mark: _Mark | None = _marks.get(x)
    if mark is None or (mark.version, mark.passes) != (x._version, mark.chain.course.passes):
        return None
    return mark


def end_pass(course: Course) -> None:
    """Invalidate the marks of a network, whose forward pass has ended."""
    if _traced:
        _keep([(tensor, mark) for tensor, mark in _traced if mark is None or mark.chain.course is not course])
    else:
        course.passes += 1


def _versioned() -> AbstractContextManager[Any]:
    """Leave inference mode, whose tensors have no version counter; gradients stay disabled."""
    if _traced or not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


if TYPE_CHECKING:
    _Layer = nn.Module
else:
    _Layer = object


class ChainHead(CountsCalls, _Layer):
    """A convolution or linear layer with rounded weight and input, at the head of a chain.

    Attributes:
        links: The BatchNorm and the activation after it; they stay registered where the float network has them.
        grid_of: The chain from which every input came through operations that keep values on its grid, such as
            max-pooling, if there is one; rounding to a second grid would only add error.
        later_calls: The grids of its second and later calls within a forward pass, if these have their own.
        taps: A list in which calls are recorded, or None.
    """

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize
    input_fake_quant: FakeQuantize
    output_fake_quant: FakeQuantize
    links: tuple[nn.Module, ...]
    grid_of: tuple[ChainHead, ...]
    taps: list[Tap] | None
    number = 0  # its own grids are those of the first call
    calls_so_far: int | None = None  # an attribute, on which compiled steps can guard: one thread trains

    @property
    def course(self) -> Course:
        """The state that all layers of the prepared network share."""
        course = self.output_fake_quant.course
        assert course is not None
        return course

    @property
    def grids(self) -> tuple[ChainHead | Grids, ...]:
        """The holders of the grids of each call, in order."""
        later: Any = self._modules.get(LATER, ())
        return (self, *later)

    @property
    def batchnorm(self) -> FreezableBatchNorm | None:
        """The BatchNorm that is folded into the int8 kernel."""
        first = self.links[0] if self.links else None
        return first if isinstance(first, FreezableBatchNorm) else None

    @property
    def left_float(self) -> bool:
        """Whether it runs as the plain layer, with nothing rounded, because it cannot be int8."""
        return self.weight_fake_quant.left_float

    @property
    def is_unknown(self) -> bool:
        """Whether it runs as the plain layer, because no range of its output is known, nor observed now.

        No training step called it. It has no int8 form either, so that the layers after it get a float input.
        """
        fq = self.output_fake_quant
        if not fq.fake_quant_enabled or fq.observes or torch.compiler.is_compiling():
            return False
        return not fq.seen

    @property
    def shares_grid(self) -> bool:
        """Whether its input is on the grid of another chain's output."""
        return bool(self.grid_of) and not self.grid_of[0].left_float and not self.grid_of[0].is_unknown

    @property
    def input_grid(self) -> FakeQuantize:
        """The FakeQuantize of inputs that are not on a grid yet."""
        return self.grid_of[0].output_fake_quant if self.shares_grid else self.input_fake_quant

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with BatchNorm folded in, in float32, as in the int8 kernel."""
        weight, bias = (None if value is None else value.float() for value in self.kernel())
        assert weight is not None
        bn = self.batchnorm
        if bn is None:
            return weight, bias
        assert bn.running_mean is not None
        factor, mean = for_each_row(factor_of(bn), weight), for_each_row(bn.running_mean, weight)
        beta = None if bn.bias is None else for_each_row(bn.bias, weight)
        return folded_weight(weight, factor), folded_bias(bias, mean, factor, beta)

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the form that the int8 kernel uses."""
        return self.weight, self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Round an input that is not on a grid yet, and run the layer with its rounded weight."""
        if self.left_float or decided_once(lambda: self.is_unknown):
            return self._run_float(input)  # not marked, so the modules after it are not part of a chain
        with _versioned():
            grids = self.grids
            here = grids[decided_once(lambda: self.next_call(len(grids)))] if len(grids) > 1 else self
            x, tap = self._on_grid(input, here)
            return self.passed(self._apply_layer(x, self._rounded_weight()), 0, tap, here)

    def passed(
        self, y: Tensor, stage: int, tap: Tap | None, grids: ChainHead | Grids, *, relu: float | None = None
    ) -> Tensor:
        """Mark the output of a module of the chain; round it after the last module.

        Args:
            y: The output.
            stage: Number of links before it.
            tap: Where this call is recorded.
            grids: Holder of the grids of this call.
            relu: Upper limit of the last link, if ``y`` is its input and the ReLU is still to be applied.
        """
        if stage == len(self.links):
            if tap is not None:
                tap.exact = y.detach().clone()
            y = grids.output_fake_quant(y, relu=relu)
            if tap is not None:
                tap.output = y.detach().clone()
        _set_mark(y, self, grids, stage, tap)
        return y

    def _on_grid(self, input: Tensor, grids: ChainHead | Grids) -> tuple[Tensor, Tap | None]:
        mark = _mark_of(input)
        if mark is not None and mark.complete and mark.chain.course is self.course:
            grid, x = mark.grids.output_fake_quant, input
        elif decided_once(lambda: self.shares_grid):
            grid = self.grid_of[0].output_fake_quant
            x = grid.round(input)  # this tensor must not update the range
        else:
            grid = grids.input_fake_quant
            x = grid(input)
        if self.taps is None:
            return x, None
        here = grid is grids.input_fake_quant
        tap = Tap(grid, x.detach().clone(), input.detach().clone() if here else None, number=grids.number)
        self.taps.append(tap)
        return x, tap

    def _rounded_weight(self) -> Tensor:
        bn, (weight, _) = self.batchnorm, self.kernel()
        if bn is None:
            rounded: Tensor = self.weight_fake_quant(weight)
            return rounded
        return fake_quantize_folded(weight, for_each_row(factor_of(bn), weight), self.weight_fake_quant)

    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _run_float(self, input: Tensor) -> Tensor:
        return self._apply_layer(input, self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adapt_entries(cast("nn.Module", self), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ConvHead(ChainHead):
    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, self.bias)  # type: ignore[operator]
        return y


class ConvHead1d(_ConvHead, nn.Conv1d):
    """`nn.Conv1d` at the head of a chain."""


class ConvHead2d(_ConvHead, nn.Conv2d):
    """`nn.Conv2d` at the head of a chain."""


class ConvHead3d(_ConvHead, nn.Conv3d):
    """`nn.Conv3d` at the head of a chain."""


class LinearHead(ChainHead, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` at the head of a chain."""

    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class ProjectionHead(RowsOfAttention, LinearHead):  # type: ignore[misc, override]
    """A linear map of attention at the head of a chain."""


class ChainLink(_Layer):
    """A BatchNorm or activation that may be part of a chain; other tensors pass through the original module."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the module, and continue the chain that ``input`` belongs to."""
        mark = _mark_of(input)
        if mark is None or mark.complete or mark.chain.links[mark.stage] is not self or not _foldable(mark, input):
            plain: Tensor = super().forward(input)
            return plain
        chain, stage = mark.chain, mark.stage + 1
        with _versioned():
            if stage == len(chain.links) and not getattr(self, "inplace", False):
                largest = relu_limit(self)
                if largest is not None and not is_looked_at(mark.grids.output_fake_quant):
                    return chain.passed(input, stage, mark.tap, mark.grids, relu=largest)
            return chain.passed(super().forward(input), stage, mark.tap, mark.grids)


def _foldable(mark: _Mark, x: Tensor) -> bool:
    """Whether BatchNorm can be folded: a linear layer has its channels last, so only if its output is a matrix."""
    return mark.stage > 0 or mark.chain.batchnorm is None or not isinstance(mark.chain, LinearHead) or x.dim() == 2


class LinkBatchNorm1d(ChainLink, FreezableBatchNorm1d):
    """`nn.BatchNorm1d` in a chain."""


class LinkBatchNorm2d(ChainLink, FreezableBatchNorm2d):
    """`nn.BatchNorm2d` in a chain."""


class LinkBatchNorm3d(ChainLink, FreezableBatchNorm3d):
    """`nn.BatchNorm3d` in a chain."""


class LinkReLU(ChainLink, nn.ReLU):
    """`nn.ReLU` in a chain."""


class LinkReLU6(ChainLink, nn.ReLU6):
    """`nn.ReLU6` in a chain."""


class LinkHardtanh(ChainLink, nn.Hardtanh):
    """`nn.Hardtanh` from 0 in a chain."""


LINKS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: LinkBatchNorm1d,
    nn.BatchNorm2d: LinkBatchNorm2d,
    nn.BatchNorm3d: LinkBatchNorm3d,
    FreezableBatchNorm1d: LinkBatchNorm1d,
    FreezableBatchNorm2d: LinkBatchNorm2d,
    FreezableBatchNorm3d: LinkBatchNorm3d,
    nn.ReLU: LinkReLU,
    nn.ReLU6: LinkReLU6,
    nn.Hardtanh: LinkHardtanh,
}
"""The link of each float module."""


def become(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Change the class of ``module`` to ``cls``; it stays the same object, also where it is shared."""
    module.__class__ = cls
    module.__dict__.update(attributes)


def without_fast_paths(network: nn.Module) -> None:
    """Make torch's transformer layers call their linear layers, instead of one kernel that reads their weights."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor = False
