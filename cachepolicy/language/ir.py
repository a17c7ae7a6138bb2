"""The nodes of a policy: frozen pydantic models without behaviour.

A node that was parsed from a text has the `span` of its text. Spans are ignored by equality and left out of JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import SkipJsonSchema

from cachepolicy.errors import Span

EDITION = 1

ParamType = Literal["int", "float", "bool", "string", "range", "list"]
Kind = Literal["attention", "self_attention", "cross_attention", "feedforward", "block", "model"]


class Node(BaseModel):
    """Base class of all nodes. Nodes with the same content are equal, wherever they stand in a text."""

    # Nodes are dictionary keys of a run's memory and are looked up at every step, so their hash is computed once.
    __slots__ = ("_hashed",)

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    span: SkipJsonSchema[Span | None] = Field(default=None, exclude=True, repr=False)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(value, other.__dict__[name]) for name, value in self.__dict__.items() if name not in _PLACES)

    def __hash__(self) -> int:
        try:
            return _HASHED.__get__(self)
        except AttributeError:
            computed = hash((type(self), *(value for name, value in self.__dict__.items() if name not in _PLACES)))
            _HASHED.__set__(self, computed)
            return computed


class GrownNode(Node):
    """A node with fields that were added after policies existed.

    At their defaults these fields are left out of the JSON form and of the digest, so that both stay what they were.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset()
    """The names of these fields."""

    def unsaid(self) -> frozenset[str]:
        """Returns the added fields that have their defaults."""
        fields = type(self).model_fields
        return frozenset(name for name in self.ADDED if _same(getattr(self, name), fields[name].default))

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unsaid = self.unsaid()
        return {name: value for name, value in handler(self).items() if name not in unsaid}


_HASHED: Any = Node.__dict__["_hashed"]  # the slot descriptor, because frozen models refuse assignments
_PLACES = frozenset({"span", "comments", "source_name", "text"})
"""Fields that say where a node stands in a text."""


def _same(one: object, other: object) -> bool:
    """Returns whether two values are equal and of one type, so that `1`, `1.0` and `True` differ, in tuples too."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
    return type(one) is type(other) and one == other  # pyright: ignore[reportUnknownArgumentType]


# --- expressions -----------------------------------------------------------------------------------------


class Number(Node):
    """A number, `inf` included."""

    kind: Literal["number"] = "number"
    value: int | float


class Boolean(Node):
    """`true` or `false`."""

    kind: Literal["boolean"] = "boolean"
    value: bool


class Text(Node):
    """A string, as in `branch == "cond"`."""

    kind: Literal["text"] = "text"
    value: str


class Off(Node):
    """`off`: the value of an optional parameter that is not set."""

    kind: Literal["off"] = "off"


class Name(Node):
    """A clock word, parameter, let, signal or external."""

    kind: Literal["name"] = "name"
    name: str


class Lookup(Node):
    """`table[index]`: a calibrated constant."""

    kind: Literal["lookup"] = "lookup"
    table: str
    index: Expression


class ListOf(Node):
    """`[1, 2, 3]`: a list of expressions."""

    kind: Literal["list"] = "list"
    items: tuple[Expression, ...]


class Negative(Node):
    """`-x`."""

    kind: Literal["negative"] = "negative"
    operand: Expression


class Arithmetic(Node):
    """`left + right`, likewise `- * / %`."""

    kind: Literal["arithmetic"] = "arithmetic"
    operator: Literal["+", "-", "*", "/", "%"]
    left: Expression
    right: Expression


class Comparison(Node):
    """`a < b`, or a chain that runs one way: `100 < t < 800`."""

    kind: Literal["comparison"] = "comparison"
    operators: tuple[Literal["<", "<=", ">", ">=", "==", "!="], ...]
    operands: tuple[Expression, ...]


class Both(Node):
    """`a and b and c`."""

    kind: Literal["and"] = "and"
    operands: tuple[Expression, ...]


class Either(Node):
    """`a or b or c`."""

    kind: Literal["or"] = "or"
    operands: tuple[Expression, ...]


class Negation(Node):
    """`not a`."""

    kind: Literal["not"] = "not"
    operand: Expression


class Conditional(Node):
    """`then if condition else otherwise`."""

    kind: Literal["conditional"] = "conditional"
    then: Expression
    condition: Expression
    otherwise: Expression


class Interval(Node):
    """`(100, 800)`, `[0, inf)`: the two ends, each open or closed."""

    kind: Literal["interval"] = "interval"
    low: Expression
    high: Expression
    low_closed: bool = False
    high_closed: bool = False


class SetOf(Node):
    """`{0, 5, 7}`."""

    kind: Literal["set"] = "set"
    items: tuple[Expression, ...]


class Membership(Node):
    """`t in (100, 800)`, `step in {0, 5}`; a name stands for a `range` or `list` parameter."""

    kind: Literal["membership"] = "membership"
    value: Expression
    container: Annotated[Interval | SetOf | Name | Off | ListOf, Field(discriminator="kind")]


class Argument(Node):
    """`label: value` of a function or an action."""

    label: str
    value: Expression


class Call(GrownNode):
    """A function of the language: a norm, `prev`, `kept`, `sum`, `product`, `poly`, `abs`, ..."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"labelled"})

    kind: Literal["call"] = "call"
    function: str
    arguments: tuple[Expression, ...]
    labelled: tuple[Argument, ...] = Field(default=(), description="the arguments with a label, as `decay: 0.9`")


