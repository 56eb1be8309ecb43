"""Rotation: spreading outliers of activations and weights over all channels without changing the network's output.

Ashkboos et al., 2024, "QuaRot: outlier-free 4-bit inference in rotated LLMs", https://arxiv.org/abs/2404.00456: the
parts of section 4 without run-time cost, which are stage 1a and the part of stage 1c inside a head. Weights that write
to the residual stream are multiplied by an orthogonal matrix, and those that read it by its transpose, after the scales
of the norms have been folded into the weights that read them; likewise for the values of each attention head. LayerNorm
subtracts the mean, so its matrix preserves the mean. The paper folds the subtraction into the weights instead, and
turns the norm into an RMSNorm; here all modules stay the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.recipes.rotated import Plan, plan
from qat_lightning.recipes.same_outputs import named, passing, undone_if_different
from qat_lightning.recipes.space_rules import follow_spaces
from qat_lightning.recipes.spaces import Spaces


@dataclass
class Rotated:
    """The result of `rotate`.

    Attributes:
        rotated: Names of the linear layers whose inputs were rotated, each with the number of channels that are rotated
            together.
        left: Names of the other linear layers, each with the reason.
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
    """Rotate the inputs of a network's linear layers, in place, by Hadamard-like matrices with random signs.

    Which channels can be rotated together is found by running the example: those of the residual stream of a network
    with norms before the layers, whose scales and shifts are folded into the weights after them; those of the values of
    each attention head, in any network; and those between two linear layers. The values in the example do not matter.

    Args:
        network: A trained float network; names and shapes of its parameters do not change.
        example: One call of it.

    Returns:
        The result.

    Raises:
        NetworkError: The network does not run on the example, or computes different values afterwards; the change is
            undone.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        >>> rotate(network, Example((torch.randn(16, 3),)))
        Rotated(rotated={'2': 8}, left={'0': 'an input of the network', '4': 'gelu'})
    """
    with running_its_example(network):
        run = follow_spaces(network, example)
    chosen = plan(run)
    kept = passing(network, example, chosen.components, chosen.apply)
    for component in [one for one in chosen.components if one not in kept]:
        chosen.leave(component, "a rotation does not pass to it")
    with undone_if_different(network, example, by="The rotation", remedy="rotation=False"):
        chosen.apply()
    return _report(run, chosen)


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
