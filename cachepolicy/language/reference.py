"""Reference of the language: the tables of `docs/language.md`, which editors show for each word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class ReferenceTable:
    """A table of the reference.

    Attributes:
        sort: The sort of forms in the table, such as `selector`.
        verb: The verb between a form and its meaning, as in "`attention` takes attention modules".
        section: The anchor of the heading in `docs/language.md`.
        says: The meaning of each form.
    """

    sort: str
    verb: str
    section: str
    says: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ReferenceEntry:
    """A form of the language, its meaning and its table."""

    form: str
    says: str
    table: ReferenceTable

    @property
    def sentence(self) -> str:
        """The verb and the meaning, such as `takes attention modules`."""
        return f"{self.table.verb} {self.says}"

    @property
    def words(self) -> list[str]:
        """The words of the form, in order."""
        return re.findall(r"[A-Za-z_][A-Za-z0-9_]*", re.sub(r'"[^"]*"', "", self.form))


TABLES = (
    ReferenceTable("statement", "is", "a-file", {
        "cachepolicy 1": "the edition of the language",
        'policy NAME ["title"]': "the policy's name",
        'source "..."': "the paper or repository that the policy follows",
        'param NAME: TYPE = DEFAULT [in DOMAIN] ["doc"]': "a knob",
        'param NAME: TYPE [in DOMAIN] ["doc"]': "a knob that a preset or the caller has to set",
        'preset NAME for class "regex" [when G] with A = V, ... [source "..."]': "defaults for the models that fit",
        "let NAME = EXPRESSION": "a named value of clock, params and tables",
        "table NAME = [...]": "calibrated constants",
        "signal NAME = ...": "a tensor or number measured once a step and branch",
        "external NAME: float": "a number that the caller supplies",
        "match SELECTOR ... -> ACTION": "a rule",
        "use POLICY [with A = V, ...]": "another policy's rules, here",
        "use POLICY ... [when G] [at most N in a row]": "the same, narrowed",
        "expect SELECTOR over N steps [with A = V, ...]: C R ...": "a test inside the file",
        "tuned over N steps [with A = V, ...]": "what the rules were found for",
    }),
    ReferenceTable("part of a rule", "says", "which-rule-decides", {
        "optional": "that the rule may take nothing",
        "when G": "at which steps the rule owns its sites, by the clock and the params",
        "while C": "what must hold for a reuse, of what was measured",
        "at most N in a row": "that a site reuses while age ≤ N",
        "at most N in all": "how often the rule may reuse at a site and branch, over the trajectory",
        "follow BRANCH": "that any other branch does what this one did",
    }),
    ReferenceTable("selector", "takes", "selectors", {
        '"regex"': "modules whose qualified name contains a match",
        "NAME": "the same, for a `string` or `list` param: any regex of the list",
        "attention": "attention modules",
        "cross_attention": "attention modules that read another sequence, such as the prompt's",
        "self_attention": "all other attention modules",
        "feedforward": "feed-forward modules",
        "block": "the elements of the model's block lists",
        "model": "the root",
        'class "regex"': "modules whose class name contains a match",
        "each blocks, each blocks[a:b]": "blocks, one site each",
        "blocks, blocks[a:b], blocks[i]": "consecutive blocks as **one** site, a span",
        "each blocks[a:b:c]": "every c-th of these blocks",
        'blocks of "regex"': "blocks of the lists whose name contains a match",
        "S within T": "modules that S takes, inside a module that T takes",
        "S and S, S or S, not S, ( S )": "sets of modules; `within` binds before `not`, then `and`, then `or`",
    }),
    ReferenceTable("clock word", "is", "when", {
        "t": "the scheduler's timestep in training units, 1000 to 0, whatever scale the model's argument has",
        "step": "the number of the step, from 0",
        "steps": "how many steps the trajectory has",
        "progress": "step / (steps − 1), 0 to 1",
        "sigma": "the scheduler's sigma",
        "branch": 'the name of the branch, a string: `branch == "cond"`',
        "uncond_skipped": (
            "true where this step's call computes the conditional half only; rules on `model` cannot read it"
        ),
        "age": "steps since this site last computed",
        "gap": "steps between this site's last two computes; it has no value before the second",
        "computes": "how often this site has computed in this trajectory",
    }),
    ReferenceTable("expression", "is", "when", {
        "a if c else b": "a where c holds, else b; only the one that is taken is read",
        "a or b": "true where one holds",
        "a and b": "true where both hold",
        "not a": "true where a does not hold",
        "x in C": "true where x lies in an interval, a set, or a `range` or `list` param",
        "true, false": "a condition that always, or never, holds",
        "inf": "the number above all others",
        "off": "the value of an optional param that is not set",
        "abs(x)": "x without its sign",
        "min(x, y, ...)": "the smallest of them",
        "max(x, y, ...)": "the largest of them",
        "sqrt(x)": "the square root",
        "exp(x)": "e to the power of x",
        "log(x)": "the natural logarithm",
        "clamp(x, low, high)": "x, but not below low and not above high",
        "floor(x)": "the largest whole number that is not above x",
        "poly([highest, ..., c0], x)": "the polynomial of x with these coefficients",
    }),
    ReferenceTable("schedule", "computes when", "schedules", {
        "every N": "step % N == 0",
        "every N offset K": "(step − K) % N == 0",
        "every N from end": "(steps − 1 − step) % N == 0",
        "every N since compute": "age ≥ N",
        "on {0, 1, 2, 7}, on NAME": "step is one of these; NAME is a `list` param",
        'mask "1101", mask NAME': "the step's letter is 1; NAME is a `string` param",
        "mask NAME by site": "the step's letter in the site's own mask is 1; NAME is a `list` param",
    }),
    ReferenceTable("measure", "is", "while", {
        "input(S)": "the tensor that goes into the site",
        "output(S)": "the tensor that comes out of it",
        "residual(S)": "output minus input",
        'argument(S, "temb")': "the tensor that the site's forward is given under this name",
        "residual(self), input(self), output(self)": "the same of the site that is decided",
        "input(S, tokens: a:b)": "the tokens a to b of a sequence; likewise of the other three",
        'input(S, tokens: "latent")': "the tokens of the picture, without those of reference pictures after them",
        "x + y, x - y, c * x": "a tensor, of tensors x and y of one shape and a number c",
        "wiener(x, beta: E)": "x through SeaCache's filter, by `sigma` and a spectrum of exponent −E",
        "cross(cond, x)": "x on the branch `cond` at this step, or of that half of a guidance batch",
        "cross(cond, prev(x))": "the same one step earlier",
        "mean(x over S), min(x over S), max(x over S)": "of x at the sites that S takes; in x, `self` is the site",
        "any(c over S)": "true where c holds at one of them",
        "prev(x)": "x at the step just before, on this branch",
        "kept(x)": "x at the step this site last computed, for whatever reason",
        "kept(x, 2)": "x at the compute before that; so on up to 16",
        "l1(x), l1(x, y)": "mean|x|, mean|x − y|",
        "l2(x), l2(x, y)": "the root mean square of x, of x − y",
        "relative_l1(x, y)": "mean|x − y| / mean|y|",
        "cosine(x, y)": "the cosine of the angle between them: 1 where they point the same way",
        "differing(x, y)": "the share of the elements that differ: 0 where x and y are equal",
        "sum(x)": "the sum of x over the steps since this site last computed, this one included",
        "product(x)": "the product of x over the same steps",
        "sum(x, decay: d)": "the same sum, which is multiplied by d at each step before x is added",
        "total(x)": "the sum of x over all steps at which the rule owned the site; a compute does not reset it",
        "ema(x, a)": "the moving average of x: it starts as the first x, then the share a of each step is x",
        "latch(c)": "true from the first step at which c holds; from then on c is not read",
        "at_step(k, x)": "x at step k; it has no value before, and x is read at that step only",
    }),
    ReferenceTable("action", "answers with", "actions", {
        "compute": "nothing: the site runs",
        "skip": "its input",
        "reuse": "its last output",
        "reuse residual": "its input plus its last residual (output minus input)",
        "reuse mean": "in a guidance batch, for both halves: the mean of both of its last output",
        "predict NAME(...)": "a sum of its history, with weights that depend on the clock",
        "predict NAME(...) of residual": "its input plus the same of its residuals",
        "approximate uncond spectral(...)": "on `model` only: half computed, half rebuilt",
        "approximate uncond copy": "the conditional half for both: no guidance at this step",
        "approximate uncond delta": "the conditional half, minus its last difference to the other",
        "approximate uncond affine(cond: [...], uncond: [...])": "sums of both halves with these factors, newest first",
    }),
    ReferenceTable("predictor", "answers with, where k = age", "actions", {
        "linear(weight: E)": "newest + (newest − the one before) · weight",
        "taylor(order: m)": (
            "Σ Δ^i k^i / i! for i up to m, of recursive differences at computes, Δ^(i+1) = (Δ^i − previous Δ^i) / gap"
        ),
        "hermite(order: m, scale: E)": "the same with E^i H_i(E k) in place of k^i, of Hermite polynomials H",
        "newton(order: m)": "the polynomial of degree m through the last m + 1 results",
        "chebyshev(order: m, ridge: E)": (
            "a sum of Chebyshev polynomials up to m, fitted to the last results by ridge regression"
        ),
        "bdf2()": "newest + (newest − the one before) · k / gap, a step of BDF2 with the last slope",
        "weights(of: [E, E, ...])": "a sum of the last results with these factors, newest first",
        "align(probe: P, clip: [a, b])": (
            "the one before + c · (newest − the one before), "
            "c = l1(P, kept(P, 2)) / l1(kept(P), kept(P, 2)), from a to b"
        ),
        "band(transform: T, cut: E, low: P, high: P)": (
            "the low frequencies of one prediction and the high ones of another"
        ),
    }),
    ReferenceTable("type", "is", "params", {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "a text",
        "range": "an interval of numbers",
        "list": "numbers, or strings",
    }),
)  # fmt: skip


@cache
def _entries() -> tuple[ReferenceEntry, ...]:
    return tuple(ReferenceEntry(form, says, table) for table in TABLES for form, says in table.says.items())


def explain_word(word: str) -> tuple[ReferenceEntry, ...]:
    """Finds the entries for a word or a fixed phrase of the language.

    Args:
        word: The word or phrase.

    Returns:
        The entries whose form starts with the word. If there are none, the shortest forms that contain it. For a
        phrase, all forms that contain it.
    """
    if " " in word:
        return tuple(entry for entry in _entries() if word in entry.form)
    begun = [entry for entry in _entries() if any(re.match(rf"{word}\b", part) for part in entry.form.split(", "))]
    if begun:
        return tuple(begun)
    held = [entry for entry in _entries() if word in entry.words]
    least = min((len(entry.words) for entry in held), default=0)
    return tuple(entry for entry in held if len(entry.words) == least)
