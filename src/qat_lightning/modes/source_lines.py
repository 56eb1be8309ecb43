"""The line of a network's code that raised an error."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
import traceback
from importlib.util import find_spec
from typing import Any

import torch
import typing_extensions


def line_at_fault(error: BaseException) -> str:
    """The innermost line of the user's code in an error's traceback, as ``file:line in function: code``."""
    frames = traceback.extract_tb(error.__traceback__)
    roots = (
        *_folders("torch"),
        *_folders("torchao"),
        *(str(module.__file__) for module in (inspect, contextlib, typing_extensions)),
    )
    own = __file__.rsplit("/", 2)[0]
    users = [f for f in frames if not f.filename.startswith((*roots, own, "<"))]
    if not users:
        return ""
    frame = users[-1]
    code = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {code}"


def _folders(package: str) -> list[str]:
    """The folders of a package, without importing it."""
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def reason_of(error: Exception) -> str:
    """Where in the network's code an export failed, and why; for messages."""
    where = _line_of_export(error) or line_at_fault(error)
    prefix = f"at {where} " if where else ""
    # An exception that the network's own code raised; by name, because importing torch._dynamo takes seconds.
    if type(error.__cause__).__name__.startswith("Observed"):
        return f"{prefix}({str(error.__cause__).removeprefix('raised exception ')})"
    text = re.split(r"\n\s*(?:from user code|Set TORCH|The above exception)", str(error))[0].strip()
    reason = " ".join(text.split())[:300]
    return f"{prefix}({type(error).__name__}: {reason})"


def _line_of_export(error: Exception) -> str:
    """The innermost user line that Dynamo was tracing; the traceback itself only has Dynamo's frames."""
    stack: Any = getattr(error, "real_stack", None) or []
    root = str(torch.__path__[0])
    users = [frame for frame in stack if not frame.filename.startswith(root)]
    if not users:
        return ""
    frame: traceback.FrameSummary = users[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
