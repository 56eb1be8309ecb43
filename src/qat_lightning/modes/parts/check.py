"""Comparing a whole int8 network by parts with fake-quant, after each part was compared layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.modes.eager.check import run
from qat_lightning.modes.judging import Names
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.modes.recording import copies
from qat_lightning.modes.whole import Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.settings.engines import quantized_engine

Call = tuple[Any, Any]
"""The arguments of one call of a part, and its result."""


@torch.no_grad()
def check_whole_network(
    prepared: nn.Module, int8: nn.Module, parts: Sequence[str], checks: Sequence[LayerCheck], example: Example
) -> WholeCheck | None:
    """Compare the result of an int8 network with fake-quant.

    Args:
        prepared: The network with fake-quant, on the CPU, in eval mode, with rounding enabled.
        int8: The converted network.
        parts: Names of the int8 parts.
        checks: Checks of their layers.
        example: A real batch.

    Raises:
        VerificationError: All layers are correct and the whole network is not.
    """
    state = prepared_state(prepared)
    comparison = _Comparison(prepared, int8, parts, example)
    with quantized_engine(state.recipe.target.engine):
        actual = run(int8, example)
        whole = check_whole(comparison.expected, actual, (comparison.disturbed, comparison.replayed))
    if whole is not None and not is_right(whole):
        names = Names(state.prefix, {name for name, _ in state.float_network.named_modules()})
        raise_if_wrong(whole, [], checks, names)
    return whole


class _Comparison:
    """Fake-quant's run on the example, and runs with disturbances."""

    def __init__(self, prepared: nn.Module, int8: nn.Module, parts: Sequence[str], example: Example) -> None:
        self.prepared, self.int8, self.parts, self.example = prepared, int8, parts, example
        self.calls: dict[str, list[Call]] = {name: [] for name in parts}
        self._errors: dict[str, list[Any]] | None = None
        with self._watching():
            self.expected = run(prepared, example)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, calls in self.calls.items():
                # Copied before and after: a part may overwrite its inputs, and the code after it its outputs.
                given: list[Any] = []
                part = self.prepared.get_submodule(name)
                before = lambda _, args, kwargs, given=given: given.append(copies((args, kwargs)))  # noqa: E731
                after = lambda _, __, y, given=given, calls=calls: calls.append((given.pop(), copies(y)))  # noqa: E731
                hooks.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(part.register_forward_hook(after).remove)
            yield

    def disturbed(self, disturb: Disturbance) -> Any:
        """Fake-quant's result with its inputs, and the tensors that are rounded, disturbed by a millionth."""
        with ExitStack() as hooks:
            for _, fq in fake_quantizers(self.prepared):
                if fq.observed:
                    handle = fq.register_forward_pre_hook(lambda _, args: (disturb(args[0]), *args[1:]))
                    hooks.callback(handle.remove)
            return run(self.prepared, self.example, disturb)

    def replayed(self, disturb: Disturbance) -> Any:
        """Fake-quant's result with inputs disturbed by a millionth, and with the rounding of each part's kernels."""
        if self._errors is None:
            self._errors = {name: [self._error(name, call) for call in calls] for name, calls in self.calls.items()}
        with ExitStack() as hooks:
            for name, errors in self._errors.items():
                left = iter(errors)
                add: Callable[..., Any] = lambda _, __, y, left=left: _plus(y, next(left, None))  # noqa: E731
                hooks.callback(self.prepared.get_submodule(name).register_forward_hook(add).remove)
            return run(self.prepared, self.example, disturb)

    def _error(self, name: str, call: Call) -> list[Any]:
        """By how much the outputs of an int8 part differ, given fake-quant's inputs."""
        (args, kwargs), wanted = call
        part = self.int8.get_submodule(name)
        with buffers_copied(part):
            got = part(*copies(args), **copies(kwargs))
        return [_difference(one, other) for one, other in zip(_leaves(got), _leaves(wanted), strict=True)]


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def _difference(got: Any, wanted: Any) -> Tensor | None:
    same = isinstance(got, Tensor) and isinstance(wanted, Tensor) and got.shape == wanted.shape
    return got - wanted if same and wanted.is_floating_point() else None


def _plus(value: Any, errors: list[Any] | None) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    if errors is None or len(errors) != len(leaves):
        return value
    pairs = zip(leaves, errors, strict=True)
    return pytree.tree_unflatten(
        [leaf + error if error is not None and error.shape == leaf.shape else leaf for leaf, error in pairs], spec
    )
