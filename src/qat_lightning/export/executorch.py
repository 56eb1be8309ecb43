"""ExecuTorch: a ``.pte`` file, lowered to the backend that the network was trained for, and run by its own runtime."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qat_lightning.errors import ExportError, MissingExtraError, in_full
from qat_lightning.export.executorch_targets import LOWERINGS, find_openvino, lower
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.export.pt2 import as_list, flat_graph
from qat_lightning.export.xnnpack_layers import for_xnnpack, refuse_grids
from qat_lightning.settings.recipe import Recipe


class ExecuTorch:
    """`Format` of ExecuTorch. A file has a batch size of 1, because its memory is planned ahead of time."""

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    runtime: ClassVar[str] = "ExecuTorch"
    extra: ClassVar[str | None] = "xnnpack"
    batch: ClassVar[int | None] = 1

    def require(self) -> None:
        """See `Format.require`."""
        try:
            import executorch.exir
            import executorch.runtime  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "export='executorch' needs ExecuTorch: pip install 'qat-lightning[xnnpack]'."
            ) from error

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        if recipe.kind == "weight_only":
            return (
                "XNNPACK has no kernel for float inputs and integer weights: use kind='dynamic' with a scheme of "
                "activation_granularity='per_token', or kind='static' with mode='pt2e' and backend='xnnpack'."
            )
        if any(own.by_token_or_group for own in recipe.each):
            return refuse_grids(recipe)
        if recipe.backend != "xnnpack" and recipe.kind == "dynamic":
            return (
                "XNNPACK computes the range of activations for each token: use a scheme of "
                "activation_granularity='per_token', or mode='pt2e' with backend='xnnpack'."
            )
        if recipe.backend not in LOWERINGS:
            return (
                "XNNPACK's kernels need int8 activations on its own grids, and the network is for "
                f"backend={recipe.backend!r}: use mode='pt2e' with backend='xnnpack', or another one of ExecuTorch's "
                f"({', '.join(name for name in LOWERINGS if name != 'xnnpack')})."
            )
        return ""

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        graph_module, examples, dynamic = flat_graph(source, source.spelled(for_xnnpack))
        one = tuple(
            example[:1].contiguous() if axes and 0 in axes else example
            for example, axes in zip(examples, dynamic, strict=True)
        )
        recipe = source.recipe
        # Kinds without calibration always use XNNPACK, whatever backend the int8 network has in this process.
        backend = recipe.backend if recipe is not None and recipe.backend in LOWERINGS else "xnnpack"
        bits = 8 if recipe is None else recipe.scheme.activation_bits
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # Vela prints its plan
            warnings.simplefilter("ignore")
            try:
                written = lower(backend, bits, graph_module, one)
            except Exception as error:
                raise ExportError(_explain(error, backend)) from error
        with path.open("wb") as file:
            written.write_to_file(file)

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return None

    def load(self, path: Path) -> Runner:
        """See `Format.load`."""
        find_openvino()
        from executorch.runtime import Runtime

        # Load from memory: OpenVINO's delegate reads buffers after a loaded file has been released.
        data = path.read_bytes()
        program = Runtime.get().load_program(data)
        methods = [program.load_method("forward"), program, data]  # a method does not keep its program alive

        def run(tensors: list[Tensor]) -> list[Tensor]:
            # The next call overwrites the outputs' memory.
            return [tensor.clone() for tensor in as_list(methods[0].execute([t.contiguous() for t in tensors]))]

        return run


def _explain(error: BaseException, backend: str) -> str:
    """Return the message of the failed pass, without the wrapping that ExecuTorch adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        f"ExecuTorch cannot lower the network to {backend} ({in_full(error)}). Rewrite that part with "
        "other ops, or choose another format, such as onnx or pt2."
    )


def not_delegated(path: Path) -> list[str]:
    """Return the ops of a file that run outside its delegate, in ExecuTorch's portable kernels."""
    from executorch.exir._serialize import _deserialize_pte_binary

    plan: Any = _deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
    return [f"{operator.name}.{operator.overload}".rstrip(".") for operator in plan.operators]
