"""Invalid settings, networks, data and files, each with a name that the error message must contain."""

from __future__ import annotations

import hashlib
import io
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning.artifact import artifact_bytes, load_quantized
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import QuantizationError
from qat_lightning.settings.backends import BACKENDS, MODES
from qat_lightning.settings.schedule import SchedulePoint
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import Lit, loader, trainer
from tests.stress.spoiling import spoil


@dataclass(frozen=True)
class Malformed:
    """Something invalid, and the expected reaction.

    Attributes:
        kind: Its family.
        what: Description.
        names: One of these must be in the message.
        provoke: Triggers it; gets files to use, and returns nothing.
        module: The LightningModule that must not change, if there is one.
        prepared: Whether the network may already be prepared; its weights must not change in any case.
        harmless: Whether it may also have no effect, which ``provoke`` checks.
    """

    kind: str
    what: str
    names: tuple[str, ...]
    provoke: Callable[[Files], Any]
    module: LightningModule | None = field(default=None, repr=False)
    prepared: bool = False
    harmless: bool = False


def complaint(case: Malformed, files: Files) -> str:
    """Trigger it, and return what is wrong with the reaction; empty if nothing is."""
    before = {} if case.module is None else {k: _copied(v) for k, v in case.module.state_dict().items()}
    hooks = None if case.module is None else len(case.module._load_state_dict_pre_hooks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.provoke(files)
    except QuantizationError as error:
        message = str(error)
        if not any(name in message for name in case.names):
            return f"the message names none of {case.names}: {message}"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{type(error).__name__} instead of an error of ours: {str(error)[:500]}"
    else:
        return "" if case.harmless else "no error"
    if case.module is None:
        return ""
    after = case.module.state_dict()
    if not case.prepared and before.keys() != after.keys():
        return f"the LightningModule has other keys: {sorted(before.keys() ^ after.keys())[:5]}"
    moved = [k for k, v in before.items() if isinstance(v, Tensor) and not torch.equal(v, after[k])]
    if moved:
        return f"the LightningModule has moved: {moved[:5]}"
    patched = {"configure_model", "log", "log_dict"} | (set() if case.prepared else {"forward"})
    left = patched & set(case.module.__dict__)
    if left or len(case.module._load_state_dict_pre_hooks) != hooks:
        return f"left behind: {sorted(left) or 'a hook'}"
    return ""


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Files:
    """Checkpoints and int8 networks, valid and damaged, created on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved: dict[str, tuple[bytes, Any]] = {}

    @cached_property
    def quantized(self) -> bytes:
        """The file of an int8 network."""
        callback = QuantizationAwareTraining("fx")
        trainer(callback, max_steps=1).fit(Lit(), loader())
        callback.save(self.folder / "good.int8")
        return (self.folder / "good.int8").read_bytes()

    def saved(self, mode: str) -> tuple[bytes, Any, Callable[[], Any]]:
        """The file of an int8 network of a mode, the network, and the float network that loading may need."""
        if mode not in self._saved:
            callback = QuantizationAwareTraining(mode)
            trainer(callback, max_steps=1).fit(Lit(), loader())
            self._saved[mode] = artifact_bytes(callback.quantized), callback.quantized
        return (*self._saved[mode], lambda: Lit().net if mode == "eager" else None)

    def checkpoint(self, mode: str | None, **settings: Any) -> Path:
        """A Lightning checkpoint of a fit with these settings; without a mode, of a float fit."""
        # Settings in words may be too long for the name of a file.
        name = f"{mode}_{hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]}"
        path = self.folder / f"{name}.ckpt"
        if not path.exists():
            saving = ModelCheckpoint(self.folder, filename=name, every_n_train_steps=1)
            callbacks = [saving] if mode is None else [QuantizationAwareTraining(mode, **settings), saving]
            trainer(*callbacks, max_steps=1, enable_checkpointing=True).fit(Lit(), loader())
        return path

    def spoilt(self, content: bytes) -> Path:
        """A file with any content."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".ckpt", delete=False) as file:
            file.write(content)
        return Path(file.name)


# Values of every kind, of which each setting takes a few

_THINGS: list[Any] = [
    None,
    object(),
    int,
    len,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    -1,
    -0.5,
    1.5,
    "",
    " ",
    "x",
    "None",
    "false",
    b"fx",
    (),
    [],
    {},
    set(),
    [None],
    [1],
    [""],
    {"": 1},
    Path("nowhere"),
    torch.zeros(2),
    torch.tensor(4),
    np.zeros(2),
    np.array(["fx", "eager"]),
    nn.ReLU(),
    Scheme,
    True,
    False,
]
_things = st.one_of(
    st.sampled_from(_THINGS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=4), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=6), st.integers(), max_size=3),
)

