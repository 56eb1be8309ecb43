"""Every YAML file is composed, and checked against the code that reads it."""

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.errors import CombinationError
from qat_lightning.run import app
from qat_lightning.settings.backends import BACKENDS, pairs
from tests.support.boxed_images import make_boxed_images
from tests.support.targets import missing

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PACKAGED = ROOT / "src" / "qat_lightning" / "conf"
FILES = sorted([*CONF.rglob("*.yaml"), *PACKAGED.rglob("*.yaml")])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
Compose = Callable[..., DictConfig]


def options(group: str, where: Path = CONF) -> list[str]:
    return sorted(path.stem for path in (where / group).glob("*.yaml") if not path.stem.startswith("_"))


def commands(path: Path) -> list[list[str]]:
    opening = path.read_text().split("\n\n")[0].splitlines()
    found = re.findall(r"python \w+\.py(.*)", "\n".join(line for line in opening if line.startswith("#")))
    # two spaces and prose may follow a command
    return [shlex.split(re.split(r" {2,}|;", command.strip())[0]) for command in found]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_opens_with_a_command_that_uses_it(path: Path) -> None:
    assert path.read_text().startswith("#")
    assert commands(path)


@pytest.mark.parametrize("path", [path for path in FILES if CONF in path.parents], ids=lambda path: path.stem)
@pytest.mark.slow
def test_the_commands_of_a_file_compose(path: Path, composed: Compose) -> None:
    for words in commands(path):
        composed(*(word for word in words if not word.startswith("-") and "," not in word))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        key, _, value = line.partition(":")
        says_itself = key.strip() in ("", "_target_", "defaults") or key.strip().startswith(("#", "-"))
        refers = value.strip().startswith("${")
        opens_a_mapping = not value.strip()
        if not (says_itself or refers or opens_a_mapping or "#" in value or lines[number - 1].lstrip().startswith("#")):
            # the pairs' two keys and the experiments' repeat keys that are commented where they are introduced
            assert path.parent.name in ("quantization", "experiment", "debug", "trainer"), f"{path}: {line}"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "val", "test"):
        for label in ("cat", "dog", "eel"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (9, 12)).save(folder / "1.png")
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / "scenes" / split / kind).mkdir(parents=True)
            Image.new(mode, (9, 12)).save(tmp_path / "scenes" / split / kind / "1.png")
    return make_boxed_images(tmp_path / "photos", train=1, val=1, test=1)  # in images/, with a table


EXTRA = {
    "data=detection_csv": ["data.num_classes=2", "data.datamodule.suffix=.png", "model=single_shot"],
    "data=image_folder": ["data.num_classes=3"],
    "data=segmentation_folder": ["data.num_classes=3", "model=unet"],
    "experiment=segmentation": ["data.num_classes=3"],
    "data=digit_masks": ["model=deeplab_mobilenet"],
    "data=text_file": ["model=char_transformer"],
    "model=char_transformer": ["data=text_file"],
    "model=single_shot": ["data=detection_csv", "data.num_classes=2", "data.datamodule.suffix=.png"],
    "model=unet": ["data=digit_masks"],
    "model=deeplab_mobilenet": ["data=digit_masks"],
    "model=custom": ["model.module.net._target_=qat_lightning.demos.ResNet20"],
}
CHOICES = [f"{group}={option}" for group in ("data", "model", "logger", "callbacks") for option in options(group)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_becomes_objects(choice: str, composed: Compose, images: Path) -> None:
    text = images / "train" / "cat" / "1.png"  # any file is bytes
    paths = {
        "data=detection_csv": images,
        "data=image_folder": images,
        "data=segmentation_folder": images.parent / "scenes",
        "data=text_file": text,
    }
    extra = EXTRA.get(choice, [])
    extra = [*extra, *(f"data.datamodule.path={paths[word]}" for word in (choice, *extra) if word in paths)]
    cfg = composed("method=float", "trainer=cpu", choice, *extra)
    app.check(cfg)
    run = app.build(cfg)
    assert isinstance(run.model, LightningModule)
    assert isinstance(run.datamodule, LightningDataModule)
    assert all(isinstance(callback, Callback) for callback in run.callbacks)
    assert all(isinstance(logger, Logger) for logger in run.loggers)
    assert bool(run.loggers) == (choice != "logger=none")


@pytest.mark.parametrize(
    ("model", "metric", "mode"),
    [
        ("vit", "acc", "max"),
        ("char_transformer", "perplexity", "min"),
        ("single_shot", "map", "max"),
        ("unet", "miou", "max"),
    ],
)
def test_all_that_decides_goes_by_the_metric_of_the_model(
    model: str, metric: str, mode: str, composed: Compose
) -> None:
    for callbacks, name in (("default", "model_checkpoint"), ("early_stopping",) * 2, ("pruning",) * 2):
        part = composed(f"model={model}", f"callbacks={callbacks}").callbacks[name]
        assert (part.monitor, part.mode) == (f"val/{metric}", mode)
    assert composed(f"model={model}", "method=auto").ladder.metric == f"val/{metric}"
    for search in options("hparams_search"):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        cfg = compose("config", [f"model={model}", f"hparams_search={search}"], return_hydra_config=True)
        objective, direction = (OmegaConf.select(cfg, key) for key in ("objective", "hydra.sweeper.direction"))
        first = (objective, direction) if isinstance(objective, str) else (objective[0], direction[0])
        assert first == (f"val/{metric}", f"{mode}imize")


def test_data_of_another_task_is_refused_before_anything_is_built(composed: Compose) -> None:
    for words, says in (
        (["model=unet"], "learns a label for each pixel, and data=digits has one for each sample"),
        (["data=digit_masks"], "has one for each pixel: choose another data= or model="),
        (["model=char_transformer"], "model=char_transformer learns a label for each token"),
    ):
        with pytest.raises(CombinationError, match=re.escape(says)):
            app.check(composed(*words))
    app.check(composed("data=digit_masks", "model.labels=pixel"))


def test_files_are_held_to_the_agreement_that_a_model_states(composed: Compose) -> None:
    for given, least in (([], 0.995), (["+model.min_agreement=0.98"], 0.98)):
        for name in set(options("export")) - {"none"}:
            cfg = composed("model=unet", f"export={name}", "method=qat", *given)
            assert cfg.callbacks.export.min_agreement == least


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if OmegaConf.is_dict(node) and not node._is_none():
        if node.get("_target_"):
            yield path, node
        for key in node:
            if not (OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key)):
                yield from targets(node[key], f"{path}.{key}".strip("."))


