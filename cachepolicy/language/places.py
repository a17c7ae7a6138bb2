"""Where an expression stands, and what may be read there."""

from __future__ import annotations

from dataclasses import dataclass

from cachepolicy.language.scope import Sort


@dataclass(frozen=True, slots=True)
class Place:
    """A kind of place for expressions: its name in messages, and what is known there."""

    called: str
    knows: frozenset[Sort]
    memory: bool = False
    """Whether `prev` and `kept` may stand there."""
    accumulators: bool = False
    probes: bool = False
    refusal: str = "is decided ahead of the run"
    """What is said of the place when something is not known there."""


_PURE: frozenset[Sort] = frozenset({"clock word", "parameter", "let", "table"})

_FIXED: frozenset[Sort] = frozenset({"parameter", "let"})
_STREAMS: frozenset[Sort] = _PURE.union({"signal"})
_WEIGHED: frozenset[Sort] = _PURE.union({"external"})

WHEN = Place("`when`", _PURE)
SCHEDULE = Place("a schedule", _PURE)
BOUND = Place("`at most`", _PURE)
LET = Place("`let`", _PURE, refusal="is a number of clock and parameters")
WHILE = Place("`while`", _STREAMS, memory=True, accumulators=True)
SIGNAL = Place("`signal`", _STREAMS, memory=True, probes=True)
ARGUMENT = Place("an action's argument", _WEIGHED, refusal="depends on the clock and externals alone")
CONSTANT = Place("an action's constant", _FIXED, refusal="is the same at every step")
POSITION = Place("the position of a block", _FIXED, refusal="is fixed when the policy meets its model")
SETTING = Place("a setting", _FIXED, refusal="is fixed before the run")
LITERAL = Place("a default", frozenset(), refusal="is a constant")
EXPECTED = Place("an expectation's setting", frozenset(), refusal="is a constant")
