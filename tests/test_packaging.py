"""The lock file, the version ranges and the wheel agree."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    canonicalize_name(name): Version(version)
    for name, version in (
        line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    )
}
EXTRAS = PROJECT["optional-dependencies"]
# Ray's launcher wants cloudpickle 2.2.1, and joblib of the lock wants 3; the benchmarks' weights are no use to tests;
# LiteRT's converter and the jaxlib that it needs are 0.9 GB; tosa-tools wants numpy below 2.2; NNCF is for one target;
# the site and the release have a lock of their own
APART = {"ray", "benchmarks", "litert", "arm", "executorch-openvino", "docs", "release"}
REQUIREMENTS = [
    requirement
    for text in chain(PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS if name not in APART))
    if (requirement := Requirement(text)).name != PROJECT["name"]
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_lock_pins_every_dependency_within_its_range(requirement):
    assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_two_malicious_lightning_releases_are_excluded(version):
    (lightning,) = (requirement for requirement in REQUIREMENTS if requirement.name == "lightning")
    assert not lightning.specifier.contains(version)
    assert LOCK["lightning"] != Version(version)


def test_the_lock_holds_no_cuda_no_torchvision_and_no_local_versions():
    assert not [name for name in LOCK if name == "torchvision" or name.startswith(("nvidia", "cuda", "triton"))]
    assert not [name for name, version in LOCK.items() if version.local]


def test_all_names_every_extra():
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.extras == EXTRAS.keys() - {"all"} - APART


def test_the_changelog_begins_with_this_version():
    headings = re.findall(
        r"^## \[(\S+)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert headings[0][0] == PROJECT["version"]


REPOSITORY = "https://git.example.org/some/where"
README = (ROOT / "README.md").read_text()
readme = runpy.run_path(str(ROOT / "setup.py"))["readme"]


def test_links_of_the_readme_lead_to_the_tag_in_the_repository():
    shown = readme(README, REPOSITORY, "1.2.3")
    assert f"[Get started in five minutes]({REPOSITORY}/blob/v1.2.3/docs/start.md)" in shown
    assert not re.findall(r"\]\((?!https://|#)", shown)


def test_links_that_are_absolute_already_stay():
    text = "[a](https://example.org/a) [b](#limits) [c](docs/c.md#part)"
    assert readme(text, REPOSITORY + "/", "1") == text.replace("docs/", f"{REPOSITORY}/blob/v1/docs/")


def test_without_a_repository_links_of_the_readme_are_plain_text():
    shown = readme(README, None, "1.2.3")
    assert "**Get started in five minutes** · **Tutorials**" in shown
    assert not re.findall(r"\]\((?!https://|#)", shown)


def test_the_site_and_the_package_name_one_repository():
    declared = re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert (declared and declared[1]) == PROJECT.get("urls", {}).get("Repository")


def built(folder: Path, kind: str) -> Path:
    """The wheel or sdist, built from a copy of tracked files, since a build writes next to its sources."""
    sources = folder / "sources"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    program = f"import setuptools.build_meta as b; print(b.build_{kind}(r'{folder}'))"
    made = subprocess.run([sys.executable, "-c", program], cwd=sources, check=True, capture_output=True, text=True)
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel: dependencies come from this environment, the package does not."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # not its .pth files: no editable install
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


def in_it(installed: Path, *command: str) -> str:
    """The output of a command in that environment, outside the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [str(installed / "venv" / "bin" / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=installed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = wheel.parent / "sources" / "src"
    expected = {
        path.relative_to(package).as_posix()
        for path in (package / "qat_lightning").rglob("*")
        if path.suffix in {".py", ".yaml", ".html", ".css", ".js"} or path.name == "py.typed"
    }
    assert packed == expected


@pytest.mark.slow
def test_the_wheel_shows_the_readme_with_links_that_work_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    repository = PROJECT.get("urls", {}).get("Repository")
    assert str(metadata.get_payload()).strip() == readme(README, repository, PROJECT["version"]).strip()


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "src/qat_lightning/conf/quantization/qat.yaml",
    } <= packed
    assert not {name for name in packed if name.startswith(("tests", "benchmarks", "docs"))}


TWINE = shutil.which("twine", path=f"{ROOT / '.venv-docs' / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(TWINE is None, reason="make docs installs twine")
def test_an_index_accepts_wheel_and_sdist(wheel: Path, sdist: Path) -> None:
    done = subprocess.run([str(TWINE), "check", "--strict", str(wheel), str(sdist)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_installed_package_is_imported_from_where_it_is_installed(installed: Path) -> None:
    shown = in_it(installed, "python", "-c", "import qat_lightning as q; print(q.__file__, q.__version__)")
    file, version = shown.split()
    assert Path(file).is_relative_to(installed)
    assert version == PROJECT["version"]
    assert in_it(installed, "qat-lightning", "--version").strip() == version


@pytest.mark.slow
def test_the_installed_command_lists_every_packaged_configuration(installed: Path) -> None:
    shown = in_it(installed, "qat-lightning", "configs")
    options = {path.stem for path in (ROOT / "src/qat_lightning/conf/quantization").glob("*.yaml")}
    assert options <= set(re.findall(r"^ (\w+) ", shown, re.MULTILINE))
    assert "--max-drop" in in_it(installed, "qat-lightning", "compare", "--help")
    assert "--max-drop" in in_it(installed, "qat-lightning", "sensitivity", "--help")


APP = """
import hydra
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from qat_lightning import load_quantized

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()
    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.net(batch).pow(2).mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    torch.manual_seed(cfg.seed)
    qat = hydra.utils.instantiate(cfg.quantization)
    data = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4)
    folder = hydra.core.hydra_config.HydraConfig.get().runtime.output_dir
    trainer = Trainer(max_epochs=2, callbacks=[qat], logger=CSVLogger(folder), enable_checkpointing=False)
    model = Net()
    trainer.fit(model, data)
    trainer.test(model, data)
    qat.save(f"{folder}/model.int8")
    print(load_quantized(f"{folder}/model.int8", network=Net().net)(torch.randn(3, 8)).shape)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_an_app_uses_the_installed_group_and_its_runs_are_compared(installed: Path) -> None:
    (installed / "app.yaml").write_text("hydra:\n  searchpath: [pkg://qat_lightning.conf]\nseed: 0\n")
    (installed / "app.py").write_text(APP)
    shown = in_it(installed, "python", "app.py", "-m", "+quantization=fx_x86,eager_x86", "hydra.sweep.dir=multirun/one")
    assert shown.count("torch.Size([3, 2])") == 2
    table = in_it(installed, "qat-lightning", "compare", "multirun/one", "--metric", "test/loss")
    assert "eager" in table
    assert "fx" in table
