"""The public API needs a server; here W&B's own runs are made of what one would return."""

import json
from typing import Any

import pytest
import wandb

from qat_lightning.compare import find_online
from qat_lightning.compare.run import Curve
from qat_lightning.errors import ConfigurationError, RunFileError


class Stored(wandb.apis.public.Run):
    """W&B's own class with what a server would return."""

    url = "https://example.invalid/a"
    rows: list[dict[str, Any]]

    def history(self, samples: int, pandas: bool) -> list[dict[str, Any]]:
        return self.rows


def stored(run_id: str, state: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> Stored:
    attributes = {
        "name": run_id,
        "displayName": "a",
        "state": state,
        "config": json.dumps({"seed": {"value": 1}}),
        "summaryMetrics": json.dumps(summary),
        "systemMetrics": "{}",
        "sweepName": None,
        "user": {"name": "me", "username": "me"},
    }
    run = Stored(None, "me", "project", run_id, attrs=attributes)
    run.rows = rows
    return run


class Api:
    asked: tuple[Any, ...] = ()

    def runs(self, path: str, filters: Any = None, order: str = "") -> list[Any]:
        self.asked = (path, filters, order)
        table = {"quant/layers": {"_type": "table-file", "nrows": 38, "path": "media/table/layers.json"}}
        rows = [{"val/acc": 0.5, "trainer/global_step": 0}, {"val/acc": 0.75, "trainer/global_step": 9}]
        summary = {"int8/test/acc": 0.9, "_runtime": 12, "val/acc": {"max": 0.75}} | table
        return [
            stored("a1", "finished", [row | table for row in rows], summary),
            stored("a2", "crashed", [], summary),
        ]


def test_runs_of_a_group_are_read() -> None:
    api = Api()
    found, crashed = find_online("me/project/group", api)
    assert api.asked[:2] == ("me/project", {"group": "group"})
    assert found.curves == {"val/acc": Curve([0.0, 9.0], [0.5, 0.75])}, "the number of rows of a table is no metric"
    assert found.metrics == {"int8/test/acc": 0.9, "val/acc.max": 0.75}, "also nested values"
    assert found.config == {"seed": 1}
    assert (found.seconds, found.status, crashed.status, crashed.reason) == (
        12.0,
        "finished",
        "failed",
        "W&B says it is crashed",
    )


def test_an_address_without_a_project_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="entity/project"):
        find_online("project", Api())


def test_what_wandb_refuses_is_an_error_of_ours() -> None:
    class Refusing:
        def runs(self, *_: Any, **__: Any) -> None:
            raise wandb.errors.CommError("no such project")

    with pytest.raises(RunFileError, match="no such project"):
        find_online("me/project", Refusing())
