"""Running an exported network in a separate process, with the call signature of the float network."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from qat_lightning.errors import ExportError
from qat_lightning.export.call import Call
from qat_lightning.modes.decomposed.compiling import as_compiled

_LAST_LINES = 3


class Server:
    """A process of `qat_lightning.export.server`; a context manager that ends the process.

    Args:
        format_name: The format whose runtime it uses.
    """

    def __init__(self, format_name: str) -> None:
        self.format_name = format_name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qat_lightning.export.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        self._send((format_name, torch.get_num_threads()))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `qat_lightning.export.server.Runtime` in the process.

        Raises:
            ExportError: The runtime raised, or its process died.
        """
        self._send((method, *arguments))
        assert self._process.stdout is not None
        try:
            well, answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise ExportError(self._describe_exit()) from error
        if not well:
            raise ExportError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._said.close()

    def _send(self, request: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ExportError(self._describe_exit()) from error

    def _describe_exit(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the process of {self.format_name!r} {how}{': ' if lines else ''}{' / '.join(lines)}"


class RemoteNetwork(nn.Module):
    """An artifact in its runtime's process, called like the float network with tensors on the CPU.

    Args:
        server: The process, which has loaded the file.
        key: The name that it was loaded under.
        call: The signature of the float network.
    """

    def __init__(self, server: Server, key: str, call: Call) -> None:
        super().__init__()
        self.__dict__["_server"] = server
        self.key = key
        self.__dict__["_call"] = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Send the inputs, in float32 like those of every runtime's file, and wait for the outputs."""
        call: Call = self.__dict__["_call"]
        tensors = list(map(as_compiled, call.flatten(args, kwargs)))
        server: Server = self.__dict__["_server"]
        returned = server.ask("run", self.key, tensors, call.batched, call.batched_results)
        return call.result(returned, args, kwargs)
