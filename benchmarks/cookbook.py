"""Write the cookbook: a page for a shipped policy, with what it does to the pictures of the emoji model if measured.

    OMP_NUM_THREADS=1 python -m benchmarks.cookbook [NAME ...] [--pairs 3]

Measures the policies that are named, or all, and writes `docs/cookbook`: the pages, a picture each, and the numbers in
`measured.json`. `--pages` writes the pages again from numbers that are there.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import cachepolicy
from benchmarks.cookbook_texts import TEXTS, Text
from cachepolicy._resources import shipped_policies
from cachepolicy.engine.introspection import describe
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.presets import short_text
from cachepolicy.planning.module_tree import Skeleton
from cachepolicy.reports.text import draw
from cachepolicy.tools.demo import Sampling, measure, save
from cachepolicy.tools.emoji import load_pipeline

FOLDER = Path(__file__).parents[1] / "docs" / "cookbook"
MEASURED = FOLDER / "measured.json"
STEPS, PICTURES = 50, 12


def digest(name: str) -> str:
    """The hash of what the policy means with its defaults: a page is old once it changes."""
    return cachepolicy.plan(cachepolicy.load(name)).resolved.digest


def measured(name: str, pairs: int) -> dict[str, Any]:
    """Sample the emoji model without the policy, with it and with fewer steps, and keep the pictures."""
    sampling = Sampling(steps=STEPS, pictures=PICTURES, pairs=pairs)
    outcome = measure(name, {}, sampling)
    save(outcome, FOLDER / f"{name}.png", (f"uncached, {STEPS} steps", name))
    return {**outcome.to_json(), "digest": digest(name)}


def page(name: str, numbers: dict[str, Any] | None, skeleton: Skeleton) -> str:
    """The page of a policy, with its numbers if it was measured."""
    policy, text = cachepolicy.load(name), TEXTS.get(name)
    parts = [
        f"# {policy.title or name}",
        _source(policy),
        "" if text is None else f"{text.works}\n\n## What it computes",
        _sites(name, skeleton),
        "## Its text",
        f"`cachepolicy show {name}` prints it. The rows of `expect` are tests of the file.",
        f"```cachepolicy\n{cachepolicy.format(_without_presets(policy)).rstrip()}\n```",
        "## What can be set",
        _params(policy),
        _presets(policy),
        "" if text is None else f"## Limits\n\n{text.limits}",
        "## What it costs and saves",
    ]
    if numbers is None:
        parts.append(
            "Exact on tiny models, not measured for quality: tests compare its decisions with those of a plain\n"
            "transcription of the method, on small models with random streams."
        )
    else:
        picture = (
            f"```{{image}} {name}.png\n:alt: Twelve emoji drawn without the policy, and the same ones with it.\n```"
        )
        parts += [_table(numbers), picture]
    return "\n\n".join(each for each in parts if each) + "\n"


def _without_presets(policy: ir.Policy) -> ir.Policy:
    kept = tuple(statement for statement in policy.statements if not isinstance(statement, ir.Preset))
    return policy.model_copy(update={"statements": kept})


def _presets(policy: ir.Policy) -> str:
    presets = [statement for statement in policy.statements if isinstance(statement, ir.Preset)]
    if not presets:
        return ""
    lines = [
        "## Presets",
        "",
        "Published settings for models, which were not measured here. `apply` takes the one that fits the model. Those",
        'that a configuration does not tell are chosen by `preset="NAME"`. Figures are those of the source.',
        "",
        "| preset | class | taken | sets | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    for preset in presets:
        by_name = isinstance(preset.when, ir.Boolean)
        when = "by name" if by_name else "for the class" if preset.when is None else f"`{format_node(preset.when)}`"
        settings = ", ".join(f"{setting.name} = {short_text(setting.value)}" for setting in preset.settings)
        where, _, claim = (preset.origin or "").partition(" (")
        source = f"[{where.partition('/tree/')[0]}](https://{where})" + (f" ({claim}" if claim else "")
        model = "any" if preset.for_class == "." else f"`{preset.for_class.removeprefix('^').removesuffix('$')}`"
        lines.append(f"| `{preset.name}` | {model} | {when} | `{settings}` | {source} |")
    return "\n".join(lines)


def _source(policy: ir.Policy) -> str:
    return f"Source: {_link(policy.source)}." if policy.source else ""


def _link(source: str) -> str:
    if source.startswith("arXiv:"):
        return f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv:')})"
    return f"[{source}](https://{source})" if source else ""


def _sites(name: str, skeleton: Skeleton) -> str:
    """The grid on the emoji model; where a signal decides, for a made-up series that says so."""
    text = TEXTS.get(name, Text("", ""))
    plan = cachepolicy.plan(cachepolicy.load(name), skeleton=skeleton, **text.values)
    values = ", ".join(f"`{param} = {value}`" for param, value in text.values.items())
    series = {signal: [0.0, *(list(numbers) * STEPS)][:STEPS] for signal, numbers in text.signals.items()}
    schedule = cachepolicy.simulate(plan, steps=STEPS, signals=series)
    says = f"On the emoji model, over {STEPS} steps{f' with {values}' if values else ''}:"
    if text.signals:
        ((signal, numbers),) = text.signals.items()
        shown = f"the repeating values {', '.join(map(str, numbers))}"
        if len(numbers) >= STEPS:
            runs = (f"{number} at {len(list(run))} steps" for number, run in groupby(numbers))
            shown = f"the values {', then '.join(runs)}"
        params = f" and the params {values}" if values else ""
        says = f"The steps at which it reuses depend on `{signal}`. For {shown}{params}:"
    return f"{says}\n\n```text\n{draw(schedule, width=110)}\n```"


def _params(policy: ir.Policy) -> str:
    rows = ["| param | type | default | |", "| --- | --- | --- | --- |"]
    for each in policy.statements:
        if isinstance(each, ir.Param):
            kind = f"{each.type}?" if each.optional else each.type
            default = (format_node(each.default) if each.default else "").replace("|", "\\|")
            rows.append(f"| `{each.name}` | {kind} | `{default}` | {each.doc or ''} |")
    return "\n".join(rows)


def _table(numbers: dict[str, Any]) -> str:
    policy, fewer = numbers["policy"], numbers["fewer_steps"]
    rows = ["| | steps | FLOPs | CPU time | PSNR, mean | worst picture |", "| --- | --: | --: | --: | --: | --: |"]
    for label, row in (("with the policy", policy), ("no policy, fewer steps", fewer)):
        cpu = 1 / row["cpu"]["median"]
        nearness = [f"{value:.1f} dB" if value is not None else "equal" for value in (row["psnr"], row["worst_psnr"])]
        rows.append(f"| {label} | {row['steps']} | {row['flops']:.3f} | {cpu:.2f} | {nearness[0]} | {nearness[1]} |")
    return "\n".join(
        [
            f"{PICTURES} pictures of the emoji model on one CPU thread; {STEPS} steps uncached are 1. CPU time is the",
            f"median of {numbers['pairs']} rounds in which the ways took turns. Fewer steps at about the same FLOPs is",
            "what a policy has to beat; [all settings side by side](../emoji-results.md) are a page of their own.",
            "",
            *rows,
        ]
    )


def index(measured: list[str]) -> str:
    """The page that leads to the others."""
    names = sorted({*measured, *TEXTS})
    lines = [
        "# Cookbook",
        "",
        "Policies that come with cachepolicy, a page each: where it is from, its text, what it computes and",
        "reuses, and, where that was measured, what it does to the pictures of the small emoji model. Which one fits",
        "a model of yours, [`cachepolicy plan MODEL`](../planning.md) shows.",
        "",
        "```{toctree}",
        *names,
        "```",
        "",
        "## Without a page",
        "",
        "These come with cachepolicy too. Tests compare their decisions with those of plain transcriptions of the",
        "methods, on small models with random streams. Their effect on pictures was not measured.",
        "`cachepolicy show NAME` prints their text and their params.",
        "",
        "| name | method | source |",
        "| --- | --- | --- |",
    ]
    for name in sorted({*shipped_policies()} - {*names}):
        policy = cachepolicy.load(name)
        lines.append(f"| `{name}` | {policy.title or name} | {_link(policy.source or '')} |")
    return "\n".join(lines) + "\n"


def write(numbers: dict[str, dict[str, Any]]) -> None:
    """Write all pages."""
    skeleton = describe(load_pipeline().transformer)
    for name in {*numbers, *TEXTS}:
        (FOLDER / f"{name}.md").write_text(page(name, numbers.get(name), skeleton), "utf-8")
    (FOLDER / "index.md").write_text(index(sorted(numbers)), "utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--pages", action="store_true", help="write the pages only")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers = json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {}
    if not given.pages:
        for name in given.names or shipped_policies():
            numbers[name] = measured(name, given.pairs)
            print(f"{name}: {numbers[name]['policy']['psnr']:.1f} dB at {numbers[name]['policy']['flops']:.3f} FLOPs")
        MEASURED.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", "utf-8")
    write(numbers)


if __name__ == "__main__":
    main()
