"""The lock, the ranges and the wheel go together."""

import subprocess
import sys
import zipfile
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


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path):
    sources = tmp_path / "sources"
    # a build writes next to its sources, so it is given a copy
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(sources)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = sources / "src"
    expected = {
        path.relative_to(package).as_posix()
        for path in (package / "qat_lightning").rglob("*")
        if path.suffix in {".py", ".yaml", ".html", ".css", ".js"} or path.name == "py.typed"
    }
    assert packed == expected
