"""Names of earlier releases."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

import pytest

import qat_lightning
from qat_lightning._moved import MOVED


@pytest.mark.parametrize("old", [name for name, homes in MOVED.items() if homes])
def test_an_earlier_module_has_what_is_now_elsewhere(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = import_module(f"qat_lightning.{old}")
    for home in MOVED[old]:
        now = import_module(f"qat_lightning.{home}")
        own = [name for name, value in vars(now).items() if getattr(value, "__module__", None) == now.__name__]
        assert own
        assert all(getattr(module, name) is getattr(now, name) for name in own)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_what_programs_imported_from_inside_still_imports() -> None:
    sys.modules.pop("qat_lightning." + "flows.base", None)
    with pytest.warns(DeprecationWarning, match=r"flows\.base is "):
        base = import_module("qat_lightning." + "flows.base")
    assert base.Example is qat_lightning.Example
    assert base.get_flow("fx")
