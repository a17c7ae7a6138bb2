"""The commands of `cachepolicy`. Only `demo`, `run`, `tune`, `compare` and `--model` import torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from cachepolicy._resources import shipped_policies
from cachepolicy.cli import options, output
from cachepolicy.cli._plan import show_overview, show_plan
from cachepolicy.cli._publish import publish
from cachepolicy.errors import Diagnostic, PolicyError, counted, to_json
from cachepolicy.language import ir
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import SHIPPED, load, read_policy
from cachepolicy.language.parser import parse, recover
from cachepolicy.language.presets import ModelFacts, by_name, fits, short_text
from cachepolicy.language.sharing import packaged_policies
from cachepolicy.language.vocabulary import TEXT_LIMIT
from cachepolicy.methods.convert import convert
from cachepolicy.planning.bind import bind
from cachepolicy.planning.check import Expectations, check, check_text, run_expectations
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.plan import Plan
from cachepolicy.reports import text as report_text
from cachepolicy.reports.diff import compare, draw_diff
from cachepolicy.reports.explanation import Explanation, explain, explain_run
from cachepolicy.reports.html.page import page
from cachepolicy.tools.meta_model import Blueprint, is_model, read_model
from cachepolicy.tools.saved_pipeline import check_tensor_file, read_index, require_text_encoder
from cachepolicy.tracing.perfetto import perfetto_json
from cachepolicy.tracing.schema import schema as trace_schema
from cachepolicy.tracing.trace import Trajectory, load_trace

STDIN = "-"


def _print_version(context: click.Context, _option: click.Parameter, requested: bool) -> None:
    if requested and not context.resilient_parsing:
        from cachepolicy import __version__

        output.say(f"cachepolicy {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Check, plan, explain and run caching policies for diffusion models.

    A policy is a name (`cachepolicy list`), the path of a file, `hf:OWNER/REPOSITORY[:FILE][@REVISION]` for one in a
    hub, or `-` for standard input. Exit codes: 0 no error, 1 an error in a policy or a failed expectation, 2 an
    unusable command line or file.
    """


_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")


# --- policies --------------------------------------------------------------------------------------------


def _standard_input() -> bytes:
    return sys.stdin.buffer.read(TEXT_LIMIT + 1)


def _load_policy(name: str) -> ir.Policy:
    return parse(_standard_input(), source="<stdin>") if name == STDIN else load(name)


def _bind_policy(name: str, sampled: options.SampledModel) -> Plan:
    """Binds the policy to the model. For a broken text, the errors include what binding its valid rules finds."""
    text = _standard_input() if name == STDIN else None
    try:
        policy = load(name) if text is None else parse(text, source="<stdin>")
    except PolicyError as error:
        raise PolicyError([*error.diagnostics, *_binding_errors(name, text, sampled, error.diagnostics)]) from error
    return bind(resolve(policy, sampled.settings, model=sampled.skeleton.facts), sampled.skeleton)


def _binding_errors(
    name: str, text: bytes | None, sampled: options.SampledModel, known: Sequence[Diagnostic]
) -> list[Diagnostic]:
    """Returns the selector errors (E20x) of the valid rules of a broken text. Other codes would repeat known errors."""
    if not any(diagnostic.span for diagnostic in known):
        return []
    try:
        if text is None:
            policy, _ = recover(Path(name).read_bytes(), source=name)
            policy = policy.model_copy(update={"source_name": str(Path(name).absolute())})
        else:
            policy, _ = recover(text, source="<stdin>")
        bind(resolve(policy, sampled.settings, model=sampled.skeleton.facts), sampled.skeleton)
    except OSError:
        return []
    except PolicyError as error:
        return [diagnostic for diagnostic in error.diagnostics if diagnostic.code.startswith("E20")]
    return []


# --- commands --------------------------------------------------------------------------------------------


