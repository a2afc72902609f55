"""A page of text, tables and figures, written twice from the same blocks: Markdown, and HTML in one file.

The HTML carries its figures and its style, loads nothing and runs nothing, so it can be mailed. Text may hold `code`
and **bold**, which both know.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deit_fast.training.files import atomic_write

_STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .5rem; border-top: 1px solid #ddd; }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 48rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
table.words td { text-align: left; white-space: normal; }
table.words th { text-align: left; }
tr.light td { color: #666; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .9rem; margin-top: .4rem; max-width: 48rem; }
code { background: #f3f3f3; padding: .1em .3em; border-radius: 3px; font-size: .9em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """light: the rows in grey. words: cells are sentences rather than numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    light: frozenset[int] = frozenset()
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure of which `<folder>/<name>.png` and `.svg` exist; caption also serves those who do not see it."""

    name: str
    caption: str


Block = Heading | Text | Items | Table | Picture


def write_page(folder: Path, figures: str, title: str, blocks: Sequence[Block]) -> Path:
    """The path of report.html, written with report.md into `folder`, whose subfolder `figures` holds the figures."""
    markdown = "\n\n".join(_markdown(block, figures) for block in (Heading(1, title), *blocks)) + "\n"
    atomic_write(folder / "report.md", lambda file: file.write(markdown.encode()))
    body = "\n".join(_html(block, folder / figures) for block in (Heading(1, title), *blocks))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    atomic_write(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(name, caption):
            return f"![{caption}]({figures}/{name}.png)\n\n*{caption}* ([SVG]({figures}/{name}.svg))"
        case Table(header, rows, _, words):
            marks = ["---"] * len(header) if words else ["---", *["---:"] * (len(header) - 1)]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, marks, *rows)
            )


def _html(block: Block, figures: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Picture(name, caption):
            data = base64.b64encode((figures / f"{name}.png").read_bytes()).decode()
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Table(header, rows, light, words):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join(
                f"<tr{' class=light' if index in light else ''}>"
                + "".join(f"<td>{_inline(cell)}</td>" for cell in row)
                + "</tr>"
                for index, row in enumerate(rows)
            )
            return (
                f'<div class="scroll"><table{" class=words" if words else ""}><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )


def _inline(text: str) -> str:
    """Text as HTML, with `code` and **bold**."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
