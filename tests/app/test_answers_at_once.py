"""train.py answers questions about its configuration without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import atexit, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
heavy = {"torch", "lightning", "wandb"}
atexit.register(lambda: print("imported:", sorted(heavy & sys.modules.keys()), file=sys.stderr))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], 0, "== Configuration groups =="),
        (["--cfg", "job", "mode=fx"], 0, "output_dir"),
        (["mode=fxx"], 1, "Could not find 'mode/fxx'"),
        (["trainer.max_epoch=3"], 1, "max_epoch"),
        (["mode=pt2e", "backend=qnnpack"], 1, "for qnnpack use mode='eager'"),
    ],
    ids=["help", "configuration", "misspelt group", "misspelt key", "impossible pair"],
)
def test_without_torch(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "imported: []" in done.stderr
