"""Tunes several numbers of steps and levels, and writes one policy with a `level` param."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.parser import parse
from cachepolicy.language.traversal import transform
from cachepolicy.tools.sampling import Progress
from cachepolicy.tuning.compare import Comparison
from cachepolicy.tuning.found_policy import FoundPolicy
from cachepolicy.tuning.run_directory import fingerprint
from cachepolicy.tuning.sampling import STEPS, ModelCall
from cachepolicy.tuning.tuner import Tuning, tune

LEVEL = "level"
"""The name of the param."""
Goal = Literal["cost", "speedup", "psnr", "psnr_p10"]


@dataclass(frozen=True, slots=True)
class LevelTuning(FoundPolicy):
    """What `tune_levels` found.

    Args:
        policy: One policy for all numbers of steps and levels.
        text: Its text.
        results: What was found for each number of steps and level. The number of steps is None where the calls' own
            number was tuned alone.
    """

    results: Mapping[tuple[int | None, float], Tuning]

    def report(self, path: str | os.PathLike[str], **options: Any) -> dict[int | None, Comparison]:
        """Compare the levels of each number of steps on the held-out calls, and write an HTML file for each number.

        Args:
            path: Where to write. With several numbers of steps, each is added to the name: `tune-20.html`.
            options: Further arguments of `cachepolicy.compare`, such as `metrics` and `progress`.

        Returns:
            The comparison for each number of steps.

        Raises:
            OSError: A file cannot be written.
            PolicyError: A call fails (E213).
        """
        found = dict[int | None, Comparison]()
        numbers = list(dict.fromkeys(steps for steps, _ in self.results))
        for number in numbers:
            levels = {level: one for (steps, level), one in self.results.items() if steps == number}
            first = next(iter(levels.values()))
            found[number] = first.compared({f"{LEVEL} {level:g}": one for level, one in levels.items()}, **options)
            file = Path(path)
            where = file if len(numbers) == 1 else file.with_stem(f"{file.stem}-{number}")
            title = "A tuned policy" if number is None else f"A tuned policy at {counted(number, 'step')}"
            found[number].report(where, title=title)
        return found


def tune_levels(
    target: Any,
    calls: Sequence[ModelCall],
    levels: Sequence[float],
    *,
    steps: Sequence[int] = (),
    goal: Goal = "speedup",
    held_out: Sequence[ModelCall] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **further: Any,
) -> LevelTuning:
    """Tune each number of steps for each level, and write one policy.

    The recordings of a number of steps are shared by all levels. The scheduler and the numbers of steps are kept.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of each call, as those of `tune`.
        levels: Values of the target, which are the values of the param `level`.
        steps: Values of `num_inference_steps`. Without any, that of the calls.
        goal: The target that the levels are values of.
        held_out: Calls to measure on, as those of `tune`.
        run_dir: A folder that keeps what was sampled, as that of `tune`.
        progress: Called with the calls done, the calls in all, and what is sampled, for each tuning.
        **further: Further arguments of `tune`.

    Returns:
        The policy and what was found.

    Raises:
        PolicyError: As `tune`; the message names the number of steps and the level. No level is given (E402).
    """
    if not levels:
        raise PolicyError.of("E402", "no level is given", help="pass the values of the target: `levels=[1.5, 2, 3]`")
    results = dict[tuple[int | None, float], Tuning]()
    with _folder(run_dir, [*calls, *(held_out or ())]) as folder:
        for number in dict.fromkeys(steps) or (None,):
            changed = {} if number is None else {STEPS: number}
            sampled = [{**call, **changed} for call in calls]
            others = None if held_out is None else [{**call, **changed} for call in held_out]
            for level in dict.fromkeys(levels):
                where = f"{LEVEL} {level:g}" if number is None else f"{number} steps, {LEVEL} {level:g}"
                with _named(where):
                    results[number, level] = tune(
                        target,
                        sampled,
                        held_out=others,
                        run_dir=folder,
                        progress=_labelled(progress, where),
                        # One policy cannot ask for another scheduler at each level.
                        keep_scheduler=True,
                        **{goal: level},
                        **further,
                    )
    text = _merged(results, goal)
    return LevelTuning(parse(text, source="<tuned>"), text, results)


@contextlib.contextmanager
def _folder(
    run_dir: str | os.PathLike[str] | None, calls: Sequence[ModelCall]
) -> Generator[str | os.PathLike[str] | None]:
    """Give a folder in which the levels share their recordings, or None where the calls cannot be recognised."""
    if run_dir is not None:
        yield run_dir
        return
    try:
        fingerprint(calls)
    except PolicyError:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="cachepolicy-") as folder:
        yield folder


@contextlib.contextmanager
def _named(where: str) -> Generator[None]:
    """Name the number of steps and the level in errors."""
    try:
        yield
    except PolicyError as error:
        found = (replace(each, message=f"at {where}: {each.message}") for each in error.diagnostics)
        raise PolicyError(found) from error


def _labelled(progress: Progress | None, where: str) -> Progress | None:
    if progress is None:
        return None

    def report(done: int, total: int, label: str) -> None:
        progress(done, total, f"{where}: {label}")

    return report


# --- one policy of many ----------------------------------------------------------------------------------


def _merged(results: Mapping[tuple[int | None, float], Tuning], goal: Goal) -> str:
    """Return one policy: each rule holds at its number of steps and level."""
    levels = sorted({level for _, level in results})
    values = tuple(map(_number, levels))
    param = ir.Param(
        name=LEVEL,
        type="float",
        default=values[len(values) // 2],
        domain=ir.SetOf(items=values),
        doc=f"the `{goal}` that the steps were tuned for",
    )
    parts: dict[str, list[ir.Statement]] = {kind: [] for kind in ("table", "match", "expect", "tuned")}
    for (steps, level), result in results.items():
        suffix = f"{level:g}".replace(".", "_").replace("-", "minus_")
        name = suffix if steps is None else f"{steps}_{suffix}"
        for statement in _renamed(result.policy, name):
            parts.setdefault(statement.kind, []).append(_gated(statement, steps, level))
    statements = [param, *(statement for kind in parts.values() for statement in kind)]
    return format_policy(ir.Policy(name="tuned", statements=tuple(statements)))


def _gated(statement: ir.Statement, steps: int | None, level: float) -> ir.Statement:
    """Return a statement that holds at a number of steps and a level only."""
    setting = ir.Setting(name=LEVEL, value=_number(level))
    match statement:
        case ir.Rule():
            clauses = [] if steps is None else [_equal("steps", steps)]
            clauses.append(_equal(LEVEL, level))
            clauses += [] if statement.when is None else [statement.when]
            when = ir.Both(operands=tuple(clauses)) if len(clauses) > 1 else clauses[0]
            return statement.model_copy(update={"when": when})
        case ir.Expect() | ir.Tuned():
            return statement.model_copy(update={"settings": (setting, *statement.settings)})
        case _:
            return statement


def _renamed(policy: ir.Policy, suffix: str) -> list[ir.Statement]:
    """Return the statements of a policy with names of their own for its lets and tables."""
    declared = {each.name for each in policy.statements if isinstance(each, ir.Let | ir.Table)}
    names = {name: f"{name}_{suffix}" for name in declared}

    def rename(node: ir.Node) -> ir.Node:
        match node:
            case ir.Name() | ir.Let() | ir.Table() if node.name in names:
                return node.model_copy(update={"name": names[node.name]})
            case ir.Lookup() if node.table in names:
                return node.model_copy(update={"table": names[node.table]})
            case _:
                return node

    return [transform(statement, rename) for statement in policy.statements]


def _equal(name: str, value: float) -> ir.Comparison:
    return ir.Comparison(operators=("==",), operands=(ir.Name(name=name), _number(value)))


def _number(value: float) -> ir.Number:
    return ir.Number(value=int(value) if float(value).is_integer() else value)
