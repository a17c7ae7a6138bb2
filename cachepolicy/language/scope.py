"""Names of a policy: their sorts, their declarations, and the positions in which each sort may be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError
from typing import Literal

from cachepolicy.errors import Diagnostic, nearest
from cachepolicy.language import ir
from cachepolicy.language.traversal import dependency_order, names_in
from cachepolicy.language.vocabulary import ADDED_WORDS, CLOCK, FUNCTIONS, KEYWORDS

Declaration = ir.Param | ir.Let | ir.Table | ir.Signal | ir.External
Sort = Literal["clock word", "parameter", "let", "table", "signal", "external", "function", "unknown"]

SORTS: Mapping[str, Sort] = {
    "param": "parameter",
    "let": "let",
    "table": "table",
    "signal": "signal",
    "external": "external",
}

SYNONYMS: Mapping[str, str] = {
    "timestep": "t", "time": "t", "timesteps": "t", "i": "step", "index": "step", "step_index": "step",
    "num_steps": "steps", "num_inference_steps": "steps", "total_steps": "steps", "True": "true", "False": "false",
    "None": "off", "null": "off", "none": "off", "infinity": "inf", "mlp": "feedforward", "ff": "feedforward",
    "ffn": "feedforward", "feed_forward": "feedforward", "attn": "attention", "self_attn": "self_attention",
    "cross_attn": "cross_attention", "layers": "blocks", "layer": "block", "transformer_blocks": "blocks",
    "transformer": "model", "unet": "model",
}  # fmt: skip
"""Names from other libraries, mapped to the words of this language."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnostic, and the word that it refers to if the word is narrower than the span."""

    diagnostic: Diagnostic
    word: str | None = None


@dataclass
class Report:
    """Collects the diagnostics of one check."""

    findings: list[Finding] = field(default_factory=list[Finding])
    reported: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(
        self,
        code: str,
        message: str,
        node: ir.Node,
        *,
        help: str | None = None,
        word: str | None = None,
        label: str = "",
        once: str | None = None,
    ) -> None:
        """Adds a diagnostic about `node`. With `once`, only the first diagnostic with this code and word is kept."""
        if once is not None:
            if (code, once) in self.reported:
                return
            self.reported.add((code, once))
        severity = "warning" if code.startswith("W") else "error"
        diagnostic = Diagnostic(code, message, severity, span=node.span, help=help, label=label)
        self.findings.append(Finding(diagnostic, word))

    def adopt(self, diagnostic: Diagnostic, node: ir.Node) -> None:
        """Adds an existing diagnostic and locates it at `node`."""
        self.findings.append(Finding(replace(diagnostic, span=node.span)))


@dataclass(frozen=True)
class Scope:
    """Names of one policy.

    Attributes:
        declared: The declaration of each name.
        broken: Names that are declared by statements with syntax errors.
        reads: The names that each let and signal reads, in dependency order.
        clock: The clock words that each let and signal depends on, in dependency order.
    """

    declared: Mapping[str, Declaration]
    broken: frozenset[str] = frozenset()
    reads: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])
    clock: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    def sort(self, name: str) -> Sort | None:
        """Returns the sort of `name`, or `None` if the name is not declared."""
        if name in self.declared:
            return SORTS[self.declared[name].kind]
        if name in self.broken:
            return "unknown"
        if name in CLOCK:
            return "clock word"
        return "function" if name in FUNCTIONS else None

    def param(self, name: str) -> ir.Param | None:
        """Returns the parameter with this name, or `None`."""
        declared = self.declared.get(name)
        return declared if isinstance(declared, ir.Param) else None

    def clock_of(self, node: ir.Node) -> frozenset[str]:
        """Returns the clock words that `node` depends on, directly or through lets and signals."""
        names = names_in(node)
        return frozenset((CLOCK.keys() & names) - self.declared.keys()).union(
            *(self.clock.get(name, frozenset()) for name in names)
        )

    def near(self, name: str, sorts: frozenset[Sort], *words: str) -> str | None:
        """Returns a help sentence with the known name that is most similar to `name`."""
        known: dict[str, Sort] = dict.fromkeys(CLOCK, "clock word")
        known |= {name: SORTS[declaration.kind] for name, declaration in self.declared.items()}
        candidates = [candidate for candidate, sort in known.items() if sort in sorts]
        similar = SYNONYMS.get(name)
        if similar not in candidates and similar not in words:
            similar = nearest(name, [*words, *candidates])
        if similar is None:
            return None
        return f"did you mean the {known[similar]} `{similar}`?" if similar in known else f"did you mean `{similar}`?"


def scope_of(policy: ir.Policy, report: Report, broken: frozenset[str] = frozenset()) -> Scope:
    """Builds the scope of `policy`. Reports duplicate, reserved and circular declarations."""
    declared = dict[str, Declaration]()
    for statement in policy.statements:
        if not isinstance(statement, Declaration):
            continue
        _judge_name(statement, report)
        first = declared.setdefault(statement.name, statement)
        if first is not statement:
            label = f"first in line {first.span.line}" if first.span else ""
            report.add("E102", f"`{statement.name}` is declared twice", statement, word=statement.name, label=label)
    reads = _acyclic(declared, report)
    clock = {name: frozenset(CLOCK.keys() & set(names)) - declared.keys() for name, names in reads.items()}
    return Scope(declared, broken, reads, propagated(reads, clock))