_points = st.one_of(
    _things,
    st.dictionaries(st.sampled_from(["epoch", "step", "fraction", "Epoch", "steps"]), _things, min_size=1, max_size=3),
)


def _is_point(value: Any) -> bool:
    if value is None or isinstance(value, SchedulePoint):
        return True
    if isinstance(value, bool):
        return False
    if isinstance(value, Mapping):
        if len(value) != 1:
            return False
        ((unit, at),) = value.items()
        if unit == "fraction":
            return isinstance(at, Real) and not isinstance(at, bool) and 0 <= at <= 1
        return unit in ("epoch", "step") and isinstance(at, Integral) and not isinstance(at, bool) and at >= 0
    if isinstance(value, Integral):
        return value >= 0
    return isinstance(value, Real) and 0 <= value <= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value)


_ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "mode": lambda v: isinstance(v, str) and v in (*MODES, "auto"),
    "backend": lambda v: isinstance(v, str) and v in BACKENDS,
    "module": lambda v: v is None or isinstance(v, str) or _is_names(v),
    "example_inputs": lambda v: v is None or isinstance(v, Tensor),
    "scheme": lambda v: v is None or isinstance(v, Scheme),
    "start": _is_point,
    "freeze_observers": lambda v: _is_point(v) and v not in (0, 0.0),
    "freeze_batchnorm": _is_point,
    "include": lambda v: v is None or _is_names(v),
    "exclude": lambda v: v is None or _is_names(v),
    "convert_on_fit_end": lambda v: isinstance(v, bool),
    "float_checkpoint": lambda v: v is None,
    "reset_best_on_start": lambda v: isinstance(v, bool),
}

_SCHEME: dict[str, Callable[[Any], bool]] = {
    "weight_bits": lambda v: isinstance(v, int) and not isinstance(v, bool) and 2 <= v <= 8,
    "weight_granularity": lambda v: isinstance(v, str) and v in ("per_channel", "per_tensor"),
    "activation_bits": lambda v: isinstance(v, int) and not isinstance(v, bool) and v == 8,
    "activation_symmetric": lambda v: isinstance(v, bool),
    "averaging_constant": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1,
}


