"""Warning, once per place, of batches with NaN or infinite activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from qat_lightning.modes.places import Place, find_places
from qat_lightning.modes.prepared import fake_quantizers

_SHOWN = 8


class NonFiniteReport:
    """Reads the fake-quantize modules' counts of batches with NaN or infinite values.

    Ranges ignore such batches, so training continues and the problem would go unnoticed. Each place is reported once.
    """

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def look(self, networks: Mapping[str, nn.Module]) -> None:
        """Warn of places not reported before; one transfer from the device per network.

        Args:
            networks: The prepared networks by name.
        """
        places = {}
        for name, network in networks.items():
            ours = [(key, fq) for key, fq in fake_quantizers(network) if fq.observed]
            if not ours:
                continue
            counts = torch.stack([fq.nonfinite_batches for _, fq in ours]).tolist()
            found = {place.fq: place for place in reversed(find_places(network))} if any(counts) else {}
            for (key, fq), count in zip(ours, counts, strict=True):
                if count and (name, key) not in self._said:
                    self._said.add((name, key))
                    places[f"{_in_words(found.get(fq), key)} of {name!r}"] = count
        if places:
            more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            rank_zero_warn(
                f"NaN or infinite activations in {max(places.values())} batch(es), in "
                f"{', '.join(list(places)[:_SHOWN])}{more}. The ranges ignore these batches. Check the data "
                "and the loss of this epoch. This is reported once for each place."
            )


def _in_words(place: Place | None, key: str) -> str:
    """Describe a place; a range shared by several tensors is described by its name in the network."""
    if place is None:
        return f"the shared range {key!r}"
    if place.kind != "input":
        return f"the output of layer {place.layer!r}"
    layer = place.layer.removesuffix(".input")
    return f"the input {layer!r}" if layer == place.layer else f"the input of layer {layer!r}"
