"""The documentation as a site: links, code blocks, the reference, and the build."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
CODE = re.compile(r"^( *)``` ?([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LONGEST_CELL = 300


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of headings, as GitHub and Python-Markdown create them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", text) for text in words}


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_python_code_is_python_and_imports_what_there_is(page: Path) -> None:
    for indent, language, code in CODE.findall(page.read_text()):
        if language != "python":
            continue
        text = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qat_lightning"):
                exec(compile(ast.Module([node], []), name_of(page), "exec"), {})


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_table_cells_are_short(page: Path) -> None:
    rows = [line for line in prose(page).splitlines() if line.lstrip().startswith("|")]
    cells = [cell for row in rows for cell in row.strip().strip("|").split(" | ")]
    assert [cell for cell in cells if len(cell) > LONGEST_CELL] == []


@pytest.mark.parametrize("module", ["", ".export", ".sensitivity", ".compare"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    documented = set(re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))
    last = {name.rpartition(".")[2] for name in documented}
    assert set(import_module(f"qat_lightning{module}").__all__) <= last


def mkdocs() -> str | None:
    """The path of a program, in the environment of ``make docs`` or in this one."""
    return shutil.which("mkdocs", path=f"{ROOT / '.venv-docs' / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(mkdocs() is None, reason="make docs installs MkDocs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [str(mkdocs()), "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site" / "index.html").is_file()
    pages = (page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert [link for html in pages for link in re.findall(r'href="[^":]+\.(?:md|ipynb)[#"]', html)] == []
    assert "QuantizationAwareTraining" in (tmp_path / "site" / "reference" / "callbacks.html").read_text()


NOTEBOOKS = sorted(DOCS.glob("tutorials/*.ipynb"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def cells(notebook: Path) -> list[dict[str, object]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_tutorial_runs_and_its_stored_outputs_are_of_this_code(notebook: Path, tmp_path: Path) -> None:
    if notebook.stem == "ship_to_phone":
        pytest.importorskip("executorch")
    copy = tmp_path / notebook.name
    copy.write_bytes(notebook.read_bytes())
    done = subprocess.run(
        [sys.executable, str(DOCS / "tutorials" / "execute.py"), str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printing = [bool(cell["outputs"]) for cell in cells(copy)]
    assert printing == [bool(cell["outputs"]) for cell in cells(notebook)], "run make tutorials"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_links_of_a_tutorial_lead_to_files_and_headings(notebook: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"])
    for path, anchor in re.findall(r"\]\(([^)#:]+\.(?:md|ipynb))#?([^)]*)\)", text):
        found = (notebook.parent / path).resolve()
        assert found.exists(), path
        assert not anchor or anchor in anchors(found), anchor


def test_every_tutorial_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in NOTEBOOKS if f"tutorials/{path.name}" not in navigation] == []


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    if example.stem == "export_onnx":
        pytest.importorskip("onnxruntime")
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_every_example_is_on_its_page() -> None:
    page = (DOCS / "examples.md").read_text()
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in page] == []


@pytest.mark.slow
def test_the_script_of_the_start_page_runs(tmp_path: Path) -> None:
    page = (DOCS / "start.md").read_text()
    (script,) = [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, _, code in CODE.findall(page) if indent]
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
