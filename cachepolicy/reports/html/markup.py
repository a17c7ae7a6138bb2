"""HTML that cannot be broken out of: every text is escaped unless it was made here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable


class Markup(str):
    """HTML as it stands; any other string is text."""

    __slots__ = ()


Content = str | int | float | Iterable["Content"] | None
"""Markup, text to be escaped, several of them, or nothing."""

_VOID = frozenset({"br", "col", "hr", "input", "meta", "path", "line", "circle", "rect", "polyline"})


def tag(name: str, /, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """An element; `class_` is `class`, `aria_label` is `aria-label`; None and False leave an attribute out."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID and not content:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def joined(content: Content) -> Markup:
    """The content one after the other, its texts escaped."""
    match content:
        case Markup():
            return content
        case None:
            return Markup()
        case str():
            return Markup(html.escape(content))
        case int() | float():
            return Markup(content)
        case _:
            return Markup("".join(map(joined, content)))


def data(value: object) -> Markup:
    """JSON for a script element: nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
