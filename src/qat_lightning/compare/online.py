"""Reading runs from W&B's server, through its public API."""

from __future__ import annotations

from typing import Any

from qat_lightning.compare.offline import STEP
from qat_lightning.compare.run import Run, Status, curves_of, numbers, without_media
from qat_lightning.errors import ConfigurationError, RunFileError

_STATUS: dict[str, Status] = {"finished": "finished", "running": "unfinished", "failed": "failed", "crashed": "failed"}
_SAMPLES = 500


def find_online(address: str, api: Any = None) -> list[Run]:
    """Read the runs of a project, or of one group in it.

    Args:
        address: ``entity/project`` or ``entity/project/group``.
        api: A `wandb.Api`; by default a new one, which needs `wandb login` first.

    Returns:
        The runs, oldest first. Per-layer tables stay on the server.

    Raises:
        ConfigurationError: The address has another form.
        RunFileError: W&B does not answer, or denies access.
    """
    entity, _, rest = address.strip("/").partition("/")
    project, _, group = rest.partition("/")
    if not entity or not project:
        raise ConfigurationError(
            f"--wandb {address!r} does not name a project: give entity/project or entity/project/group."
        )
    import wandb  # here, because offline comparisons do not need it

    try:
        api = wandb.Api() if api is None else api
        found = api.runs(f"{entity}/{project}", filters={"group": group} if group else None, order="+created_at")
        return [_run(run) for run in found]
    except (wandb.Error, ValueError, OSError) as error:
        raise RunFileError(f"W&B returned no runs of {address}: {error}") from error


def _run(run: Any) -> Run:
    rows = list(run.history(samples=_SAMPLES, pandas=False))
    summary = run.summary_metrics  # plain: `summary` has mappings of its own class inside
    state = str(run.state)
    return Run(
        name=str(run.name),
        folder=str(run.url),
        status=_STATUS.get(state, "failed"),
        config=dict(run.config),
        metrics=numbers({key: value for key, value in without_media(summary).items() if not key.startswith("_")}),
        curves=curves_of(map(without_media, rows), STEP),
        seconds=numbers(summary).get("_runtime"),
        reason="" if state == "finished" else f"W&B says it is {state}",
        wandb_id=str(run.id),
    )
