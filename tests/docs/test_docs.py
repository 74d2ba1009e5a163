"""Tests of README.md and docs/: Python examples run, and links point to existing files."""

import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# docs/accelerate.md is tested in tests/patching/test_docs.py.
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
NEEDS_FILES = re.compile(r"\.pth|accelerate\(model\)")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/accelerate.md"])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the examples of a page in order in one namespace; compile only those that read weight files."""
    monkeypatch.chdir(tmp_path)  # for the files that they write
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        compiled = compile(code, page, "exec")
        if not NEEDS_FILES.search(code):
            exec(compiled, names)


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_existing_files(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        assert link.startswith(("https://", "#")) or (folder / link.partition("#")[0]).exists(), link


def test_readme_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