class Tokens(Node):
    """`tokens: a:b` of a probe, or `tokens: "latent"`, the tokens of the picture without reference tokens."""

    kind: Literal["tokens"] = "tokens"
    start: Expression | None = None
    stop: Expression | None = None
    latent: bool = False


class Probe(GrownNode):
    """`input(S)`, `output(S)`, `residual(S)`, `argument(S, "temb")`: a tensor measured at one site."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"tokens"})

    kind: Literal["probe"] = "probe"
    stream: Literal["input", "output", "residual", "argument"]
    selector: Selector
    argument: str | None = None
    tokens: Tokens | None = None


class Over(Node):
    """`mean(x over S)`, likewise `min`, `max` and `any`: of the values of x at the sites that S takes.

    Inside x, `self` is the site.
    """

    kind: Literal["over"] = "over"
    function: str
    value: Expression
    selector: Selector


Expression = Annotated[
    Number
    | Boolean
    | Text
    | Off
    | Name
    | Lookup
    | ListOf
    | Negative
    | Arithmetic
    | Comparison
    | Both
    | Either
    | Negation
    | Conditional
    | Interval
    | SetOf
    | Membership
    | Call
    | Probe
    | Over,
    Field(discriminator="kind"),
]


# --- selectors -------------------------------------------------------------------------------------------


class Pattern(Node):
    """`"regex"`: modules whose qualified name contains a match, in RE2 syntax."""

    kind: Literal["pattern"] = "pattern"
    regex: str


class PatternParam(Node):
    """A `string` or `list` parameter in the position of a regex."""

    kind: Literal["pattern_param"] = "pattern_param"
    name: str


class Itself(Node):
    """`self` in a probe: the site that is decided. A policy before substitution has a `PatternParam` in its place."""

    kind: Literal["itself"] = "itself"


class OfKind(Node):
    """`attention`, `feedforward`, `block`, `model`, ..."""

    kind: Literal["of_kind"] = "of_kind"
    of: Kind


class OfClass(Node):
    """`class "regex"`: modules whose class name contains a match."""

    kind: Literal["of_class"] = "of_class"
    regex: str


class Blocks(GrownNode):
    """`blocks`, `blocks[a:b]`, `blocks[i]`, with `each` one site per block, with `of "regex"` other lists."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"stride"})

    kind: Literal["blocks"] = "blocks"
    each: bool = False
    index: Expression | None = None
    start: Expression | None = None
    stop: Expression | None = None
    stride: Expression | None = None
    of: str | None = None


