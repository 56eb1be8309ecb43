"""Files made to run code when they are loaded: each raises an error, and no code runs."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_lightning.artifact import artifact_bytes, load_quantized
from qat_lightning.errors import ArtifactError, QuantizationError
from tests.artifact.making import batch_of, case_named, quantize, read, write
from tests.artifact.networks import Zoo

CODE = "__import__('pathlib').Path('canary').touch()"


@pytest.fixture(autouse=True)
def _no_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executed code would leave a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    yield
    assert not Path("canary").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bytes]]:
    """The contents of valid files."""
    contents = {}
    case = case_named("several_inputs")
    for mode in ("fx", "pt2e", "eager"):
        path = tmp_path_factory.mktemp("good") / mode
        path.write_bytes(artifact_bytes(quantize(mode, "x86", case.network(), batch_of(case))))
        contents[mode] = read(path)
    path.write_bytes(
        artifact_bytes(quantize("fx", "x86", torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.GELU())))
    )
    contents["small"] = read(path)
    return contents


def refused(content: tuple[Any, bytes], match: str = "cannot be loaded", **options: Any) -> None:
    write(Path("bad.int8"), *content)
    with pytest.raises(ArtifactError, match=match):
        load_quantized("bad.int8", **options)


def changed(content: tuple[Any, bytes], change: Callable[[dict[str, Any]], None]) -> tuple[Any, bytes]:
    description = copy.deepcopy(content[0])
    change(description["network"])
    return description, content[1]


def add_node(
    op: str, target: Any, args: Any = (), kwargs: Any = None, name: str = "evil"
) -> Callable[[dict[str, Any]], None]:
    def change(network: dict[str, Any]) -> None:
        record = {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs or {}}
        network["nodes"].insert(1, record)

    return change


INJECTIONS = [
    CODE,
    f"x\n    {CODE}\n    y",
    f"x); {CODE} #",
    f'x"); {CODE} #',
    f"x'); {CODE} #",
    f"x = {CODE}",
    f"*args, y={CODE}",
    f"x: {CODE}",
    "x\\",
    "lambda: 0",
    "class",
    "",
    "a b",
    "\uff45xec",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_code_in_names(good: dict, text: str) -> None:
    for op, target in (("call_function", "torch.rand"), ("placeholder", "more")):
        refused(changed(good["fx"], add_node(op, target, name=text)), "not a plain name")


@pytest.mark.parametrize("text", INJECTIONS)
def test_code_in_names_of_inputs(good: dict, text: str) -> None:
    refused(changed(good["fx"], add_node("placeholder", text)), "not a plain name")
    if text:
        refused(changed(good["fx"], add_node("placeholder", f"**{text}")), "not a plain name")


@pytest.mark.parametrize("text", INJECTIONS)
def test_code_in_keywords(good: dict, text: str) -> None:
    refused(changed(good["fx"], add_node("call_function", "torch.rand", [2], {text: 1})), "not a plain name")


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("op", ["call_module", "get_attr"])
def test_code_in_targets(good: dict, op: str, text: str) -> None:
    refused(changed(good["fx"], add_node(op, text)), "which its graph uses")

    def as_part(network: dict[str, Any]) -> None:
        add_node(op, text)(network)
        network["used"][text] = {"buffer": {"tensor": 0}}

    if text != "class":  # a Python keyword is no way to code, only one to a syntax error
        refused(changed(good["fx"], as_part))


@pytest.mark.parametrize("text", INJECTIONS)
def test_code_in_methods_functions_and_operations(good: dict, text: str) -> None:
    node = [{"node": "x"}]
    refused(changed(good["fx"], add_node("call_method", text, node)), "method")
    refused(changed(good["fx"], add_node("call_function", text, node)), "not allowed to call")
    refused(changed(good["fx"], add_node(text, "x", node)), "no operation")
    refused(changed(good["fx"], add_node("call_function", "getattr", [*node, text])), "attribute")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "os:system",
        "builtins:eval",
        "builtins:exec",
        "posix:system",
        "subprocess:run",
        "eval",
        "exec",
        "print",
        "open",
        "__import__",
        "torch.load",
        "torch.save",
        "torch.from_file",
        "torch.hub.load",
        "torch.compile",
        "torch.jit.load",
        "torch.classes.load_library",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten._index_put_impl_.default",
        "torch.ops.prim.Print",
        "torch.ops.aten.relu.__call__",
        "torch.ops.aten.relu._op",
        "torch.ops.aten.__class__",
        "torch.ops.higher_order.out_dtype.x",
        "torch.ops.quantized.make_quantized_cell_params",
        "torch.utils.cpp_extension.load",
        "operator.methodcaller",
        "operator.attrgetter",
        "operator.call",
        "torch.add.__globals__",
        "torch.set_num_threads",
        "torch.manual_seed",
        "torch.__dict__",
    ],
)
def test_functions_off_the_list(good: dict, target: str) -> None:
    refused(changed(good["fx"], add_node("call_function", target, ["touch canary"])))
    # There is no such way inside a graph of pt2e either.
    refused(
        changed(good["pt2e"], lambda network: add_node("call_function", target, ["touch canary"])(network["graph"]))
    )


@pytest.mark.parametrize(
    "target",
    [
        "__class__",
        "__reduce__",
        "__setstate__",
        "numpy",
        "tolist",
        "map_",
        "apply_",
        "register_hook",
        "backward",
        "set_",
        "storage",
        "data_ptr",
        "share_memory_",
        "module_load",
        "relu.__globals__",
        "type",
        "resize_",
        "requires_grad_",
    ],
)
def test_methods_off_the_list(good: dict, target: str) -> None:
    refused(changed(good["fx"], add_node("call_method", target, [{"node": "x"}])), "method")


@pytest.mark.parametrize(
    "name", ["__class__", "__dict__", "__globals__", "grad_fn", "data", "_backward_hooks", "storage"]
)
def test_attributes_off_the_list(good: dict, name: str) -> None:
    refused(changed(good["fx"], add_node("call_function", "getattr", [{"node": "x"}, name])), "attribute")
    refused(changed(good["fx"], add_node("get_attr", name)), "which its graph uses")


def test_getattr_takes_nothing_but_a_listed_name_of_a_value(good: dict) -> None:
    for args in ([{"node": "x"}], [{"node": "x"}, {"node": "x"}], [{"node": "x"}, "shape", 0], ["text", "shape"], []):
        refused(changed(good["fx"], add_node("call_function", "getattr", args)), "attribute")


def test_methods_of_anything_but_values(good: dict) -> None:
    for args in (["text"], [], [{"dtype": "float32"}]):
        refused(changed(good["fx"], add_node("call_method", "split", args)), "not the result of a node")


@pytest.mark.parametrize(
    "name", ["forward", "__call__", "_run", "graph", "train", "__class__", "_modules", "set_graph", "_call_impl"]
)
def test_parts_that_would_replace_what_a_module_is(good: dict, name: str) -> None:
    def change(network: dict[str, Any]) -> None:
        network["used"][name] = {"buffer": {"tensor": 0}}

    def inside(network: dict[str, Any]) -> None:
        network["used"][f"part.{name}"] = {"value": "text"}

    refused(changed(good["fx"], change))
    if name not in ("_run", "graph", "set_graph"):
        refused(changed(good["fx"], inside))


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "load"},
        {"dtype": f"float32); {CODE} #"},
        {"layout": "save"},
        {"memory_format": "nn"},
        {"device": CODE},
        {"device": "cuda; rm"},
        {"qscheme": "ops"},
        {"float": "1e3"},
        {"float": CODE},
        {"pickle": "gASV"},
        {"function": "os.system"},
        {"code": CODE},
        {"tensor": -1},
        {"tensor": 10**6},
        {"tensor": "0"},
        {"tensor": True},
        {"node": "output"},
        {"node": CODE},
        {"namedtuple": [CODE, ["a"], [1]]},
        {"namedtuple": ["Point", [f"a={CODE}"], [1]]},
        {"namedtuple": ["Point", ["_replace"], [1]]},
        {"dict": [[{"tuple": [1]}, 1]]},
        {"dict": [[{"list": []}, 1]]},
        {"slice": [1]},
        {"a": 1, "b": 2},
        {},
    ],
)
def test_values_of_unknown_kinds(good: dict, value: Any) -> None:
    refused(changed(good["fx"], add_node("call_function", "torch.add", [{"node": "x"}, value])))
    refused(changed(good["fx"], add_node("call_function", "torch.add", [{"node": "x"}, [{"tuple": [value]}]])))


def test_text_stays_text(good: dict) -> None:
    """The value of a constant is returned by the network unchanged."""
    texts = [*INJECTIONS, '"""', "'''", "\\", "\n", "\r", "\0", "{0}", "%s", "\u2028", "\ud800", "\x1b[0m", "é"]

    def change(network: dict[str, Any]) -> None:
        network["nodes"][-1]["args"] = [{"dict": [[text, {"tuple": [text, [text]]}] for text in texts]}]

    description, data = changed(good["small"], change)
    write(Path("texts.int8"), description, data)
    result = load_quantized("texts.int8")(torch.zeros(1, 3, 2, 2))
    assert result == {text: (text, [text]) for text in texts}


@pytest.mark.parametrize(
    "layer",
    [
        {"class": "os.system", "arguments": {}, "state": {}},
        {"class": "torch.nn.Module", "arguments": {}, "state": {}},
        {"class": "torch.nn.Transformer", "arguments": {}, "state": {}},
        {"class": "torch.nn.utils.parametrize", "arguments": {}, "state": {}},
        {"class": "torch.nn.ReLU", "arguments": {"forward": 1}, "state": {}},
        {"class": "torch.nn.ReLU", "arguments": {"__class__": 1}, "state": {}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": 2, "out_features": 2, "device": "meta"}, "state": {}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": 2, "out_features": 2}, "state": {}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": 10**9, "out_features": 10**9}, "state": {}},
        {"class": "torch.nn.Upsample", "arguments": {"mode": {"code": CODE}}, "state": {}},
    ],
)
def test_layers_off_the_list(good: dict, layer: Any) -> None:
    def change(network: dict[str, Any]) -> None:
        network["used"]["evil"] = {"module": {"layer": layer}}
        add_node("call_module", "evil", [{"node": "x"}])(network)

    refused(changed(good["fx"], change))


@pytest.mark.parametrize("kind", ["os.system", "ConvAdd2d", "_FusedModule", "ConvReLU2d", None])
@pytest.mark.parametrize("parts", [[], [{"layer": {"class": "torch.nn.ReLU", "arguments": {}, "state": {}}}] * 2, CODE])
def test_fused_layers_off_the_list(good: dict, kind: Any, parts: Any) -> None:
    def change(network: dict[str, Any]) -> None:
        network["used"]["evil"] = {"module": {"fused": {"class": kind, "parts": parts}}}
        add_node("call_module", "evil", [{"node": "x"}])(network)

    refused(changed(good["fx"], change))


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack"])
def test_impossible_convolutions(backend: str) -> None:
    """Kernels divide by these numbers, and 0 would crash the process."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, groups=3), torch.nn.Flatten(), torch.nn.Linear(216, 2))
    Path("bad.int8").write_bytes(artifact_bytes(quantize("fx", backend, network)))
    good = read(Path("bad.int8"))
    for key, values in {
        "groups": (0, -1, 4, 5, 10**20, {"float": "nan"}, None),
        "stride": ((0, 0), (-1, 1), (1,), (1, 1, 1), (2**40, 1)),
        "dilation": ((0, 1), (-1, 1), ()),
        "padding": ((-1, 0), (0,), ("1", 1)),
        "padding_mode": ("os", None),
    }.items():
        for value in values:

            def change(network: dict[str, Any], key: str = key, value: Any = value) -> None:
                numbers = network["used"]["0"]["module"]["packed"]["numbers"]
                numbers[key] = {"tuple": list(value)} if isinstance(value, tuple) else value

            refused(changed(good, change))
    for part, other in (("0", "2"), ("2", "0")):

        def swap(network: dict[str, Any], part: str = part, other: str = other) -> None:
            layers = [network["used"][name]["module"]["packed"] for name in (part, other)]
            layers[0]["weight"] = layers[1]["weight"]

        refused(changed(good, swap))
        for value in (None, 1.0, "weight", {"tensor": 0}):
            for key in ("weight", "bias"):

                def replace(network: dict[str, Any], part: str = part, key: str = key, value: Any = value) -> None:
                    network["used"][part]["module"]["packed"][key] = value

                if (key, value) != ("bias", None):
                    refused(changed(good, replace))


def test_modules_of_unknown_kinds(good: dict) -> None:
    for module in ({"pickle": CODE}, {"code": CODE}, {}, {"layer": {}, "packed": {}}, CODE, None):
        for used in ({"module": module}, {"what": module}, {"packed": module}, {"graph": module}):

            def change(network: dict[str, Any], used: Any = used) -> None:
                network["used"]["evil"] = used

            refused(changed(good["fx"], change))


def test_own_modules_come_from_the_given_network_only(good: dict) -> None:
    """A path into the given network can refer only to its modules, with the right class."""

    def change(path: str, kind: str) -> Callable[[dict[str, Any]], None]:
        def apply(network: dict[str, Any]) -> None:
            network["used"]["evil"] = {"module": {"foreign": {"path": path, "class": kind, "state": {}}}}

        return apply

    network = Zoo()
    for path, kind in (("forward", "method"), ("__class__", "type"), ("stem.weight", "Parameter"), ("stem", "Linear")):
        refused(changed(good["fx"], change(path, kind)), "where the network given", network=network)


def test_structures_do_not_import(good: dict) -> None:
    """Upstream's loader of structures imports the factory of a defaultdict by a name from the file."""
    upstream = {"defaultdict": {"default_factory_module": "os", "default_factory_name": "system"}}
    for key in ("in", "out"):
        for value in (upstream, "[1, {}]", {"leaf": True, "dict": []}, [1, 2, 3], {"type": "os.system"}):

            def change(network: dict[str, Any], key: str = key, value: Any = value) -> None:
                network[key] = value

            content = changed(good["pt2e"], change)
            write(Path("bad.int8"), *content)
            try:
                loaded = load_quantized("bad.int8")
            except ArtifactError:
                continue
            with pytest.raises((QuantizationError, ValueError, TypeError)):
                loaded(torch.zeros(1, 3, 8, 8), torch.zeros(1, 5))


def test_signatures_do_not_run(good: dict) -> None:
    for row in ([CODE, "POSITIONAL_ONLY"], ["x", CODE], ["x", "POSITIONAL_ONLY", {"code": CODE}], "x", [], None):

        def change(network: dict[str, Any], row: Any = row) -> None:
            network["signature"] = [row]

        refused(changed(good["pt2e"], change))


def test_impossible_tensors(good: dict) -> None:
    for key, value in (
        ("dtype", "load"),
        ("dtype", "quint8"),
        ("shape", [10**12]),
        ("shape", [-1]),
        ("shape", ["2"]),
        ("shape", 3),
        ("order", [5]),
        ("order", []),
        ("start", -64),
        ("start", 10**12),
        ("start", 1.5),
    ):
        description, data = copy.deepcopy(good["fx"])
        for entry in description["tensors"]:
            if entry["shape"]:
                entry[key] = value
        refused((description, data))


def test_pickles_are_not_opened(good: dict) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return eval, (CODE,)

    evil = pickle.dumps(Evil())
    Path("bad.int8").write_bytes(evil)
    with pytest.raises(ArtifactError):
        load_quantized("bad.int8")
    torch.save(Evil(), "bad.int8")
    with pytest.raises(ArtifactError):
        load_quantized("bad.int8", trusted=True)
    description, data = good["fx"]
    with zipfile.ZipFile("bad.int8", "w") as archive:
        archive.writestr("network.json", json.dumps(description))
        archive.writestr("tensors.bin", data)
        archive.writestr("data.pkl", evil)
    with pytest.raises(ArtifactError):
        load_quantized("bad.int8")


def test_deep_nesting(good: dict) -> None:
    description, data = changed(good["fx"], add_node("call_function", "torch.add", ["NESTED"]))
    for depth in (400, 5000):
        nested = '{"tuple":[' * depth + "1" + "]}" * depth
        with zipfile.ZipFile("bad.int8", "w") as archive:
            archive.writestr("network.json", json.dumps(description).replace('"NESTED"', nested))
            archive.writestr("tensors.bin", data)
        with pytest.raises(ArtifactError):
            load_quantized("bad.int8")
    with zipfile.ZipFile("bad.int8", "w") as archive:
        archive.writestr("network.json", "[" * 200_000)
        archive.writestr("tensors.bin", b"")
    with pytest.raises(ArtifactError):
        load_quantized("bad.int8")


def test_graphs_that_are_none(good: dict) -> None:
    def no_output(network: dict[str, Any]) -> None:
        del network["nodes"][-1]

    def two_outputs(network: dict[str, Any]) -> None:
        network["nodes"].insert(0, {**network["nodes"][-1], "name": "first", "args": [1]})

    def twice(network: dict[str, Any]) -> None:
        network["nodes"].insert(1, network["nodes"][0])

    def later(network: dict[str, Any]) -> None:
        network["nodes"][0], network["nodes"][-2] = network["nodes"][-2], network["nodes"][0]

    for change in (no_output, two_outputs, twice, later):
        refused(changed(good["fx"], change))


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Yield every container in a description with each of its keys."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    found = [(data, key) for key in keys]
    for key in keys:
        found += _places(data[key])
    return found


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([CODE, "__class__", "os.system", [], {}, [[]], {"node": "x"}, {"tensor": 0}, {"dtype": "float32"}]),
)


@settings(max_examples=300)
@given(place=st.integers(min_value=0), junk=JUNK, mode=st.sampled_from(["fx", "pt2e", "eager"]))
def test_any_change_is_refused_or_harmless(good: dict, place: int, junk: Any, mode: str) -> None:
    """With any value replaced by any other, the file loads or raises one of our errors."""
    description, data = copy.deepcopy(good[mode])
    places = _places(description)
    holder, key = places[place % len(places)]
    holder[key] = junk
    write(Path("changed.int8"), description, data)
    try:
        load_quantized("changed.int8", network=case_named("several_inputs").network() if mode == "eager" else None)
    except QuantizationError:
        return
