"""One forward pass is one batch: a layer that it calls several times has one range, of all that it was given in it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.flows.base import fake_quantizers, prepared_state
from qat_lightning.flows.eager_chains import Observation
from qat_lightning.flows.eager_layers import ChainHead


def take_forwards_as_a_whole(prepared: nn.Module, observation: Observation) -> None:
    """Tell the FakeQuantizes of a prepared network where each of its forward passes begins and ends.

    Where parts of it are called from outside, each call is a pass of its own.

    Args:
        prepared: Prepared in eager mode.
        observation: The run on the example, which shows the layers that it calls several times.
    """
    times = Counter(id(call.module) for call in observation.calls if call.module is not None)
    for module in prepared.modules():
        if isinstance(module, ChainHead) and times[id(module)] > 1:
            module.input_fake_quant.is_shared = module.output_fake_quant.is_shared = True
    prepared.register_forward_pre_hook(forward_begins, prepend=True)
    prepared.register_forward_hook(forward_ends, always_call=True)


def forward_begins(prepared: nn.Module, args: Any) -> None:
    """Forward pre-hook of a prepared network."""
    prepared_state(prepared).course.in_forward = True
    _begin_anew(prepared)


def forward_ends(prepared: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a prepared network, also where its forward raises."""
    prepared_state(prepared).course.in_forward = False
    _begin_anew(prepared)


def is_foreign(hook: Any) -> bool:
    """Whether a hook on a prepared network is somebody else's."""
    return hook not in (forward_begins, forward_ends)


def _begin_anew(prepared: nn.Module) -> None:
    course = prepared_state(prepared).course
    places: tuple[FakeQuantize, ...] | None = course.__dict__.get("places")
    if places is None:
        # Found once for each network, and by a copy of it anew.
        places = tuple(fq for _, fq in fake_quantizers(prepared) if fq.observed)
        course.__dict__["places"] = places
    for fq in places:
        fq.begin_forward()