@main.command("check")
@_files
@options.model
@options.json_form
@output.guarded
def check_command(*, files: Sequence[str], model: str | None, as_json: bool) -> None:
    """Report errors and warnings in policies, with --model also those on this model."""
    blueprint = None if model is None else read_model(model)
    findings = {name: _check(name, blueprint) for name in files}
    diagnostics = [diagnostic for reported in findings.values() for diagnostic in reported]
    if as_json:
        output.say(to_json(diagnostics))
    else:
        output.report_findings(diagnostics)
        for name in (name for name, reported in findings.items() if not reported):
            output.say(f"{name}: fine")
    raise SystemExit(max(map(output.exit_code, findings.values())))


def _check(name: str, blueprint: Blueprint | None) -> tuple[Diagnostic, ...]:
    text = _standard_input() if name == STDIN else None
    found = check(name) if text is None else check_text(text, source="<stdin>")
    if blueprint is None or any(finding.severity == "error" for finding in found):
        return found
    try:
        policy = load(name) if text is None else parse(text, source="<stdin>")
        plan = bind(resolve(policy, model=blueprint.skeleton.facts), blueprint.skeleton)
    except PolicyError as error:
        return (*found, *error.diagnostics)
    known = {(finding.code, finding.span) for finding in found}
    further = options.as_called(plan, blueprint, blueprint.guidance).warnings
    return (*found, *(finding for finding in further if (finding.code, finding.span) not in known))


@main.command("fmt")
@_files
@click.option("--check", "only_check", is_flag=True, help="Write nothing; name the files that would change (exit 1).")
@output.guarded
def fmt_command(*, files: Sequence[str], only_check: bool) -> None:
    """Rewrite policy files in the canonical style and keep comments; `-` is written to standard output."""
    worst = output.FINE
    for name in files:
        try:
            worst = max(worst, _format_file(name, only_check=only_check))
        except PolicyError as error:
            output.report_findings(error.diagnostics, error=True)
            worst = max(worst, output.exit_code(error.diagnostics))
    raise SystemExit(worst)


def _format_file(name: str, *, only_check: bool) -> int:
    if name.endswith(".json"):
        raise click.UsageError(f"`{name}` is the JSON form of a policy; `cachepolicy show {name}` prints its text")
    if name == STDIN:
        before = _standard_input()
        after = format_policy(parse(before, source="<stdin>")).encode()
        if not only_check:
            sys.stdout.buffer.write(after)
            return output.FINE
    else:
        after = format_policy(read_policy(Path(name), name)).encode()
        before = Path(name).read_bytes()
    if after == before:
        return output.FINE
    if only_check:
        output.say(f"{'<stdin>' if name == STDIN else name}: would be reformatted")
        return output.FINDINGS
    output.write(name, after)
    output.say(f"{name}: reformatted")
    return output.FINE


@main.command("plan")
@click.argument("names", nargs=-1, required=True, metavar="[MODEL] [FILE]")
@options.schedule
@options.picture
@click.option("--trace", type=click.Path(dir_okay=False), help="A saved trace: its clock and its measured signals.")
@click.option("--html", type=click.Path(dir_okay=False), metavar="OUT", help="Write the schedule as one HTML file.")
@output.guarded
def plan_command(
    *, names: Sequence[str], as_json: bool, shapes: str | None, trace: str | None, html: str | None, **values: Any
) -> None:
    """Draw the decision of each site at each step, without running a model.

    MODEL is a diffusers folder or configuration (no weights are read), or a skeleton file. For a diffusers model,
    FLOPs are counted too. Without MODEL, a generic diffusion transformer is used. Without FILE, all shipped policies
    are compared. Where a signal decides that neither --signal nor --trace gives, the cost is a range.
    """
    if len(names) > 2 or (len(names) == 2 and values["model"] is not None):
        raise click.UsageError("name one model and one policy")
    file: str | None = names[-1]
    if len(names) == 2:
        values["model"] = names[0]
    elif values["model"] is None and is_model(names[0]):
        values["model"], file = names[0], None
    if file is None and (trace is not None or html is not None):
        raise click.UsageError("--trace and --html are for one policy")
    recorded = None if trace is None else _trajectory(trace, -1)
    sampled = options.model_and_clock(values)
    picture = {name: values[name] for name in options.PICTURE}
    if file is None:
        show_overview(sampled, picture, shapes, as_json=as_json)
    else:
        bound = _bind_policy(file, sampled)
        show_plan(bound, sampled, picture, shapes, trajectory=recorded, html=html, as_json=as_json)