CHOICES_BY_SIGNATURE = [
    f"{group}={name}" for group in ("trainer", "method", "recipe", "scheme", "debug") for name in options(group)
]


@pytest.mark.parametrize("choice", [*CHOICES_BY_SIGNATURE, *(f"experiment={name}" for name in options("experiment"))])
def test_every_key_is_a_parameter_of_what_reads_it(choice: str, composed: Compose) -> None:
    for path, node in targets(composed(choice, *EXTRA.get(choice, []))):
        parameters = inspect.signature(get_object(node._target_)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            unknown = {key for key in node if not str(key).startswith("_")} - parameters.keys()
            assert not unknown, f"{path} of {choice}: {node._target_} does not take {unknown}"


def test_the_packaged_group_has_every_setting_with_the_default_of_the_code() -> None:
    for name, callback in (("qat", QuantizationAwareTraining), ("ptq", PostTrainingQuantization)):
        _has_every_setting(OmegaConf.load(PACKAGED / "quantization" / f"{name}.yaml"), callback)


def _has_every_setting(cfg: Any, callback: Any) -> None:
    for node, code in ((cfg, callback), (cfg.scheme, Scheme)):
        values = {key: value for key, value in node.items() if not key.startswith("_") and key != "scheme"}
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(code).parameters.items()
            if name != "scheme"
        }
        assert values == defaults
    assert instantiate(cfg.scheme) == Scheme()


@pytest.mark.parametrize("name", sorted({*options("scheme")} - {"default"}))
def test_a_scheme_goes_with_the_method_of_its_command(name: str, composed: Compose) -> None:
    for words in commands(CONF / "scheme" / f"{name}.yaml"):
        callback = instantiate(composed(*words).quantization)
        assert callback.scheme != Scheme()


@pytest.mark.parametrize("choice", ["scheme=default", "recipe=none", "export=none"])
def test_the_default_of_an_optional_group_changes_nothing(choice: str, composed: Compose) -> None:
    assert composed(choice) == composed()
    assert composed("method=float", choice) == composed("method=float")


@pytest.mark.parametrize("name", options("recipe"))
def test_a_recipe_has_the_defaults_of_the_code(name: str, composed: Compose) -> None:
    for path, node in targets(composed(f"recipe={name}").callbacks):
        if path == name:
            values = {key: value for key, value in node.items() if not str(key).startswith("_")}
            parameters = inspect.signature(get_object(node._target_)).parameters
            assert values == {key: parameter.default for key, parameter in parameters.items()}
            assert isinstance(instantiate(node), Callback)


def test_the_packaged_group_has_every_pair() -> None:
    named = {f"{mode}_{backend}" for mode, backend in pairs()}
    assert set(options("quantization", PACKAGED)) == {*named, "qat", "ptq", "auto"}
    for mode, backend in pairs():
        cfg = OmegaConf.load(PACKAGED / "quantization" / f"{mode}_{backend}.yaml")
        assert (cfg.mode, cfg.backend) == (mode, backend)


def test_the_groups_have_every_mode_and_backend(composed: Compose) -> None:
    by_parts = [("parts", backend) for mode, backend in pairs() if mode == "fx"]
    assert options("mode") == sorted({"auto", "parts", *(mode for mode, _ in pairs())})
    assert options("backend") == sorted({"custom", *BACKENDS})
    for mode, backend in [*pairs(), *by_parts]:
        cfg = composed(f"mode={mode}", f"backend={backend}")
        assert (cfg.quantization.mode, cfg.quantization.backend) == (mode, backend)
        assert cfg.run.tags == ["qat", mode, backend, "small_mobilenet"]
        if not missing(backend):
            assert isinstance(instantiate(cfg.quantization), QuantizationAwareTraining)


@pytest.mark.parametrize("point", ["3", "0.5", "{epoch:3}", "{step:1200}", "{fraction:0.5}"])
def test_a_schedule_point_can_be_written_in_every_way(point: str, composed: Compose) -> None:
    instantiate(composed(f"quantization.start={point}").quantization)
