"""The form in which a trace is saved: plain data with a JSON schema, enough to decide everything once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cachepolicy._strict_json import DuplicateKeyError, refuse_duplicate_keys
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format, format_node
from cachepolicy.language.linker import Resolved, resolve
from cachepolicy.language.loader import origin
from cachepolicy.language.params import typed
from cachepolicy.language.parser import parse, parse_value
from cachepolicy.language.vocabulary import NUMBER_LIMIT
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import Skeleton, fault
from cachepolicy.planning.plan import Plan

VERSION = 1
FILE_LIMIT = 256 * 2**20
"""Bytes of a file that is read; 50 steps of a FLUX with 114 sites take a quarter of a mebibyte."""

Count = Annotated[int, Field(ge=0, le=NUMBER_LIMIT)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0)]


class Form(BaseModel):
    """A part of the saved form."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PolicyForm(Form):
    """A policy's canonical text; `uses` tells for each name after `use` the place in `policies` of what it means."""

    text: str
    uses: dict[str, Index] = {}


class PlanForm(Form):
    """A policy on a model.

    `policies` holds the policy first, then what it uses; `settings` the params' values as the language writes them;
    `digest` the hash of what the rules mean; `sites` the names of the sites, by number.
    """

    policies: Annotated[tuple[PolicyForm, ...], Field(min_length=1)]
    settings: dict[str, str]
    digest: str
    skeleton: Skeleton
    sites: tuple[str, ...]


class DecisionForm(Form):
    """What was decided: `rule` is the owner's number, from 1, None where no rule owns the site."""

    verdict: Literal["compute", "reuse", "hidden"]
    rule: Annotated[int, Field(ge=1)] | None
    reason: str


class SliceForm(Form):
    """The time that one intercepted module took, in seconds since the trajectory's first call."""

    module: str
    began: Seconds
    seconds: Seconds


class CallForm(Form):
    """One call of the root.

    `decisions` holds for each site number a place in the trajectory's `decisions`; `facts` what only the run knew, and
    `signals` the numbers that were measured, by site number. `began` counts in seconds from the trajectory's first
    call; `held` are the bytes that the session held afterwards; `profile` is empty unless the run was profiled.
    """

    step: Count
    t: float | None
    steps: Annotated[int, Field(ge=1, le=NUMBER_LIMIT)] | None
    sigma: float | None
    branch: str
    uncond_skipped: bool = False
    began: Seconds
    seconds: Seconds
    held: Count
    decisions: tuple[Index, ...]
    facts: dict[Index, str] = {}
    signals: dict[Index, dict[str, float]] = {}
    profile: tuple[SliceForm, ...] = ()


class TrajectoryForm(Form):
    """The calls of one trajectory: `plan` is a place in the document's `plans`, `session` a name for whose it was.

    `began` counts in seconds from the beginning of the document's first trajectory.
    """

    session: str
    plan: Index
    began: Seconds
    decisions: tuple[DecisionForm, ...]
    calls: tuple[CallForm, ...]


class Document(Form):
    """A saved trace: the trajectories oldest first."""

    cachepolicy_trace: Literal[1] = VERSION
    plans: tuple[PlanForm, ...]
    trajectories: tuple[TrajectoryForm, ...]


def schema() -> dict[str, Any]:
    """The JSON schema of a saved trace."""
    return Document.model_json_schema()


def document(text: str | bytes) -> Document:
    """The document that a JSON text holds.

    Raises:
        PolicyError: E260, the text is too large, no JSON, or no trace.
    """
    if len(text) > FILE_LIMIT:
        raise PolicyError.of("E260", f"a trace of {len(text)} bytes; at most {FILE_LIMIT} are read")
    try:
        refuse_duplicate_keys(text)
        return Document.model_validate_json(text)
    except DuplicateKeyError as error:
        raise PolicyError.of("E260", f"no trace: {error}", help="`Trace.save` writes one") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise PolicyError.of("E260", f"no trace: {where}: {message}", help="`Trace.save` writes one") from error


# --- plans -----------------------------------------------------------------------------------------------


def form_of(plan: Plan) -> PlanForm:
    """A plan in the form in which it is saved."""
    resolved = plan.resolved
    policies = list[ir.Policy]([resolved.policy])
    for used in resolved.used.values():
        if not any(used is each for each in policies):
            policies.append(used)
    places = {id(policy): place for place, policy in enumerate(policies)}
    uses: dict[str, dict[str, int]] = {}
    for (user, name), used in resolved.used.items():
        uses.setdefault(user, {})[name] = places[id(used)]
    return PlanForm(
        policies=tuple(PolicyForm(text=format(each), uses=uses.get(origin(each).key, {})) for each in policies),
        settings=settings_of(resolved),
        digest=resolved.digest,
        skeleton=plan.skeleton,
        sites=tuple(site.name for site in plan.sites),
    )


def settings_of(resolved: Resolved) -> dict[str, str]:
    """What the params are worth, as the language writes it."""
    params = {each.name: each for each in resolved.policy.statements if isinstance(each, ir.Param)}
    texts = dict[str, str]()
    for name, value in resolved.settings.items():
        setting = ir.Setting(name=name, value=typed(params[name], value))
        texts[name] = format_node(setting).removeprefix(f"{name} = ")
    return texts


def plan_of(form: PlanForm, where: str) -> Plan:
    """The plan that was saved; `where` names it in errors.

    Raises:
        PolicyError: E260, the parts do not make a plan, or make another one than was saved.
    """
    try:
        resolved = _resolved(form)
        problem = fault(form.skeleton)
        if problem is not None:
            raise PolicyError.of("E210", problem)
        plan = bind(resolved, form.skeleton)
    except PolicyError as error:
        first = error.diagnostics[0]
        raise PolicyError.of("E260", f"no trace: {where}: {first.message}", help=first.help) from error
    if resolved.digest != form.digest:
        raise PolicyError.of("E260", f"no trace: {where}.digest: the policy's hash is `{resolved.digest}`")
    if tuple(site.name for site in plan.sites) != form.sites:
        raise PolicyError.of("E260", f"no trace: {where}.sites: the policy selects other sites in the skeleton")
    return plan


def _resolved(form: PlanForm) -> Resolved:
    """The policy with its settings; what it uses is what was saved beside it, and no file."""
    policies = [parse(each.text, source=_source(place)) for place, each in enumerate(form.policies)]
    uses: Mapping[str, dict[str, int]] = {_source(place): each.uses for place, each in enumerate(form.policies)}

    def loader(name: str, user: ir.Policy) -> ir.Policy:
        place = uses[user.source_name or ""].get(name, len(policies))
        if place >= len(policies):
            raise PolicyError.of("E150", f"`use {name}`, which was not saved")
        return policies[place]

    return resolve(policies[0], {name: parse_value(text) for name, text in form.settings.items()}, loader=loader)


def _source(place: int) -> str:
    return f"<trace>/{place}"
