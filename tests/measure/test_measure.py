"""The measures agree with numpy in float64, and leave the measured modules unchanged."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.measure.metrics import (
    Agreement,
    Latency,
    SignalToQuantizationNoiseRatio,
    agreement,
    class_axis,
    latency_interleaved,
    latency_ms,
    size_mb,
)
from qat_lightning.numerics.sqnr import sqnr_db

values = st.floats(-1e3, 1e3, width=32)
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=40)


def numpy_sqnr_db(reference, actual):
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    signal, noise = (reference**2).sum(), ((reference - actual) ** 2).sum()
    if noise == 0:
        return math.inf
    with np.errstate(divide="ignore"):
        return 10 * np.log10(signal / noise)


@given(pairs)
def test_sqnr_is_numpys_in_float64(pairs):
    reference, actual = np.array(pairs, dtype=np.float32).T
    expected = numpy_sqnr_db(reference, actual)
    assert sqnr_db(torch.tensor(reference), torch.tensor(actual)) == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_sqnr_is_not_lost_in_float32():
    reference = torch.full((1000,), 1000.0)
    actual = reference.clone()
    actual[0] = torch.nextafter(actual[0], torch.tensor(2000.0))
    assert sqnr_db(reference, actual) == pytest.approx(numpy_sqnr_db(reference.numpy(), actual.numpy()))
    assert sqnr_db(reference, actual) > 170


@pytest.mark.parametrize(
    ("reference", "actual", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0], [0.0], math.inf),
        ([], [], math.inf),
        ([0.0], [1.0], -math.inf),
        ([math.nan], [1.0], math.nan),
        ([1.0], [math.nan], math.nan),
        ([math.inf], [math.inf], math.nan),
        ([1.0], [2.0], 0.0),
    ],
)
def test_the_edges_of_sqnr(reference, actual, expected):
    reference, actual = torch.tensor(reference), torch.tensor(actual)
    assert sqnr_db(reference, actual) == pytest.approx(expected, nan_ok=True)
    metric = SignalToQuantizationNoiseRatio()
    metric.update(reference, actual)
    assert metric.compute().item() == pytest.approx(expected, nan_ok=True)


def test_quantized_and_half_tensors_are_measured():
    x = torch.tensor([[0.0, 1.0, 2.0]])
    q = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
    assert sqnr_db(x, q) == math.inf
    assert sqnr_db(x.bfloat16(), x) == math.inf
    assert agreement(x, q) == 1.0


@pytest.mark.parametrize("measure", [sqnr_db, agreement])
def test_different_shapes_are_refused_with_both(measure):
    with pytest.raises(ConfigurationError, match=r"\(2, 3\).*\(2, 1\)"):
        measure(torch.zeros(2, 3), torch.zeros(2, 1))


@given(pairs, st.integers(1, 5))
def test_the_sqnr_metric_is_the_sqnr_of_all_batches_together(pairs, batch_size):
    reference, actual = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    metric = SignalToQuantizationNoiseRatio()
    for batch in zip(reference.split(batch_size), actual.split(batch_size), strict=True):
        metric.update(*batch)
    assert metric.compute().item() == pytest.approx(sqnr_db(reference, actual), rel=1e-9, abs=1e-9)


def test_the_sqnr_metric_sums_in_float64_whatever_the_module_around_it_is_cast_to():
    metric = nn.ModuleDict({"sqnr": SignalToQuantizationNoiseRatio()}).half()["sqnr"]
    metric.update(torch.ones(3), torch.ones(3))
    assert metric.signal.dtype == metric.noise.dtype == torch.float64


scores = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**31 - 1))


@given(scores, st.sampled_from([(), (3,), (2, 3)]))
def test_agreement_is_numpys(scores, positions):
    rows, classes, seed = scores
    # few distinct scores, so that ties are common
    reference, actual = np.random.default_rng(seed).integers(0, 4, (2, rows, classes, *positions)).astype(np.float32)
    expected = (reference.argmax(1) == actual.argmax(1)).mean(dtype=np.float64)
    assert agreement(torch.tensor(reference), torch.tensor(actual)) == pytest.approx(expected)
    metric = Agreement()
    for batch in zip(torch.tensor(reference).split(2), torch.tensor(actual).split(2), strict=True):
        metric.update(*batch)
    assert metric.compute().item() == pytest.approx(expected)
    assert int(metric.rows) == rows * math.prod(positions)


def test_no_rows_have_no_agreement():
    assert math.isnan(agreement(torch.zeros(0, 3), torch.zeros(0, 3)))


@pytest.mark.parametrize("output", [torch.zeros(()), torch.zeros(8), torch.zeros(8, 1), torch.zeros(8, 3).long()])
def test_an_output_without_classes_is_refused_and_pointed_to_sqnr(output):
    assert class_axis(output) is None
    with pytest.raises(ConfigurationError, match=r"no class axis.*sqnr_db"):
        agreement(output, output)


@pytest.mark.parametrize("metric_class", [Agreement, SignalToQuantizationNoiseRatio])
def test_states_are_summed_over_processes(metric_class):
    metric = metric_class()
    assert metric._reductions
    assert all(
        reduction is not None and reduction.__name__ == "dim_zero_sum" for reduction in metric._reductions.values()
    )


@pytest.mark.parametrize("metric_class", [Agreement, SignalToQuantizationNoiseRatio])
def test_metrics_reset(metric_class):
    metric = metric_class()
    metric.update(torch.eye(3), 1 - torch.eye(3))
    spoiled = metric.compute()
    metric.reset()
    metric.update(torch.eye(3), torch.eye(3))
    assert metric.compute() > spoiled


def test_size_counts_bytes_saved():
    assert size_mb(nn.Linear(500, 500, bias=False)) == pytest.approx(1.0, rel=5e-3)
    assert size_mb(nn.Linear(500, 500, bias=False).bfloat16()) == pytest.approx(0.5, rel=5e-3)
    assert size_mb(nn.ReLU()) < 0.002


class Sleeper(nn.Module):
    """Takes a given time, and records how it was called."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds
        self.dropout = nn.Dropout()
        self.calls = []

    def forward(self, x, *, scale=1.0):
        self.calls.append((self.training, self.dropout.training, torch.is_inference_mode_enabled(), scale))
        time.sleep(self.seconds)
        return x * scale


