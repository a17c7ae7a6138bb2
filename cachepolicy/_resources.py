"""Where the grammar, the shipped policies and the data are."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

SUFFIXES = (".cp", ".cachepolicy")


def shipped(folder: str) -> Traversable:
    """The folder `grammars`, `policies` or `examples`: inside an installed package, beside it in a checkout."""
    packaged = files("cachepolicy") / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / folder


def documentation(page: str) -> str | None:
    """The address of a page such as `language.md#when`, where the documents are installed as files."""
    name, mark, anchor = page.partition("#")
    path = shipped("docs").joinpath(*name.split("/"))
    return path.as_uri() + mark + anchor if isinstance(path, Path) and path.is_file() else None


def shipped_policies() -> dict[str, Traversable]:
    """The shipped policies by name, in alphabetical order: `{"pab": .../policies/pab.cp, ...}`."""
    found = {
        each.name.removesuffix(suffix): each
        for each in shipped("policies").iterdir()
        for suffix in SUFFIXES
        if each.name.endswith(suffix)
    }
    return dict(sorted(found.items()))


def template(name: str) -> str:
    """The text of a file that reports are made of."""
    return (files("cachepolicy.reports.html") / "templates" / name).read_text(encoding="utf-8")


def render(name: str, /, **values: object) -> str:
    """Fills in a template of a report.

    Args:
        name: The file name of the template.
        values: What the template shows. All text is escaped.
    """
    return _environment().get_template(name).render(values)


@cache
def _environment() -> Environment:
    # Imported on first use: `import cachepolicy` and most commands do not need jinja2.
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(template),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
