"""Rotation: outliers of activations and weights are spread over all channels, and the network computes the same.

Ashkboos et al., 2024, "QuaRot: outlier-free 4-bit inference in rotated LLMs", https://arxiv.org/abs/2404.00456: of its
section 4 what costs nothing when the network runs, which is stage 1a and the part of stage 1c that is inside a head.
What writes to the residual stream is multiplied by an orthogonal matrix, what reads it by its transpose, once the
scales of the norms are in the weights that read them; and the values of each head of attention likewise. LayerNorm
takes the mean away, so there the matrix keeps the mean, in place of the paper's way, which folds the subtraction into
the weights and makes the norm an RMSNorm: all modules stay what they are.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.recipes.rotated import Plan, plan
from qat_lightning.recipes.same_outputs import SAME, distance, named, outputs_of, undo_if_changed
from qat_lightning.recipes.space_rules import follow_spaces
from qat_lightning.recipes.spaces import Spaces


@dataclass
class Rotated:
    """What was done to a network.

    Attributes:
        rotated: Names of the linear layers whose inputs were rotated, each with how many channels are rotated together.
        left: Names of the other linear layers, each with what stands in the way.
    """

    rotated: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One sentence."""
        sizes = Counter(self.rotated.values()).most_common()
        shown = " (" + ", ".join(f"{count} of {size} channels each" for size, count in sizes) + ")" if sizes else ""
        text = f"the inputs of {len(self.rotated)} linear layers were rotated{shown}"
        if self.left:
            text += f"; {len(self.left)} cannot be: {named(self.left)}"
        return text + "."


@torch.no_grad()
def rotate(network: nn.Module, example: Example) -> Rotated:
    """Rotate what the linear layers of a network read, in place, by matrices of Hadamard's kind with random signs.

    Which channels may be rotated together is seen by running the example: those of the residual stream of a network
    with its norms in front, whose scales and shifts go into the weights behind them; those of the values of each head
    of attention, in any network; and those between two linear layers. The numbers in the example do not matter.

    Args:
        network: A float network that was trained; names and shapes of its parameters stay.
        example: One call of it.

    Returns:
        What was done.

    Raises:
        NetworkError: The network does not run on the example, or computes different values afterwards, which is undone.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        >>> rotate(network, Example((torch.randn(16, 3),)))
        Rotated(rotated={'2': 8}, left={'0': 'an input of the network', '4': 'gelu'})
    """
    with running_its_example(network):
        run = follow_spaces(network, example)
    before = outputs_of(network, example)
    kept = copy.deepcopy(network.state_dict())
    chosen = plan(run)
    _keep_what_passes(network, example, chosen, before)
    chosen.apply()
    undo_if_changed(network, example, before, kept, by="The rotation", remedy="rotation=False")
    return _report(run, chosen)


def _keep_what_passes(network: nn.Module, example: Example, chosen: Plan, before: list[Tensor]) -> None:
    """Try all rotations together, and one by one if that fails; leave out those that change the network."""

    def passes(which: list[int]) -> bool:
        values = [(parameter, parameter.clone()) for parameter in network.parameters()]
        chosen.apply(which)
        try:
            return distance(before, outputs_of(network, example)) <= SAME
        finally:
            for parameter, value in values:
                parameter.copy_(value)

    if not passes(chosen.components):
        for component in [one for one in chosen.components if not passes([one])]:
            chosen.leave(component, "a rotation does not pass to it")


def _report(run: Spaces, chosen: Plan) -> Rotated:
    done = Rotated()
    for read in run.reads:
        size, why = chosen.of_read(read)
        if size:
            done.rotated[_layer(read.name)] = size
        else:
            done.left[_layer(read.name)] = why
    for name, why in run.unknown.items():
        done.left.setdefault(_layer(name), why)
    done.left = {name: why for name, why in done.left.items() if name not in done.rotated}
    return done


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")
