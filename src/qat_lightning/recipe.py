"""What a network was prepared with: kept inside it, and so in every checkpoint of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qat_lightning.backends import Backend, get_backend
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.scheme import Scheme

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """Mode, backend, scheme and choice of layers: all that decides what prepare makes of a network.

    Args:
        mode: ``"eager"``, ``"fx"`` or ``"pt2e"``.
        backend: A name in `qat_lightning.backends.BACKENDS`.
        scheme: Bits and granularity.
        include: Globs of module names; empty for all.
        exclude: Globs of module names that stay float, with all that is inside them.

    Raises:
        ConfigurationError: The mode and the backend do not go together, or a glob is not a string.

    Example:
        >>> recipe = Recipe("fx", "x86", exclude=("head*",))
        >>> recipe.selects("head.fc"), recipe.selects("stem.conv")
        (False, True)
    """

    mode: str
    backend: str
    scheme: Scheme = field(default_factory=Scheme)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the pair and the globs."""
        get_backend(self.backend, self.mode)
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str) or not all(isinstance(glob, str) and glob for glob in globs):
                raise ConfigurationError(
                    f"{name}={globs!r} is not possible: give a list of globs of module names, like ['head.*']."
                )

    @property
    def target(self) -> Backend:
        """The backend's row."""
        return get_backend(self.backend, self.mode)

    @property
    def weight_quant_max(self) -> int:
        """The largest integer of a weight; the smallest is its negative."""
        return min(self.scheme.weight_quant_max, self.target.weight_limit)

    def selects(self, name: str) -> bool:
        """Whether the module ``name`` is to be quantized: it or a parent of it is included, and none is excluded."""
        parts = name.split(".")
        lineage = [".".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatchcase(part, glob) for glob in self.exclude for part in lineage):
            return False
        return not self.include or any(fnmatchcase(part, glob) for glob in self.include for part in lineage)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "format": FORMAT,
            "mode": self.mode,
            "backend": self.backend,
            "scheme": self.scheme.to_dict(),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Undo `to_dict`."""
        if values.get("format") != FORMAT:
            raise CheckpointMismatchError(
                f"This file has format {values.get('format')!r}; this release of qat-lightning reads format {FORMAT}."
            )
        return cls(
            mode=values["mode"],
            backend=values["backend"],
            scheme=Scheme(**values["scheme"]),
            include=tuple(values["include"]),
            exclude=tuple(values["exclude"]),
        )

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which two recipes differ, both sides named."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} here, {getattr(other, f.name)!r} there"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def check_globs(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse a glob that matches no module: a typing error would otherwise quantize what should stay float.

    Raises:
        ConfigurationError: A glob matches nothing; the message lists names that exist.
    """
    for kind in ("include", "exclude"):
        for glob in getattr(recipe, kind):
            if not any(fnmatchcase(name, glob) for name in names):
                some = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
                raise ConfigurationError(f"{kind}={glob!r} matches no module: the network has {some}.")


class PreparedState(nn.Module):
    """The child ``_quantization`` of a prepared network: its recipe, saved as extra state, and what convert needs.

    Attributes:
        recipe: What the network was prepared with.
        prefix: The network's dotted name in the LightningModule, to which the recipe's globs are relative.
        float_network: A copy of the network before it was prepared; not a child, so not trained and not saved here.
        added_keys: The keys of the ``state_dict`` that the float network does not have.
        plan: What the flow that prepared it wants to remember for conversion.
    """

    recipe: Recipe
    prefix: str
    float_network: nn.Module
    plan: Any

    def __init__(self, recipe: Recipe, float_network: nn.Module, *, prefix: str = "", plan: Any = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.prefix = prefix
        self.added_keys: list[str] = []
        self.__dict__["float_network"] = float_network
        self.__dict__["plan"] = plan

    def forward(self, input: Any) -> Any:
        """``input`` itself: an ``nn.Sequential`` calls every child that it has."""
        return input

    def get_extra_state(self) -> dict[str, Any]:
        """The recipe and the added keys as plain values, which ``torch.load(weights_only=True)`` takes."""
        return self.recipe.to_dict() | {"added_keys": self.added_keys}

    def set_extra_state(self, state: Any) -> None:
        """Refuse the ranges of another recipe."""
        check_recipe(self.recipe, state)


def check_recipe(recipe: Recipe, state: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's recipe is the one of the network it is loaded into.

    Raises:
        CheckpointMismatchError: They differ; the message names both sides.
    """
    differences = recipe.differences(Recipe.from_dict(state))
    if differences:
        raise CheckpointMismatchError(
            "The checkpoint was written by a run with other settings of quantization ('there'): "
            + "; ".join(differences)
        )
