"""The words of the language and its counted limits: data that parsing, checking and tools share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cachepolicy.language.ir import ParamType

# --- limits ----------------------------------------------------------------------------------------------

TEXT_LIMIT = 2**20
"""Bytes (or characters) of a text."""
TOKEN_LIMIT = 30_000
"""Words and signs of a text, nodes of a policy that came as JSON."""
DEPTH_LIMIT = 64
"""How deep brackets, and the nodes of a policy, may be nested."""
NUMBER_LIMIT = 2**53
"""Whole numbers up to here are exact as floats too."""
REGEX_LIMIT = 1000
"""Characters of a regular expression."""
KEPT_LIMIT = 16
"""How many computes back `kept` reads."""
STEPS_LIMIT = 10_000
"""Steps of an expectation."""

# --- words -----------------------------------------------------------------------------------------------

KINDS = ("attention", "self_attention", "cross_attention", "feedforward", "block", "model")
TYPES: tuple[ParamType, ...] = ("int", "float", "bool", "string", "range", "list")
HEADER_WORDS = ("cachepolicy", "policy", "source")
STATEMENT_WORDS = (*HEADER_WORDS, "param", "let", "table", "signal", "external", "match", "use", "expect")
CLAUSE_WORDS = ("when", "every", "offset", "from", "since", "on", "mask", "while", "at", "follow", "with", "over")
ACTION_WORDS = ("compute", "skip", "reuse", "predict", "approximate")
CONTINUING = frozenset((*CLAUSE_WORDS, *ACTION_WORDS, "and", "or", "if", "else", "in"))
"""Words that a statement never starts with, and that people put at the start of a line."""
SELECTOR_WORDS = (*KINDS, "blocks", "each", "of", "class", "optional")
VALUE_WORDS = ("and", "or", "not", "if", "else", "in", "off", "inf", "true", "false")
PROBES = ("input", "output", "residual", "argument")
RESERVED = frozenset((*STATEMENT_WORDS, *CLAUSE_WORDS, *ACTION_WORDS, *SELECTOR_WORDS, *VALUE_WORDS, *PROBES))
PHRASES = (
    "from end", "since compute", "at most", "in a row", "in all", "over N steps", "reuse residual", "of residual",
    "approximate uncond",
)  # fmt: skip
"""Fixed phrases: their words are words of the language together, also those that are names elsewhere."""
KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "apply": (
        "target", "policy", "timestep", "scheduler", "steps", "guidance", "samples", "process_group", "trace",
        "max_sessions", "history_dtype", "history_device", "memory_limit",
    ),
    "simulate": (
        "policy", "steps", "timesteps", "sigmas", "sites", "skeleton", "signals", "branches", "facts",
    ),
    "plan": ("policy", "skeleton", "sites"),
    "explain": ("policy", "where", "steps", "branch"),
    "session": ("self", "key", "timestep", "scheduler", "steps", "guidance"),
}  # fmt: skip
"""The arguments of the functions that take params as keyword arguments; `session` is a method of a run.

No param and no external can have one of these names. A test compares them with the signatures.
"""

# --- types -----------------------------------------------------------------------------------------------

Type = Literal["number", "boolean", "text", "tensor", "list", "range", "off", "any"]

CLOCK: Mapping[str, Type] = {
    "t": "number",
    "step": "number",
    "steps": "number",
    "progress": "number",
    "sigma": "number",
    "age": "number",
    "branch": "text",
    "uncond_skipped": "boolean",
}


@dataclass(frozen=True, slots=True)
class Signature:
    """How a function is called: the types it takes (`any` for a tensor or a number), how many, what it gives."""

    takes: tuple[Type, ...]
    least: int
    gives: Type = "number"
    more: bool = False
    """Whether the last type may be repeated."""


FUNCTIONS: Mapping[str, Signature] = {
    "l1": Signature(("tensor", "tensor"), 1),
    "l2": Signature(("tensor", "tensor"), 1),
    "relative_l1": Signature(("tensor", "tensor"), 2),
    "cosine": Signature(("tensor", "tensor"), 2),
    "abs": Signature(("number",), 1),
    "min": Signature(("number", "number"), 2, more=True),
    "max": Signature(("number", "number"), 2, more=True),
    "sqrt": Signature(("number",), 1),
    "exp": Signature(("number",), 1),
    "log": Signature(("number",), 1),
    "clamp": Signature(("number", "number", "number"), 3),
    "poly": Signature(("list", "number"), 2),
    "sum": Signature(("number",), 1),
    "product": Signature(("number",), 1),
    "prev": Signature(("any",), 1, gives="any"),
    "kept": Signature(("any", "number"), 1, gives="any"),
}
NORMS = frozenset({"l1", "l2", "relative_l1", "cosine"})
ACCUMULATORS = frozenset({"sum", "product"})
MEMORIES = frozenset({"prev", "kept"})


@dataclass(frozen=True, slots=True)
class Label:
    """An argument of an action: its type, whether it must be given, whether it must be a constant."""

    type: Type
    required: bool = True
    constant: bool = False
    choices: tuple[str, ...] = ()


PREDICTORS: Mapping[str, Mapping[str, Label]] = {
    "linear": {"weight": Label("number"), "feedback": Label("boolean", required=False, constant=True)},
    "taylor": {
        "order": Label("number", constant=True),
        "feedback": Label("boolean", required=False, constant=True),
    },
    "hermite": {
        "order": Label("number", constant=True),
        "scale": Label("number"),
        "feedback": Label("boolean", required=False, constant=True),
    },
}
APPROXIMATIONS: Mapping[str, Mapping[str, Label]] = {
    "spectral": {
        "low": Label("number"),
        "high": Label("number"),
        "layout": Label("text", constant=True, choices=("uncond first", "cond first")),
        "format": Label(
            "text", required=False, constant=True, choices=("found", "BCFHW", "BFCHW", "BFHWC", "BCHW", "BSC")
        ),
        "grid": Label("list", required=False, constant=True),
        "inputs": Label("list", required=False, constant=True),
    },
}
ORDER_LIMIT = 8
"""Highest order of a predictor."""
