"""Options that several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from cachepolicy._strict_json import DuplicateKeyError, load_json
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, constant
from cachepolicy.language.parser import parse_value
from cachepolicy.planning.guidance import Guidance, without_uncond
from cachepolicy.planning.module_tree import Skeleton, builtin, sites_skeleton
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.references import with_references
from cachepolicy.tools.meta_model import Blueprint, read_model

Command = Callable[..., Any]
DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Assignment(click.ParamType[Any]):
    """`NAME=VALUE`, where VALUE is a literal of the policy language."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Returns the name and the parsed value; other text is a usage error."""
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"`{value}` is not NAME=VALUE", param, ctx)
        try:
            return name.strip(), self.parse(text)
        except PolicyError as error:
            hint = " (write a string in quotes, and the quotes in quotes for the shell)" if text.isidentifier() else ""
            self.fail(f"`{name}`: {error.diagnostics[0].message}{hint}", param, ctx)

    def parse(self, text: str) -> Any:
        """Returns the expression that the text holds."""
        return parse_value(text)


class _JsonAssignment(_Assignment):
    """`NAME=VALUE`, where VALUE is JSON, or else a plain string."""

    def parse(self, text: str) -> Any:
        """Returns the value of the JSON text, or the text itself if it is not JSON."""
        try:
            return load_json(text)
        except DuplicateKeyError as error:
            raise PolicyError.of("E213", str(error)) from error
        except ValueError:
            return text


class _Numbers(click.ParamType[Any]):
    """Numbers separated by commas."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Returns the numbers; other text is a usage error."""
        try:
            return tuple(float(number) for number in str(value).strip("[] ").split(","))
        except ValueError:
            self.fail(f"`{value}` is not a list of numbers separated by commas", param, ctx)


