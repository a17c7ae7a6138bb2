"""The words of the language and its limits: data that the parser, the checks and the tools share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from cachepolicy.language.ir import Kind, ParamType

# --- limits ----------------------------------------------------------------------------------------------

TEXT_LIMIT = 2**20
"""Maximum size of a text in bytes (or characters)."""
TOKEN_LIMIT = 30_000
"""Maximum number of tokens of a text, and of nodes of a policy in JSON form."""
DEPTH_LIMIT = 64
"""Maximum nesting depth of brackets, and of the nodes of a policy."""
NUMBER_LIMIT = 2**53
"""Largest whole number. Whole numbers up to it are exact as floats."""
REGEX_LIMIT = 1000
"""Maximum length of a regular expression in characters."""
KEPT_LIMIT = 16
"""Maximum number of computes that `kept` reads back."""
EXPECTATION_LIMIT = 10_000
"""Maximum number of steps of an expectation."""
ORDER_LIMIT = 8
"""Highest order of a predictor."""
WINDOW_LIMIT = 16
"""Maximum number of computed results that a predictor reads."""

# --- words -----------------------------------------------------------------------------------------------

KINDS: tuple[str, ...] = get_args(Kind)
TYPES: tuple[ParamType, ...] = get_args(ParamType)
HEADER_WORDS = ("cachepolicy", "policy", "source")
STATEMENT_WORDS = (
    *HEADER_WORDS,
    "param",
    "let",
    "table",
    "signal",
    "external",
    "match",
    "use",
    "expect",
    "tuned",
    "preset",
)
LATER_WORDS = frozenset({"tuned", "preset", "for", "within", "by", "site"})
"""Words that were added after policies existed. They are words where no name can stand, and names elsewhere."""
CLAUSE_WORDS = ("when", "every", "offset", "from", "since", "on", "mask", "while", "at", "follow", "with", "over")
ACTION_WORDS = ("compute", "skip", "reuse", "predict", "approximate")
CONTINUING = frozenset((*CLAUSE_WORDS, *ACTION_WORDS, "and", "or", "if", "else", "in"))
"""Words that no statement starts with. A line that starts with one is meant to continue a statement."""
SELECTOR_WORDS = (*KINDS, "blocks", "each", "of", "class", "optional")
VALUE_WORDS = ("and", "or", "not", "if", "else", "in", "off", "inf", "true", "false")
PROBES = ("input", "output", "residual", "argument")
RESERVED = (
    frozenset((*STATEMENT_WORDS, *CLAUSE_WORDS, *ACTION_WORDS, *SELECTOR_WORDS, *VALUE_WORDS, *PROBES)) - LATER_WORDS
)
PHRASES = (
    "from end", "since compute", "at most", "in a row", "in all", "over N steps", "reuse residual", "of residual",
    "reuse mean", "approximate uncond", "by site",
)  # fmt: skip
"""Fixed phrases. Their words are keywords only within the phrase."""
KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "apply": (
        "target", "policy", "timestep", "scheduler", "steps", "guidance", "samples", "process_group", "trace",
        "max_sessions", "history_dtype", "history_device", "memory_limit", "options",
    ),
    "simulate": (
        "policy", "steps", "timesteps", "sigmas", "sites", "skeleton", "signals", "branches", "facts",
    ),
    "plan": ("policy", "skeleton", "sites"),
    "explain": ("policy", "where", "steps", "branch"),
    "session": ("self", "key", "timestep", "scheduler", "steps", "guidance", "audit"),
}  # fmt: skip
"""The arguments of the functions that take params as keyword arguments; `session` is a method of a run.

