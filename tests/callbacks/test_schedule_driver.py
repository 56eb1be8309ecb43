"""Schedule points that training will not or may not reach are reported when the fit begins."""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from tests.callbacks.lit import Lit, loader, qat, trainer
from tests.callbacks.test_steps import Accumulates


def fit(callback: Any, *others: Any, make: Any = Lit, **settings: Any) -> None:
    """One batch for each planned epoch is enough."""
    trainer(callback, *others, **settings).fit(make(), loader(), loader())


def stop() -> EarlyStopping:
    return EarlyStopping("val/loss", patience=20)


@pytest.mark.parametrize(
    ("start", "settings", "make", "said"),
    [
        (2, {}, Lit, "start={epoch: 2} is never reached: .*max_epochs=2, 8 steps.* not be trained for its grid"),
        ({"step": 8}, {}, Lit, "start={step: 8} is never reached"),
        (0.95, {}, Lit, "start={fraction: 0.95} is never reached"),
        (0.95, {}, Accumulates, "start={fraction: 0.95} is never reached"),
        (1, {"max_steps": 4}, Lit, "start={epoch: 1} is never reached: .*max_steps=4"),
        (1, {"max_time": timedelta(hours=1)}, Lit, r"start={epoch: 1} may never be reached: max_time .*min_epochs="),
        (0.5, {"callbacks": stop}, Lit, "start={fraction: 0.5} may never be reached: EarlyStopping may end"),
    ],
)
def test_a_start_that_may_be_left_out_is_said(start: Any, settings: dict[str, Any], make: Any, said: str) -> None:
    settings = dict(settings)
    others = [settings.pop("callbacks")()] if "callbacks" in settings else []
    with pytest.warns(UserWarning, match=said):
        fit(qat("eager", start=start), *others, make=make, **settings)


def test_freezes_are_said_as_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(qat("eager", freeze_observers=1, freeze_batchnorm=2), stop())
    assert "freeze_observers={epoch: 1} may never be reached: EarlyStopping" in caplog.text
    assert "freeze_batchnorm={epoch: 2} is never reached" in caplog.text


@pytest.mark.parametrize(
    ("settings", "trainer_settings"),
    [({"start": 1}, {}), ({"start": 1}, {"min_epochs": 2}), ({"start": 0.5}, {"min_steps": 5}), ({"start": 0}, {})],
    ids=str,
)
def test_nothing_is_said_of_what_will_be_reached(settings: dict[str, Any], trainer_settings: dict[str, Any]) -> None:
    others = [stop()] if "min_epochs" in trainer_settings or "min_steps" in trainer_settings else []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reached")
        fit(qat("eager", **settings), *others, **trainer_settings)