class AllOf(Node):
    """`S and T`."""

    kind: Literal["all_of"] = "all_of"
    selectors: tuple[Selector, ...]


class AnyOf(Node):
    """`S or T`."""

    kind: Literal["any_of"] = "any_of"
    selectors: tuple[Selector, ...]


class NoneOf(Node):
    """`not S`."""

    kind: Literal["none_of"] = "none_of"
    selector: Selector


class Within(Node):
    """`S within T`: the modules of S that are strictly inside a module that T takes."""

    kind: Literal["within"] = "within"
    selector: Selector
    inside: Selector


Selector = Annotated[
    Pattern | PatternParam | Itself | OfKind | OfClass | Blocks | AllOf | AnyOf | NoneOf | Within,
    Field(discriminator="kind"),
]


# --- the clauses of a rule -------------------------------------------------------------------------------


class Every(Node):
    """`every N [offset K]`, `every N from end`, `every N since compute`: compute at every N-th step."""

    kind: Literal["every"] = "every"
    interval: Expression
    offset: Expression | None = None
    anchor: Literal["start", "end", "compute"] = "start"


class OnSteps(Node):
    """`on {0, 1, 7}` or `on steps_param`: compute at these steps."""

    kind: Literal["on"] = "on"
    steps: Annotated[SetOf | Name | ListOf | Off, Field(discriminator="kind")]


class Mask(GrownNode):
    """`mask "1101"` or a `string` parameter: 1 computes, 0 reuses. Steps after its end compute.

    `mask NAME by site`: a `list` parameter with a mask for each site.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"by_site"})

    kind: Literal["mask"] = "mask"
    mask: Annotated[Text | Name | Off | ListOf, Field(discriminator="kind")]
    by_site: bool = False


ScheduleClause = Annotated[Every | OnSteps | Mask, Field(discriminator="kind")]


class Bound(Node):
    """`at most N in a row` (age at most N) or `at most N in all`."""

    kind: Literal["bound"] = "bound"
    count: Expression
    scope: Literal["row", "all"]


class Compute(Node):
    """`compute`: run the site."""

    kind: Literal["compute"] = "compute"


class Skip(Node):
    """`skip`: return the input."""

    kind: Literal["skip"] = "skip"


class Reuse(GrownNode):
    """`reuse`: the last output; `reuse residual`: the input plus the last residual.

    `reuse mean`: the mean of both halves of a guidance batch of the last output, for both.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"mean"})

    kind: Literal["reuse"] = "reuse"
    residual: bool = False
    mean: bool = False


class Predict(Node):
    """`predict NAME(...) [of residual]`: a sum of the history with weights that depend on the clock."""

    kind: Literal["predict"] = "predict"
    predictor: str
    arguments: tuple[Argument, ...] = ()
    residual: bool = False


class ApproximateUncond(Node):
    """`approximate uncond METHOD(...)`: run the conditional half of a guidance batch and reconstruct the other."""

    kind: Literal["approximate_uncond"] = "approximate_uncond"
    method: str
    arguments: tuple[Argument, ...] = ()


Action = Annotated[Compute | Skip | Reuse | Predict | ApproximateUncond, Field(discriminator="kind")]


# --- statements ------------------------------------------------------------------------------------------


class Param(Node):
    """`param NAME: TYPE [= DEFAULT] [in DOMAIN] ["doc"]`: a parameter."""

    kind: Literal["param"] = "param"
    name: str
    type: ParamType
    optional: bool = False
    default: Expression | None = None
    domain: Annotated[Interval | SetOf, Field(discriminator="kind")] | None = None
    doc: str | None = None


class Let(Node):
    """`let NAME = EXPR`: a named value that depends on the clock and on parameters."""

    kind: Literal["let"] = "let"
    name: str
    value: Expression