class _StepCounts(click.ParamType[Any]):
    """Numbers of sampling steps, separated by commas."""

    name = "N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Returns the numbers; other text is a usage error."""
        if value == ():  # the default
            return ()
        try:
            counts = tuple(int(number) for number in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or not all(1 <= count <= 10_000 for count in counts):
            self.fail(f"`{value}` is not a number of steps, or several separated by commas (1 to 10000)", param, ctx)
        return counts


json_form = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model = click.option(
    "--model", metavar="PATH", help="A diffusers config.json or folder (no weights are read), or a skeleton file."
)
param_type = _Assignment()
numbers_type = _Numbers()
steps_type = _StepCounts()
set_param = click.option("--set", "settings", type=param_type, multiple=True, help="Set a parameter of the policy.")
call_argument = click.option(
    "--argument", "more", type=_JsonAssignment(), multiple=True, help="Another argument of the pipeline; repeatable."
)


def pipeline(command: Command) -> Command:
    """Adds the options that say how a pipeline from a folder is loaded, and the arguments of all its calls."""
    options = (
        click.option(
            "--embeds", metavar="FILE", help="Tensors by argument name, e.g. prompt_embeds (safetensors, pt)."
        ),
        call_argument,
        click.option("--device", default="cpu", show_default=True, help="Device to run on."),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Dtype of the weights."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def sampled_calls(samples: int) -> Callable[[Command], Command]:
    """Returns a decorator that adds the options for the calls of a pipeline. `samples` is the default number."""

    def add(command: Command) -> Command:
        options = (
            click.option("--prompts", type=click.Path(dir_okay=False), metavar="FILE", help="Prompts, one a line."),
            pipeline,
            click.option(
                "--samples", type=click.IntRange(1), default=samples, show_default=True, help="Calls to sample."
            ),
            click.option(
                "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of the first call."
            ),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return add


def schedule(command: Command) -> Command:
    """Adds the options that describe the trajectory and the model."""
    options = (
        click.option("--steps", type=click.IntRange(1, 100_000), help="Number of sampling steps (default 50)."),
        click.option("--timesteps", type=_Numbers(), help="The timesteps, 0..1000 (default: evenly from 999 to 0)."),
        click.option("--sigmas", type=_Numbers(), help="The sigmas of the steps, for a policy that reads `sigma`."),
        click.option("--signal", "signals", type=param_type, multiple=True, help="The value of a signal, or a list."),
        click.option("--branch", "branches", multiple=True, metavar="NAME", help="A branch, e.g. cond; repeatable."),
        click.option("--site", "sites", multiple=True, metavar="NAME", help="A module of the model; repeatable."),
        model,
        set_param,
        json_form,
    )
    for option in reversed(options):
        command = option(command)
    return command


def picture(command: Command) -> Command:
    """Adds the options that describe the inputs for which FLOPs are counted."""
    size = click.IntRange(1, 1_000_000)
    options = (
        click.option("--height", type=size, default=1024, show_default=True, help="Height in pixels."),
        click.option("--width", type=size, default=1024, show_default=True, help="Width in pixels."),
        click.option("--frames", type=size, default=81, show_default=True, help="Frames of a video."),
        click.option("--batch", type=size, default=1, show_default=True, help="Rows of a call, guidance included."),
        click.option("--text-tokens", "text", type=size, help="Text tokens (default: the pipeline's number)."),
        click.option("--arguments", "shapes", type=click.Path(dir_okay=False), help="JSON file of argument shapes."),
    )
    for option in reversed(options):
        command = option(command)
    return command


PICTURE = ("height", "width", "frames", "batch", "text")


@dataclass(frozen=True, slots=True)
class SampledModel:
    """The values of the `schedule` options.

    Attributes:
        blueprint: The model.
        settings: Values of policy parameters by name.
        arguments: Keyword arguments of `simulate`.
        guidance: How guidance runs, as the options say or the model shows.
    """

    blueprint: Blueprint
    settings: Mapping[str, ir.Expression]
    arguments: Mapping[str, Any]
    guidance: Guidance

    @property
    def skeleton(self) -> Skeleton:
        """The modules of the model."""
        return self.blueprint.skeleton


def _numbers(name: str, value: Any) -> Any:
    """Returns the number of a `--signal`, or its list of numbers."""
    with contextlib.suppress(Undefined, TypeError):
        result = constant(value)
        numbers = result if isinstance(result, tuple) else (result,)
        if all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            return result
    raise click.UsageError(f"Invalid value for '--signal': `{name}` takes a number, or a list of one for each step")


def as_called(plan: Plan, blueprint: Blueprint, guidance: Guidance) -> Plan:
    """Returns a plan as the calls of the model's pipeline are: without the unconditional half that they do not have.

    The plan has warnings for what they do not have (W516), and for the reference pictures that they hold (W517).
    """
    plan = without_uncond(plan) if guidance.form == "distilled" else plan
    return with_references(plan, blueprint.references)


def model_and_clock(values: Mapping[str, Any]) -> SampledModel:
    """Builds the model and the clock from the values of the `schedule` options.

    Raises:
        PolicyError: The model cannot be read, or a site is not a module name.
        click.UsageError: Two options exclude each other.
    """
    if values["model"] and values["sites"]:
        raise click.UsageError("--model and --site exclude each other")
    if values["model"]:
        blueprint = read_model(values["model"])
    else:
        blueprint = Blueprint(sites_skeleton(values["sites"]) if values["sites"] else builtin())
    series = next((len(values[name]) for name in ("timesteps", "sigmas") if values[name]), 50)
    arguments = {
        "steps": values["steps"] or series,
        "timesteps": values["timesteps"],
        "sigmas": values["sigmas"],
        "signals": {name: _numbers(name, value) for name, value in values["signals"]},
        "branches": values["branches"] or blueprint.guidance.branches,
    }
    branches = tuple(values["branches"])
    guidance = Guidance("sequential", "--branch", branches) if branches else blueprint.guidance
    return SampledModel(blueprint, dict(values["settings"]), arguments, guidance)
