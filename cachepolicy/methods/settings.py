"""Reads the settings of another tool, and makes policies from shipped ones with params set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, NoReturn, TypeVar, cast

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.loader import SHIPPED, load
from cachepolicy.language.params import typed
from cachepolicy.language.parser import parse

_Bound = TypeVar("_Bound", int, float)


@cache
def shipped(name: str) -> ir.Policy:
    """Returns a shipped policy."""
    return load(f"{SHIPPED}{name}.cp")


def params(policy: ir.Policy) -> dict[str, ir.Param]:
    """Returns the params of a policy by name."""
    return {statement.name: statement for statement in policy.statements if isinstance(statement, ir.Param)}


def preset_values(policy: str, preset: str) -> dict[str, ir.Expression]:
    """Returns what a preset of a shipped policy sets."""
    (found,) = (each for each in shipped(policy).statements if isinstance(each, ir.Preset) and each.name == preset)
    return {setting.name: setting.value for setting in found.settings}


def using(name: str, values: Mapping[str, object], shown: Sequence[str] = ()) -> ir.Policy:
    """Returns a policy that uses a shipped one.

    Args:
        name: The name of the shipped policy.
        values: Values of its params. A value that is the default is left out, unless a preset for a model may set the
            param.
        shown: Params that are written although they have the default.

    Raises:
        PolicyError: A value has the wrong type (E161) or is outside the domain (E162).
    """
    policy = shipped(name)
    known = params(policy)
    # A preset that is chosen by name alone changes no policy that does not name it.
    presets = [
        statement
        for statement in policy.statements
        if isinstance(statement, ir.Preset) and statement.when != ir.Boolean(value=False)
    ]
    shown = (*shown, *(setting.name for preset in presets for setting in preset.settings))
    settings = [
        ir.Setting(name=param, value=value)
        for param, value in ((param, typed(known[param], value)) for param, value in values.items())
        if param in shown or known[param].default is None or value != typed(known[param], known[param].default)
    ]
    use = ir.Use(policy=name, settings=tuple(settings))
    return ir.Policy(name=policy.name, title=policy.title, source=policy.source, statements=(use,))


def inlined(name: str, values: Mapping[str, object], change: Callable[[ir.Rule], ir.Rule]) -> ir.Policy:
    """Returns the rules of a shipped policy with `values` as the defaults of its params, and each rule changed.

    Raises:
        PolicyError: A value has the wrong type (E161) or is outside the domain (E162).
    """
    policy = shipped(name)
    statements = tuple(
        change(statement) if isinstance(statement, ir.Rule) else statement
        for statement in policy.statements
        if not isinstance(statement, ir.Preset | ir.Expect)
    )
    return _with_defaults(policy.model_copy(update={"statements": statements}), values)


def written(text: str, values: Mapping[str, object]) -> ir.Policy:
    """Returns the policy of a text with `values` as the defaults of its params.

    Raises:
        PolicyError: A value has the wrong type (E161) or is outside the domain (E162).
    """
    return _with_defaults(parse(text), values)


def _with_defaults(policy: ir.Policy, values: Mapping[str, object]) -> ir.Policy:
    known = params(policy)
    defaults = {param: typed(known[param], value) for param, value in values.items()}
    statements = tuple(
        statement.model_copy(update={"default": defaults[statement.name]})
        if isinstance(statement, ir.Param) and statement.name in defaults
        else statement
        for statement in policy.statements
    )
    return policy.model_copy(update={"statements": statements})


@dataclass(frozen=True)
class Conversion:
    """A policy that another tool's setting was converted to.

    Attributes:
        converted: The policy.
        notes: What the text of the policy does not say and the tool does, as sentences.
        steps: The number of steps that the setting is for, if it tells.
    """

    converted: ir.Policy
    notes: tuple[str, ...] = ()
    steps: int | None = None

    def policy(self) -> ir.Policy:
        """Returns the policy."""
        return self.converted

    def arguments(self) -> dict[str, Any]:
        """Returns `steps` if the setting is for a number of steps."""
        return {} if self.steps is None else {"steps": self.steps}


def _items(value: object) -> list[Any] | None:
    return list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else None


class Fields:
    """The fields of a setting of another tool. Each has to be read once; `finish` refuses those that were not."""

    def __init__(self, owner: str, values: Mapping[str, Any]) -> None:
        self.owner = owner
        self._values = {str(name): value for name, value in values.items()}
        self._read = set[str]()

    @classmethod
    def of(cls, config: Any, name: str) -> Fields:
        """Returns the fields of a config object, under the name of its class. Only dataclasses have fields."""
        values = {field.name: getattr(config, field.name) for field in fields(config)} if is_dataclass(config) else {}
        return cls(f"`{name}`", values)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or the default where it is missing or None."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, *, low: float = -math.inf, high: float = math.inf) -> float:
        """Returns a field that is a finite number from `low` to `high`."""
        value = self.get(name, default)
        item = getattr(value, "item", None)
        value = item() if callable(item) else value
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            self._mistyped(name, "a finite number", value)
        number = float(value)
        if not low <= number <= high:
            self._mistyped(name, f"a number from {low:g} to {high:g}", value, code="E162")
        return number

    def whole(self, name: str, default: int, *, low: int = 0) -> int:
        """Returns a field that is a whole number from `low`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, Integral):
            self._mistyped(name, "a whole number", value)
        if value < low:
            self._mistyped(name, f"a whole number from {low}", value, code="E162")
        return int(value)

    def limit(self, name: str, default: int = -1) -> int | None:
        """Returns a field that bounds a number of reuses: -1 stands for no bound."""
        value = self.whole(name, default, low=-1)
        return None if value < 0 else self._reusing(name, value)

    def most(self, name: str, default: int) -> int:
        """Returns a field that bounds a number of reuses and has to allow one."""
        return self._reusing(name, self.whole(name, default))

    def threshold(self, name: str, default: float, *, low: float = 0) -> float:
        """Returns a field that is the smallest change that computes: a number from `low`, above 0."""
        return self._reusing(name, self.number(name, default, low=low))

    def window(self, names: tuple[str, str], defaults: tuple[float, float]) -> tuple[float, float]:
        """Returns two fields that are shares from 0 to 1, the first one below the second one."""
        start, end = (self.number(name, default, low=0, high=1) for name, default in zip(names, defaults, strict=True))
        if start >= end:
            self.refuse(names[0], f"the range is empty, because `{names[1]}` is not above it")
        return start, end

    def switch(self, name: str, *, default: bool) -> bool:
        """Returns a field that is true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self._mistyped(name, "true or false", value)
        return value

    def texts(self, name: str) -> list[str]:
        """Returns a field that is a list of strings, or no string where it is missing."""
        value = _items(self.get(name, []))
        if value is None or not all(isinstance(text, str) for text in value):
            self._mistyped(name, "a list of strings", self.get(name))
        return list(value)

    def numbers(self, name: str) -> list[float]:
        """Returns a field that is a list, an array or a tensor of numbers."""
        value = self.get(name, [])
        tolist = getattr(value, "tolist", None)
        numbers = _items(tolist() if callable(tolist) else value)
        if not numbers or not all(isinstance(number, Real) and math.isfinite(number) for number in numbers):
            self._mistyped(name, "a list of finite numbers", value)
        return [float(number) for number in numbers]

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """Returns a field that is one of some strings."""
        value = self.get(name, default)
        if value not in choices:
            self._mistyped(name, " or ".join(f"`{choice}`" for choice in choices), value, code="E162")
        return value

    def rename(self, names: Mapping[str, str]) -> None:
        """Moves fields from the names of a tool to other names."""
        for name, old in names.items():
            if old in self._values:
                self._values[name] = self._values.pop(old)

    def default(self, name: str, value: Any) -> None:
        """Sets a field that is missing."""
        self._values.setdefault(name, value)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Reads a field and refuses values that are neither missing nor among `allowed`."""
        value = self.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, why)

    def ignore(self, *names: str) -> None:
        """Reads fields that do not concern the policy, such as what the run itself tells."""
        self._read.update(names)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises the error for a field that no policy expresses.

        Raises:
            PolicyError: Always (E168).
        """
        raise PolicyError.of("E168", f"`{name}` of {self.owner} cannot be expressed by the policy", help=why)

    def finish(self) -> None:
        """Refuses fields that were not read.

        Raises:
            PolicyError: There are such fields (E168).
        """
        unread = [name for name in self._values if name not in self._read]
        if unread:
            known = ", ".join(f"`{name}`" for name in sorted(self._read))
            self.refuse(unread[0], f"it is no field that is known; known are {known}")

    def _reusing(self, name: str, value: _Bound) -> _Bound:
        """Returns the value of a field that is a bound of reuse, unless it allows none."""
        if value <= 0:
            self.refuse(name, "0 never reuses, which is the bare model")
        return value

    def _mistyped(self, name: str, takes: str, value: object, *, code: str = "E161") -> NoReturn:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        raise PolicyError.of(code, f"`{name}` of {self.owner} takes {takes}, not `{shown}`")
