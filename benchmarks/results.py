"""Results of long benchmarks, kept as they come, so that one that was broken off goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe


class Results:
    """Figures in a file of JSON lines, each under all the settings that it depends on.

    Args:
        path: The file; it is made with the first result, and read if it is there.

    Attributes:
        rows: All that the file has, in its order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]

    def once(self, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` returned for these settings, called only if the file does not have it yet."""
        settings = json.loads(json.dumps(settings))
        for row in self.rows:
            if row["settings"] == settings:
                return row["figures"]
        start = time.perf_counter()
        figures = measure()
        row = {
            "settings": settings,
            "figures": figures,
            "seconds": round(time.perf_counter() - start, 1),
            "machine": describe(),
        }
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({"settings": settings, "figures": figures, "seconds": row["seconds"]}), flush=True)
        return figures
