"""The int8 network for users: an ordinary module on the CPU."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_lightning.artifact.frozen import FrozenCalls
from qat_lightning.artifact.write import save_quantized
from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import QuantizationError
from qat_lightning.graph.example import Example
from qat_lightning.graph.inference_call import inference_example
from qat_lightning.layers.kernels import choose_kernels
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.settings.engines import packing_engine, quantized_engine
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence


def _without_autocast() -> AbstractContextManager[object]:
    """Let what stays float compute as it was verified: int8 kernels take float32, and autocast would give bfloat16."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


class QuantizedNetwork(nn.Module):
    """An int8 network; call it like the float network.

    It runs on the CPU, supports any batch size, and is for inference only: ``train()`` and ``eval()`` have no effect,
    and it has no parameters to optimize. In mode eager it has the public methods and attributes of the float network,
    such as ``generate`` and ``config``; graphs only have ``forward``.

    When called repeatedly with inputs of one form, it records its kernels and runs them without Python between them:
    the same bits in less time. Hooks and changes are detected, and then it runs unrecorded.

    Args:
        converted: The result of a mode's ``convert``.
        recipe: The recipe the network was prepared with.
        example: The call it was verified with.
        source: Which weights it contains.

    Attributes:
        recipe: Mode, backend and scheme.
        coverage: Which layers are int8, and why others are not.
        operations: The same for the ops between layers.
        checks: The comparison of each int8 layer with fake-quant.
        whole: The comparison of the whole network with fake-quant; None if unknown.
        notes: Messages for the user, such as a fallback that was used.
        source: Which weights it contains.
    """

    recipe: Recipe

    def __init__(self, converted: Converted, recipe: Recipe, example: Example, *, source: str = "") -> None:
        super().__init__()
        self.network = converted.network
        self.recipe = recipe
        self.coverage: Sequence[LayerCoverage] = list(converted.coverage)
        self.operations: Sequence[LayerCoverage] = list(converted.operations)
        self.checks: Sequence[LayerCheck] = list(converted.checks)
        self.whole: WholeCheck | None = converted.whole
        self.notes: Sequence[str] = list(converted.notes)
        self.example = example
        self.source = source
        self._frozen = FrozenCalls()
        self.training = False

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the int8 kernels on CPU inputs of the float network's shapes and dtypes, without autocast."""
        with quantized_engine(self.recipe.target.engine), _without_autocast():
            return self._frozen.run(self.network, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """The public attributes and methods of the network; methods run like ``forward``."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or name.startswith("_"):
                raise
            try:
                found = getattr(network, name)
            except AttributeError:
                graph = traits_of(self.recipe.mode).captures
                why = ": a graph only has forward; mode='eager' keeps your methods" if graph else ""
                raise AttributeError(f"{error}, and neither has its network{why}") from None
        if not isinstance(found, types.MethodType):
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), quantized_engine(self.recipe.target.engine), _without_autocast():
                return found(*args, **kwargs)

        return method

    def at_inference(self) -> QuantizedNetwork:
        """The network without inputs that only its loss reads, such as labels, on the same layers.

        Returns:
            The network itself if it has no such inputs, or if its mode keeps Python code, which decides at each call.
        """
        network: Any = self.network
        call = getattr(network, "inference_call", None)
        if call is None:
            return self
        made = QuantizedNetwork.__new__(QuantizedNetwork)
        made.__dict__.update(self.__dict__)
        made._modules = self._modules | {"network": network.at_inference()}
        made._frozen = FrozenCalls()
        made.example = inference_example(call, self.example)
        return made

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Only store the flag: int8 kernels do not train, and their layers stay in evaluation."""
        self.training = mode
        return self

    def save(self, path: str | Path) -> None:
        """Write the network to one file, completely or not at all; `qat_lightning.load_quantized` reads it."""
        save_quantized(self, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedNetwork:
        """Copy with weights packed for the same kernels."""
        copied = QuantizedNetwork.__new__(QuantizedNetwork)
        memo[id(self)] = copied
        # A copy packs weights again, for the current engine.
        with packing_engine(self.recipe.target.engine):
            copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        choose_kernels(copied, self.recipe.target.engine)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Raise an error if the network has packed layers, which cannot be restored from a pickle."""
        if traits_of(self.recipe.mode).packs and self.recipe.kind not in DIRECT:
            raise QuantizationError(
                f"An int8 network of mode={self.recipe.mode!r} cannot be pickled, because its packed layers cannot: "
                "save it with save(path), and load it with qat_lightning.load_quantized(path)."
            )
        return self.__dict__

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedNetwork:
        """Stay on the CPU with the same integers: there is nothing to move or cast."""
        if fn(torch.zeros(1)).device.type not in ("cpu", "meta"):
            raise QuantizationError(
                f"The int8 network for backend {self.recipe.backend!r} runs on the CPU only: give it inputs on the CPU "
                "instead of moving it."
            )
        return self

    def extra_repr(self) -> str:
        """Mode, backend and contents, for ``print``."""
        count = sum(row.quantized for row in self.coverage)
        return f"mode={self.recipe.mode}, backend={self.recipe.backend}, int8 layers={count}/{len(self.coverage)}"
