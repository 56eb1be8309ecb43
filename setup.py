"""The README as an index of packages shows it; everything else is in pyproject.toml."""

import re
import warnings
from pathlib import Path

from setuptools import setup

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)\s]+)\)")


def readme(text: str, repository: str | None, version: str) -> str:
    """The README with links that work where its neighbours are not.

    An index of packages shows the README alone, so that relative links lead nowhere.

    Args:
        text: README.md, with links relative to the root of the repository.
        repository: Address of the repository, such as ``https://github.com/owner/name``; without one, links become
            plain text.
        version: The version, whose tag ``v<version>`` the links lead to.
    """
    if repository is None:
        return RELATIVE_LINK.sub(r"\1", text)
    return RELATIVE_LINK.sub(rf"[\1]({repository.rstrip('/')}/blob/v{version}/\2)", text)


def main() -> None:
    """Add the README to what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    if repository is None:
        warnings.warn(
            "pyproject.toml has no Repository in [project.urls]: links in the README of this package are plain text",
            stacklevel=1,
        )
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=readme(text, repository, project["version"]),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
