"""The table of formats in the docs matches the code."""

from pathlib import Path

from qat_lightning.export import FORMATS, get_format
from qat_lightning.settings.backends import pairs
from qat_lightning.settings.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


def table() -> str:
    rows = ["| mode, backend |" + "".join(f" `{name}` |" for name in FORMATS), "|---" * (1 + len(FORMATS)) + "|"]
    for mode, backend in pairs():
        takes = [not get_format(name).refusal(Recipe(mode, backend)) for name in FORMATS]
        rows.append(f"| `{mode}`, `{backend}` |" + "".join(" yes |" if taken else " |" for taken in takes))
    return "\n".join(rows)


def test_the_docs_have_the_table_of_formats() -> None:
    found = DOCS.read_text().split("<!-- formats: begin -->\n")[1].split("\n<!-- formats: end -->")[0]
    assert found == table()