@main.command("diff")
@click.argument("first", metavar="FIRST")
@click.argument("second", metavar="SECOND")
@options.schedule
@click.option("--set-second", type=options.param_type, multiple=True, help="Set a parameter of SECOND only.")
@output.guarded
def diff_command(
    *, first: str, second: str, set_second: Sequence[tuple[str, ir.Expression]], as_json: bool, **values: Any
) -> None:
    """Show the calls that two policies decide differently, on one model and clock."""
    sampled = options.model_and_clock(values)
    other = replace(sampled, settings={**sampled.settings, **dict(set_second)})
    difference = compare(_bind_policy(first, sampled), _bind_policy(second, other), **sampled.arguments)
    if as_json:
        output.say_json(difference.to_json())
        return
    names = (first, second) if first != second else (f"{first} (first)", f"{second} (second)")
    output.say(draw_diff(difference, names, width=output.columns(), colour=output.coloured(sys.stdout)))


@main.command("explain")
@click.argument("names", nargs=-1, required=True, metavar="[FILE] SITE@STEP")
@click.option("--trace", type=click.Path(dir_okay=False), help="A saved trace: explain a decision of that run.")
@click.option("--trajectory", type=int, default=-1, show_default=True, help="Index of the trajectory in the trace.")
@options.schedule
@output.guarded
def explain_command(*, names: Sequence[str], trace: str | None, trajectory: int, as_json: bool, **values: Any) -> None:
    """Explain why a site computes or reuses at a step: the deciding rule, clause by clause.

    With --trace, FILE is omitted, and the values are those that the run measured.
    """
    if len(names) != (2 if trace is None else 1):
        raise click.UsageError("name a policy and a SITE@STEP, or a SITE@STEP and --trace")
    if trace is None:
        sampled = options.model_and_clock(values)
        explanation = explain(_bind_policy(names[0], sampled), names[1], **sampled.arguments)
    else:
        branch = next(iter(values["branches"]), None)
        explanation = explain_run(_trajectory(trace, trajectory), names[0], branch=branch)
    if as_json:
        output.say_json(_explanation_json(explanation))
    else:
        output.say(str(explanation))


def _trajectory(path: str, index: int) -> Trajectory:
    trajectories = load_trace(path).trajectories
    if not -len(trajectories) <= index < len(trajectories):
        raise click.UsageError(f"--trajectory is {index}, but the number of trajectories is {len(trajectories)}")
    return trajectories[index]


def _explanation_json(explanation: Explanation) -> dict[str, object]:
    decision = explanation.decision
    return {
        "site": explanation.site,
        "step": explanation.step,
        "branch": explanation.branch,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "error": explanation.error,
        "rule": None if decision.rule is None else decision.rule + 1,
        "asked": [{**asdict(asked), "rule": asked.rule + 1} for asked in explanation.asked],
    }


@main.command("test")
@_files
@options.model
@options.json_form
@output.guarded
def test_command(*, files: Sequence[str], model: str | None, as_json: bool) -> None:
    """Run the `expect` statements of policies, and name the rules that none of them reaches."""
    skeleton = read_model(model).skeleton if model else None
    results = {name: run_expectations(_load_policy(name), skeleton) for name in files}
    if as_json:
        output.say_json({name: _expectations_json(expectations) for name, expectations in results.items()})
    else:
        for name, expectations in results.items():
            _show_expectations(name, expectations)
    raise SystemExit(output.FINE if all(expectations.hold for expectations in results.values()) else output.FINDINGS)


