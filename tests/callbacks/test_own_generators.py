"""Networks that draw random numbers from generators of their own, which no global state restores."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from qat_lightning.errors import TraceError
from tests.callbacks.lit import Lit, assert_same_state, loader, qat, state, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")


MAKE: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "torch": (
        lambda: torch.Generator().manual_seed(0),
        lambda generator, x: torch.randn(x.shape, generator=generator),
    ),
    "numpy": (lambda: np.random.default_rng(0), lambda generator, x: float(generator.normal())),
    "numpy's older": (lambda: np.random.RandomState(0), lambda generator, x: float(generator.normal())),
    "python": (lambda: random.Random(0), lambda generator, x: generator.gauss(0, 1)),
}


class Noisy(nn.Module):
    """Adds noise of its own generator, in training and in evaluation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.kind = kind
        self.noise = MAKE[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(x)
        return self.head(hidden + 0.3 * MAKE[self.kind][1](self.noise, hidden))


def fitted(kind: str, *callbacks: Any) -> Lit:
    seed_everything(0, verbose=False)
    module = Lit(Noisy(kind))
    trainer(*callbacks, max_epochs=1).fit(module, loader())
    return module


@pytest.mark.parametrize("kind", MAKE)
def test_eager_trains_and_converts_with_own_generators(kind: str) -> None:
    callback = qat("eager")
    fitted(kind, callback)
    assert all(row.quantized for row in callback.quantized.coverage)


@pytest.mark.filterwarnings("ignore:.*is never reached")
@pytest.mark.parametrize("kind", MAKE)
def test_own_generators_are_where_they_would_be_when_training_begins(kind: str) -> None:
    plain, callback = fitted(kind), qat("eager", start=1.0, convert_on_fit_end=False)
    module = fitted(kind, callback)
    floats = {name: tensor for name, tensor in state(module).items() if name in plain.state_dict()}
    assert_same_state(floats, state(plain))


@pytest.mark.parametrize("kind", MAKE)
def test_fx_refuses_draws_of_own_generators_before_training(kind: str) -> None:
    why = "at .*test_own_generators.py:.*hold a torch.Generator" if kind == "torch" else "draws random numbers outside"
    with pytest.raises(TraceError, match=f"(?s){why}.*mode='eager'"):
        fitted(kind, qat("fx"))
    callback = qat("auto")
    fitted(kind, callback)
    assert callback.quantized.recipe.mode == "eager"


class Noise(nn.Module):
    """Noise in a module without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn(x.shape, generator=self.generator)


def test_fx_calls_a_module_without_layers_with_its_generator() -> None:
    callback = qat("fx")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Noise(), nn.ReLU(), nn.Linear(16, 4))
    trainer(callback, max_epochs=1).fit(Lit(net), loader())
    assert all(row.quantized for row in callback.quantized.coverage)


OUTSIDE = torch.Generator().manual_seed(0)


class NoisyFromOutside(Noisy):
    """Its generator is no attribute of it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(x)
        return self.head(hidden + 0.01 * torch.randn(hidden.shape, generator=OUTSIDE))


def test_a_network_that_differs_from_itself_is_not_compared_once_it_is_prepared() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(qat("eager", convert_on_fit_end=False), max_epochs=1).fit(Lit(NoisyFromOutside("torch")), loader())
    assert (
        sum("returns something else in each evaluation of the same inputs" in str(one.message) for one in caught) == 1
    )
