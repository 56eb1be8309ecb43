"""The layers of the package: imports only go down, in functions and for types too, and there are no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import qat_lightning

PACKAGE = Path(qat_lightning.__file__).parent

ROOMS = (
    ("errors", "checks", "processes", "json_files", "whole_files", "storage", "terminal"),
    ("settings",),
    ("numerics",),
    ("layers",),
    ("graph",),
    ("modes",),
    ("artifact",),
    ("measure",),
    ("rehearsal",),
    ("recipes",),
    ("export",),
    ("plain",),
    ("callbacks.parts",),
    ("callbacks",),
    ("demos",),
    ("run",),
    ("sweep",),
    ("sensitivity",),
    ("compare",),
    ("ladder",),
    ("_moved", "conf", "__main__", ""),
)
"""From the ground up: a room imports from those before it, and from itself."""


def name_of(path: Path) -> str:
    """The dotted name relative to the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported(name: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in it."""
    found = set[str]()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one.removeprefix("qat_lightning.") in MODULES else node.module for one in whole}
    own = {one.removeprefix("qat_lightning").removeprefix(".") for one in found if one.split(".")[0] == "qat_lightning"}
    return {one for one in own if one in MODULES} - {name}


def floor(module: str) -> int:
    """The layer that contains a module, counted from the bottom."""
    found = [
        (len(room), number)
        for number, rooms in enumerate(ROOMS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    assert found, f"{module} is in no room: put it into one, or make the room known here"
    return max(found)[1]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that can reach themselves: the rest after removing all modules without remaining imports."""
    left = {name: set(ends) for name, ends in arrows.items()}
    while True:
        done = {name for name, ends in left.items() if not ends & left.keys()}
        if not done:
            break
        for name in done:
            del left[name]
    return sorted(left)


ARROWS = {name: imported(name) for name in MODULES}


def test_imports_are_read() -> None:
    assert len(MODULES) > 200
    assert "modes.registry" in ARROWS["plain"]
    assert "modes.pt2e.mode" in ARROWS["modes.pt2e"], "of a package"
    assert any(end.startswith("modes.fx") for end in ARROWS["modes.registry"]), "in a function"
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_every_arrow_runs_down() -> None:
    up = [f"{name} -> {end}" for name, ends in ARROWS.items() for end in ends if floor(end) > floor(name)]
    assert not up


def test_there_is_no_circle() -> None:
    assert not circles(ARROWS)