def _show_expectations(name: str, expectations: Expectations) -> None:
    for outcome in expectations.outcomes:
        output.say(f"{'ok    ' if outcome.holds else 'FAILED'}  {format_node(outcome.expect)}")
    output.report_findings(expectations.findings)
    held, total = sum(outcome.holds for outcome in expectations.outcomes), len(expectations.outcomes)
    uncovered = f", {counted(len(expectations.uncovered), 'rule')} not reached" if expectations.uncovered else ""
    output.say(f"{name}: {held} of {counted(total, 'expectation')} {'holds' if total == 1 else 'hold'}{uncovered}")


def _expectations_json(expectations: Expectations) -> dict[str, object]:
    outcomes = [
        {"text": format_node(outcome.expect), "holds": outcome.holds, "rows": dict(outcome.rows)}
        for outcome in expectations.outcomes
    ]
    findings = json.loads(to_json(expectations.findings))
    return {"hold": expectations.hold, "expectations": outcomes, "findings": findings}


@main.command("report")
@click.argument("trace", required=False, type=click.Path(dir_okay=False))
@click.option("--html", type=click.Path(dir_okay=False), metavar="OUT", help="Write the report as one HTML file.")
@click.option("--perfetto", type=click.Path(dir_okay=False), metavar="OUT", help="Write a file for ui.perfetto.dev.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a saved trace.")
@options.json_form
@output.guarded
def report_command(*, trace: str | None, html: str | None, perfetto: str | None, schema: bool, as_json: bool) -> None:
    """Show the newest session of a saved trace, as a grid or as an HTML page."""
    if schema:
        output.say_json(trace_schema())
        return
    if trace is None:
        raise click.UsageError("name a saved trace, or use --schema")
    recorded = load_trace(trace)
    if html is not None:
        output.write(html, page(recorded.latest).encode())
    if perfetto is not None:
        output.write(perfetto, perfetto_json(recorded).encode())
    if as_json:
        output.say_json([report_text.outcome_to_json(trajectory) for trajectory in recorded.latest])
        return
    width, colour = output.columns(), output.coloured(sys.stdout)
    grids = [report_text.draw(trajectory, width=width, colour=colour) for trajectory in recorded.latest]
    output.say("\n\n".join(grids) or str(recorded))


@main.command("list")
@options.model
@options.json_form
@output.guarded
def list_command(*, model: str | None, as_json: bool) -> None:
    """List the policies that ship and those of installed packages, or with --model those with a preset for the model.

    A preset that is said to be chosen by name is for a model of this class that its configuration does not tell.
    Figures in the source of a preset are those of its authors.
    """
    policies = {name: load(f"{SHIPPED}{name}") for name in shipped_policies()}
    faulty = dict[str, str]()
    for name, file in packaged_policies().items():
        try:
            policies[name] = read_policy(file, name)
        except PolicyError as error:  # which must not hide the others
            first = error.diagnostics[0]
            faulty[name] = f"{first.severity}[{first.code}]: {first.message}"
    if model is not None:
        _list_presets(policies, model, as_json=as_json)
        return
    if as_json:
        output.say_json(
            [{"name": name, **policy.model_dump(include={"title", "source"})} for name, policy in policies.items()]
        )
        return
    width = max(map(len, (*policies, *faulty)), default=0)
    for name, policy in policies.items():
        source = f"  ({policy.source})" if policy.source else ""
        output.say(f"{name:<{width}}  {policy.title or policy.name or ''}{source}")
    for name, reason in faulty.items():
        output.say(f"{name:<{width}}  {reason}")


