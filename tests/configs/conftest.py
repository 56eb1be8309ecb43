"""Composing the configurations of train.py without running it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Callable[..., DictConfig]]:
    """`composed("mode=pt2e")` is the configuration that train.py would get."""

    def make(*overrides: str) -> DictConfig:
        cfg = compose("config", list(overrides), return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield make
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
