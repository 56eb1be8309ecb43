"""Compiling in a separate process, which frees the memory of the compiler and its caches when it ends.

Otherwise a process that only loads an int8 file and runs it would hold three times the memory for its whole life.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat_lightning.graph.portable_graph import PortableModule
from qat_lightning.modes.decomposed.progress import said_while_it_lasts

_OPERATORS = frozenset({"aten", "prims", "quantized_decomposed", "onednn"})
_FUNCTIONS = frozenset({"torch", "_operator", "operator", "math", "builtins"})


def can_compile_apart(graph_module: fx.GraphModule) -> bool:
    """Whether a graph can and should be compiled in another process.

    It should if the compiler is not loaded here yet. It can if the graph only calls torch's own operators, because
    operators that a program registers exist only in its own process.
    """
    if "torch._inductor" in sys.modules or not sys.executable:
        return False
    return all(map(_is_torchs, _targets(graph_module)))


def _targets(graph_module: fx.GraphModule) -> list[Any]:
    inner = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    return [node.target for one in inner for node in one.graph.nodes if node.op == "call_function"]


def _is_torchs(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _OPERATORS
    return (getattr(target, "__module__", None) or "").partition(".")[0] in _FUNCTIONS


def compile_apart(graph_module: fx.GraphModule, examples: tuple[Tensor, ...], dynamic: tuple[Any, ...]) -> bytes:
    """Run `qat_lightning.modes.decomposed.compiling.compile_package` in another process, with the same arguments.

    Raises:
        RuntimeError: It failed there; the message is the last line of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder:
        asked, answer = Path(folder, "graph.pickle"), Path(folder, "package")
        asked.write_bytes(pickle.dumps((PortableModule(graph_module), examples, dynamic, torch.get_num_threads())))
        path = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        program = "from qat_lightning.modes.decomposed.compiling import answer_process; answer_process()"
        command = [sys.executable, "-W", "ignore", "-c", program, str(asked), str(answer)]
        with said_while_it_lasts("AOTInductor compiles the int8 network for this CPU, once for every batch size"):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not answer.exists():
            said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
            raise RuntimeError(said[-1])
        return answer.read_bytes()
