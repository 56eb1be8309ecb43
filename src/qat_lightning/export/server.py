"""A process that loads artifacts with their runtimes and runs them: ``python -m qat_lightning.export.server``.

It knows only the files, not the network. It reads pickled requests from its standard input and writes pickled answers
to its standard output: see `qat_lightning.export.remote`.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.export.formats import get_format
from qat_lightning.export.protocol import Kernels, Port, Runner
from qat_lightning.measure.metrics import latency_interleaved


class Runtime:
    """Loaded artifacts of one format.

    Args:
        format_name: The format.
        threads: Number of torch's threads, which runtimes use too.
    """

    def __init__(self, format_name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.format = get_format(format_name)
        self.runners: dict[str, Runner] = {}

    def load(self, key: str, path: str) -> None:
        """Load a file under a name."""
        self.runners[key] = self.format.load(Path(path))

    def kernels(self, path: str) -> Kernels | None:
        """Return how a file's layers are run; see `Format.kernels`."""
        return self.format.kernels(Path(path))

    def ports(self, path: str) -> tuple[Port, ...]:
        """Return the integer inputs and outputs of a file; see `Format.ports`."""
        return self.format.ports(Path(path))

    def run(
        self, key: str, tensors: list[Tensor], batched: Sequence[bool], batched_results: Sequence[bool]
    ) -> list[Tensor]:
        """Return the outputs for a batch; call by call for a format with a fixed batch size.

        Args:
            key: Name of the loaded file.
            tensors: The inputs.
            batched: For each input, whether it has a batch dimension.
            batched_results: For each output, whether it has a batch dimension.

        Raises:
            ExportError: The batch has to be split into calls, and an output without a batch dimension depends on it.
        """
        run = self.runners[key]
        size = self.format.batch
        if size is None or not any(batched):
            return run(tensors)
        count = next(tensor.shape[0] for tensor, has in zip(tensors, batched, strict=True) if has)
        parts = [
            run([t[start : start + size] if has else t for t, has in zip(tensors, batched, strict=True)])
            for start in range(0, count, size)
        ]
        return [_of_batch(part, has) for part, has in zip(zip(*parts, strict=True), batched_results, strict=True)]

    def time(self, tensors: list[Tensor], rounds: int) -> dict[str, float]:
        """Return the median latency of each loaded file in milliseconds, in alternating measurements."""
        modules = {key: _Module(run) for key, run in self.runners.items()}
        found = latency_interleaved(modules, (tensors,), rounds=rounds)
        return {key: latency.median_ms for key, latency in found.items()}


def _of_batch(parts: Sequence[Tensor], batched: bool) -> Tensor:
    if batched:
        return torch.cat(list(parts))
    if any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise ExportError(
            "an output has no batch dimension, and this format takes one sample at a time: call it with single samples"
        )
    return parts[0]


class _Module(nn.Module):
    def __init__(self, run: Runner) -> None:
        super().__init__()
        self.run = run

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.run(tensors)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the input ends."""
    runtime = Runtime(*pickle.load(requests))
    while True:
        try:
            method, *arguments = pickle.load(requests)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = True, getattr(runtime, method)(*arguments)
        except Exception as error:  # noqa: BLE001 (a runtime may fail in any way; the client process raises it)
            trace = traceback.format_exc(limit=-1)
            answer = False, f"{type(error).__name__}: {error}" if str(error) else trace
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # Keep the runtime's own output separate from the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, out)
