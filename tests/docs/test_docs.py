"""README.md and docs/: every Python example runs, and links lead to files that are there."""

import re

import pytest

from tests.helpers.paths import ROOT

# docs/accelerate.md has a test of its own (test_patching_docs.py).
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
NEEDS_FILES = re.compile(r"\.pth|accelerate\(model\)")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/accelerate.md"])
def test_examples_run(page: str) -> None:
    """In order, with the names of those before; those that read files of weights are compiled alone."""
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        compiled = compile(code, page, "exec")
        if not NEEDS_FILES.search(code):
            exec(compiled, names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        assert link.startswith(("https://", "#")) or (folder / link.partition("#")[0]).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
