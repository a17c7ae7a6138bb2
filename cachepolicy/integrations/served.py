"""What the plugins share: the policies of a server, what a request asks of them, and the record of each request.

Nothing of an engine is imported here.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import cachepolicy
from cachepolicy.errors import PolicyError, suggestion
from cachepolicy.planning.tally import tally
from cachepolicy.tracing.trace import Trace, Trajectory

KEY = "cachepolicy"
"""The name under which a request says what it asks for, and under which its record is found."""

_FIELDS = ("policy", "params", "options")
_REQUEST_OPTIONS = ("steps", "guidance", "audit", "trace")
_PROCESS_OPTIONS = ("timestep", "scheduler", "process_group", "externals")  # what JSON cannot say, or the engine knows


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy with the params and options of `cachepolicy.apply`."""

    policy: str
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of a server.

    Attributes:
        default: The setting of requests that name no other.
        named: The settings that requests may name.
    """

    default: Setting
    named: Mapping[str, Setting] = field(default_factory=dict[str, Setting])

    @classmethod
    def of(cls, given: Any) -> Config:
        """Read a configuration.

        Args:
            given: `{"policy": ..., "params": {...}, "options": {...}, "policies": {name: {the same three}}}`, or its
                JSON text. `policy` is a shipped name or a path; everything else may be left out.

        Raises:
            PolicyError: The configuration has another form (E309).
        """
        content = _object(_decoded(given), "the cache config", (*_FIELDS, "policies"))
        default = _setting(content, "the cache config")
        policies = _object(content.get("policies"), "`policies`", None)
        return cls(
            default,
            {name: _setting(_object(each, f"`{name}`", _FIELDS), f"`{name}`") for name, each in policies.items()},
        )


def _decoded(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise PolicyError.of("E309", f"the cache config is no JSON: {error}", help=_FORM) from error


_FORM = '`{"policy": "fbc", "params": {...}, "options": {...}}`'


def _object(given: Any, name: str, known: Sequence[str] | None) -> dict[str, Any]:
    """Return a JSON object whose keys are known; None is an empty one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in cast("Mapping[Any, Any]", given)):
        raise PolicyError.of("E309", f"{name} is `{_shown(given)}`", help=f"an object such as {_FORM}")
    content = dict(cast("Mapping[str, Any]", given))
    for key in content:
        if known is not None and key not in known:
            raise PolicyError.of("E309", f"{name} has no `{_shown(key)}`", help=suggestion(key[:80], known))
    return content


def _shown(value: Any) -> str:
    """Return a value of a request for a message; requests may be long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


_MOST_SHOWN = 80


def _setting(content: Mapping[str, Any], name: str) -> Setting:
    policy = content.get("policy")
    if not isinstance(policy, str) or not policy:
        raise PolicyError.of("E309", f"{name} names no policy", help=_FORM)
    params = _object(content.get("params"), f"`params` of {name}", None)
    options = {"samples": "max"} | _object(content.get("options"), f"`options` of {name}", None)
    for option in _PROCESS_OPTIONS:
        if option in options and options[option] is not False:
            raise PolicyError.of("E309", f"`options` of {name} cannot say `{option}`", help="the engine provides it")
    return Setting(policy, params, options)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        policy: The name of a setting, None for the default one.
        params: Params of the policy that differ from those of the setting.
        options: The session's options.
        trace: Whether the record has the whole trace.
        bare: Whether it asks for the model without a policy.
    """

    policy: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trace: bool = False
    bare: bool = False

    @classmethod
    def of(cls, said: Any, config: Config) -> Asked:
        """Read what a request says.

        Args:
            said: None or True for the server's default, False for the bare model, or an object: the fields `policy` (a
                name of `config.named`), `params` and `options`; all other keys are params.
            config: The configuration of the server.

        Raises:
            PolicyError: It has another form (E309).
        """
        if said is None or said is True:
            return cls()
        if said is False:
            return cls(bare=True)
        content = _object(said, "`cachepolicy` of the request", None)
        params = {key: value for key, value in content.items() if key not in _FIELDS}
        params |= _object(content.get("params"), "`params` of the request", None)
        options = _object(content.get("options"), "`options` of the request", _REQUEST_OPTIONS)
        trace = options.pop("trace", False)
        if not isinstance(trace, bool):
            raise PolicyError.of("E309", f"`trace` of the request is `{_shown(trace)}`", help="true or false")
        policy = content.get("policy")
        if policy is not None and (not isinstance(policy, str) or policy not in config.named):
            raise PolicyError.of(
                "E309",
                f"the server has no policy `{_shown(policy)}`",
                help=suggestion(_shown(policy), list(config.named)) or "a request may leave `policy` out",
            )
        for name in params:
            if name in _SESSION_WORDS:
                raise PolicyError.of("E309", f"`{name}` is no param", help=f"options: {', '.join(_REQUEST_OPTIONS)}")
        return cls(policy, params, {name: value for name, value in options.items() if value is not None}, trace)

    @property
    def identity(self) -> str:
        """Equal for requests that may share a batch."""
        return identity_of([self.bare, self.policy, self.params, self.options])


