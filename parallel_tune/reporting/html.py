"""HTML and SVG from plain functions: text is escaped unless it is markup that these functions made."""

from __future__ import annotations

from html import escape
from pathlib import Path

VOID = {"meta", "br", "line", "rect", "path", "circle", "polyline"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """One element. `class_` is class, other underscores are hyphens; an attribute that is None is left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if name in VOID and not children:
        return Markup(f"<{' '.join(parts)}/>")
    return Markup(f"<{' '.join(parts)}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children one after the other, those that are not markup escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> Markup:
    """A table whose first columns are text and whose others are numbers, in a box that scrolls sideways.

    Names that are all empty are not shown.
    """
    kinds = ["text" if column < text_columns else "number" for column in range(len(head))]
    names = (tag("th", name, class_=kind, scope="col") for name, kind in zip(head, kinds, strict=True))
    header = tag("thead", tag("tr", *names)) if any(head) else ""
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("div", tag("table", header, tag("tbody", *body)), class_="scroll")


def page(title: str, *body: str) -> str:
    """A whole document that loads nothing else."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing may be fetched or run, whatever a name in it says.
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"
