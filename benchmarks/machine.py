"""Description of the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Return CPU, instruction sets relevant for int8, threads and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    sets = [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if f" {flag}" in text]
    return (
        f"{name or platform.processor() or platform.machine()} ({', '.join(sets) or 'no int8 instructions known'}), "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def resident(key: str) -> int:
    """Return this process's memory in bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
