"""Runs notebooks and stores what their cells print: python docs/tutorials/execute.py docs/tutorials/*.ipynb.

It needs no Jupyter. Each notebook runs in its own process, in an empty folder. Standard output and the value of a
cell's last expression are stored; warnings and logs, which go to standard error, are not.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, str | None]:
    """Runs the code of one cell.

    Args:
        source: Python.
        names: The notebook's variables, which it changes.

    Returns:
        What it printed, and its last expression's value as text; None if it does not end with one.
    """
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), None if value is None else repr(value)


def outputs(printed: str, value: str | None, count: int) -> list[Cell]:
    """The outputs of a cell as a notebook stores them."""
    found: list[Cell] = []
    if printed:
        found.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": value.splitlines(keepends=True)}
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


def execute(path: Path) -> Cell:
    """Runs a notebook in this process and folder, and returns it with the outputs of this run.

    Raises:
        Exception: Whatever a cell raises.
    """
    notebook: Cell = json.loads(path.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, 1):
        printed, value = run_cell("".join(cell["source"]), names)
        cell["execution_count"], cell["outputs"] = count, outputs(printed, value, count)
    return notebook


def main(paths: list[str]) -> int:
    """Runs each notebook in a process of its own; ``--here`` runs one in this process and prints it."""
    if paths[:1] == ["--here"]:
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # what a cell's own processes and threads print
            notebook = execute(Path(paths[1]))
        json.dump(notebook, out, indent=1, ensure_ascii=False)
        return 0
    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "WANDB_SILENT": "true"}
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).resolve()), "--here", str(path.resolve())]
            done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        path.write_text(done.stdout[done.stdout.index("{") :] + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