class Table(Node):
    """`table NAME = [...]`: constants calibrated on a run with as many steps as values."""

    kind: Literal["table"] = "table"
    name: str
    values: tuple[int | float, ...]


class Signal(Node):
    """`signal NAME = EXPR`: a tensor or a number that is measured once per step and branch."""

    kind: Literal["signal"] = "signal"
    name: str
    value: Expression


class External(Node):
    """`external NAME: float`: a number that the caller supplies."""

    kind: Literal["external"] = "external"
    name: str


class Rule(Node):
    """`match SELECTOR [when G] [SCHEDULE] [while C] [BOUND ...] -> ACTION [follow BRANCH]`."""

    kind: Literal["match"] = "match"
    selector: Selector
    optional: bool = False
    when: Expression | None = None
    schedule: ScheduleClause | None = None
    condition: Expression | None = Field(default=None, description="the `while` clause")
    bounds: tuple[Bound, ...] = ()
    action: Action
    follow: str | None = None


class Setting(Node):
    """`NAME = VALUE` after `use ... with` or `expect ... with`."""

    name: str
    value: Expression


class Preset(Node):
    """`preset NAME for class "regex" [when G] with A = V, ... [source "..."]`: defaults for models that fit."""

    kind: Literal["preset"] = "preset"
    name: str
    for_class: str
    when: Expression | None = None
    settings: tuple[Setting, ...] = ()
    origin: str | None = Field(default=None, description="where the values are from")


class Use(GrownNode):
    """`use POLICY [with A = V, ...] [when G] [at most N in a row]`: inserts the rules of another policy."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"when", "bound"})

    kind: Literal["use"] = "use"
    policy: str
    settings: tuple[Setting, ...] = ()
    when: Expression | None = None
    bound: Bound | None = None


class Expect(Node):
    """`expect SELECTOR over N steps [with ...]: C R R ...`: a test in the policy file."""

    kind: Literal["expect"] = "expect"
    selector: Selector
    steps: int
    settings: tuple[Setting, ...] = ()
    row: str = Field(pattern="^[CR]+$", description="one letter per step: C computes, R reuses")


class Tuned(Node):
    """`tuned over N steps [with A = V, ...]`: what the rules were found for, on schedules of N steps."""

    kind: Literal["tuned"] = "tuned"
    steps: int
    settings: tuple[Setting, ...] = ()


Statement = Annotated[
    Param | Let | Table | Signal | External | Rule | Use | Expect | Tuned | Preset, Field(discriminator="kind")
]


class Comment(BaseModel):
    """A comment before a statement or at its end.

    Statement 0 is the first after the header. Statements -3, -2 and -1 are the `cachepolicy`, `policy` and `source`
    lines, and the number of statements stands for the end of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statement: int
    place: Literal["before", "after"]
    text: str


class Policy(Node):
    """A policy. Its statements are in the order of the text."""

    edition: int = EDITION
    name: str | None = None
    title: str | None = None
    source: str | None = None
    statements: tuple[Statement, ...] = ()
    comments: SkipJsonSchema[tuple[Comment, ...]] = Field(default=(), exclude=True, repr=False)
    source_name: SkipJsonSchema[str | None] = Field(
        default=None, exclude=True, repr=False, description="name of the file of the text"
    )
    text: SkipJsonSchema[str | None] = Field(
        default=None, exclude=True, repr=False, description="the text, which diagnostics quote"
    )


for _model in (
    Lookup, ListOf, Negative, Arithmetic, Comparison, Both, Either, Negation, Conditional, Interval, SetOf,
    Membership, Call, Tokens, Probe, Over, Blocks, AllOf, AnyOf, NoneOf, Within, Every, OnSteps, Mask, Bound, Argument,
    Predict, ApproximateUncond, Param, Let, Signal, Rule, Setting, Preset, Use, Expect, Tuned, Policy,
):  # fmt: skip
    _model.model_rebuild()
