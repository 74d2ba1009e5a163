"""One HTML page of the tables and plots, with all that it shows inside: no other file, no network, any width."""

import base64
import html
import re
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
div.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
img { max-width: 100%; height: auto; background: white; }
code { font-size: 0.9em; }
"""


def page(title: str, sections: dict[str, str], root: Path) -> str:
    """HTML of sections of Markdown, heading → text: paragraphs, tables, `code` and pictures by paths from `root`."""
    body = "".join(f"<h2>{html.escape(name)}</h2>\n{_blocks(text, root)}" for name, text in sections.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def _blocks(text: str, root: Path) -> str:
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", block)
        if picture:
            data = base64.b64encode((root / picture[2]).read_bytes()).decode()
            found.append(f'<p><img alt="{html.escape(picture[1])}" src="data:image/png;base64,{data}"></p>\n')
        elif len(lines) > 1 and all(line.startswith("|") for line in lines):
            head, _, *rows = lines
            cells = [_row(head, "th"), *(_row(row, "td") for row in rows)]
            found.append(f'<div class="table"><table>\n{"".join(cells)}</table></div>\n')
        else:
            found.append(f"<p>{_inline(block)}</p>\n")
    return "".join(found)


def _row(line: str, tag: str) -> str:
    return (
        "<tr>" + "".join(f"<{tag}>{_inline(cell.strip())}</{tag}>" for cell in line.strip("|").split("|")) + "</tr>\n"
    )


def _inline(text: str) -> str:
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1", coded)  # a link into the repository would lead nowhere from here