def _refused(accepted: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not accepted(value)


@st.composite
def settings(draw: st.DrawFn) -> Malformed:
    """One argument of the callback is invalid."""
    name = draw(st.sampled_from(list(_ACCEPTED)))
    values = _points if name in ("start", "freeze_observers", "freeze_batchnorm") else _things
    value = draw(values.filter(_refused(_ACCEPTED[name])))
    return Malformed(
        "settings",
        f"{name}={value!r}",
        (name,),
        lambda _: QuantizationAwareTraining(**{name: value}),
    )


@st.composite
def schemes(draw: st.DrawFn) -> Malformed:
    """One field of the scheme is invalid."""
    name = draw(st.sampled_from(list(_SCHEME)))
    value = draw(_things.filter(_refused(_SCHEME[name])))
    return Malformed("scheme", f"Scheme({name}={value!r})", (f"scheme.{name}",), lambda _: Scheme(**{name: value}))


@st.composite
def pairs(draw: st.DrawFn) -> Malformed:
    """An unsupported combination of mode and backend."""
    wrong = [(mode, name) for mode in MODES for name, row in BACKENDS.items() if mode not in row.modes]
    mode, backend = draw(st.sampled_from(wrong))
    return Malformed(
        "settings",
        f"mode={mode!r}, backend={backend!r}",
        (f"backend={backend!r}",),
        lambda _: QuantizationAwareTraining(mode, backend),
    )


_modes = st.sampled_from(MODES)


def _fit(lit: LightningModule, mode: str, data: Any = None, **given: Any) -> None:
    trainer(QuantizationAwareTraining(mode, **given)).fit(lit, data or loader())


_words = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789 é", min_size=1, max_size=12)


_NO_NETWORKS = [
    "hparams",
    "forward",
    "accuracy",
    "net.temperature",
    "net.nothing",
    "net.",
    ".net",
    "net..head",
    "net.norm",
    "net.features.7",
    "net.head.weight",
    "..",
]


@st.composite
def modules(draw: st.DrawFn) -> Malformed:
    """``module`` names something that does not exist, or contains nothing to quantize."""
    missing = _words.map(lambda word: f"{word}x")
    known = st.sampled_from(_NO_NETWORKS)
    name = draw(st.one_of(missing, known))
    value = draw(st.sampled_from([name, [name], ["net.head", name], ["net", "net.head"], [".", "net"], ["net", "net"]]))
    module = Lit()
    mode = draw(_modes)
    # A name that holds nothing to quantize is itself in the message.
    names = ("module=", *(repr(one) for one in ([value] if isinstance(value, str) else value)))
    return Malformed("module", f"{mode}, module={value!r}", names, lambda _: _fit(module, mode, module=value), module)


@st.composite
def globs(draw: st.DrawFn) -> Malformed:
    """``include`` or ``exclude`` match nothing, or leave nothing to quantize."""
    name = draw(st.sampled_from(["include", "exclude"]))
    word = draw(_words.filter(lambda word: word.strip(".") not in ("net", "accuracy")))
    nothing = [f"{word}?", f"net.{word}x", f"*.{word}x", f"{word}[", "net.head.*"]
    leaves_nothing = {"include": [["net.norm"]], "exclude": [["*"], ["net"], ["net.*"], ["net", "accuracy"]]}
    value = draw(st.one_of(st.sampled_from(nothing).map(lambda glob: [glob]), st.sampled_from(leaves_nothing[name])))
    module = Lit()
    mode = draw(_modes)
    return Malformed(
        "globs", f"{mode}, {name}={value!r}", (f"{name}=",), lambda _: _fit(module, mode, **{name: value}), module
    )


_x = torch.randn(2, 1, 8, 8)
_EXAMPLES: list[Any] = [
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 1, 2, 2),
    torch.zeros(2, 1, 9, 9),
    torch.zeros(2, 8),
    torch.zeros(2),
    torch.tensor(1.0),
    torch.zeros(0, 1, 8, 8),
    torch.zeros(2, 1, 0, 8),
    torch.zeros(2, 1, 8, 8, dtype=torch.int64),
    torch.zeros(2, 1, 8, 8, dtype=torch.bool),
    torch.zeros(2, 1, 8, 8, dtype=torch.complex64),
    (_x, _x),
    (_x, "x"),
    ("x", _x),
    ((_x,),),
    [[_x]],
    {"x": "x", "y": _x},
    {"images": _x},
    {"x": _x, "z": _x},
    {"x": torch.zeros(2, 3, 8, 8)},
    {1: _x},
    (np.zeros((2, 1, 8, 8)), _x),
    torch.zeros(2, 1, 8, 8).to_sparse(),
    torch.zeros(2, 1, 8, 8, device="meta"),
]


@st.composite
def examples(draw: st.DrawFn) -> Malformed:
    """``example_inputs`` with which the network cannot be called."""
    value = draw(st.sampled_from(_EXAMPLES))
    module, mode = Lit(), draw(_modes)
    return Malformed(
        "example",
        f"{mode}, example_inputs={_shown(value)}",
        ("example_inputs",),
        lambda _: _fit(module, mode, example_inputs=value),
        module,
    )


class _Bare(Lit):
    def __init__(self, net: nn.Module | None) -> None:
        super().__init__(nn.ReLU())
        if net is None:
            del self.net
        else:
            self.net = net


class _FailsEarly(Lit):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.error is not None:
            raise self.error
        return torch.zeros((), requires_grad=True)

    validation_step = None  # type: ignore[assignment]


class _Breaks(nn.Module):
    """Fails when it is called."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            raise self.error
        return self.layer(x.flatten(1))


class _Two(Lit):
    """A valid network and one that fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.other = _Breaks(error)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.other(batch[0]).sum()


