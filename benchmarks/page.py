"""One HTML page of the tables and plots, with all that it shows inside: no other file, no network, any width."""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
:root { --soft: light-dark(#f6f7f9, #1b1d21); --back: light-dark(#fff, #121316); }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { font: 16px/1.55 system-ui, sans-serif; background: var(--back); }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p { max-width: 46rem; overflow-wrap: anywhere; }
nav { background: var(--soft); border-radius: 0.5rem; padding: 0.75rem 1rem; font-size: 0.9rem; }
nav ul { list-style: none; margin: 0; padding: 0; columns: 9rem; }
nav li { padding: 0.15rem 0; break-inside: avoid; }
nav strong { display: block; }
a { color: inherit; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
td { max-width: 26rem; min-width: 3.5rem; }
tr > :first-child { position: sticky; left: 0; background: var(--back); padding-left: 0; }
tbody tr:nth-child(even) > * { background: var(--soft); }
figure { margin: 1rem 0; }
figcaption { font-size: 0.85rem; opacity: 0.8; }
img { display: block; width: 100%; max-width: 55rem; height: auto; background: white; border-radius: 0.25rem; }
code { font-size: 0.9em; }
@media (max-width: 40rem) {
  img { min-width: 36rem; }
  table { width: max-content; }
  td, th { max-width: 15rem; }
  tr > :first-child { max-width: 9rem; overflow-wrap: break-word; }
  th, td { padding-right: 0.5rem; padding-left: 0.5rem; }
}
@media (min-width: 70rem) {
  body { display: grid; grid-template-columns: 15rem minmax(0, 1fr); column-gap: 3rem; }
  h1 { grid-column: 1 / -1; }
  nav { position: sticky; top: 1rem; align-self: start; max-height: calc(100vh - 2rem); overflow-y: auto; }
  nav ul { columns: auto; }
  main > section:first-child > h2 { margin-top: 0; }
}
"""
Parts = Mapping[str, str]


def page(title: str, sections: Mapping[str, Parts], root: Path) -> str:
    """HTML of a device → heading → Markdown, with a table of contents.

    The Markdown: paragraphs, tables, `code`, and pictures by paths from `root`.
    """
    contents, body = [], []
    for device, parts in sections.items():
        links = "".join(
            f'<li><a href="#{_anchor(device, heading)}">{html.escape(heading)}</a></li>' for heading in parts if heading
        )
        contents.append(f"<strong>{html.escape(device)}</strong><ul>{links}</ul>\n")
        blocks = "".join(
            (f'<h3 id="{_anchor(device, heading)}">{html.escape(heading)}</h3>\n' if heading else "")
            + _blocks(text, root)
            for heading, text in parts.items()
        )
        body.append(f"<section><h2>{html.escape(device)}</h2>\n{blocks}</section>\n")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<nav aria-label="Contents">\n{"".join(contents)}</nav>\n<main>\n{"".join(body)}</main>\n</body>\n</html>\n'
    )


def _anchor(device: str, heading: str) -> str:
    return re.sub(r"\W+", "-", f"{device} {heading}".lower()).strip("-")


def _blocks(text: str, root: Path) -> str:
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", block)
        if picture:
            data = base64.b64encode((root / picture[2]).read_bytes()).decode()
            caption = html.escape(picture[1])
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            found.append(f'<figure><div class="wide">{image}</div><figcaption>{caption}</figcaption></figure>\n')
        elif len(lines) > 1 and all(line.startswith("|") for line in lines):
            head, _, *rows = lines
            cells = "".join(_row(row, "td") for row in rows)
            found.append(
                f'<div class="wide"><table>\n<thead>{_row(head, "th")}</thead>\n<tbody>{cells}</tbody></table></div>\n'
            )
        else:
            found.append(
                _listed(lines) if all(line.startswith("- ") for line in lines) else f"<p>{_inline(block)}</p>\n"
            )
    return "".join(found)


def _listed(lines: list[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{_inline(line[2:])}</li>\n" for line in lines) + "</ul>\n"


def _row(line: str, tag: str) -> str:
    return (
        "<tr>" + "".join(f"<{tag}>{_inline(cell.strip())}</{tag}>" for cell in line.strip("|").split("|")) + "</tr>\n"
    )


def _inline(text: str) -> str:
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1", coded)  # a link into the repository would lead nowhere from here
