"""Tests of README.md and docs/: Python examples run, commands have known flags, links point to existing files."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from mvar.cli.main import COMMANDS, build_parser
from mvar.train import flags as model_flags
from mvar.train_tokenizer import flags as tokenizer_flags
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


def commands(text: str) -> list[list[str]]:
    """The arguments of every `mvar …`, also under torchrun, in lines of a shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"] and "mvar" in words:
            words = words[words.index("mvar") :]
        if words[:1] == ["mvar"] and len(words) > 1:
            found.append(words[1:])
    return found


def shell_examples(page: str) -> str:
    return "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


EXAMPLES = {page: commands(shell_examples(page)) for page in [*PAGES, "examples/emoji/README.md"]} | {
    f"mvar {name} --help": commands(import_module(f"mvar.cli.{name.replace('-', '_')}").EXAMPLES) for name in COMMANDS
}


@pytest.mark.parametrize("page", [page for page, found in EXAMPLES.items() if found])
def test_commands_are_accepted(page: str) -> None:
    """By the parser of their flags."""
    for words in EXAMPLES[page]:
        options = build_parser().parse_args(words)
        if words[0] == "train":
            model_flags.parse_flags(options)
        if words[0] == "train-tokenizer":
            tokenizer_flags.parse_flags(options)


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_existing_files(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        assert link.startswith(("https://", "#")) or (folder / link.partition("#")[0]).exists(), link


def test_readme_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
