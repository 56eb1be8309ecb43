"""The table of backends."""

from __future__ import annotations

import pytest
import torch

from qat_lightning.errors import ConfigurationError
from qat_lightning.settings.backends import BACKENDS, MODES, get_backend, pairs, require
from tests.support.targets import missing


def test_every_pair_is_found_and_can_be_made_here() -> None:
    for mode, name in pairs():
        backend = get_backend(name, mode)
        if why := missing(name):
            assert f"pip install 'qat-lightning[{backend.extra}]'" in why
            continue
        require(backend)
        assert backend.engine is None or backend.engine in torch.backends.quantized.supported_engines


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_other_pair_is_refused_with_the_right_ones(mode: str, name: str) -> None:
    if (mode, name) in pairs():
        return
    with pytest.raises(ConfigurationError) as caught:
        get_backend(name, mode)
    for right in BACKENDS[name].modes:
        assert f"mode={right!r}" in str(caught.value)
    for backend in (b for m, b in pairs() if m == mode):
        assert backend in str(caught.value)


@pytest.mark.parametrize(("name", "mode"), [("x87", "fx"), ("x86", "graph")])
def test_unknown_names_are_refused_with_the_known(name: str, mode: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is unknown: use one of .*(x86|fx)"):
        get_backend(name, mode)
