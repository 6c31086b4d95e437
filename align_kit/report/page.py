"""A page: one self-contained file of HTML, readable in light and in dark, without a script and without the network."""

from __future__ import annotations

import contextlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.report import plots
from align_kit.report.style import CSS, LOOKS, PICTURE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Nothing may be fetched or run: what a page shows comes from models and data of others.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NOTHING = "–"
_NO_TEXT = {code: "\ufffd" for code in (*range(32), 127) if chr(code) not in "\n\t"}
_NUMBER = re.compile(r"(?:[-+−±~<>≤≥≈$]? ?\d.*|nan|-?inf|–|)", re.DOTALL)


def shown(value: Any) -> str:
    """Return a cell as text: numbers short, with thousands set apart; a dash for `None`."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def escaped(text: str) -> str:
    """Return text as it may stand in HTML; control characters, which may not, as one mark."""
    return html.escape(text.translate(_NO_TEXT))


class Page:
    """A page that is filled from top to bottom and then written; all text given is shown as it is, never as markup."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._sections: list[tuple[str, list[str]]] = [("", [])]
        self._figures = 0
        self._pictures: dict[str, str] = {}  # by the names of their files

    def section(self, title: str) -> None:
        """Begin a section; what follows lies in it."""
        self._sections.append((title, []))

    def _add(self, markup: str) -> None:
        self._sections[-1][1].append(markup)

    def text(self, text: str) -> None:
        """Add a paragraph, its line breaks kept; an empty line begins another."""
        for paragraph in text.split("\n\n"):
            self._add(f"<p>{escaped(paragraph)}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Add a table; a column that holds numbers, or text that begins as one, stands to the right."""
        cells = [[shown(value) for value in row] for row in rows]
        right = [all(_NUMBER.fullmatch(row[column]) for row in cells) for column in range(len(head))]
        over = f"<caption>{escaped(caption)}</caption>" if caption else ""
        top = _row("th", head, right)
        body = "".join(_row("td", row, right) for row in cells)
        self._add(f'<div class="wide"><table>{over}<thead>{top}</thead><tbody>{body}</tbody></table></div>')

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add what a reader looks for first: values in large letters, each with its name above."""
        items = "".join(
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(shown(value))}</dd></div>"
            for name, value in facts.items()
        )
        self._add(f"<dl>{items}</dl>")

    def points(self, points: Sequence[str]) -> None:
        """Add a list."""
        self._add(f"<ul>{''.join(f'<li>{escaped(point)}</li>' for point in points)}</ul>")

    def blocks(self, blocks: Mapping[str, str]) -> None:
        """Add longer texts side by side, as they are, each with its name above."""
        items = "".join(
            f"<div><h3>{escaped(name)}</h3><pre>{escaped(text)}</pre></div>" for name, text in blocks.items()
        )
        self._add(f'<div class="blocks">{items}</div>')

    def figure(self, figure: Figure, caption: str, name: str = "") -> None:
        """Add a plot; plots that follow each other stand side by side where there is room.

        Where `name` is given, `write` also stores it as a picture of its own, `<name>.svg`.
        """
        self._figures += 1
        drawn = plots.svg(figure, f"f{self._figures}-").translate(_NO_TEXT)
        if name:
            self._pictures[name] = drawn.replace(">", f"><style>{PICTURE}</style>", 1) + "\n"
        text = escaped(caption)
        drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{text or "plot"}"', 1)
        below = f"<figcaption>{text}</figcaption>" if caption else ""
        self._add(f"<figure>{drawn}{below}</figure>")

    def code(self, text: str, summary: str = "") -> None:
        """Add text as it is, in letters of one width; where `summary` is given it is folded behind that."""
        block = f"<pre><code>{escaped(text)}</code></pre>"
        self._add(f"<details><summary>{escaped(summary)}</summary>{block}</details>" if summary else block)

    def marked(self, parts: Sequence[tuple[str, str]]) -> None:
        """Add text as it is, in letters of one width, part by part: (text, look), a look being one of `style.LOOKS`."""
        spans = "".join(f'<span class="look-{LOOKS.index(look)}">{escaped(text)}</span>' for text, look in parts)
        self._add(f'<pre class="marked">{spans}</pre>')

    def markup(self) -> str:
        """Return the page as HTML."""
        title, subtitle = escaped(self.title), escaped(self.subtitle)
        under = f'<p class="subtitle">{subtitle}</p>' if subtitle else ""
        named = [name for name, _ in self._sections if name]
        links = "".join(f'<a href="#s{place}">{escaped(name)}</a>' for place, name in enumerate(named, 1))
        contents = f"<nav>{links}</nav>" if len(named) > 2 else ""
        body = "\n".join(_section(place, name, parts) for place, (name, parts) in enumerate(self._sections))
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f"<header><h1>{title}</h1>{under}{contents}</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page and its named pictures, each whole or not at all, and return where the page is.

        Raises `UserError` where they cannot lie.
        """
        path = Path(path)
        for name, drawn in self._pictures.items():
            write_whole(path.with_name(f"{name}.svg"), drawn)
        write_whole(path, self.markup())
        return path


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either there as a whole or not; raises UserError where it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    marked = (
        f'<{tag} class="n">{escaped(cell)}</{tag}>' if to_right else f"<{tag}>{escaped(cell)}</{tag}>"
        for cell, to_right in zip(cells, right, strict=True)
    )
    return f"<tr>{''.join(marked)}</tr>"


def _section(place: int, name: str, parts: Sequence[str]) -> str:
    """Return a section with figures that follow each other laid in one grid."""
    if not parts and not name:
        return ""
    laid: list[str] = []
    for part in parts:
        if part.startswith("<figure>") and laid and laid[-1].endswith("</figure></div>"):
            laid[-1] = laid[-1].removesuffix("</div>") + part + "</div>"
        else:
            laid.append(f'<div class="figures">{part}</div>' if part.startswith("<figure>") else part)
    heading = f"<h2>{escaped(name)}</h2>\n" if name else ""
    return f'<section id="s{place}">\n{heading}' + "\n".join(laid) + "\n</section>"
