"""One forward pass is one batch: a layer that is called several times in it has one range, over all of its inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from qat_lightning.modes.eager.calls import MOST_CALLS
from qat_lightning.modes.eager.chains import Chain
from qat_lightning.modes.eager.layers import ChainHead, end_pass
from qat_lightning.modes.eager.observation import Observation
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize


def take_forwards_as_a_whole(prepared: nn.Module, observation: Observation) -> None:
    """Tell the FakeQuantizes of a prepared network where each of its forward passes begins and ends.

    If parts of the network are called from outside, each such call is a pass of its own.

    Args:
        prepared: Prepared in eager mode.
        observation: The run on the example; it shows which layers are called several times.
    """
    times = _times(observation)
    for module in prepared.modules():
        if isinstance(module, ChainHead) and times[id(module)] > MOST_CALLS:
            module.input_fake_quant.is_shared = module.output_fake_quant.is_shared = True
    prepared.register_forward_pre_hook(forward_begins, prepend=True)
    prepared.register_forward_hook(forward_ends, always_call=True)


def with_calls(chains: list[Chain], observation: Observation, modules: dict[str, nn.Module]) -> list[Chain]:
    """Give chains that the example calls several times a pair of grids for each call.

    These grids are not shared with other chains.
    """
    times = _times(observation)
    calls = {chain.name: times[id(modules[chain.name])] for chain in chains}
    several = {name for name, count in calls.items() if 1 < count <= MOST_CALLS}
    return [
        replace(
            chain,
            calls=calls[chain.name] if chain.name in several else 1,
            grid_of=None if chain.name in several or chain.grid_of in several else chain.grid_of,
        )
        for chain in chains
    ]


def _times(observation: Observation) -> Counter[int]:
    """Number of calls of each module."""
    return Counter(id(call.module) for call in observation.calls if call.module is not None)


def forward_begins(prepared: nn.Module, args: Any) -> None:
    """Forward pre-hook of a prepared network."""
    _restart(prepared, within=True)


def forward_ends(prepared: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a prepared network; also called if its forward raises."""
    _restart(prepared, within=False)
    end_pass(prepared_state(prepared).course)


def is_foreign(hook: Any) -> bool:
    """Whether a hook on a prepared network belongs to other code."""
    return hook not in (forward_begins, forward_ends)


def _restart(prepared: nn.Module, *, within: bool) -> None:
    course = prepared_state(prepared).course
    course.in_forward = within
    found: tuple[list[FakeQuantize], list[ChainHead]] | None = course.__dict__.get("places")
    if found is None:
        # Found once per network; a copy searches again.
        places = [fq for _, fq in fake_quantizers(prepared) if fq.observed]
        found = places, [head for head in prepared.modules() if isinstance(head, ChainHead)]
        course.__dict__["places"] = found
    for fq in found[0]:
        fq.begin_forward()
    for head in found[1]:
        head.begin_forward(within)