_ERRORS: list[Exception] = [
    ValueError("wrong"),
    KeyError("image"),
    RuntimeError("shape"),
    TypeError(),
    AttributeError("gone"),
    IndexError(3),
    StopIteration(),
    AssertionError(),
    ZeroDivisionError("by zero"),
    NotImplementedError(),
]


@st.composite
def networks(draw: st.DrawFn) -> Malformed:
    """Nothing to quantize, or a failing step or network."""
    error = draw(st.sampled_from(_ERRORS))
    module: LightningModule = draw(
        st.sampled_from(
            [
                lambda: _Bare(None),
                lambda: _Bare(nn.Sequential(nn.ReLU(), nn.Flatten())),
                lambda: _Bare(nn.Embedding(4, 4)),
                lambda: _Bare(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())),
                lambda: _FailsEarly(error),
                lambda: _FailsEarly(None),
                lambda: Lit(_Breaks(error)),
                lambda: _Two(error),
                lambda: Lit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 4))),
            ]
        )
    )()
    mode = draw(_modes)
    what = f"{mode}, {type(module).__name__}, {getattr(module, 'net', None)!r}, {error!r}"
    names = ("_Bare", "example_inputs", "network", "net")
    given = {"module": ["net", "other"]} if isinstance(module, _Two) else {}
    return Malformed("network", what, names, lambda _: _fit(module, mode, **given), module)


@st.composite
def batches(draw: st.DrawFn) -> Malformed:
    """The network cannot be called with the data."""
    images = draw(
        st.sampled_from(
            [torch.zeros(8, 3, 8, 8), torch.zeros(8, 1, 2, 2), torch.zeros(8, 64), torch.zeros(8, 1, 8, 8).long()]
        )
    )
    module, mode = Lit(), draw(_modes)
    data = DataLoader(TensorDataset(images, torch.zeros(8).long()), batch_size=4)
    return Malformed(
        "data",
        f"{mode}, batches of {_shown(images)}",
        ("example_inputs", "batch"),
        lambda _: _fit(module, mode, data),
        module,
    )


_contents = st.one_of(
    st.binary(max_size=64), st.text(max_size=64).map(str.encode), st.just(b""), st.just(b"PK\x03\x04")
)


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@st.composite
def float_checkpoints(draw: st.DrawFn) -> Malformed:
    """``float_checkpoint`` is not a checkpoint, incomplete, or of another model."""
    module, mode = Lit(), draw(_modes)
    kind = draw(st.sampled_from(["any", "cut", "other", "shape", "value", "missing", "folder", "prefix"]))
    content, share = draw(_contents), draw(st.floats(0.01, 0.99))
    seed = draw(st.integers(0, 99))

    def path(files: Files) -> Path:
        whole = files.checkpoint(None)
        state = torch.load(whole, weights_only=True)["state_dict"]
        key = random.Random(seed).choice(sorted(k for k in state if k.startswith("net.")))
        if kind == "missing":
            return files.folder / "nowhere.ckpt"
        if kind == "folder":
            return files.folder
        values = {
            "any": content,
            "cut": whole.read_bytes()[: int(share * whole.stat().st_size)],
            "other": _bytes({"state_dict": nn.Linear(3, 3).state_dict()}),
            "shape": _bytes({"state_dict": state | {key: torch.zeros(5, 5)}}),
            "value": _bytes(state | {key: "x"}) if seed % 2 else _bytes([state]),
            "prefix": _bytes({k.removeprefix("net."): v for k, v in state.items() if k != key}),
        }
        return files.spoilt(values[kind])

    return Malformed(
        "float_checkpoint",
        f"{mode}, {kind}, {content!r}, {share}, {seed}",
        ("float_checkpoint=",),
        lambda files: _fit(module, mode, float_checkpoint=path(files)),
        module,
    )


_RECIPES: list[dict[str, Any]] = [
    {"backend": "fbgemm"},
    {"exclude": ["net.head"]},
    {"include": ["net.features"]},
    {"scheme": Scheme(weight_bits=4)},
    {"scheme": Scheme(activation_symmetric=True)},
    {"module": "net.features"},
]


