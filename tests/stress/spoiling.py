"""Damaged files of int8 networks: flipped bytes, truncated members, replaced JSON values."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

DESCRIPTION, TENSORS = "network.json", "tensors.bin"

_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63)),
    *(0.0, -0.0, 0.5, -1.5, 1e-45, 1e-300, 1e30, 1e308, float("nan"), float("inf"), -float("inf"), 10**40),
)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, "", "x", "0", "relu", "float32", "qint8", [], {}, [1], [[]]),
    *({"tuple": []}, {"tuple": [0, 0]}, {"tensor": 0}, {"tensor": 10**6}, {"node": "x"}, {"float": "nan"}),
    *({"dtype": "qint8"}, {"dtype": "complex64"}, {"device": "cuda"}, {"dict": []}, {"a": 1, "b": 2}),
)


def members(data: bytes) -> tuple[Any, bytes]:
    """The contents of a valid file: its description and its tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return json.loads(archive.read(DESCRIPTION)), archive.read(TENSORS)


def packed(description: Any, tensors: bytes, **more: bytes) -> bytes:
    """A file with these members and a valid archive."""
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(DESCRIPTION, text)
        archive.writestr(TENSORS, tensors, zipfile.ZIP_STORED)
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def flip(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Flip bits anywhere in the file, in runs of one to eight bytes."""
    spoilt = bytearray(data)
    where = [draw.randrange(len(data)) for _ in range(draw.choice((1, 1, 1, 2, 8)))]
    for start in where:
        for place in range(start, min(len(data), start + draw.choice((1, 1, 1, 2, 8)))):
            spoilt[place] ^= draw.randrange(1, 256)
    return bytes(spoilt), f"bytes flipped from {where}"


def flip_ends(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Flip bits in the archive's own structures: the first hundred and the last three hundred bytes."""
    head = draw.random() < 0.3
    spoilt = bytearray(data)
    place = draw.randrange(100) if head else len(data) - 1 - draw.randrange(300)
    spoilt[place] ^= draw.randrange(1, 256)
    return bytes(spoilt), f"byte {place} of {len(data)} flipped"


def cut(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Remove a part of the file: its end, its beginning, or a section between."""
    start = draw.randrange(len(data))
    end = draw.choice((len(data), len(data), draw.randrange(start, len(data)) + 1))
    return data[:start] + data[end:], f"bytes {start} to {end} cut out"


def cut_member(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Truncate a member in a valid archive; or omit, duplicate or add a member."""
    description, tensors = members(data)
    text = json.dumps(description).encode()
    kind = draw.choice(("json", "json", "tensors", "tensors", "longer", "empty", "more", "text"))
    start, end = sorted(draw.randrange(len(text)) for _ in range(2))
    if kind == "json":
        return packed(text[:start] + text[end:], tensors), f"{start} to {end} cut out of {DESCRIPTION}"
    if kind == "tensors":
        start, end = sorted(draw.randrange(max(1, len(tensors))) for _ in range(2))
        return packed(description, tensors[:start] + tensors[end:]), f"{start} to {end} cut out of {TENSORS}"
    if kind == "longer":
        return packed(description, tensors + draw.randbytes(64)), f"{TENSORS} is longer"
    if kind == "empty":
        return packed(b"", b""), "members are empty"
    if kind == "more":
        return packed(description, tensors, more=b"x"), "there is one more member"
    spoilt = bytearray(text)
    spoilt[start] ^= draw.randrange(1, 256)
    return packed(bytes(spoilt), tensors), f"byte {start} of {DESCRIPTION} flipped"


def replace(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Replace a value of the description, a number by a number or any value by any."""
    description, tensors = members(data)
    numbers = draw.random() < 0.7
    places = [place for place in _places(description) if not numbers or _is_number(_at(description, place))]
    said = []
    spoilt = copy.deepcopy(description)
    for place in draw.sample(places, min(len(places), draw.choice((1, 1, 1, 2)))):
        new = _another(_at(description, place), draw) if numbers else draw.choice(_OTHERS + _NUMBERS)
        try:
            holder = _at(spoilt, place[:-1])
            holder[place[-1]] = copy.deepcopy(new)
        except (LookupError, TypeError):  # the first of two replacements took the place of the second away
            continue
        said.append(f"{'.'.join(map(str, place))} is {new!r}")
    return packed(spoilt, tensors), ", ".join(said)


def remove(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Remove a key or an item of the description, or duplicate an item."""
    description, tensors = members(data)
    place = draw.choice(_places(description))
    holder = _at(description, place[:-1])
    if isinstance(holder, list) and draw.random() < 0.3:
        holder.insert(place[-1], copy.deepcopy(holder[place[-1]]))
        return packed(description, tensors), f"{'.'.join(map(str, place))} is there twice"
    del holder[place[-1]]
    return packed(description, tensors), f"{'.'.join(map(str, place))} is missing"


def spoil_tensors(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Replace bytes of the tensors in a valid archive; scales may become NaN."""
    description, tensors = members(data)
    spoilt = bytearray(tensors)
    start = draw.randrange(max(1, len(spoilt) - 8)) & ~3
    new = draw.choice((b"\xff" * 4, b"\0" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f", draw.randbytes(8)))
    spoilt[start : start + len(new)] = new
    return packed(description, bytes(spoilt[: len(tensors)])), f"{new!r} at {start} of {TENSORS}"


WAYS: tuple[Callable[[bytes, random.Random], tuple[bytes, str]], ...] = (
    *(flip, flip_ends, cut, cut_member, spoil_tensors),
    *(replace, replace, replace, remove),
)


def spoil(data: bytes, seed: int, *, whole_again: bool = False) -> tuple[bytes, str]:
    """Damage a file in a random way.

    Args:
        data: A valid file.
        seed: Seed of the random draw.
        whole_again: Remove the digest, as after a deliberate change, so that only the checks of each value remain.

    Returns:
        The damaged file, and a description of the damage.
    """
    draw = random.Random(seed)
    way = draw.choice(WAYS)
    if whole_again:
        description, tensors = members(data)
        description.pop("digest", None)
        data = packed(description, tensors)
    spoilt, what = way(data, draw)
    return spoilt, f"{way.__name__}: {what}"


def _another(number: Any, draw: random.Random) -> Any:
    near = (number + 1, number - 1, -number, number * 2, number * 1000, number / 3)
    return draw.choice((draw.choice(near), draw.choice(_NUMBERS)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    return list(_walk(node, path))


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _walk(value, (*path, key))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node