def _judge_name(statement: Declaration, report: Report) -> None:
    name = statement.name
    function = next((owner for owner, arguments in KEYWORDS.items() if name in arguments), None)
    if (name in CLOCK or name in FUNCTIONS) and name not in ADDED_WORDS:
        sort = "a clock word" if name in CLOCK else "a function"
        report.add(
            "E103", f"`{name}` is {sort} and cannot be declared", statement, word=name, help="choose another name"
        )
    elif isinstance(statement, ir.Param | ir.External) and function is not None:
        kind = "parameter" if isinstance(statement, ir.Param) else "external"
        message = f"`{name}` is an argument of `{function}`, so that no {kind} can have this name"
        report.add("E104", message, statement, word=name, help=f"call it `cache_{name}` or something else")
    elif name in ADDED_WORDS:
        help = "rename it if the word of the language is meant elsewhere in this file"
        report.add(
            "W507",
            f"`{name}` is a word of the language, and here it is what the file declares",
            statement,
            word=name,
            help=help,
        )


def propagated(reads: Mapping[str, Iterable[str]], facts: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Adds to the facts of each name the facts of all names that it depends on.

    Args:
        reads: The names that each name reads, in dependency order.
        facts: The facts of each name itself.

    Returns:
        The facts of each name, in dependency order.
    """
    known = dict[str, frozenset[str]]()
    for name, read in reads.items():
        known[name] = facts[name].union(*(known[other] for other in read if other in known))
    return known


_CYCLES_REPORTED = 20
"""Number of cycles that are reported one by one. Each needs another sort of all names."""


def _acyclic(declared: Mapping[str, Declaration], report: Report) -> dict[str, list[str]]:
    """Returns the names that each let and signal reads, in dependency order.

    A cycle is reported (E109), and one of its references is left out.
    """
    reads = {
        name: sorted(names_in(statement.value))
        for name, statement in declared.items()
        if isinstance(statement, ir.Let | ir.Signal)
    }
    for _ in range(_CYCLES_REPORTED):
        try:
            return {name: reads[name] for name in dependency_order(reads)}
        except CycleError as error:
            *cycle, _ = error.args[1][::-1]
            members = set(cycle)
            start = cycle.index(next(name for name in reads if name in members))
            _report_cycle([*cycle[start:], *cycle[:start]], declared, report)
            reads[cycle[-1]].remove(cycle[0])
    return {name: [] for name in reads}


def _report_cycle(names: list[str], declared: Mapping[str, Declaration], report: Report) -> None:
    shown = names if len(names) < 8 else [*names[:6], "..."]
    path = " -> ".join(f"`{name}`" for name in [*shown, names[0]])
    message = f"`{names[0]}` is defined by itself: {path}"
    report.add("E109", message, declared[names[0]], word=names[0], once=names[0])


# --- positions of expressions ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpressionPlace:
    """A kind of position in which an expression may occur.

    Attributes:
        called: Name of the position in messages.
        knows: Sorts of names that the expression may read.
        memory: Whether `prev` and `kept` are allowed.
        accumulators: Whether accumulators are allowed.
        probes: Whether probes are allowed.
        refusal: Second half of the message when the expression reads a name that is not known there.
    """

    called: str
    knows: frozenset[Sort]
    memory: bool = False
    accumulators: bool = False
    probes: bool = False
    refusal: str = "is decided ahead of the run"


_PURE: frozenset[Sort] = frozenset({"clock word", "parameter", "let", "table"})

_FIXED: frozenset[Sort] = frozenset({"parameter", "let"})
_STREAMS: frozenset[Sort] = _PURE.union({"signal"})
_WEIGHED: frozenset[Sort] = _PURE.union({"external"})
_MEASURED: frozenset[Sort] = _STREAMS.union({"external"})

WHEN = ExpressionPlace("`when`", _PURE)
SCHEDULE = ExpressionPlace("a schedule", _PURE)
BOUND = ExpressionPlace("`at most`", _PURE)
LET = ExpressionPlace("`let`", _PURE, refusal="is a number of clock and parameters")
WHILE = ExpressionPlace("`while`", _MEASURED, memory=True, accumulators=True)
SIGNAL = ExpressionPlace("`signal`", _STREAMS, memory=True, probes=True)
ARGUMENT = ExpressionPlace("an action's argument", _WEIGHED, refusal="depends on the clock and externals alone")
PROBED = ExpressionPlace("an action's probe", _STREAMS, memory=True, refusal="is measured by a signal")
CONSTANT = ExpressionPlace("an action's constant", _FIXED, refusal="is the same at every step")
POSITION = ExpressionPlace("the position of a block", _FIXED, refusal="is fixed when the policy meets its model")
SETTING = ExpressionPlace("a setting", _FIXED, refusal="is fixed before the run")
LITERAL = ExpressionPlace("a default", frozenset(), refusal="is a constant")
EXPECTED = ExpressionPlace("an expectation's setting", frozenset(), refusal="is a constant")
