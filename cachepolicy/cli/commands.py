"""The commands of `cachepolicy`: each a few lines over the library. None but `demo` and `--model` imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from cachepolicy._resources import shipped_policies
from cachepolicy.cli import options, output
from cachepolicy.cli.plan import show_overview, show_plan
from cachepolicy.cli.report import show_trace
from cachepolicy.errors import Diagnostic, PolicyError, to_json
from cachepolicy.language import ir
from cachepolicy.language.formatter import format as printed
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import SHIPPED, load, read_policy
from cachepolicy.language.parser import parse, recover
from cachepolicy.language.vocabulary import TEXT_LIMIT
from cachepolicy.planning.bind import bind
from cachepolicy.planning.check import Expectations, check_text, run_expectations
from cachepolicy.planning.check import check as check_policy
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.diff import compare
from cachepolicy.reports.diff import draw_diff as draw_difference
from cachepolicy.reports.explanation import Explanation, explain_run
from cachepolicy.reports.explanation import explain as explain_place
from cachepolicy.tools.meta_model import is_model, read_model
from cachepolicy.tracing.schema import schema as trace_schema
from cachepolicy.tracing.trace import Trajectory, load_trace

STDIN = "-"


def _version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from cachepolicy import __version__

        output.say(f"cachepolicy {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print it.")
def main() -> None:
    """Caching policies for diffusion models: check them, see what they do, try one on a small model.

    A policy is a shipped name (`cachepolicy list`), the path of a file, or `-` for standard input. Exit codes: 0 fine,
    1 something is wrong with a policy or an expectation fails, 2 the command or a file cannot be used.
    """


_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_file = click.argument("file", metavar="FILE")


# --- policies --------------------------------------------------------------------------------------------


def _standard_input() -> bytes:
    return sys.stdin.buffer.read(TEXT_LIMIT + 1)


def _opened(name: str) -> ir.Policy:
    return parse(_standard_input(), source="<stdin>") if name == STDIN else load(name)


def _bound(name: str, wanted: options.SampledModel) -> Plan:
    """The policy on the model; of a text with errors also what its other rules would find there."""
    text = _standard_input() if name == STDIN else None
    try:
        policy = load(name) if text is None else parse(text, source="<stdin>")
    except PolicyError as error:
        raise PolicyError([*error.diagnostics, *_further(name, text, wanted, error.diagnostics)]) from error
    return bind(resolve(policy, wanted.settings), wanted.skeleton)


def _further(
    name: str, text: bytes | None, wanted: options.SampledModel, known: Sequence[Diagnostic]
) -> list[Diagnostic]:
    """What binding finds in the sound part of a broken text; codes of other kinds would only repeat what is known."""
    if not any(each.span for each in known):
        return []
    shown = "<stdin>" if text is not None else name
    try:
        policy, _ = recover(Path(name).read_bytes() if text is None else text, source=shown)
        if text is None:
            policy = policy.model_copy(update={"source_name": str(Path(name).absolute())})
        bind(resolve(policy, wanted.settings), wanted.skeleton)
    except OSError:
        return []
    except PolicyError as error:
        return [each for each in error.diagnostics if each.code.startswith("E20")]
    return []


# --- commands --------------------------------------------------------------------------------------------


@main.command()
@_files
@options.json_form
@output.guarded
def check(*, files: Sequence[str], as_json: bool) -> None:
    """Find what is wrong or doubtful in policies."""
    found = {name: _checked(name) for name in files}
    everything = [each for findings in found.values() for each in findings]
    if as_json:
        output.say(to_json(everything))
    else:
        output.report_findings(everything)
        for name in (name for name, findings in found.items() if not findings):
            output.say(f"{name}: fine")
    raise SystemExit(max(output.exit_code(findings) for findings in found.values()))


def _checked(name: str) -> tuple[Diagnostic, ...]:
    return check_text(_standard_input(), source="<stdin>") if name == STDIN else check_policy(name)


@main.command()
@_files
@click.option("--check", "only_check", is_flag=True, help="Write nothing; name what would change, and exit with 1.")
@output.guarded
def fmt(*, files: Sequence[str], only_check: bool) -> None:
    """Write policy files in the canonical style, comments kept; `-` goes to standard output."""
    worst = output.FINE
    for name in files:
        try:
            worst = max(worst, _formatted(name, only_check=only_check))
        except PolicyError as error:
            output.report_findings(error.diagnostics, error=True)
            worst = max(worst, output.exit_code(error.diagnostics))
    raise SystemExit(worst)


def _formatted(name: str, *, only_check: bool) -> int:
    if name.endswith(".json"):
        raise click.UsageError(f"`{name}` is the JSON form of a policy; `cachepolicy show {name}` prints its text")
    before = _standard_input() if name == STDIN else b""
    policy = parse(before, source="<stdin>") if name == STDIN else read_policy(Path(name), name)
    after = printed(policy).encode()
    if name == STDIN and not only_check:
        sys.stdout.buffer.write(after)
        return output.FINE
    if after == (before if name == STDIN else Path(name).read_bytes()):
        return output.FINE
    if only_check:
        output.say(f"{'<stdin>' if name == STDIN else name}: would be reformatted")
        return output.FINDINGS
    try:
        Path(name).write_bytes(after)
    except OSError as error:
        raise PolicyError.of("E152", f"`{name}` cannot be written: {(error.strerror or str(error)).lower()}") from error
    output.say(f"{name}: reformatted")
    return output.FINE


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="[MODEL] [FILE]")
@options.schedule
@options.picture
@output.guarded
def plan(*, names: Sequence[str], as_json: bool, shapes: str | None, **given: Any) -> None:
    """Draw what will be computed and reused, sites by steps, before anything is run.

    MODEL is a diffusers folder or configuration (no weights are read), or a skeleton file: then FLOPs are counted too.
    Without one it is a generic diffusion transformer. Without FILE, all shipped policies are compared.
    """
    model, file = _model_and_policy(names, given["model"])
    wanted = options.model_and_clock({**given, "model": model})
    picture = {name: given[name] for name in options.PICTURE}
    if file is None:
        show_overview(wanted, picture, shapes, as_json=as_json)
    else:
        show_plan(_bound(file, wanted), wanted, picture, shapes, as_json=as_json)


def _model_and_policy(names: Sequence[str], model: str | None) -> tuple[str | None, str | None]:
    """Which of one or two names is the model, and which the policy."""
    if len(names) > 2 or (len(names) == 2 and model is not None):
        raise click.UsageError("name one model and one policy")
    if len(names) == 2:
        return names[0], names[1]
    return (names[0], None) if model is None and is_model(names[0]) else (model, names[0])


@main.command()
@click.argument("first", metavar="FIRST")
@click.argument("second", metavar="SECOND")
@options.schedule
@click.option("--set-second", type=options.ParamOption(), multiple=True, help="Set a parameter of SECOND alone.")
@output.guarded
def diff(
    *, first: str, second: str, set_second: Sequence[tuple[str, ir.Expression]], as_json: bool, **given: Any
) -> None:
    """Compare two policies on one model and clock: the calls that they decide differently."""
    wanted = options.model_and_clock(given)
    other = replace(wanted, settings={**wanted.settings, **dict(set_second)})
    found = compare(_bound(first, wanted), _bound(second, other), **wanted.arguments)
    if as_json:
        output.say_json(found.to_json())
        return
    names = (first, second) if first != second else (f"{first} (first)", f"{second} (second)")
    output.say(draw_difference(found, names, width=output.columns(), colour=output.coloured(sys.stdout)))


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="[FILE] SITE@STEP")
@click.option("--trace", type=click.Path(dir_okay=False), help="A saved trace: explain what a run did, without FILE.")
@click.option("--trajectory", type=int, default=-1, show_default=True, help="Which one of the trace, -1 the newest.")
@options.schedule
@output.guarded
def explain(*, names: Sequence[str], trace: str | None, trajectory: int, as_json: bool, **given: Any) -> None:
    """Say why a site computes or reuses at a step: the rule that decided, clause by clause.

    With --trace it is why it did so in a run, by the numbers that were measured there.
    """
    if len(names) != (2 if trace is None else 1):
        raise click.UsageError("name a policy and a place, or a place and --trace")
    if trace is None:
        wanted = options.model_and_clock(given)
        explanation = explain_place(_bound(names[0], wanted), names[1], **wanted.arguments)
    else:
        explanation = explain_run(_trajectory(trace, trajectory), names[0], branch=next(iter(given["branches"]), None))
    if as_json:
        output.say_json(_explained(explanation))
    else:
        output.say(str(explanation))


def _trajectory(path: str, number: int) -> Trajectory:
    recorded = load_trace(path).trajectories
    if not -len(recorded) <= number < len(recorded):
        raise click.UsageError(f"the trace has {len(recorded)} trajectories, so there is none with the number {number}")
    return recorded[number]


def _explained(explanation: Explanation) -> dict[str, object]:
    decision = explanation.decision
    return {
        "site": explanation.site,
        "step": explanation.step,
        "branch": explanation.branch,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "rule": None if decision.rule is None else decision.rule + 1,
        "asked": [{**asdict(each), "rule": each.rule + 1} for each in explanation.asked],
    }


@main.command()
@_files
@options.model
@options.json_form
@output.guarded
def test(*, files: Sequence[str], model: str | None, as_json: bool) -> None:
    """Run the `expect` statements of policies, and name the rules that none of them reaches."""
    skeleton = read_model(model).skeleton if model else None
    ran = {name: run_expectations(_opened(name), skeleton) for name in files}
    if as_json:
        output.say_json({name: _expectations_json(each) for name, each in ran.items()})
    else:
        for name, each in ran.items():
            _say_expectations(name, each)
    raise SystemExit(output.FINE if all(each.hold for each in ran.values()) else output.FINDINGS)


def _say_expectations(name: str, ran: Expectations) -> None:
    held = sum(each.holds for each in ran.outcomes)
    for each in ran.outcomes:
        output.say(f"{'ok    ' if each.holds else 'FAILED'}  {format_node(each.expect)}")
    output.report_findings(ran.findings)
    uncovered = f", {len(ran.uncovered)} rules not reached" if ran.uncovered else ""
    output.say(f"{name}: {held} of {len(ran.outcomes)} expectations hold{uncovered}")


def _expectations_json(ran: Expectations) -> dict[str, object]:
    outcomes = [
        {"text": format_node(each.expect), "holds": each.holds, "rows": dict(each.rows)} for each in ran.outcomes
    ]
    return {"hold": ran.hold, "expectations": outcomes, "findings": json.loads(to_json(ran.findings))}


@main.command()
@click.argument("trace", required=False, type=click.Path(dir_okay=False))
@click.option("--html", type=click.Path(dir_okay=False), metavar="OUT", help="Write the report as one HTML file.")
@click.option("--perfetto", type=click.Path(dir_okay=False), metavar="OUT", help="Write it for ui.perfetto.dev.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a saved trace.")
@options.json_form
@output.guarded
def report(*, trace: str | None, schema: bool, **given: Any) -> None:
    """Show what a run did, from the trace that it saved: the newest session, as a grid or as a page."""
    if schema:
        output.say_json(trace_schema())
        return
    if trace is None:
        raise click.UsageError("name a saved trace, or ask for --schema")
    show_trace(load_trace(trace), **given)


@main.command("list")
@options.json_form
@output.guarded
def list_shipped(*, as_json: bool) -> None:
    """Name the shipped policies."""
    policies = {name: load(f"{SHIPPED}{name}") for name in shipped_policies()}
    if as_json:
        output.say_json(
            [{"name": name, **each.model_dump(include={"title", "source"})} for name, each in policies.items()]
        )
        return
    width = max(map(len, policies), default=0)
    for name, each in policies.items():
        output.say(f"{name:<{width}}  {each.title or each.name or ''}{f'  ({each.source})' if each.source else ''}")


@main.command()
@click.argument("name", required=False)
@options.json_form
@click.option("--schema", is_flag=True, help="Print the JSON schema of the JSON form.")
@output.guarded
def show(*, name: str | None, as_json: bool, schema: bool) -> None:
    """Print a policy: its text, or its JSON form, which says the same and can be loaded too."""
    if schema:
        output.say_json(ir.Policy.model_json_schema())
        return
    if name is None:
        raise click.UsageError("name a policy, or ask for --schema")
    policy = _opened(name)
    output.say(policy.model_dump_json(indent=2) if as_json else printed(policy).rstrip("\n"))


@main.command()
@click.option("--policy", default="pab.cp", show_default=True, metavar="FILE", help="The policy to try.")
@options.set_param
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Sampling steps.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--pairs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Timings of each way, in turn."
)
@click.option("--pictures", type=click.IntRange(1, 36), default=12, show_default=True, help="Pictures at a time.")
@click.option("--output", type=click.Path(dir_okay=False), default="demo.png", show_default=True, help="PNG to write.")
@options.json_form
@output.guarded
def demo(
    *, policy: str, settings: Sequence[tuple[str, ir.Expression]], output: str, as_json: bool, **given: int
) -> None:
    """Draw emoji with a small model, uncached and with a policy: time, FLOPs and pictures compared.

    The same model with fewer steps, at nearly the policy's cost, is the row that a policy has to beat.
    """
    from cachepolicy.cli.demo import show_demo
    from cachepolicy.tools.demo import Sampling

    show_demo(
        _opened(policy),
        "<stdin>" if policy == STDIN else policy,
        dict(settings),
        Sampling(**given),
        Path(output),
        as_json=as_json,
    )


@main.command()
@click.argument("folder", metavar="FOLDER")
@click.option("--policy", metavar="FILE", help="The policy; without one the bare pipeline is sampled.")
@options.set_param
@click.option("--prompt", help="The prompt, for a pipeline that was saved with its text encoder.")
@click.option("--embeds", metavar="FILE", help="Tensors for the call by name, such as prompt_embeds (safetensors, pt).")
@click.option("--argument", "more", multiple=True, metavar="NAME=VALUE", help="Any other argument of the call.")
@click.option("--seed", "seeds", type=click.IntRange(0, 2**31), multiple=True, help="Seeds; repeatable (default 0).")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampling steps (default: the pipeline's own).")
@click.option("--compare/--no-compare", "compares", default=True, help="Sample uncached too, and measure the distance.")
@click.option(
    "--output", type=click.Path(file_okay=False), default="run", show_default=True, help="Folder to write to."
)
@click.option("--device", default="cpu", show_default=True, help="Where to run.")
@click.option("--dtype", default="float32", show_default=True, help="In which precision.")
@options.json_form
@output.guarded
def run(*, folder: str, policy: str | None, settings: Sequence[tuple[str, ir.Expression]], **given: Any) -> None:
    """Sample a pipeline from a diffusers folder, with a policy and without: pictures, trace, report and metrics."""
    opened = None if policy is None else _opened(policy)
    from cachepolicy.cli.run import Task, show_run
    from cachepolicy.tools.sampling import open_pipeline, read_tensors, values

    named = {"prompt": given["prompt"], "num_inference_steps": given["steps"]}
    tensors = {} if given["embeds"] is None else read_tensors(given["embeds"], device=given["device"])
    arguments = {name: value for name, value in named.items() if value is not None} | tensors | values(given["more"])
    output, seeds = Path(given["output"]), given["seeds"] or (0,)
    task = Task(arguments, seeds, output, opened, dict(settings), given["compares"])
    pipe = open_pipeline(folder, dtype=given["dtype"], device=given["device"])
    show_run(pipe, task, as_json=given["as_json"])


# --- editors ---------------------------------------------------------------------------------------------


@main.command()
@click.option("--stdio", is_flag=True, expose_value=False, help="Standard input and output; there is no other way.")
@output.guarded
def lsp() -> None:
    """Serve an editor: findings as you type, hover, completion, definitions, fixes and formatting.

    Editors start it; docs/editors.md says how.
    """
    from cachepolicy.lsp.server import serve

    serve()
