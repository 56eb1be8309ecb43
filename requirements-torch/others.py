"""Prints what is to be installed beside a torch that may be outside of its range: all other requirements.

Run it where qat-lightning is installed without its dependencies. ``make test-torch`` does.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires

WITH_TORCH = {"torch", "torchao", "executorch"}
"""Pinned for each torch; where they are not, the newest that pip finds for it."""
APART = {"all", "ray", "benchmarks", "litert", "executorch-openvino", "arm"}
"""Extras that `all` does not name, or that want a torch of their own."""


def main(pinned: set[str]) -> None:
    """Print a requirement a line."""
    for requirement in requires("qat-lightning") or []:
        text, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
        name = re.match(r"[\w.-]+", text)
        if name is None or (extra is not None and extra[1] in APART) or name[0] in pinned:
            continue
        sys.stdout.write(f"{name[0] if name[0] in WITH_TORCH else text.strip()}\n")


if __name__ == "__main__":
    main(WITH_TORCH if sys.argv[1:] else {"torch"})
