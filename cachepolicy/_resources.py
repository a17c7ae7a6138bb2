"""Locates the grammar, the shipped policies, the data files and the documentation."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

POLICY_SUFFIXES = (".cp", ".cachepolicy")


def shipped(folder: str) -> Traversable:
    """Returns a folder such as `grammars` or `policies`: in the installed package, or beside it in a checkout."""
    packaged = files("cachepolicy") / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / folder


def documentation(page: str) -> str | None:
    """Returns the URI of a page such as `language.md#when`, or None if the page is not installed as a file."""
    name, mark, anchor = page.partition("#")
    path = shipped("docs").joinpath(*name.split("/"))
    return path.as_uri() + mark + anchor if isinstance(path, Path) and path.is_file() else None


def shipped_policies() -> dict[str, Traversable]:
    """Returns the files of the shipped policies by name, in alphabetical order: `{"pab": .../policies/pab.cp, ...}`."""
    policies = {
        file.name.removesuffix(suffix): file
        for file in shipped("policies").iterdir()
        for suffix in POLICY_SUFFIXES
        if file.name.endswith(suffix)
    }
    return dict(sorted(policies.items()))


def policy_stem(name: str) -> str:
    """Returns the name of a policy file without its suffix, or another name unchanged."""
    return next((name.removesuffix(suffix) for suffix in POLICY_SUFFIXES if name.endswith(suffix)), name)


def template(name: str) -> str:
    """Returns the text of a template file for HTML reports."""
    return (files("cachepolicy.reports.html") / "templates" / name).read_text(encoding="utf-8")


def render_template(name: str, /, **values: object) -> str:
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
