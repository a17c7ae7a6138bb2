"""Output of the `plan` command: the schedule of one policy with its FLOPs, or a comparison of all shipped policies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from cachepolicy._strict_json import load_json
from cachepolicy.cli import output
from cachepolicy.cli.options import SampledModel, as_called
from cachepolicy.errors import PolicyError
from cachepolicy.planning import cost_model
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.guidance import reads_guidance
from cachepolicy.planning.open_signals import replay_open, simulate_open
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.simulation import Schedule, numbers_by_step, refuse_unknown
from cachepolicy.reports import overview
from cachepolicy.reports import text as report_text
from cachepolicy.reports.html.page import page
from cachepolicy.tracing.trace import Trajectory


def show_plan(
    plan: Plan,
    sampled: SampledModel,
    picture: Mapping[str, Any],
    shapes: str | None,
    *,
    trajectory: Trajectory | None = None,
    html: str | None = None,
    as_json: bool,
) -> None:
    """Prints the schedule of one policy, and the FLOPs that it skips if they can be counted.

    Args:
        plan: The policy, bound to the model.
        sampled: The model and the clock.
        picture: Sizes of the inputs, by the names of `Picture`.
        shapes: A JSON file with shapes of the call's arguments, which replace `picture`.
        trajectory: A recorded run whose clock and signals take the place of those of `sampled`.
        html: The file to write the schedule to as an HTML page.
        as_json: Print JSON.

    Raises:
        PolicyError: The file cannot be written (E152).
    """
    guidance = sampled.guidance
    plan = as_called(plan, sampled.blueprint, guidance)
    simulated = simulate_open(plan, **sampled.arguments) if trajectory is None else _recorded(plan, trajectory, sampled)
    work = _work(sampled, picture, shapes)
    outlook = held = most = None
    if work is not None:
        from cachepolicy.tools.memory_forecast import holdings  # imports the engine, and with it torch

        outlook, held = cost_model.forecast(simulated.plan, simulated, work), holdings(plan, simulated, work)
        most = None if simulated.most is None else cost_model.forecast(simulated.plan, simulated.most, work)
    if html is not None:
        output.write(html, page([simulated], work=work).encode())
    if as_json:
        flops = None if outlook is None else outlook.to_json()
        as_data = report_text.outcome_to_json(simulated)
        if as_data["most_cost"] is not None:
            as_data["most_cost"]["flops"] = None if most is None else most.to_json()
        output.say_json({**as_data, "flops": flops, "held": held, "guidance": asdict(guidance)})
        return
    output.report_findings(simulated.warnings, error=True)
    output.say(report_text.draw(simulated, width=output.columns(), colour=output.coloured(sys.stdout)))
    if guidance.form != "unknown" or reads_guidance(plan):
        output.say(str(guidance))
    if outlook is not None and work is not None:
        output.say(cost_model.draw_forecast(outlook, simulated.plan, work, steps=simulated.steps, most=most))
        peak = cost_model.format_bytes(max(held or (), default=0))
        output.say(f"{peak} of history at most, in float32; half of that in bfloat16")


def _recorded(plan: Plan, trajectory: Trajectory, sampled: SampledModel) -> Schedule:
    """Returns the schedule of a plan on the clock and the signals of a recorded run. `--signal` takes precedence.

    Sites that the run did not have read the numbers of its first site that measured.
    """
    ticks = [replace(call.tick, uncond_skipped=False) for call in trajectory.calls]
    number = {site.name: site.index for site in trajectory.plan.sites}
    given = sampled.arguments["signals"]
    refuse_unknown(plan, given)
    steps = ticks[0].steps or 1 + max(tick.step for tick in ticks)
    series = {name: numbers_by_step(name, value, steps) for name, value in given.items()}
    measured = dict[tuple[int, str], dict[int, dict[str, float]]]()
    for tick, call in zip(ticks, trajectory.calls, strict=True):
        first = next(iter(call.signals.values()), dict[str, float]())
        own = {name: numbers[tick.step] for name, numbers in series.items()}
        measured[tick.step, tick.branch] = {
            site.index: {**first, **call.signals.get(number.get(site.name, -1), {}), **own} for site in plan.sites
        }
    return replay_open(plan, ticks, measured)


def show_overview(sampled: SampledModel, picture: Mapping[str, Any], shapes: str | None, *, as_json: bool) -> None:
    """Prints the parts of the model, and the outcome of each shipped policy on it."""
    work = _work(sampled, picture, shapes)
    clock = {name: value for name, value in sampled.arguments.items() if name != "signals"}
    distilled = sampled.guidance.form == "distilled"
    prospects = overview.prospects(sampled.skeleton, work, distilled=distilled, **clock)
    if as_json:
        as_data = overview.overview_to_json(sampled.skeleton, work, prospects)
        output.say_json({**as_data, "guidance": asdict(sampled.guidance)})
    else:
        output.say(overview.draw_overview(sampled.skeleton, work, prospects, steps=sampled.arguments["steps"]))
        output.say(str(sampled.guidance))
        if sampled.blueprint.references is not None:
            output.say(f"calls of `{sampled.blueprint.references}` hold reference pictures: W517 tells what that means")


def _work(sampled: SampledModel, picture: Mapping[str, Any], shapes: str | None) -> Work | None:
    """Returns the FLOPs of a call. If they cannot be counted, prints a note and returns None."""
    if sampled.blueprint.class_name is None:
        return None
    from cachepolicy.tools.example_inputs import Picture

    try:
        return sampled.blueprint.work(Picture(**picture), None if shapes is None else _shapes(shapes))
    except PolicyError as error:
        if shapes is not None:
            raise
        output.say(f"note: {error.diagnostics[0].message}", error=True)
        return None


def _shapes(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            shapes = load_json(file.read())
    except (OSError, ValueError) as error:
        raise PolicyError.of("E212", f"`{path}` cannot be read: {error}") from error
    if not isinstance(shapes, dict):
        raise PolicyError.of("E212", f"`{path}` is not a JSON object of argument names and shapes")
    return shapes  # pyright: ignore[reportUnknownVariableType]