def _list_presets(policies: Mapping[str, ir.Policy], model: str, *, as_json: bool) -> None:
    facts = read_model(model).skeleton.facts or ModelFacts(model)
    found = [
        (name, preset)
        for name, policy in policies.items()
        for preset in policy.statements
        if isinstance(preset, ir.Preset) and (by_name(preset, facts) or fits(preset, facts))
    ]
    if as_json:
        output.say_json(
            [
                {
                    "name": name,
                    "preset": preset.name,
                    "settings": {setting.name: format_node(setting.value) for setting in preset.settings},
                    "source": preset.origin,
                    "by_name": not fits(preset, facts),
                }
                for name, preset in found
            ]
        )
        return
    for name, preset in found:
        source = f"  ({preset.origin})" if preset.origin else ""
        settings = ", ".join(f"{setting.name} = {short_text(setting.value)}" for setting in preset.settings)
        chosen = "" if fits(preset, facts) else f', chosen by name: preset="{preset.name}"'
        output.say(f"{name}: preset {preset.name}{source}{chosen}\n  {settings}")
    if not found:
        output.say(f"no shipped policy has a preset for `{facts.class_name}`")


@main.command("publish")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repo", metavar="OWNER/NAME", help="The repository in a hub where the folder will be.")
@click.option("--license", "licence", metavar="ID", help="The licence of the policies, e.g. apache-2.0.")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Steps of the schedules (default: as tuned, else 50).")
@click.option("--force", is_flag=True, help="Replace a README.md that was not written by this command.")
@options.model
@output.guarded
def publish_command(
    *, folder: Path, repo: str | None, licence: str | None, steps: int | None, force: bool, model: str | None
) -> None:
    """Write a README.md for a folder of policies, to be shared in a repository or a package.

    All policies are checked, and their expectations are run. A `comparison.json` that `compare --json` has printed is
    shown.
    """
    blueprint = Blueprint(builtin()) if model is None else read_model(model)
    facts = blueprint.skeleton.facts
    shown = "a generic diffusion transformer" if facts is None else f"`{facts.class_name}`"
    publish(folder, blueprint, shown, steps=steps, repo=repo, licence=licence, force=force)


@main.command("show")
@click.argument("name", required=False)
@options.json_form
@click.option("--schema", is_flag=True, help="Print the JSON schema of the JSON form.")
@output.guarded
def show_command(*, name: str | None, as_json: bool, schema: bool) -> None:
    """Print a policy as text, or in its JSON form, which is equivalent and can be loaded too."""
    if schema:
        output.say_json(ir.Policy.model_json_schema())
        return
    if name is None:
        raise click.UsageError("name a policy, or use --schema")
    policy = _load_policy(name)
    output.say(policy.model_dump_json(indent=2) if as_json else format_policy(policy).rstrip("\n"))


@main.command("convert")
@click.argument("file", metavar="FILE")
@output.guarded
def convert_command(*, file: str) -> None:
    """Print the policy of another tool's setting: a JSON or YAML file of cache-dit, for example.

    A field that no policy expresses is an error (E168), which names it.
    """
    output.say(convert(Path(file)).rstrip("\n"))


@main.command("demo")
@click.option("--policy", metavar="FILE", help="The policy to measure (default: the one tuned for the model).")
@options.set_param
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Sampling steps.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of the noise.")
@click.option("--pictures", type=click.IntRange(1, 36), default=12, show_default=True, help="Number of pictures.")
@click.option("--output", type=click.Path(dir_okay=False), default="demo.png", show_default=True, help="PNG to write.")
@options.json_form
@output.guarded
def demo_command(
    *,
    policy: str | None,
    settings: Sequence[tuple[str, ir.Expression]],
    output: str,
    as_json: bool,
    **sampling: int,
) -> None:
    """Draw emoji with a small model, uncached, with a policy, with fewer steps and with other solvers.

    The pictures with their differences are written to a PNG file, and all numbers to an HTML page beside it.
    """
    from cachepolicy.cli._demo import show_demo
    from cachepolicy.tuning.demo import Sampling, tuned_policy

    file = str(tuned_policy()) if policy is None else policy
    name = "<stdin>" if policy == STDIN else Path(file).stem
    show_demo(_load_policy(file), name, dict(settings), Sampling(**sampling), Path(output), as_json=as_json)