def test_latency_is_the_time_of_one_call():
    latency = latency_ms(Sleeper(0.005), (torch.ones(1),), min_run_time=0.05)
    assert isinstance(latency, Latency)
    assert 5 <= latency.median_ms < 100
    assert latency.iqr_ms >= 0
    assert latency.runs >= 3


@pytest.mark.parametrize(
    "measure",
    [
        lambda module: latency_ms(module, (torch.ones(1),), {"scale": 2.0}, min_run_time=0.001),
        lambda module: latency_interleaved({"it": module}, (torch.ones(1),), {"scale": 2.0}, 2, block_time=0.001),
    ],
)
def test_modules_are_timed_in_evaluation_and_inference_mode_and_left_as_they_were(measure):
    module = Sleeper(0.0005)
    module.dropout.eval()
    measure(module)
    assert set(module.calls) == {(False, False, True, 2.0)}
    assert module.training
    assert not module.dropout.training


def test_flags_come_back_after_a_module_that_fails():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    module = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        latency_ms(module, (torch.ones(1),))
    assert module.training
    assert not torch.is_inference_mode_enabled()


def test_interleaved_modules_take_turns():
    order = []

    def recording(name):
        class Recording(nn.Module):
            def forward(self, x):
                order.append(name)
                time.sleep(0.002)
                return x

        return Recording()

    latencies = latency_interleaved(
        {"a": recording("a"), "b": recording("b")}, (torch.ones(1),), rounds=4, block_time=0.002
    )
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    # the warm-up of each, then a b, b a, a b, b a
    assert turns == ["a", "b", "a", "b", "a", "b", "a"]
    assert list(latencies) == ["a", "b"]


def test_interleaved_latencies_keep_their_ratio():
    modules = {"slow": Sleeper(0.008), "fast": Sleeper(0.002)}
    latencies = latency_interleaved(modules, (torch.ones(1),), rounds=5, block_time=0.002)
    assert latencies["slow"].median_ms > 2 * latencies["fast"].median_ms
    assert latencies["slow"].runs == 5


def test_a_bare_tensor_as_args_is_refused_with_what_to_type():
    with pytest.raises(ConfigurationError, match=r"\(x,\)"):
        latency_ms(nn.ReLU(), torch.ones(2, 2))
    with pytest.raises(ConfigurationError, match=r"\(x,\)"):
        latency_interleaved({"it": nn.ReLU()}, torch.ones(2, 2))


def test_no_rounds_are_refused():
    with pytest.raises(ConfigurationError, match="rounds=0"):
        latency_interleaved({"it": nn.ReLU()}, (torch.ones(1),), rounds=0)


def test_timing_uses_the_present_number_of_threads():
    seen = set()

    class Threads(nn.Module):
        def forward(self, x):
            seen.add(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        latency_ms(Threads(), (torch.ones(1),), min_run_time=0.001)
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


def test_the_axis_of_the_classes_of_tokens() -> None:
    tokens, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    scores = torch.zeros(2, 5, 9)
    assert class_axis(scores, {"input_ids": tokens}) == 2
    assert class_axis(scores, (mask,)) == 1
    assert class_axis(scores, (mask,), -1) == 2
    assert class_axis(torch.zeros(2, 5), (tokens,)) == 1
    assert class_axis(torch.zeros(2, 1, 9), (torch.zeros(2, 1, dtype=torch.long),)) == 2
    assert class_axis(torch.zeros(2, 1, 9), (mask,)) is None
    assert class_axis(torch.zeros(2, 3), (), 2) is None
    assert class_axis(tokens, (tokens,)) is None


def test_agreement_of_scores_of_tokens_is_over_the_words() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    one = torch.randn(2, 3, 5)
    other = one.clone()
    other[0, 0] = -one[0, 0]  # another word at one of six positions
    fidelity = Fidelity()
    fidelity.update({"logits": one}, {"logits": other}, ((tokens,), {}))
    assert fidelity.compute()["agreement"] == pytest.approx(5 / 6)
