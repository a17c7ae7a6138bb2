"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import constant
from cachepolicy.language.parser import parse_value
from cachepolicy.planning.module_tree import Skeleton, builtin, sites_skeleton
from cachepolicy.tools.meta_model import Blueprint, read_model

Decorated = Callable[..., Any]

json_form = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model = click.option(
    "--model", metavar="PATH", help="A diffusers config.json or folder (no weights are read), or a skeleton file."
)


class ParamOption(click.ParamType[Any]):
    """`NAME=VALUE`, the value as the language writes it."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ir.Expression]:
        """The name and the value's expression; anything else is a usage error."""
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"`{value}` is not NAME=VALUE", param, ctx)
        try:
            return name.strip(), parse_value(text)
        except PolicyError as error:
            hint = " (a string stands in quotes of its own)" if text.isidentifier() else ""
            self.fail(f"`{name}`: {error.diagnostics[0].message}{hint}", param, ctx)


class Numbers(click.ParamType[Any]):
    """Numbers between commas."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers; anything else is a usage error."""
        try:
            return tuple(float(each) for each in str(value).strip("[] ").split(","))
        except ValueError:
            self.fail(f"`{value}` is no list of numbers between commas", param, ctx)


set_param = click.option("--set", "settings", type=ParamOption(), multiple=True, help="Set a parameter of the policy.")


def schedule(command: Decorated) -> Decorated:
    """The options that say which trajectory, on which model."""
    options = (
        click.option("--steps", type=click.IntRange(1, 100_000), help="Steps of the trajectory (default 50)."),
        click.option("--timesteps", type=Numbers(), help="Their timesteps, 0..1000 (default: evenly from 999 to 0)."),
        click.option("--sigmas", type=Numbers(), help="Their sigmas, for a policy that reads `sigma`."),
        click.option("--signal", "signals", type=ParamOption(), multiple=True, help="A signal's number, or a list."),
        click.option("--branch", "branches", multiple=True, metavar="NAME", help="A branch, such as cond; repeatable."),
        click.option("--site", "sites", multiple=True, metavar="NAME", help="A module of the model; repeatable."),
        model,
        set_param,
        json_form,
    )
    for option in reversed(options):
        command = option(command)
    return command


def picture(command: Decorated) -> Decorated:
    """The options that say what a call of the model is counted for."""
    size = click.IntRange(1, 1_000_000)
    options = (
        click.option("--height", type=size, default=1024, show_default=True, help="Pixels."),
        click.option("--width", type=size, default=1024, show_default=True, help="Pixels."),
        click.option("--frames", type=size, default=81, show_default=True, help="Of a video."),
        click.option(
            "--batch", type=size, default=1, show_default=True, help="Samples a call, both halves of guidance."
        ),
        click.option("--text-tokens", "text", type=size, help="Text tokens (default: as the pipeline has them)."),
        click.option("--arguments", "shapes", type=click.Path(dir_okay=False), help="JSON with the arguments' shapes."),
    )
    for option in reversed(options):
        command = option(command)
    return command


PICTURE = ("height", "width", "frames", "batch", "text")


@dataclass(frozen=True, slots=True)
class SampledModel:
    """The options of `schedule`, as `simulate` takes them."""

    blueprint: Blueprint
    settings: Mapping[str, ir.Expression]
    arguments: Mapping[str, Any]

    @property
    def skeleton(self) -> Skeleton:
        """The modules of the model."""
        return self.blueprint.skeleton


def model_and_clock(given: Mapping[str, Any]) -> SampledModel:
    """The model and the clock that the options of `schedule` ask for.

    Raises:
        PolicyError: the model cannot be read, or a site is no module name.
        click.UsageError: two options exclude each other.
    """
    if given["model"] and given["sites"]:
        raise click.UsageError("--model and --site exclude each other")
    if given["model"]:
        blueprint = read_model(given["model"])
    else:
        blueprint = Blueprint(sites_skeleton(given["sites"]) if given["sites"] else builtin())
    series = next((len(given[name]) for name in ("timesteps", "sigmas") if given[name]), 50)
    arguments = {
        "steps": given["steps"] or series,
        "timesteps": given["timesteps"],
        "sigmas": given["sigmas"],
        "signals": {name: constant(value) for name, value in given["signals"]},
        "branches": given["branches"] or ("",),
    }
    return SampledModel(blueprint, dict(given["settings"]), arguments)