@main.command("run")
@click.argument("folder", metavar="FOLDER")
@click.option("--policy", metavar="FILE", help="The policy; without one, the bare pipeline is sampled.")
@options.set_param
@click.option("--prompt", help="The prompt, for a pipeline that was saved with its text encoder.")
@options.pipeline
@click.option("--seed", "seeds", type=click.IntRange(0, 2**31), multiple=True, help="A seed; repeatable (default 0).")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampling steps (default: the pipeline's own).")
@click.option("--compare/--no-compare", "compares", default=True, help="Sample uncached too, and compare the pictures.")
@click.option(
    "--output", type=click.Path(file_okay=False), default="run", show_default=True, help="Folder to write to."
)
@options.json_form
@output.guarded
def run_command(
    *, folder: str, policy: str | None, settings: Sequence[tuple[str, ir.Expression]], **values: Any
) -> None:
    """Sample a pipeline from a diffusers folder, with and without a policy: pictures, trace, report and metrics."""
    loaded = None if policy is None else _load_policy(policy)
    if loaded is not None:
        resolve(loaded, dict(settings))
    elif settings:
        raise click.UsageError("--set needs --policy")
    named = {"prompt": values["prompt"], "num_inference_steps": values["steps"]}
    pipe, arguments = _open_pipeline(folder, named, **values)
    from cachepolicy.cli._run import Task, show_run

    task = Task(arguments, values["seeds"] or (0,), Path(values["output"]), loaded, dict(settings), values["compares"])
    show_run(pipe, task, as_json=values["as_json"])


def _open_pipeline(
    folder: str,
    named: Mapping[str, Any],
    *,
    embeds: str | None,
    more: Sequence[tuple[str, Any]],
    device: str,
    dtype: str,
    **_: Any,
) -> tuple[Any, dict[str, Any]]:
    """Loads a pipeline. Everything that can be checked without torch is checked first.

    Args:
        folder: Its folder.
        named: Arguments of its call that have options of their own; None stands for one that is not given.
        embeds: The file of `--embeds`.
        more: The values of `--argument`.
        device: The device of the pipeline.
        dtype: The dtype of the weights.

    Returns:
        The pipeline and all arguments of its call.
    """
    index = read_index(folder)
    arguments = {name: value for name, value in named.items() if value is not None} | dict(more)
    if embeds is None:
        require_text_encoder(folder, index, arguments)
    else:
        check_tensor_file(embeds)
    from cachepolicy.tools.sampling import open_pipeline, read_tensors

    if embeds is not None:
        arguments = read_tensors(embeds, device=device) | arguments
    return open_pipeline(folder, arguments, dtype=dtype, device=device), arguments


@main.command("tune")
@click.argument("folder", metavar="FOLDER")
@click.option("--cost", type=click.FloatRange(0, 1, min_open=True), help="Target: the share of the model's calls.")
@click.option("--speedup", type=click.FloatRange(1), help="Target: how many times as fast a whole call gets.")
@click.option("--psnr", type=float, help="Target: the mean PSNR in dB against the uncached pictures.")
@click.option("--psnr-p10", type=float, help="Target: the 10th percentile of the same.")
@click.option("--policy", metavar="FILE", help="Set the threshold of this policy, instead of planning a list of steps.")
@click.option("--param", help="The param that is the threshold (default: the only one that a `while` reads).")
@options.set_param
@options.sampled_calls(24)
@click.option(
    "--steps",
    type=options.steps_type,
    default=(),
    help="Sampling steps, or several: 20,28,50 (default: the pipeline's own).",
)
@click.option("--levels", type=options.numbers_type, help="Speed-ups for the values of a `level` param: 1.5,2,3.")
@click.option("--held-out", type=click.IntRange(1), default=8, show_default=True, help="Further calls to measure on.")
@click.option("--order", type=click.IntRange(0, 3), default=1, show_default=True, help="Order of the extrapolation.")
@click.option(
    "--gap", type=click.IntRange(1), default=9, show_default=True, help="Most steps from one computed call to the next."
)
@click.option("--keep-scheduler", is_flag=True, help="Keep the scheduler and the number of steps of the pipeline.")
@click.option("--run-dir", type=click.Path(file_okay=False), help="Folder that keeps what was sampled.")
@click.option("--out", type=click.Path(dir_okay=False), default="tuned.cp", show_default=True, help="File to write.")
@click.option("--report", type=click.Path(dir_okay=False), help="Compare the policy with fewer steps, as an HTML page.")
@options.json_form
@output.guarded
def tune_command(
    *,
    folder: str,
    prompts: str | None,
    steps: Sequence[int],
    out: str,
    run_dir: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Find the policy that meets a target with the least error, for a pipeline from a diffusers folder.

    The pipeline is sampled without a policy, with different seeds and the prompts in turn, and the policy is planned
    on these recordings. Then it is measured on further calls. With --run-dir, an interrupted command goes on when it
    is run again. With --policy, the threshold of that policy is found instead. Several --steps, or --levels in place of
    a target, give one policy with a `level` param.
    """
    policy = None if values["policy"] is None else _load_policy(values["policy"])
    if policy is None and (values["param"] is not None or values["settings"]):
        raise click.UsageError("--param and --set need --policy")
    if policy is not None:
        resolve(policy, dict(values["settings"]))
    targets = {name: values[name] for name in ("cost", "speedup", "psnr", "psnr_p10") if values[name] is not None}
    levels: Sequence[float] = values["levels"] or ()
    if len(targets) + bool(levels) != 1:
        raise click.UsageError("give one of --cost, --speedup, --psnr, --psnr-p10 and --levels")
    if values["policy"] is not None and (levels or len(steps) > 1):
        raise click.UsageError("--policy takes one target and one number of steps")
    pipe, arguments, lines = _open_for_calls(folder, prompts, steps[0] if steps else None, values)
    from cachepolicy.cli._tune import show_levels, show_threshold, show_tuning
    from cachepolicy.tuning.calls import Calls

    calls = Calls(arguments, lines, values["samples"], values["held_out"], values["seed"])
    report = None if values["report"] is None else Path(values["report"])
    shown: dict[str, Any] = {"out": Path(out), "run_dir": run_dir, "as_json": as_json, "report": report}
    if policy is not None:
        further = {**targets, "param": values["param"], "settings": dict(values["settings"])}
        show_threshold(pipe, calls, policy, further, **shown)
        return
    further = {"order": values["order"], "gap": values["gap"]}
    if levels or len(steps) > 1:
        goal = next(iter(targets), "speedup")
        show_levels(pipe, calls, levels or [*targets.values()], {**further, "goal": goal, "steps": steps}, **shown)
        return
    further["keep_scheduler"] = values["keep_scheduler"]
    show_tuning(pipe, calls, {**targets, **further}, **shown)


@main.command("compare")
@click.argument("folder", metavar="FOLDER")
@click.argument("policies", nargs=-1, metavar="[POLICY...]")
@options.set_param
@options.sampled_calls(8)
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampling steps (default: the pipeline's own).")
@click.option("--try-steps", type=click.IntRange(1, 10_000), multiple=True, help="Another number of steps; repeatable.")
@click.option("--try-solver", type=click.Choice(["UniPC", "DPM++ 2M"]), multiple=True, help="A solver; repeatable.")
@click.option(
    "--converged",
    type=click.IntRange(0, 10_000),
    default=120,
    show_default=True,
    help="Steps of the run that is taken for exact; 0 for none.",
)
@click.option(
    "--output", type=click.Path(file_okay=False), default="compare", show_default=True, help="Folder to write to."
)
@options.json_form
@output.guarded
def compare_command(
    *,
    folder: str,
    policies: Sequence[str],
    settings: Sequence[tuple[str, ir.Expression]],
    prompts: str | None,
    steps: int | None,
    try_steps: Sequence[int],
    try_solver: Sequence[str],
    converged: int,
    output: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure policies, numbers of steps and solvers on the same calls of a pipeline from a diffusers folder.

    Each policy is compared with fewer steps, UniPC and DPM++ 2M at its own cost, by the distance from the uncached run
    and from a converged one. --set sets a parameter of all policies.
    """
    loaded = {Path(name).stem: _load_policy(name) for name in policies}
    for policy in loaded.values():
        resolve(policy, dict(settings))
    pipe, arguments, lines = _open_for_calls(folder, prompts, steps, values)
    from cachepolicy.cli._compare import show_comparison
    from cachepolicy.tuning.calls import Calls
    from cachepolicy.tuning.compare import Variant

    variants = {name: Variant(policy, dict(settings)) for name, policy in loaded.items()}
    variants |= {counted(number, "step"): Variant(steps=number) for number in try_steps}
    variants |= {solver: Variant(solver=solver) for solver in try_solver}
    calls = Calls(arguments, lines, values["samples"], 0, values["seed"])
    show_comparison(pipe, calls, variants, converged=converged or None, folder=Path(output), as_json=as_json)


@main.command("calibrate")
@click.argument("folder", metavar="FOLDER")
@click.option("--method", type=click.Choice(["magcache", "teacache", "smoothcache"]), required=True, help="The method.")
@click.option(
    "--cost",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="The threshold is chosen for this share of computed steps.",
)
@options.sampled_calls(4)
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampling steps (default: the pipeline's own).")
@click.option(
    "--out", type=click.Path(dir_okay=False), default="calibrated.cp", show_default=True, help="File to write."
)
@options.json_form
@output.guarded
def calibrate_command(
    *,
    folder: str,
    method: str,
    cost: float,
    prompts: str | None,
    steps: int | None,
    out: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure the constants of MagCache, TeaCache or SmoothCache for a pipeline, and write the method as a policy."""
    pipe, arguments, lines = _open_for_calls(folder, prompts, steps, values)
    from cachepolicy.cli._tune import show_calibration
    from cachepolicy.tuning.calls import Calls

    calls = Calls(arguments, lines, values["samples"], 0, values["seed"])
    show_calibration(pipe, calls, method, cost, out=Path(out), as_json=as_json)


def _open_for_calls(
    folder: str, prompts: str | None, steps: int | None, values: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], list[str]]:
    """Loads the pipeline of a command with `options.sampled_calls`. Returns it, its arguments and the prompts."""
    lines = [] if prompts is None else _prompts(prompts)
    named = {"prompt": lines[0] if lines else None, "num_inference_steps": steps}
    pipe, arguments = _open_pipeline(folder, named, **values)
    return pipe, arguments, lines


def _prompts(path: str) -> list[str]:
    """Returns the lines of a file that are not empty."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError.of("E213", f"the prompts in `{path}` cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PolicyError.of("E213", f"`{path}` holds no prompt", help="write one prompt a line")
    return prompts


# --- editors ---------------------------------------------------------------------------------------------


@main.command("lsp")
@click.option("--stdio", is_flag=True, expose_value=False, help="Use standard input and output (the only transport).")
@output.guarded
def lsp_command() -> None:
    """Start the language server, which editors use. docs/editors.md describes the setup."""
    from cachepolicy.lsp.server import serve

    serve()
