"""A target network beside the quantized one, synchronized while training runs (DQN, BYOL)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, loader, qat, ranges, state, trainer


class Synchronized(Lit):
    """Trains towards a target network that takes the weights of the trained one in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.target = Net().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 2:
            self.target.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            wanted = self.target(batch[0])
        scores = self.net(batch[0])
        return F.cross_entropy(scores, batch[1]) + F.mse_loss(scores, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_it_takes_the_float_weights_of_the_quantized_network(mode: str) -> None:
    torch.manual_seed(0)
    start = state(Synchronized())
    ends = []
    for callbacks in ([], [qat(mode, module="net", start={"step": 1000}, convert_on_fit_end=False)]):
        module = Synchronized()
        module.load_state_dict(start)
        trainer(*callbacks).fit(module, loader())
        ends.append({key: value for key, value in state(module).items() if key.startswith("target.")})
    plain, beside = ends
    assert plain.keys() == beside.keys()
    assert all(torch.allclose(value, beside[key], rtol=1e-3, atol=1e-4) for key, value in plain.items())
    module, callback = Synchronized(), qat(mode, module="net", batchnorm="fold")
    trainer(callback).fit(module, loader())
    assert callback.quantized is not None


class TakenBack(Lit):
    """Puts earlier weights back into the quantized network, from a float network."""

    def __init__(self) -> None:
        super().__init__()
        self.earlier = Net().requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.earlier.load_state_dict(self.net.state_dict())
        before = ranges(self.net)
        self.net.load_state_dict(self.earlier.state_dict())
        assert_same_state(ranges(self.net), before)


def test_the_quantized_network_takes_weights_of_a_float_one_and_keeps_its_ranges() -> None:
    module, callback = TakenBack(), qat(module="net")
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert callback.fidelity["sqnr_db"] > 40
    assert not module.earlier._load_state_dict_pre_hooks