@st.composite
def resumes(draw: st.DrawFn) -> Malformed:
    """The checkpoint to resume from has another recipe or kind, or is incomplete."""
    module, mode = Lit(), draw(_modes)
    kind = draw(st.sampled_from(["recipe", "mode", "any", "cut", "missing", "state", "list"]))
    stage = draw(st.sampled_from(["fit", "test", "validate"]))
    recipe = draw(st.sampled_from([r for r in _RECIPES if mode != "pt2e" or "backend" not in r]))
    content, share = draw(_contents), draw(st.floats(0.01, 0.99))

    def path(files: Files) -> Path:
        if kind == "recipe":
            return files.checkpoint(mode, **recipe)
        if kind == "mode":
            return files.checkpoint(MODES[MODES.index(mode) - 1])
        if kind == "missing":
            return files.folder / "nowhere.ckpt"
        whole = files.checkpoint(mode)
        state = torch.load(whole, weights_only=True)["state_dict"]
        values = {
            "any": content,
            "cut": whole.read_bytes()[: int(share * whole.stat().st_size)],
            "state": _bytes(state),
            "list": _bytes([1, 2]),
        }
        return files.spoilt(values[kind])

    def provoke(files: Files) -> None:
        run = trainer(QuantizationAwareTraining(mode))
        getattr(run, stage)(module, loader(), ckpt_path=str(path(files)))

    said = {"recipe": next(iter(recipe)), "mode": "mode"}.get(kind, "ckpt_path=")
    return Malformed(
        "resume", f"{stage}, {mode}, {kind}, {recipe}, {content!r}, {share}", (said,), provoke, module, prepared=True
    )


@st.composite
def artifacts(draw: st.DrawFn) -> Malformed:
    """The file to load is not an int8 network, or incomplete."""
    kind = draw(st.sampled_from(["any", "cut", "checkpoint", "torch", "missing", "folder"]))
    content, share = draw(_contents), draw(st.floats(0.01, 0.99))

    def provoke(files: Files) -> None:
        if kind == "missing":
            load_quantized(files.folder / "nowhere.int8")
        if kind == "folder":
            load_quantized(files.folder)
        if kind == "checkpoint":
            load_quantized(files.checkpoint("fx"))
        values = {
            "any": content,
            "cut": files.quantized[: int(share * len(files.quantized))],
            "torch": _bytes({"a": torch.zeros(2)}),
        }
        load_quantized(files.spoilt(values[kind]))

    return Malformed("load_quantized", f"{kind}, {content!r}, {share}", ("ckpt", "int8", "cannot be read"), provoke)


@st.composite
def saved_files(draw: st.DrawFn) -> Malformed:
    """An int8 file with flipped bytes, truncated members, or replaced JSON values."""
    mode, seed = draw(_modes), draw(st.integers(0, 10**9))

    def provoke(files: Files) -> None:
        good, network, given = files.saved(mode)
        spoilt, _ = spoil(good, seed)
        loaded = load_quantized(files.spoilt(spoilt), network=given())
        images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        if not torch.equal(loaded(images), network(images)):
            raise AssertionError("what was loaded is another network")

    names = ("cannot be", "damaged", "not an int8 network", "reads formats")
    return Malformed("saved files", f"{mode}, spoil(good, {seed})", names, provoke, harmless=True)


@st.composite
def variants(draw: st.DrawFn) -> Malformed:
    """An unknown variant."""
    name = draw(st.one_of(st.text(max_size=8), st.just("int8 ")).filter(lambda v: v not in ("float", "int8")))
    return Malformed(
        "variant", f"use_variant({name!r})", ("variant",), lambda _: QuantizationAwareTraining().use_variant(name)
    )


FAMILIES: Sequence[Callable[[], st.SearchStrategy[Malformed]]] = (
    settings,
    settings,
    schemes,
    pairs,
    modules,
    globs,
    examples,
    networks,
    batches,
    float_checkpoints,
    resumes,
    artifacts,
    saved_files,
    saved_files,
    variants,
)

malformed: st.SearchStrategy[Malformed] = st.one_of([family() for family in FAMILIES])


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__}{tuple(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_shown, value))})"
    return repr(value)
