"""What the `plan` command shows: the grid, the FLOPs behind it, or all shipped policies side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cachepolicy.cli import output
from cachepolicy.cli.options import SampledModel
from cachepolicy.errors import PolicyError
from cachepolicy.planning import forecast
from cachepolicy.planning.forecast import Work
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.simulation import Schedule, simulate
from cachepolicy.reports import overview
from cachepolicy.reports import text as report_text


def show_plan(
    plan: Plan, wanted: SampledModel, picture: Mapping[str, Any], shapes: str | None, *, as_json: bool
) -> None:
    """Print the schedule of one policy, and what it skips where the model's FLOPs can be counted."""
    schedule = simulate(plan, **wanted.arguments)
    work = _work(wanted, picture, shapes)
    outlook = None if work is None else forecast.forecast(schedule.plan, schedule, work)
    if as_json:
        flops = None if outlook is None else outlook.to_json()
        held = None if work is None else _holdings(plan, schedule, work)
        output.say_json({**report_text.outcome_to_json(schedule), "flops": flops, "held": held})
        return
    output.report_findings(schedule.plan.warnings, error=True)
    output.say(report_text.draw(schedule, width=output.columns(), colour=output.coloured(sys.stdout)))
    if outlook is not None and work is not None:
        output.say(forecast.draw_forecast(outlook, schedule.plan, work, steps=schedule.steps))
        output.say(_peak(_holdings(plan, schedule, work)))


def _holdings(plan: Plan, schedule: Schedule, work: Work) -> Sequence[int]:
    from cachepolicy.tools.memory_forecast import holdings  # which knows the engine, and so torch

    return holdings(plan, schedule, work)


def _peak(held: Sequence[int]) -> str:
    most = max(held, default=0)
    return f"{forecast.format_bytes(most)} of history at most, in float32; half of that in bfloat16"


def show_overview(wanted: SampledModel, picture: Mapping[str, Any], shapes: str | None, *, as_json: bool) -> None:
    """Print what the model is made of, and what each shipped policy would do with it."""
    work = _work(wanted, picture, shapes)
    clock = {name: value for name, value in wanted.arguments.items() if name != "signals"}
    found = overview.prospects(wanted.skeleton, work, **clock)
    if as_json:
        output.say_json(overview.overview_to_json(wanted.skeleton, work, found))
    else:
        output.say(overview.draw_overview(wanted.skeleton, work, found, steps=wanted.arguments["steps"]))


def _work(wanted: SampledModel, picture: Mapping[str, Any], shapes: str | None) -> Work | None:
    """The FLOPs of a call; None, and a word about it, where they cannot be counted."""
    if wanted.blueprint.class_name is None:
        return None
    from cachepolicy.tools.example_inputs import Picture

    try:
        return wanted.blueprint.work(Picture(**picture), None if shapes is None else _shapes(shapes))
    except PolicyError as error:
        if shapes is not None:
            raise
        output.say(f"note: {error.diagnostics[0].message}", error=True)
        return None


def _shapes(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise PolicyError.of("E212", f"`{path}` cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PolicyError.of("E212", f"`{path}` holds no object of argument names and shapes")
    return found  # pyright: ignore[reportUnknownVariableType]