def identity_of(said: Any) -> str:
    """Return a text that is equal for equal JSON values. A caller in Python may say anything else too."""
    try:
        return json.dumps(said, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys of several types, a cycle, or a deep nesting
        return f"{type(said).__name__} {id(said)}"


_SESSION_WORDS = frozenset(inspect.signature(cachepolicy.Run.session).parameters) - {"params"}


class RequestRefusedError(Exception):
    """A request cannot be served as it asks; other requests are not concerned."""


class ServedPolicies:
    """The policies of a server on one target. One of them is attached at a time.

    Args:
        target: A model, or an object with the denoisers as `components`, as `cachepolicy.apply` takes it.
        config: The configuration of the server.
        process_group: The processes that decide together, or None.

    Attributes:
        counts: Numbers of requests and events since the start: `requests`, `bare`, `refused`, `failed`, `split`
            (batches that were split), `computed_together` (batches that could not be split), `attached` (changes of the
            policy), and site calls: `computed`, `reused`, `hidden`.
    """

    def __init__(self, target: Any, config: Config, process_group: Any = None) -> None:
        self.target = target
        self.config = config
        self.counts: Counter[str] = Counter()
        self._group = process_group
        self._run: cachepolicy.Run | None = None
        self._current: str | None = None
        self._lock = threading.RLock()

    def start(self) -> cachepolicy.Run:
        """Attach every policy once, the default one last, so that mistakes show when the server starts.

        Raises:
            PolicyError: A policy, a param or an option is wrong, or selects nothing in the model.
        """
        try:
            for name in self.config.named:
                self._attach(name)
            return self._attach(None)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Remove the policy."""
        with self._lock:
            if self._run is not None:
                self._run.remove()
            self._run = None

    @property
    def run(self) -> cachepolicy.Run:
        """The attached run."""
        return self._run if self._run is not None else self._attach(None)

    def _attach(self, name: str | None) -> cachepolicy.Run:
        with self._lock:
            if self._run is not None and name == self._current:
                return self._run
            self.stop()
            setting = self.config.default if name is None else self.config.named[name]
            options = dict(setting.options)
            if self._group is not None:
                options.setdefault("process_group", self._group)
            self._run = cachepolicy.apply(self.target, setting.policy, options=options, **setting.params)
            self._current = name
            self.counts["attached"] += 1
            return self._run

    def read(self, said: Any) -> Asked:
        """Read what a request says, as `Asked.of` does.

        Raises:
            RequestRefusedError: It has another form.
        """
        try:
            return Asked.of(said, self.config)
        except PolicyError as error:
            self.counts["refused"] += 1
            raise RequestRefusedError(refusal_of(error)) from error

    def serve(
        self,
        asked: Asked,
        key: str,
        call: Callable[[], Any],
        *,
        requests: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Serve one request, or a batch of requests that ask for the same.

        Args:
            asked: What they ask for.
            key: The name of the session, which ends with the call.
            call: Draws the picture.
            requests: How many requests are in the batch.
            options: Options of the session that the engine knows; what the request says comes first.

        Returns:
            The result of the call, and the record of the request.

        Raises:
            RequestRefusedError: The params do not fit the policy, or the policy cannot follow the call.
        """
        self.counts["requests"] += requests
        if asked.bare:
            self.counts["bare"] += requests
            with self.run.disabled():
                return call(), {"policy": False, "session": key, "requests": requests}
        with self._entered(asked, key, requests, options or {}) as run:
            earlier = frozenset(map(id, run.trace or ()))  # a key may come again
            try:
                result = call()
                mine = [each for each in run.trace or () if each.session == key and id(each) not in earlier]
                return result, self._record(run, asked, key, requests, Trace.of(mine))
            finally:
                run.reset(key)

    @contextlib.contextmanager
    def _entered(self, asked: Asked, key: str, requests: int, options: Mapping[str, Any]) -> Generator[cachepolicy.Run]:
        try:
            run = self._attach(asked.policy)
            session = run.session(key, **{**options, **asked.options}, **asked.params)
        except Exception as error:  # params are any JSON
            self.counts["refused"] += requests
            raise RequestRefusedError(refusal_of(error)) from error
        try:
            with session:
                yield run
        except PolicyError as error:
            self.counts["failed"] += requests
            raise RequestRefusedError(refusal_of(error)) from error

    def _record(self, run: cachepolicy.Run, asked: Asked, key: str, requests: int, trace: Trace) -> dict[str, Any]:
        record = record_of(trace, policy=self._policy(asked), key=key, requests=requests)
        record["digests"] = {name: plan.resolved.digest for name, plan in run.plans.items()}
        calls = record["site_calls"]
        self.counts.update({name: calls[name] for name in ("computed", "reused", "hidden")})
        if asked.trace:
            record["trace"] = json.loads(trace.to_json())
        return record

    def _policy(self, asked: Asked) -> str:
        return self.config.default.policy if asked.policy is None else asked.policy


def refusal_of(error: Exception) -> str:
    """Return an error as one line for the caller of a server."""
    if isinstance(error, PolicyError):
        first = error.diagnostics[0]
        return f"{first.code}: {first.message}" + (f" ({first.help})" if first.help else "")
    return _shown(f"{type(error).__name__}: {error}")


def record_of(trace: Trace, *, policy: str, key: str, requests: int = 1) -> dict[str, Any]:
    """Return the record of a request as JSON values.

    Args:
        trace: The trajectories of the request.
        policy: The name of its policy.
        key: Its session.
        requests: How many requests shared the calls.
    """
    trajectories = trace.trajectories
    numbers = [tally(trajectory) for trajectory in trajectories]
    total, skipped = sum(each.total for each in numbers), sum(each.skipped for each in numbers)
    calls = sum((each.calls for each in numbers), Counter[str]())
    errors = [worst[2] for trajectory in trajectories if (worst := trajectory.worst) is not None]
    return {
        "policy": policy,
        "session": key,
        "requests": requests,
        "steps": sum(len({call.tick.step for call in trajectory.calls}) for trajectory in trajectories),
        "model_calls": sum(trajectory.size for trajectory in trajectories),
        "site_calls": {"computed": calls["compute"], "reused": calls["reuse"], "hidden": calls["hidden"]},
        "skipped_share": skipped / total if total else 0.0,
        "facts": dict(Counter(str(fact) for each in trajectories for fact in each.facts.values())),
        "model_seconds": sum(trajectory.seconds for trajectory in trajectories),
        "audit_error": max(errors, default=None),
        "rows": [_rows(trajectory) for trajectory in trajectories],
    }


def _rows(trajectory: Trajectory) -> dict[str, dict[str, str]]:
    return {branch or "first": trajectory.rows(branch) for branch in trajectory.branches}


def line_of(record: Mapping[str, Any]) -> str:
    """Return a record as one line for a log."""
    if record["policy"] is False:
        return f"{record['session']}: without a policy"
    shared = f", {record['requests']} requests" if record["requests"] > 1 else ""
    audit = "" if record["audit_error"] is None else f", audited: {record['audit_error']:.2%} off at most"
    share = f"{100 * record['skipped_share']:.1f} % of the site calls skipped"
    return f"{record['session']}: {record['policy']}, {record['steps']} steps, {share}{shared}{audit}"


def joint_group(groups: Sequence[Any]) -> Any:
    """Return the process group of all processes that hold parts of the same sample, or None for one process.

    The parts are of its tokens (sequence parallelism) or of its weights (tensor parallelism). Where a sample is divided
    in both ways, every process of the program has to call this.

    Args:
        groups: The engine's groups, each with `ranks`, `world_size` and `device_group`, or None.
    """
    several = [group for group in groups if group is not None and group.world_size > 1]
    if len(several) < 2:
        return several[0].device_group if several else None
    import torch

    dist: Any = torch.distributed

    mine = [sorted(group.ranks) for group in several]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    joined = {rank: {rank} for rank in range(len(told))}
    for ranks in (set(ranks) for lists in told for ranks in lists):
        union = set[int]().union(*(joined[rank] for rank in ranks))
        for rank in union:
            joined[rank] = union
    made = {tuple(sorted(ranks)): None for ranks in joined.values()}
    handles = {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in made}
    return handles[tuple(sorted(joined[dist.get_rank()]))]


def alike(asked: Sequence[Asked | None]) -> Iterator[tuple[Asked, list[int]]]:
    """Yield what is asked for and by whom, in order of appearance. None is left out."""
    groups = dict[str, tuple[Asked, list[int]]]()
    for index, each in enumerate(asked):
        if each is not None:
            groups.setdefault(each.identity, (each, []))[1].append(index)
    yield from groups.values()
