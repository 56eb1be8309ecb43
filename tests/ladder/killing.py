"""Searches that are killed: python -m tests.ladder.killing FOLDER KILLS SEED, in a process that forks each of them.

Importing takes longer than the search, so it is done once. A child has its own memory, nothing of a search existed when
it was forked, and SIGKILL leaves it no time: whoever goes on knows nothing but the files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from qat_lightning import Scheme, Target, reach
from tests.ladder.lit import CPU, Data, Lit


def search(folder: Path) -> None:
    """Begin, or go on, with the network that is in the folder."""
    model = Lit()
    model.load_state_dict(torch.load(folder.parent / "float.pt"))
    settings = {"short_epochs": 1, "long_epochs": 2, "adaround_iterations": 20, "calibration_batches": 4}
    reach(
        CPU,
        model,
        Data(),
        Target(max_drop=0.0),
        folder=folder,
        resume=True,
        metric="val/loss",
        scheme=Scheme(weight_bits=2, weight_granularity="per_tensor"),
        **settings,  # type: ignore[arg-type]
    )


def forked(folder: Path) -> int:
    """A child that searches."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        search(folder)
        os._exit(0)
    except BaseException:  # noqa: BLE001 (whatever it is, the child must not go on as its parent)
        traceback.print_exc()
        os._exit(1)


def count_files(folder: Path) -> int:
    """How many files a search has written."""
    return sum(len(names) for _, _, names in os.walk(folder))  # which minds no folder that vanishes


def kill_after(pid: int, folder: Path, files: int, seconds: float) -> int:
    """Kill a search so long after it has written so many files, which no other load on the machine changes.

    Returns:
        Its exit status: it may have ended by itself.
    """
    while count_files(folder) < files:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main(top: Path, kills: int, seed: int) -> dict[str, object]:
    """One search that is left alone, and one that is killed so many times.

    Returns:
        What is in the ``ladder.json`` of each, and how often the other was killed.
    """
    top.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:  # training has threads, which a fork would not bring along
        from tests.ladder.lit import trained

        torch.save(trained()[0].state_dict(), top / "float.pt")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.waitpid(forked(top / "whole"), 0)[1] == 0, (top / "whole.log").read_text()
    most = 2 * count_files(top / "whole") // (kills + 2)
    draw, killed, ended = random.Random(seed), 0, False
    while killed < kills and not ended:
        before = count_files(top / "killed")
        pid = forked(top / "killed")
        status = kill_after(pid, top / "killed", before + draw.randint(0, most), draw.uniform(0.0, 0.1))
        ended = os.WIFEXITED(status)
        assert not ended or os.WEXITSTATUS(status) == 0, (top / "killed.log").read_text()
        killed += not ended
    assert os.waitpid(forked(top / "killed"), 0)[1] == 0, (top / "killed.log").read_text()
    ladders = {name: json.loads((top / name / "ladder.json").read_text()) for name in ("whole", "killed")}
    return ladders | {"kills": killed}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201
