"""What method=auto of train.py refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.app import climb


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give max_drop, min_speedup or max_size_mb"),
        (["target.max_drop=-1"], "give a number of 0 or more"),
        (["target.max_drop=0.1", "recipe=distillation"], "chooses recipes"),
        (["target.max_drop=0.1", "quantization.rehearse=false"], "quantization.rehearse=False cannot be combined with"),
        (["target.max_drop=0.1", "export=torchscript"], r"ladder.files=\[torchscript\]"),
        (["target.max_drop=0.1", "+ladder.training.trainer.max_epochs=3"], "ladder.training.trainer.max_epochs has no"),
        (["target.max_drop=0.1", "paths.output_dir=s3://bucket/run"], "give hydra.run.dir=<a local folder>"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    words: list[str], says: str, composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=says):
        climb(composed("method=auto", "debug=fast", "trainer=cpu", *words))
    assert list(tmp_path.iterdir()) == []
