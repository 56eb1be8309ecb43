"""Layers of a network prepared in eager mode: each does its part where the user's own ``forward`` calls it.

A chain is a convolution or linear layer (its head) and the BatchNorm and activation that follow it (its links). In
the int8 network the head runs the whole chain as one kernel, so training rounds the head's folded weight, and rounds
activations only behind the last link. Which tensor is inside which chain is known from a mark on the tensor itself:
the forward may branch, loop, and call a module for several chains, and a link that gets any other tensor is just the
module that it was. A mark holds for one version of a tensor, so an in-place operation in between undoes it.
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
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.recomputation import decided_once


@dataclass
class Tap:
    """One call of a chain, recorded for verification.

    Attributes:
        grid: What rounded the input.
        input: The rounded input.
        source: What was rounded to that here; None if it was on the grid already, or on that of another chain.
        exact: The output before it was rounded.
        output: The rounded output; None if the call did not go through the whole chain.
        number: Which call of the layer it is, of those that have grids of their own.
    """

    grid: FakeQuantize
    input: Tensor
    source: Tensor | None = None
    exact: Tensor | None = None
    output: Tensor | None = None
    number: int = 0


@dataclass(frozen=True)
class _Mark:
    """Where a tensor is: ``stage`` links of ``chain`` are behind it, in the call that has these grids."""

    chain: ChainHead
    grids: ChainHead | Grids
    stage: int
    version: int
    tap: Tap | None

    @property
    def complete(self) -> bool:
        """Whether the tensor is the rounded output of the chain."""
        return self.stage == len(self.chain.links)


# Beside the tensors and not on them: an attribute of a tensor would be copied, pickled and saved with it.
_marks: Any = WeakTensorKeyDictionary()


# While a graph is traced, the only thing that can be said of two tensors is whether they are the same. Within
# `MarksWhileTraced` the list is never empty; elsewhere it always is, or marks would outlive the step they belong to.
_traced: list[tuple[Tensor | None, _Mark | None]] = []


class MarksWhileTraced(TorchFunctionMode):
    """Keeps marks while Dynamo traces a network, where tensors show no version: it sees what is changed in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and forget the mark of a tensor that it changes."""
        output = func(*args, **(kwargs or {}))
        if args and (output is args[0] or func is torch.relu_ or (kwargs or {}).get("inplace") is True):
            _forget(args[0])
        return output

    def __enter__(self) -> MarksWhileTraced:
        """Begin to keep marks."""
        _traced.append((None, None))
        return cast("MarksWhileTraced", super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        """Forget all marks."""
        _traced.clear()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


def _forget(x: Any) -> None:
    kept = [(tensor, mark) for tensor, mark in _traced if tensor is not x]
    if len(kept) < len(_traced):
        _traced.clear()
        _traced.extend(kept)


def _set_mark(x: Tensor, chain: ChainHead, grids: ChainHead | Grids, stage: int, tap: Tap | None) -> None:
    if _traced:
        _forget(x)
        _traced.append((x, _Mark(chain, grids, stage, 0, None)))
    else:
        _marks[x] = _Mark(chain, grids, stage, x._version, tap)


def _mark_of(x: Tensor) -> _Mark | None:
    if _traced:
        return next((mark for tensor, mark in _traced if tensor is x), None)
    return decided_once(lambda: _mark_beside(x))


def _mark_beside(x: Tensor) -> _Mark | None:
    mark: _Mark | None = _marks.get(x)
    return mark if mark is not None and mark.version == x._version else None


def _versioned() -> AbstractContextManager[Any]:
    """Leave inference mode, whose tensors count no versions; without grad all the same."""
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
    """A convolution or linear layer with rounded weight and input, which its chain's output grid belongs to.

    Attributes:
        links: The BatchNorm and the activation behind it; they stay registered where the float network has them.
        grid_of: The chain from which every input came through operations that keep values on its grid, such as
            max-pooling, if there is one; rounding to a second grid would only add error.
        later_calls: The grids of its second and later calls within a forward pass, if it has any of its own.
        taps: Where calls are recorded, while a list.
    """

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize
    input_fake_quant: FakeQuantize
    output_fake_quant: FakeQuantize
    links: tuple[nn.Module, ...]
    grid_of: tuple[ChainHead, ...]
    taps: list[Tap] | None
    number = 0  # the grids of its own are those of the first call

    @property
    def grids(self) -> tuple[ChainHead | Grids, ...]:
        """What has the grids of each call, in order."""
        later: Any = self._modules.get(LATER, ())
        return (self, *later)

    @property
    def batchnorm(self) -> FreezableBatchNorm | None:
        """The BatchNorm that the int8 kernel has folded in."""
        first = self.links[0] if self.links else None
        return first if isinstance(first, FreezableBatchNorm) else None

    @property
    def left_float(self) -> bool:
        """Whether it is the plain layer that it was, with nothing rounded, because it cannot be int8."""
        return self.weight_fake_quant.left_float

    @property
    def shares_grid(self) -> bool:
        """Whether its input is on the grid of another chain's output."""
        return bool(self.grid_of) and not self.grid_of[0].left_float

    @property
    def input_grid(self) -> FakeQuantize:
        """What rounds an input that is not on a grid yet."""
        return self.grid_of[0].output_fake_quant if self.shares_grid else self.input_fake_quant

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with BatchNorm folded in, in float32: what the int8 kernel has."""
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
        """Weight and bias in the form in which the int8 kernel has them."""
        return self.weight, self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Round what is not on a grid yet, and run the layer with its rounded weight."""
        if self.left_float:
            return self._run_float(input)  # not marked: what follows is no part of a chain
        with _versioned():
            grids = self.grids
            here = grids[decided_once(lambda: self.next_call(len(grids)))] if len(grids) > 1 else self
            x, tap = self._on_grid(input, here)
            return self.passed(self._apply_layer(x, self._rounded_weight()), 0, tap, here)

    def passed(
        self, y: Tensor, stage: int, tap: Tap | None, grids: ChainHead | Grids, *, relu: float | None = None
    ) -> Tensor:
        """Mark the output of a module of the chain, rounded if it was the last.

        Args:
            y: The output.
            stage: How many links are behind it.
            tap: Where this call is recorded.
            grids: What has the grids of this call.
            relu: The largest value that the last link leaves, if ``y`` is its input.
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
        if mark is not None and mark.complete:
            grid, x = mark.grids.output_fake_quant, input
        elif self.shares_grid:
            grid = self.grid_of[0].output_fake_quant
            x = grid.round(input)  # whose range must not be moved by this tensor
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
    """A BatchNorm or an activation that may be part of a chain; for other tensors it is what it was."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the module, and let the chain that ``input`` is in go on."""
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
    """A linear layer has its channels last, BatchNorm1d has them second: the same for matrices only."""
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
    """Make ``module`` a ``cls``: it stays the same object, wherever the network keeps or shares it."""
    module.__class__ = cls
    module.__dict__.update(attributes)


def without_fast_paths(network: nn.Module) -> None:
    """Keep torch's transformer layers calling their linear layers, instead of one kernel that reads their weights."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor = False