No param and no external can have one of these names. A test compares them with the signatures.
"""

# --- types -----------------------------------------------------------------------------------------------

Type = Literal["number", "boolean", "text", "tensor", "list", "range", "off", "any", "predictor"]

CLOCK: Mapping[str, Type] = {
    "t": "number",
    "step": "number",
    "steps": "number",
    "progress": "number",
    "sigma": "number",
    "age": "number",
    "gap": "number",
    "computes": "number",
    "branch": "text",
    "uncond_skipped": "boolean",
}


@dataclass(frozen=True, slots=True)
class Label:
    """A labelled argument of a function or an action.

    Attributes:
        type: Type of the value.
        required: Whether the argument must be given.
        constant: Whether the value must not depend on the clock.
        choices: The valid strings, or an empty tuple if any value of the type is valid.
        between: The smallest and the largest value of a number.
        whole: Whether it is a whole number.
        items: The smallest and the largest number of items, if it is a list of numbers.
    """

    type: Type
    required: bool = True
    constant: bool = False
    choices: tuple[str, ...] = ()
    between: tuple[float, float] | None = None
    whole: bool = False
    items: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """Signature of a function.

    Attributes:
        takes: Types of the arguments. `any` is a tensor or a number.
        least: Minimum number of arguments.
        gives: Type of the result.
        more: Whether the last argument may be repeated.
        labels: The arguments with a label, which follow the others.
    """

    takes: tuple[Type, ...]
    least: int
    gives: Type = "number"
    more: bool = False
    labels: Mapping[str, Label] = field(default_factory=dict[str, Label])


FUNCTIONS: Mapping[str, Signature] = {
    "l1": Signature(("tensor", "tensor"), 1),
    "l2": Signature(("tensor", "tensor"), 1),
    "relative_l1": Signature(("tensor", "tensor"), 2),
    "cosine": Signature(("tensor", "tensor"), 2),
    "differing": Signature(("tensor", "tensor"), 2),
    "abs": Signature(("number",), 1),
    "min": Signature(("number", "number"), 2, more=True),
    "max": Signature(("number", "number"), 2, more=True),
    "sqrt": Signature(("number",), 1),
    "exp": Signature(("number",), 1),
    "log": Signature(("number",), 1),
    "clamp": Signature(("number", "number", "number"), 3),
    "wiener": Signature(("tensor",), 1, gives="tensor", labels={"beta": Label("number")}),
    "cross": Signature(("text", "any"), 2, gives="any"),
    "floor": Signature(("number",), 1),
    "poly": Signature(("list", "number"), 2),
    "sum": Signature(("number",), 1, labels={"decay": Label("number", required=False)}),
    "product": Signature(("number",), 1),
    "total": Signature(("number",), 1),
    "ema": Signature(("number", "number"), 2),
    "latch": Signature(("boolean",), 1, gives="boolean"),
    "at_step": Signature(("number", "number"), 2),
    "prev": Signature(("any",), 1, gives="any"),
    "kept": Signature(("any", "number"), 1, gives="any"),
}
PURE_FUNCTIONS = frozenset({"abs", "min", "max", "sqrt", "exp", "log", "clamp", "floor", "poly"})
"""The functions of numbers alone."""
NORMS = frozenset({"l1", "l2", "relative_l1", "cosine", "differing"})
LASTING = frozenset({"total", "ema", "latch", "at_step"})
"""The accumulators that a compute does not reset."""
ACCUMULATORS = LASTING | {"sum", "product"}
SUMS = frozenset({"sum", "product", "total"})
"""The accumulators in which a slow drift adds up."""
MEMORIES = frozenset({"prev", "kept"})
OVERS: Mapping[str, Type] = {"mean": "number", "min": "number", "max": "number", "any": "boolean"}
"""What `NAME(x over S)` takes of x and gives."""
ADDED_WORDS = frozenset({
    "self", "wiener", "cross", "gap", "computes", "floor", "total", "ema", "latch", "at_step", "differing",
})  # fmt: skip
"""Clock words and functions that were added after policies existed. A policy may declare such a name as its own."""


_FEEDBACK = Label("boolean", required=False, constant=True)
_ALONG = Label("text", required=False, constant=True, choices=("step", "t", "sigma"))
ORDER_LABEL = Label("number", constant=True, between=(0, ORDER_LIMIT), whole=True)
WINDOW_LABEL = Label("number", required=False, constant=True, between=(1, WINDOW_LIMIT), whole=True)
COMMON_LABELS = {"along": _ALONG, "feedback": _FEEDBACK}
"""The arguments that all predictors have, but for `linear`, which has no axis."""
PREDICTORS: Mapping[str, Mapping[str, Label]] = {
    "linear": {"weight": Label("number"), "feedback": _FEEDBACK},
    "taylor": {"order": ORDER_LABEL, "scale": Label("number", required=False), **COMMON_LABELS},
    "hermite": {"order": ORDER_LABEL, "scale": Label("number"), **COMMON_LABELS},
    "newton": {"order": ORDER_LABEL, **COMMON_LABELS},
    "chebyshev": {
        "order": ORDER_LABEL,
        "ridge": Label("number", between=(0, math.inf)),
        "mix": Label("number", required=False),
        "window": WINDOW_LABEL,
        **COMMON_LABELS,
    },
    "bdf2": COMMON_LABELS,
    "weights": {"of": Label("list", items=(1, WINDOW_LIMIT)), **COMMON_LABELS},
    "align": {
        "probe": Label("tensor"),
        "clip": Label("list", constant=True, items=(2, 2)),
        "feedback": _FEEDBACK,
    },
    "band": {
        "transform": Label("text", constant=True, choices=("dct", "fft")),
        "cut": Label("number", between=(0, 1)),
        "low": Label("predictor"),
        "high": Label("predictor"),
        **COMMON_LABELS,
    },
}
NOT_LINEAR = frozenset({"align", "band"})
"""The predictors that are no sums of results with weights that the clock tells."""
_BATCH: Mapping[str, Label] = {
    "layout": Label("text", required=False, constant=True, choices=("found", "uncond first", "cond first")),
    "inputs": Label("list", required=False, constant=True),
}
APPROXIMATIONS: Mapping[str, Mapping[str, Label]] = {
    "copy": _BATCH,
    "delta": _BATCH,
    "affine": {"cond": Label("list"), "uncond": Label("list", required=False), **_BATCH},
    "spectral": {
        "low": Label("number"),
        "high": Label("number"),
        "layout": Label("text", required=False, constant=True, choices=("found", "uncond first", "cond first")),
        "format": Label(
            "text", required=False, constant=True, choices=("found", "BCFHW", "BFCHW", "BFHWC", "BCHW", "BSC")
        ),
        "grid": Label("list", required=False, constant=True),
        "inputs": Label("list", required=False, constant=True),
    },
}
