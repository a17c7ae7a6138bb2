"""The saved form of a trace: plain data with a JSON schema, from which all decisions can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cachepolicy._strict_json import InvalidDocumentError, validate_json
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
"""Largest size of a file in bytes. 50 steps of FLUX with 114 sites take a quarter of a mebibyte."""

Count = Annotated[int, Field(ge=0, le=NUMBER_LIMIT)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0)]


class Form(BaseModel):
    """A part of the saved form."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PolicyForm(Form):
    """A policy: its canonical text, and for each name after `use` the index in `policies` of the used policy."""

    text: str
    uses: dict[str, Index] = {}


class PlanForm(Form):
    """A plan.

    Attributes:
        policies: The policy, then the policies that it uses.
        settings: The values of its params in the language.
        digest: The semantic hash of the policy.
        skeleton: The module tree of the model.
        sites: The names of the sites by number.
    """

    policies: Annotated[tuple[PolicyForm, ...], Field(min_length=1)]
    settings: dict[str, str]
    digest: str
    skeleton: Skeleton
    sites: tuple[str, ...]


class DecisionForm(Form):
    """A decision. `rule` is the number of the owner from 1, None if no rule owns the site."""

    verdict: Literal["compute", "reuse", "hidden"]
    rule: Annotated[int, Field(ge=1)] | None
    reason: str


class SliceForm(Form):
    """The time of one call of a profiled module, in seconds since the trajectory's first call."""

    module: str
    began: Seconds
    seconds: Seconds


class CallForm(Form):
    """One call of the root model.

    Attributes:
        step: Number of the step, from 0.
        t: Timestep in training units, 0 to 1000.
        steps: Number of steps, if known.
        sigma: Sigma of the step, if known.
        branch: Name of the guidance branch.
        uncond_skipped: Whether the call computes the conditional half only.
        began: Seconds since the trajectory's first call.
        seconds: Duration in seconds.
        held: Bytes that the session held after the call.
        decisions: For each site the index in the trajectory's `decisions`.
        facts: What only the run could know, by site number.
        signals: Measured numbers by name, by site number.
        profile: Times of the modules in a profiled run.
        errors: Relative errors of the answers in an audited trajectory, by site number.
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
    errors: dict[Index, Annotated[float, Field(ge=0)]] = {}


class TrajectoryForm(Form):
    """One trajectory.

    Attributes:
        session: Name of its session.
        plan: Index in the document's `plans`.
        began: Seconds since the document's first trajectory.
        decisions: The different decisions.
        calls: The calls in order.
        audited: Whether every module computed, and the answers were compared with the computed outputs.
    """

    session: str
    plan: Index
    began: Seconds
    decisions: tuple[DecisionForm, ...]
    calls: tuple[CallForm, ...]
    audited: bool = False


class Document(Form):
    """A saved trace, the oldest trajectory first."""

    cachepolicy_trace: Literal[1] = VERSION
    plans: tuple[PlanForm, ...]
    trajectories: tuple[TrajectoryForm, ...]


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a saved trace."""
    return Document.model_json_schema()


def document(text: str | bytes) -> Document:
    """Returns the document of a JSON text.

    Raises:
        PolicyError: E260, the text is too large, no JSON, or no trace.
    """
    if len(text) > FILE_LIMIT:
        raise PolicyError.of("E260", f"a trace of {len(text)} bytes; at most {FILE_LIMIT} are read")
    try:
        return validate_json(text, Document.model_validate_json)
    except InvalidDocumentError as error:
        raise PolicyError.of("E260", f"no trace: {error}", help="`Trace.save` writes one") from error


# --- plans -----------------------------------------------------------------------------------------------


def form_of(plan: Plan) -> PlanForm:
    """Returns the saved form of a plan."""
    resolved = plan.resolved
    policies = list[ir.Policy]([resolved.policy])
    for used in resolved.used.values():
        if not any(used is policy for policy in policies):
            policies.append(used)
    indices = {id(policy): index for index, policy in enumerate(policies)}
    uses: dict[str, dict[str, int]] = {}
    for (user, name), used in resolved.used.items():
        uses.setdefault(user, {})[name] = indices[id(used)]
    return PlanForm(
        policies=tuple(PolicyForm(text=format(policy), uses=uses.get(origin(policy).key, {})) for policy in policies),
        settings=settings_of(resolved),
        digest=resolved.digest,
        skeleton=plan.skeleton,
        sites=tuple(site.name for site in plan.sites),
    )


def settings_of(resolved: Resolved) -> dict[str, str]:
    """Returns the values of the params in the language, by name."""
    params = {statement.name: statement for statement in resolved.policy.statements if isinstance(statement, ir.Param)}
    texts = dict[str, str]()
    for name, value in resolved.settings.items():
        setting = ir.Setting(name=name, value=typed(params[name], value))
        texts[name] = format_node(setting).removeprefix(f"{name} = ")
    return texts


def plan_of(form: PlanForm, where: str) -> Plan:
    """Binds a saved plan again.

    Args:
        form: The saved plan.
        where: Its path in the document, for errors.

    Raises:
        PolicyError: E260, the parts make no plan, or another one than was saved.
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
    """Resolves the saved policy. It uses the policies that were saved with it, and no files."""
    policies = [parse(policy.text, source=_source(index)) for index, policy in enumerate(form.policies)]
    uses: Mapping[str, dict[str, int]] = {_source(index): policy.uses for index, policy in enumerate(form.policies)}

    def loader(name: str, user: ir.Policy) -> ir.Policy:
        index = uses[user.source_name or ""].get(name, len(policies))
        if index >= len(policies):
            raise PolicyError.of("E150", f"`use {name}`, which was not saved")
        return policies[index]

    settings = {name: parse_value(text) for name, text in form.settings.items()}
    return resolve(policies[0], settings, loader=loader, model=form.skeleton.facts)


def _source(index: int) -> str:
    return f"<trace>/{index}"
