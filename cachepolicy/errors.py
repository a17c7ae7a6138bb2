"""Where a mistake is, what was found, what was expected: spans, diagnostics and `PolicyError`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of source text: offsets from 0, lines and columns from 1, the end exclusive."""

    start: int
    end: int
    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True, slots=True)
class Related:
    """Another place that a finding is about, and what it has to do with it; `source` names its file."""

    message: str
    span: Span
    source: str | None


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding: a stable code, a sentence, a place in the text and one way out.

    Messages are lower case, without a full stop, with the user's own words in backticks.
    `source` names the file (or `<text>`), `excerpt` holds the source lines that the span covers,
    `label` stands under the underlined text.
    """

    code: str
    message: str
    severity: Severity = "error"
    span: Span | None = None
    source: str | None = None
    excerpt: tuple[str, ...] = ()
    label: str = ""
    help: str | None = None
    related: tuple[Related, ...] = ()


class PolicyError(Exception):
    """Everything that can be wrong with a policy, its settings or its use on a model.

    `diagnostics` holds all findings of one attempt, in reading order; `str(error)` renders them
    without colour.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return render(self.diagnostics)

    @classmethod
    def of(cls, code: str, message: str, *, help: str | None = None) -> PolicyError:
        """An error that has no place in a text (a setting, a file, a model)."""
        return cls([Diagnostic(code, message, help=help)])


_RED, _YELLOW, _BLUE, _BOLD, _RESET = "\x1b[31;1m", "\x1b[33;1m", "\x1b[34;1m", "\x1b[1m", "\x1b[0m"


def render(diagnostics: Iterable[Diagnostic], *, colour: bool = False) -> str:
    """The findings as text for a person: a code frame with the span underlined, then the help."""
    text = "\n\n".join(_render_one(each) for each in diagnostics)
    if colour:
        return text
    for escape in (_RED, _YELLOW, _BLUE, _BOLD, _RESET):
        text = text.replace(escape, "")
    return text


def _render_one(diagnostic: Diagnostic) -> str:
    paint = _RED if diagnostic.severity == "error" else _YELLOW
    lines = [f"{paint}{diagnostic.severity}[{diagnostic.code}]{_RESET}{_BOLD}: {diagnostic.message}{_RESET}"]
    span = diagnostic.span
    if span is None:
        if diagnostic.source is not None:
            lines.append(f" {_BLUE}-->{_RESET} {diagnostic.source}")
        if diagnostic.help:
            lines.append(f"  {_BLUE}={_RESET} {_BOLD}help{_RESET}: {diagnostic.help}")
        return "\n".join(lines)
    margin = " " * len(str(span.line))
    lines.append(f"{margin}{_BLUE}-->{_RESET} {diagnostic.source or '<text>'}:{span.line}:{span.column}")
    if diagnostic.excerpt and span.column <= len(diagnostic.excerpt[0]) + 1:
        lines += _frame(diagnostic, span, margin, paint)
    if diagnostic.help:
        lines.append(f"{margin} {_BLUE}={_RESET} {_BOLD}help{_RESET}: {diagnostic.help}")
    return "\n".join(lines)


def _frame(diagnostic: Diagnostic, span: Span, margin: str, paint: str) -> list[str]:
    first, column = diagnostic.excerpt[0], span.column
    end = span.end_column if span.end_line == span.line else len(first) + 1
    if len(first) > _FRAME_WIDTH:
        first, column, end = _clipped(first, column, end)
    # A tab is kept in the padding, so that the underline stands below its text at any tab width.
    padding = "".join("\t" if letter == "\t" else " " for letter in first[: column - 1])
    underline = "^" * max(1, end - column)
    label = f" {diagnostic.label}" if diagnostic.label else ""
    return [
        f"{margin} {_BLUE}|{_RESET}",
        f"{_BLUE}{span.line} |{_RESET} {first}",
        f"{margin} {_BLUE}|{_RESET} {padding}{paint}{underline}{label}{_RESET}",
    ]


_FRAME_WIDTH = 160


