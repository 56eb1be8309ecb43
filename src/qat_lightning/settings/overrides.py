"""Schemes of single layers, by patterns of their names: pure values, checked when they are created."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qat_lightning.errors import ConfigurationError

FLOAT = "float"
"""Used in place of fields for layers that stay float."""

OF_A_LAYER = (
    "weight_bits",
    "weight_symmetric",
    "weight_granularity",
    "weight_group_size",
    "weight_observer",
    "activation_bits",
)
"""The fields of a `Scheme` that can be set for a single layer."""

_POSSIBLE = (
    "a mapping of patterns of layers' names to fields of a Scheme or to the word 'float', such as "
    "{'net.head': {'weight_bits': 8}, 'net.stem': 'float'}"
)


class Overrides(dict[str, Any]):
    """For each pattern of layer names, the fields of the scheme that it changes, or `FLOAT`.

    Only the last pattern that matches a layer applies. So the order matters: overrides with the same patterns in
    another order are not equal.

    Example:
        >>> overrides = Overrides.checked({"net.blocks.*": {"weight_bits": 4}, "net.blocks.0": "float"})
        >>> overrides.of("net.blocks.0.conv"), overrides.of("net.blocks.1"), overrides.of("net.head")
        ('float', {'weight_bits': 4}, {})
    """

    @classmethod
    def checked(cls, value: Any) -> Overrides:
        """Convert a mapping of any kind, such as OmegaConf's, to plain values; None means no overrides.

        Raises:
            ConfigurationError: It is not a mapping of this form, or a field cannot be set for a single layer.
        """
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"scheme.overrides={value!r} is not valid: use {_POSSIBLE}.")
        found = cls()
        for pattern, fields in value.items():
            if not isinstance(pattern, str) or not pattern:
                raise ConfigurationError(
                    f"scheme.overrides has the pattern {pattern!r}, which is not a name: use {_POSSIBLE}."
                )
            found[pattern] = _fields(pattern, fields)
        return found

    def of(self, name: str) -> Any:
        """The fields of the last pattern that matches a layer, `FLOAT`, or an empty dict if none matches."""
        found: Any = {}
        for pattern, fields in self.items():
            if matches(pattern, name):
                found = fields
        return found

    def with_layers(self, changes: Mapping[str, Any], scheme: Mapping[str, Any]) -> Overrides:
        """Overrides in which single layers have other fields, and keep all else that applies to them.

        The names of these layers become the last patterns, the outermost first, because a name also matches the layers
        inside. A layer that has its fields already gets no pattern.

        Args:
            changes: For each layer by its name, the fields to change, or `FLOAT`.
            scheme: The fields that apply where no pattern sets them.

        Example:
            >>> overrides = Overrides.checked({"net.*": {"weight_bits": 4, "weight_observer": "mse"}})
            >>> changed = overrides.with_layers({"net.a": {"weight_bits": 8}, "net.b": {"weight_bits": 4}}, {})
            >>> list(changed), changed.of("net.a")
            (['net.*', 'net.a'], {'weight_bits': 8, 'weight_observer': 'mse'})
        """
        found = Overrides(self)
        for name in sorted(changes, key=lambda name: name.count(".")):
            wanted = _changed(self.of(name), changes[name])
            if _changed(scheme, wanted) != _changed(scheme, found.of(name)):
                found.pop(name, None)
                found[name] = wanted
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


def _changed(fields: Any, by: Any) -> Any:
    """The fields of a layer, changed by others; a layer that was float has had none."""
    return FLOAT if by == FLOAT else {**({} if fields == FLOAT else fields), **by}


def _fields(pattern: str, fields: Any) -> Any:
    if fields == FLOAT:
        return FLOAT
    if not isinstance(fields, Mapping) or not fields:
        raise ConfigurationError(
            f"scheme.overrides[{pattern!r}]={fields!r} is not valid: use the word 'float', or a mapping of "
            f"{', '.join(OF_A_LAYER)}."
        )
    for field in fields:
        if field in OF_A_LAYER:
            continue
        near = difflib.get_close_matches(str(field), OF_A_LAYER, 1)
        instead = f"did you mean {near[0]!r}?" if near else "or set it for the whole network, outside of overrides."
        raise ConfigurationError(
            f"scheme.overrides[{pattern!r}] has {field!r}, which cannot be set for a single layer: use "
            f"{', '.join(OF_A_LAYER)}; {instead}"
        )
    return dict(fields)


def lineage(name: str) -> list[str]:
    """The names of a module and of all modules that contain it, the outermost first.

    Example:
        >>> lineage("net.head.fc")
        ['net', 'net.head', 'net.head.fc']
    """
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a module or one that contains it.

    In names of modules within ``torch.compile``, ``_orig_mod`` may be left out.

    Example:
        >>> matches("net.he*", "net.head.fc"), matches("fc", "net.head.fc")
        (True, False)
        >>> matches("net.head", "net._orig_mod.head.fc"), matches("net._orig_mod.head", "net._orig_mod.head.fc")
        (True, True)
    """
    within_compile = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return any(fnmatchcase(part, pattern) for part in [*lineage(name), *lineage(within_compile)])


def unmatched(overrides: Mapping[str, Any], layers: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The patterns that match none of the given layers, each with similar names of layers.

    Example:
        >>> list(unmatched({"net.haed": "float", "net.*": "float"}, ["net.stem", "net.head"]))
        [('net.haed', ['net.head'])]
    """
    for pattern in overrides:
        if not any(matches(pattern, layer) for layer in layers):
            ends = [layer for layer in layers if fnmatchcase(layer, f"*.{pattern}")]
            known = [*layers, *{outer for layer in layers for outer in lineage(layer)[:-1]}]
            yield pattern, (ends or difflib.get_close_matches(pattern, known, 3, 0.75))[:3]
