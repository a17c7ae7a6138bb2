"""The card of a folder of policies: a README for people who consider using them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.planning.simulation import Schedule
from cachepolicy.reports.comparison import markdown_lines
from cachepolicy.reports.text import draw, summary

MARK = "<!-- written by `cachepolicy publish` -->"
"""A line of every card, by which a later `publish` knows that it may replace the file."""

_WIDTH = 100
_LONG = 12
"""The number of elements from which a list in a `tuned` statement is shown by its length."""


@dataclass(frozen=True, slots=True)
class Published:
    """One policy of a card.

    Attributes:
        file: The name of its file.
        content: The bytes of its file.
        policy: The policy.
        schedule: Its schedule on the model of the card.
    """

    file: str
    content: bytes
    policy: ir.Policy
    schedule: Schedule

    @property
    def sha256(self) -> str:
        """The digest of the bytes, which the name of a policy in a hub may give."""
        return hashlib.sha256(self.content).hexdigest()


def card(
    published: Sequence[Published],
    *,
    model: str,
    repo: str | None = None,
    licence: str | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of a README in Markdown, with the metadata that a hub reads at its top.

    Args:
        published: The policies.
        model: What the schedules are drawn for, such as the name of a class.
        repo: Owner and name of the repository in a hub, or None for files alone.
        licence: The identifier of a licence, or None.
        comparison: A saved comparison, in the form of `Comparison.to_dict`.

    Raises:
        PolicyError: The comparison has another form (E154).
    """
    lines = ["---", "library_name: cachepolicy", "tags:", "- cachepolicy", "- diffusion", "- caching"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["---", "", MARK, "", f"# {repo or 'Caching policies'}", ""]
    about = "Caching policies for diffusion models, for the Python package `cachepolicy`."
    lines += [f"{about} A policy is data: to read one runs no code.", ""]
    lines += _table(
        ["policy", "what it is", "site calls skipped"],
        [
            [f"[{one.file}](#{_anchor(one.file)})", one.policy.title or one.policy.name or "", _skipped(one.schedule)]
            for one in published
        ],
    )
    for one in published:
        lines += ["", *_section(one, model, repo)]
    if comparison is not None:
        lines += ["", "## Measured", "", *_measured(comparison)]
    return "\n".join(lines) + "\n"


def _section(one: Published, model: str, repo: str | None) -> Iterator[str]:
    name = f"./{one.file}" if repo is None else f"hf:{repo}:{one.file}"
    yield from [f"## {one.file}", ""]
    if one.policy.title:
        yield from [f"{one.policy.title}.", ""]
    if one.policy.source:
        yield from [f"Source: {one.policy.source}", ""]
    yield from ["```python", "import cachepolicy", "", f'with cachepolicy.apply(pipe, "{name}"):', "    ..."]
    yield from ["```", ""]
    if repo is not None:
        yield from [f"A service should pin the commit and the digest: `{name}@COMMIT#sha256={one.sha256}`.", ""]
    settings = [statement for statement in one.policy.statements if isinstance(statement, ir.Param)]
    if settings:
        yield from _table(["param", "default", "meaning"], [_param(setting) for setting in settings])
        yield ""
    yield from [f"Schedule on {model}:", "", "```text", draw(one.schedule, width=_WIDTH), "```", ""]
    for statement in one.policy.statements:
        if isinstance(statement, ir.Tuned):
            yield from [f"Tuned for schedules of {statement.steps} steps:", ""]
            yield from _table(
                ["of the tuning", "value"], [[setting.name, _short(setting.value)] for setting in statement.settings]
            )
            yield ""
    yield from ["```", one.content.decode().rstrip("\n"), "```"]


def _param(param: ir.Param) -> list[str]:
    default = "none, it must be given" if param.default is None else f"`{_short(param.default)}`"
    return [f"`{param.name}`", default, param.doc or ""]


def _short(value: ir.Expression) -> str:
    if isinstance(value, ir.ListOf) and len(value.items) > _LONG:
        return f"{len(value.items)} values"
    return format_node(value)


def _skipped(schedule: Schedule) -> str:
    return summary(schedule).partition(": ")[2].rpartition("; policy")[0]


def _measured(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Yields the table of a saved comparison."""
    try:
        rows = [
            [
                str(row["name"]),
                f"{row['cost']:.3f}",
                *(_distance(row[f"psnr_{reference}"]) for reference in ("uncached", "converged")),
                f"{row['call_speedup']:.2f}x",
            ]
            for row in comparison["rows"]
        ]
        samples = int(comparison["samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError.of(
            "E154", f"`comparison.json` is not what `cachepolicy compare --json` prints: {error}"
        ) from error
    yield from _table(["", "cost", "PSNR to uncached, p10", "PSNR to converged, p10", "speed-up, whole call"], rows)
    yield from ["", f"{samples} samples; PSNR in dB, mean and 10th percentile; the speed-up is that of one machine."]


def _distance(value: Any) -> str:
    if value is None:
        return ""
    pair = cast("Mapping[str, Any]", value)
    return ", ".join("equal" if pair[name] is None else f"{pair[name]:.1f}" for name in ("mean", "p10"))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    return markdown_lines([heads, ["---"] * len(heads), *rows])


def _anchor(heading: str) -> str:
    """Returns the anchor that hubs give a heading: lower case, without points."""
    return "".join(letter for letter in heading.lower() if letter.isalnum() or letter in "-_")