def _clipped(line: str, column: int, end: int) -> tuple[str, int, int]:
    """A long line as the part around its underlined text."""
    start = max(0, column - 1 - _FRAME_WIDTH // 4)
    shown = line[start : start + _FRAME_WIDTH]
    if start:
        shown = "…" + shown[1:]
    if start + _FRAME_WIDTH < len(line):
        shown = shown[:-1] + "…"
    return shown, column - start, min(end - start, len(shown) + 1)


def to_json(diagnostics: Iterable[Diagnostic]) -> str:
    """The findings as a JSON list, one object each, for editors and scripts."""
    return json.dumps([asdict(each) for each in diagnostics], ensure_ascii=False, indent=2)


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, or None when nothing is near."""
    import difflib

    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def suggestion(word: str, candidates: Sequence[str]) -> str | None:
    """A help sentence: the nearest candidate, else the candidates themselves when they are few."""
    near = nearest(word, candidates)
    if near is not None:
        return f"did you mean `{near}`?"
    if 0 < len(candidates) <= 12:
        return "one of " + ", ".join(f"`{each}`" for each in candidates)
    return None


# --- codes -----------------------------------------------------------------------------------------------

CODES: dict[str, str] = {
    # E0xx: the text.
    "E001": "something else was expected here",
    "E002": "a sign without a meaning here",
    "E003": "a string is not closed",
    "E004": "a statement ends too early",
    "E005": "a bracket is never closed",
    "E006": "a line is indented where it must not be, or not where it must",
    "E007": "a line starts with no statement's keyword",
    "E008": "a word of the language as a name",
    "E009": "a header line in the wrong place, or twice",
    "E010": "an edition that is not known",
    "E011": "a text that is not UTF-8",
    "E012": "a character that has no place in a policy",
    "E013": "a text that is too long",
    "E014": "a text with too many words",
    "E015": "nested too deep",
    "E016": "a number that is too large",
    "E017": "a regular expression that RE2 cannot read",
    "E018": "a regular expression that needs what RE2 does not have",
    "E019": "a regular expression that is too long",
    "E020": "a clause in the wrong place, or twice",
    "E021": "a policy that no text can say",
    # E10x to E14x: names, types and places.
    "E101": "a name that nothing declares",
    "E102": "a name that is declared twice",
    "E103": "a name that belongs to the language",
    "E104": "a parameter called like an argument of `apply`",
    "E105": "a function that does not exist",
    "E106": "a call with too few or too many arguments",
    "E107": "a predictor or approximation that does not exist",
    "E108": "an argument of an action that is unknown, missing or given twice",
    "E109": "a name that is said in terms of itself",
    "E110": "a name of another sort than its place asks for",
    "E111": "a value of another type than its place asks for",
    "E112": "a chain of comparisons that turns round",
    "E113": "a decision that must be known ahead reads what a run measures",
    "E114": "a probe outside `signal`",
    "E115": "a memory or an accumulator where it has no meaning",
    "E116": "an external that would decide",
    "E117": "an expectation whose row has another length",
    "E118": "a mask with other letters than 0 and 1",
    "E119": "a span of blocks that does not stand alone",
    "E120": "a value that may be `off` where off has no meaning",
    "E121": "an action's argument that is not known ahead",
    "E122": "`uncond_skipped` in a rule on the model",
    "E123": "`approximate uncond` on something else than the model",
    "E124": "a number outside what its place allows",
    # E15x to E19x: files, `use` and settings.
    "E150": "no such policy",
    "E151": "a name that is a shipped policy and a file",
    "E152": "a file that cannot be read",
    "E153": "a file that is too large",
    "E154": "a JSON file that holds no policy",
    "E155": "a `use` that leads out of the policy's folder",
    "E156": "a policy that uses itself",
    "E157": "too much `use`",
    "E158": "names of a built policy that are said in terms of themselves",
    "E160": "a parameter that does not exist",
    "E161": "a value of another type than its parameter",
    "E162": "a value outside its parameter's domain",
    "E163": "a constant that does not fit its clause",
    "E164": "a regex from a parameter that RE2 refuses",
    "E165": "too large once its names are written out",
    # E20x to E24x: a policy on a model.
    "E200": "a rule that takes nothing in the model",
    "E201": "a block that the model has not",
    "E202": "an empty slice of blocks",
    "E203": "spans that overlap without nesting",
    "E204": "a span of blocks among other selectors",
    "E205": "no blocks where some are asked for",
    "E206": "lists that do not run one after another",
    "E207": "a probe that takes not exactly one site",
    "E208": "a probe of what the rule may skip",
    "E209": "an action or clause that fits the whole model only, or never",
    "E210": "a file that holds no skeleton of a model",
    "E211": "a site name that is none",
    "E212": "FLOPs that cannot be counted",
    "E213": "a pipeline that cannot be run",
    "E220": "an expectation that does not hold",
    # E25x: a simulation.
    "E250": "a clock word that the run does not tell",
    "E251": "a mask of another length than the run",
    "E252": "a site that no rule selects",
    "E253": "a step outside the schedule",
    "E254": "a clock that does not fit together",
    "E255": "a signal with another number of values than steps",
    "E256": "a signal that the policy has not",
    "E257": "a signal that only a run can measure",
    "E258": "no place in a schedule",
    "E260": "a file that holds no trace",
    # E3xx: a policy on a running model.
    "E300": "nothing to apply a policy to",
    "E301": "a model that has a policy already",
    "E302": "no policy to remove",
    "E303": "a denoiser that was replaced",
    "E304": "a session without a key",
    "E305": "a removal while a forward runs",
    "E307": "an external that nobody supplies",
    "E308": "a policy that selects nothing",
    "E309": "an argument of `apply` that does not fit",
    "E310": "streams that cannot be told apart",
    "E311": "blocks that form no chain",
    "E312": "two threads in one session",
    "E313": "other params for a session under way",
    "E314": "a param that no session can have to itself",
    "E315": "a pipeline without a denoiser of the run",
    "E320": "a timestep function that returns nothing",
    "E321": "a timestep in no known unit",
    "E322": "an argument of an action without a value",
    "E330": "no evidence of guidance",
    "E331": "a prediction whose layout is not clear",
    "E332": "samples of different shapes",
    "E340": "another cache on the model",
    "E341": "a site that is no longer where it was",
    "E342": "a call that a policy cannot follow",
    "E350": "another process that failed",
    "E351": "processes that are not at the same decision",
    "E352": "a process that does not answer",
    # W5xx: doubtful, but a policy.
    "W501": "a `sum` over a distance from the last compute",
    "W502": "a distance from the step before, without a `sum`",
    "W503": "a parameter that nothing reads",
    "W504": "a let, table, signal or external that nothing reads",
    "W510": "a rule that never decides",
    "W511": "a policy that takes nothing in the model",
    "W512": "an interval in which no number lies",
    "W520": "a rule that no expectation reaches",
}
"""Every code and its title; each has a page in `docs/diagnostics/`."""
