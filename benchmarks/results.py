"""Results of long benchmarks, stored as they are computed, so that an interrupted benchmark can continue."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe


class Results:
    """Figures in a JSON Lines file, each stored with all settings that it depends on.

    Args:
        path: The file; read if it exists, created with the first result.

    Attributes:
        rows: All rows of the file in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]

    def once(self, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of ``measure`` for these settings, calling it only if the file does not contain it."""
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
