"""Exporting int8 networks to several formats; each file is loaded in a fresh process, compared and timed."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, ExportError, QuantizationError
from qat_lightning.export.call import Call
from qat_lightning.export.comparison import Comparison, judge, too_few_equal
from qat_lightning.export.formats import FORMATS, check_formats, get_format, stand_in
from qat_lightning.export.program import int8_network
from qat_lightning.export.protocol import Format, Source
from qat_lightning.export.remote import RemoteNetwork, Server
from qat_lightning.export.result import ExportResult, write_json
from qat_lightning.graph.example import Example, call_apart, example_of
from qat_lightning.graph.signature import one_sample, samples
from qat_lightning.measure.class_scores import ClassScores
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.measure.metrics import Agreement, latency_interleaved, outputs_by_path, size_mb
from qat_lightning.modes.float_state import present_float
from qat_lightning.modes.prepared import cpu_copy, is_prepared, prepared_state
from qat_lightning.settings.engines import engine_here
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import Place, copied_here, join, place, require_folder
from qat_lightning.whole_files import move_whole

FIGURES = "export.json"
"""Name of the file with the figures, beside the artifacts."""

_ROUNDS = 5


def export_quantized(
    network: nn.Module,
    folder: str | Path,
    formats: Sequence[str] = ("pt2",),
    *,
    example: Any = None,
    batches: Sequence[Any] = (),
    data: Sequence[Any] = (),
    classes: Collection[int] = (),
    reference: nn.Module | None = None,
    float_network: nn.Module | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    min_agreement: float = 0.995,
    min_sqnr_db: float = 20.0,
    name: str = "model",
) -> list[ExportResult]:
    """Write a quantized network in several formats; each is loaded again by its own runtime, compared and timed.

    Each format runs in a fresh process, so runtimes do not disturb each other. A format that fails does not affect the
    others: its result gives the reason. Files appear completely or not at all; ``export.json`` has the figures.

    Args:
        network: A prepared network, which is converted first, or an int8 one (`QuantizedNetwork`).
        folder: Where the files go; created if needed. A URL that fsspec supports (``s3://bucket/run``) receives files
            that were written and checked locally, those of a format in one transaction.
        formats: Names in `FORMATS`.
        example: A call of the network with a batch of 2 or more: an `Example`, a tuple of positional inputs, a mapping
            of keyword inputs, or one tensor. By default the one it was verified with.
        batches: Real calls to compare on; by default the example.
        data: The batch of data that each of these calls is from, in any structure: its labels show which output is
            scores of classes. Without it the shapes of the outputs have to do.
        classes: Numbers of classes that are known, for data without labels of most classes.
        reference: The network that artifacts are compared with; by default the prepared network (fake-quant), or the
            int8 network if there is no prepared one.
        float_network: The float network, timed in PyTorch and in each runtime, alternating with the int8 one; by
            default that of the prepared network, otherwise none.
        metric: Called with the artifact as a module that takes CPU tensors like the float network, returns the metric.
        min_agreement: Smallest share of outputs with the reference's top-1, where one is scores of classes. An artifact
            below it fails, unless so few outputs were compared that the difference may be chance (a binomial test,
            95 %). Outputs of integers must agree in about this share of their elements.
        min_sqnr_db: Smallest SQNR of each float output, in dB; lower where the network itself differs more when its
            inputs change by a thousandth, which the remark then says. An artifact with an output below it fails.
        name: Name of the files, before the suffix of their format.

    Returns:
        A result for each format, in their order.

    Raises:
        ConfigurationError: A format is unknown, the network is not quantized, or there is no real call.
        CombinationError: A format does not support networks of this mode and backend.
        MissingExtraError: The package of a format, or for the protocol of a URL, is not installed.
        ConversionError: A prepared network cannot be converted.

    Example:
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> mode, call = get_mode("fx"), Example((torch.randn(4, 8),))
        >>> prepared = mode.prepare(nn.Sequential(nn.Linear(8, 2)), call, Recipe("fx", "x86"))
        >>> _ = prepared.train()(*call.args)
        >>> (result,) = export_quantized(prepared, tempfile.mkdtemp(), ["torchscript"], example=call)
        >>> result.passed, result.path.name
        (True, 'model.torchscript.pt')
    """
    if isinstance(formats, str) or not formats:
        raise ConfigurationError(f"formats={formats!r} is not valid: give a list of some of {', '.join(FORMATS)}.")
    if not 0 <= min_agreement <= 1:
        raise ConfigurationError(f"min_agreement={min_agreement!r} is not valid: give a share from 0 to 1.")
    if not min_sqnr_db >= 0:
        raise ConfigurationError(f"min_sqnr_db={min_sqnr_db!r} is not valid: give 0 or more, in dB.")
    if data and len(data) != len(batches):
        raise ConfigurationError(f"data= has {len(data)} batches for {len(batches)} calls: give one for each call.")
    require_folder(folder)
    if is_prepared(network):
        check_formats(formats, prepared_state(network).recipe)  # before the expensive conversion
        reference = cpu_copy(network) if reference is None else reference
        float_network = present_float(network) if float_network is None else float_network
    example = None if example is None else example_of(example)
    int8 = int8_network(network, example)
    check_formats(formats, int8.recipe)
    example = int8.example if example is None else example
    limits = _Limits(min_agreement, min_sqnr_db)
    calls = [example_of(batch) for batch in batches] or [example]
    labels = _Labels(list(data) or [None] * len(calls), classes)
    job = _Job(int8, example, calls, labels, reference or int8, float_network, metric, limits)
    where = place(folder)
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
    results = [job.export(get_format(chosen), where, name) for chosen in formats]
    try:
        write_json(results, join(where, FIGURES))
    except OSError as error:
        warnings.warn(f"The results of the export could not be written to {FIGURES}: {error}", stacklevel=2)
    return results


@contextmanager
def open_artifact(result: ExportResult) -> Iterator[nn.Module]:
    """Load an artifact in a process of its runtime within a ``with`` block, and call it like the network.

    Args:
        result: A result that passed.

    Raises:
        ExportError: There is no artifact, or its runtime cannot load it.
        OSError: It is in remote storage and cannot be copied from there.
    """
    if result.path is None or result.call is None:
        raise ExportError(f"There is no artifact of {result.format!r} to open: {result.error}")
    with copied_here(result.files) as files, Server(result.format) as server:
        server.ask("load", "int8", str(files[0]))
        yield RemoteNetwork(server, "int8", result.call)


@dataclass(frozen=True)
class _Limits:
    agreement: float
    sqnr_db: float


@dataclass(frozen=True)
class _Labels:
    data: list[Any]
    classes: Collection[int]


class _Job:
    """The inputs and settings that all formats of one export share."""

    def __init__(
        self,
        network: QuantizedNetwork,
        example: Example,
        batches: list[Example],
        labels: _Labels,
        reference: nn.Module,
        float_network: nn.Module | None,
        metric: Callable[[nn.Module], float] | None,
        limits: _Limits,
    ) -> None:
        self.source = Source(network, example)
        self.batches = [self.source.at_inference(call) for call in batches]
        self.labels = labels
        self.reference = reference
        self._returned: list[Any] = []
        self.float_network = float_network
        self.metric = metric
        self.limits = limits
        self.call = Call.of(self.source)

    def export(self, chosen: Format, folder: Place, name: str) -> ExportResult:
        """Write, load in a fresh process, compare and time one format."""
        held = "" if self.source.quantized is None else self.source.quantized.source
        result = ExportResult(chosen.name, chosen.runtime, source=held, call=self.call)
        # A folder beside the destination, if that is local, so that files only have to be renamed.
        beside = folder if isinstance(folder, Path) else None
        with tempfile.TemporaryDirectory(dir=beside, prefix=".") as apart, tempfile.TemporaryDirectory() as elsewhere:
            try:
                path = _write(chosen, self.source, Path(apart), name)
                if instead := stand_in(chosen.name, self.source.recipe):
                    self._compare_instead(get_format(instead), Path(elsewhere), result)
                else:
                    self._run(chosen, path, Path(elsewhere), result)
                made = [path, *(other for other in sorted(Path(apart).iterdir()) if other != path)]
                megabytes = sum(_size(file) for file in made) / 1e6
                result.files = move_whole(made, folder)
            except QuantizationError as error:
                result.error = str(error)
                return result
            except Exception as error:  # noqa: BLE001 (any failure must affect neither the fit nor other formats)
                result.error = f"{chosen.runtime}: {type(error).__name__}: {error}"
                return result
        result.size_mb = megabytes
        if self.float_network is not None:
            result.size_ratio = size_mb(self.float_network) / result.size_mb
        return result

    def _run(self, chosen: Format, path: Path, folder: Path, result: ExportResult) -> None:
        """Load the file in a process of its runtime, compare and time it."""
        with Server(chosen.name) as server:
            server.ask("load", "int8", str(path))
            result.kernels = server.ask("kernels", str(path))
            result.ports = server.ask("ports", str(path))
            result.remark = _remark(result, self.source.quantized)
            self._compare(server, chosen, result)
            self._time(server, chosen, folder, result)

    def _compare_instead(self, other: Format, folder: Path, result: ExportResult) -> None:
        """Compare the program that a file was made from, if no runtime here can run the file."""
        assert self.source.recipe is not None
        with Server(other.name) as server:
            server.ask("load", "int8", str(_write(other, self.source, folder)))
            self._compare(server, other, result)
        result.remark = _joined(
            result.remark,
            f"no runtime for backend={self.source.recipe.backend!r} files is available here: the {other.runtime} that "
            "this file was made from was compared instead",
        )

    def _compare(self, server: Server, chosen: Format, result: ExportResult) -> None:
        remote = RemoteNetwork(server, "int8", self.call)
        calls = self._calls(chosen)
        fidelity = Fidelity(of_all_processes=False, scores=self._scores)  # other processes do not export
        found = Comparison()
        largest = 0.0
        for call, wanted in zip(calls, self._wanted(calls), strict=True):
            got = remote(*call.args, **call.kwargs)
            found.update(wanted, got)
            fidelity.update(wanted, got, (call.args, call.kwargs))
            largest = max(largest, *_differences(wanted, got))
        values = fidelity.compute()
        result.agreement = values.get("agreement")
        result.sqnr_db = values.get("sqnr_db", result.sqnr_db)
        result.sqnr_db_of_outputs = found.sqnr_db
        result.max_difference = largest
        self._judge(found, fidelity.agreement, calls, result)
        if self.metric is not None:
            result.metric = float(self.metric(remote))

    @cached_property
    def _scores(self) -> ClassScores:
        """What knows which output of the reference is scores of classes."""
        scores = ClassScores(self.labels.classes)
        for call, wanted, data in zip(self.batches, self._wanted(self.batches), self.labels.data, strict=True):
            scores.update(outputs_by_path(wanted), (call.args, call.kwargs), data)
        return scores

    def _wanted(self, calls: list[Example]) -> list[Any]:
        """Return the reference's outputs; they are the same for all formats that run whole batches."""
        if calls is self.batches and self._returned:
            return self._returned
        with torch.no_grad():
            returned = [call_apart(self.reference, call) for call in calls]
        if calls is self.batches:
            self._returned = returned
        return returned

    def _calls(self, chosen: Format) -> list[Example]:
        """Return the batches, split into single samples if the file needs that and an output has no batch dimension."""
        if chosen.batch is None or all(self.call.batched_results):
            return self.batches
        return [sample for batch in self.batches for sample in samples(batch)]

    def _judge(self, found: Comparison, chosen: Agreement, calls: list[Example], result: ExportResult) -> None:
        limits = self.limits
        if too_few_equal(int(chosen.same), int(chosen.rows), limits.agreement):
            assert result.agreement is not None, "there are rows"
            raise ExportError(
                f"{result.runtime} computes different values: the top-1 of {result.agreement:.2%} of the outputs "
                f"equals that of fake-quant, and at least {limits.agreement:.2%} is required (min_agreement)."
                f"{self._overflow()}"
            )
        judged = judge(found, self.reference, calls, min_sqnr_db=limits.sqnr_db, min_equal=limits.agreement)
        if judged.wrong:
            raise ExportError(
                f"{result.runtime} computes different values than fake-quant: {judged.wrong}.{self._overflow()}"
            )
        result.remark = _joined(result.remark, judged.remark)

    def _overflow(self) -> str:
        """A likely cause of different values, if the kernels of runtimes overflow on this CPU."""
        engine = None if self.source.recipe is None else self.source.recipe.target.engine
        return "" if engine_here(engine) == engine else f" {_OVERFLOW}"

    def _time(self, server: Server, chosen: Format, folder: Path, result: ExportResult) -> None:
        """Time one sample, alternating between the float network in PyTorch and both networks in the runtime."""
        if self.float_network is not None:
            try:
                floats = Source(self.float_network, self.source.example, self.source.recipe)
                server.ask("load", "float", str(_write(chosen, floats, folder)))
            except QuantizationError as error:
                warnings.warn(f"The float network is not timed in {chosen.runtime}: {error}", stacklevel=4)
        one = one_sample(self.source.example)
        tensors = [tensor.contiguous() for tensor in self.call.flatten(one.args, one.kwargs)]
        times: dict[str, list[float]] = {}
        for _ in range(_ROUNDS):
            if self.float_network is not None:
                eager = latency_interleaved({"eager": self.float_network}, one.args, one.kwargs, rounds=1)
                times.setdefault("eager", []).append(eager["eager"].median_ms)
            for key, value in server.ask("time", tensors, 3).items():
                times.setdefault(key, []).append(value)
        medians = {key: statistics.median(values) for key, values in times.items()}
        result.latency_ms = medians["int8"]
        result.float_latency_ms = medians.get("float")
        result.eager_latency_ms = medians.get("eager")


_OVERFLOW = (
    "This CPU has no VNNI, and without it kernels of other runtimes overflow with 8-bit weights as well. Export on a "
    "CPU with VNNI, or train with backend='fbgemm', whose weights have 7 bits."
)
_ADD_IN_16_BITS = frozenset({"onnx", "openvino"})
"""Formats whose runtimes add pairs of products in 16 bits on a CPU without VNNI."""


def overflow_here(formats: Collection[str], recipe: Recipe) -> str:
    """Say before training that files may be refused because their kernels overflow on this CPU; empty if they do not.

    Args:
        formats: The chosen formats.
        recipe: The recipe of the network.
    """
    concerned = sorted(_ADD_IN_16_BITS.intersection(formats))
    engine = recipe.target.engine
    if not concerned or engine_here(engine) == engine or recipe.scheme.weight_bits < 8:
        return ""
    return f"export={','.join(concerned)} may compute different values here, and then writes no file. {_OVERFLOW}"


def _joined(*remarks: str) -> str:
    return "; ".join(remark.removesuffix(".") for remark in remarks if remark)


def _remark(result: ExportResult, network: QuantizedNetwork | None) -> str:
    found = result.kernels
    if found is None or found.int8 >= found.layers:
        return ""
    what = f"{result.runtime} runs {found.layers - found.int8} of {found.layers} layers in float"
    if network is not None and network.recipe.mode == "pt2e":
        what += ", whose outputs are on no grid in mode='pt2e'; mode='fx' puts each on one, and they run in int8"
    return f"{what}."


def _write(chosen: Format, source: Source, folder: Path, name: str = "float") -> Path:
    path = folder / f"{name}{chosen.suffix}"
    try:
        chosen.write(source, path)
    except QuantizationError:
        raise
    except Exception as error:
        raise ExportError(f"{chosen.runtime} cannot run the network: {type(error).__name__}: {error}") from error
    return path


def _size(made: Path) -> int:
    return (
        made.stat().st_size
        if made.is_file()
        else sum(part.stat().st_size for part in made.rglob("*") if part.is_file())
    )


def _differences(wanted: Any, got: Any) -> list[float]:
    others = outputs_by_path(got)
    return [
        float((one.float() - others[path].float()).abs().max())
        for path, one in outputs_by_path(wanted).items()
        if path in others and one.shape == others[path].shape and one.numel()
    ] or [0.0]
