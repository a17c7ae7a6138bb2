"""Every number in a shipped policy counts: another one in its place fails an expectation, a transcription or the record
of what the sources publish.

Numbers of params and presets are those of `tests/data/published.json`, written from the sources. Numbers in rules and
signals are changed one at a time, and the expectations of the file and the tests beside this one are run on the result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import Phase, given, settings  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy import PolicyError  # noqa: E402
from cachepolicy._resources import shipped_policies  # noqa: E402
from cachepolicy.language import ir, loader  # noqa: E402
from cachepolicy.language.formatter import format_node  # noqa: E402
from cachepolicy.planning.check import run_expectations  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]

RECORD = Path(__file__).parents[1] / "data" / "published.json"
NUMBER = re.compile(r"(?<![\w.\"])\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")
MODULES = [
    import_module(f"tests.methods.{file.stem}")
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if file != Path(__file__)
]
"""The files beside this one."""


def statements(text: str) -> Iterator[tuple[str, int, str]]:
    """The statements of a policy: their first word, where they begin, and their text without comments and strings."""
    blank = re.sub(r'"(?:[^"]|"")*"|#[^\n]*', lambda found: " " * len(found.group()), text)
    starts = [found.start() for found in re.finditer(r"^\w", blank, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(blank)], strict=True):
        part = blank[start:end]
        yield part.split(maxsplit=1)[0], start, part


def numbers(name: str, *, of: tuple[str, ...]) -> list[tuple[int, str]]:
    """Where the numbers stand in a policy's statements of some kinds, and what they are."""
    return [
        (start + found.start(), found.group())
        for kind, start, part in statements(shipped_policies()[name].read_text())
        if kind in of
        for found in NUMBER.finditer(part)
    ]


def others(number: str) -> list[str]:
    """A larger and a smaller number in place of one."""
    if number.isdigit():
        return [str(int(number) + 1), *([str(int(number) - 1)] if int(number) else [])]
    return [repr(float(number) * 1.5 or 0.5), repr(float(number) / 2)]


def changed(name: str, place: int, number: str, other: str) -> str:
    """The text of a policy with another number at a place."""
    text = shipped_policies()[name].read_text()
    assert text[place:].startswith(number)
    return text[:place] + other + text[place + len(number) :]


# --- params and presets


def published(policy: ir.Policy) -> dict[str, Any]:
    """The defaults and domains of a policy's params, and the settings of its presets; long lists by a hash."""

    def shown(value: Any) -> str:
        text = format_node(value)
        return text if len(text) < 400 else "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]

    params = {
        each.name: " in ".join(shown(part) for part in (each.default, each.domain) if part is not None)
        for each in policy.statements
        if isinstance(each, ir.Param)
    }
    presets = {
        each.name: {
            **({"when": shown(each.when)} if each.when is not None else {}),
            **{setting.name: shown(setting.value) for setting in each.settings},
        }
        for each in policy.statements
        if isinstance(each, ir.Preset)
    }
    return {"params": params, **({"presets": presets} if presets else {})}


def test_params_and_presets_are_as_published() -> None:
    """The record has the numbers of every shipped policy. `python -m tests.methods.test_constants` writes it; compare
    what changes with the source that the policy names."""
    recorded = json.loads(RECORD.read_text())
    assert recorded == {name: published(cachepolicy.load(name)) for name in shipped_policies()}


@pytest.mark.deep
@pytest.mark.parametrize("name", shipped_policies())
def test_another_number_of_a_param_or_preset_is_noticed(name: str) -> None:
    """No number of a param or preset escapes the record."""
    recorded = json.loads(RECORD.read_text())[name]
    for place, number in numbers(name, of=("param", "preset")):
        try:
            policy = cachepolicy.parse(changed(name, place, number, others(number)[0]))
        except PolicyError:
            continue
        assert recorded != published(policy), (place, number)


# --- rules and signals


def properties_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., None]]:
    """The properties beside this file that load a policy."""
    found = list[Callable[..., None]]()
    for module in MODULES:
        for key, test in list(vars(module).items()):
            if key.startswith("test_") and hasattr(test, "hypothesis"):
                with monkeypatch.context() as patch:
                    loaded = set[str]()
                    original = loader._shipped
                    patch.setattr(loader, "_shipped", lambda each, o=original, s=loaded: (s.add(each), o(each))[1])
                    drawn(test, 1)()
                if name in loaded:
                    found.append(test)
    return found


def drawn(test: Any, examples: int) -> Callable[[], None]:
    """A property with a number of examples, which are the same each time and are not shrunk."""
    few = settings(
        max_examples=examples,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
    )
    return few(given(**test.hypothesis._given_kwargs)(test.hypothesis.inner_test))


def noticed(name: str, text: str, tests: list[Callable[..., None]], folder: Path, patch: pytest.MonkeyPatch) -> bool:
    """Whether the expectations of a changed policy or one of the tests fail."""
    try:
        if not run_expectations(cachepolicy.parse(text)).hold:
            return True
    except PolicyError:
        return True
    file = folder / f"{name}.cp"
    file.write_text(text)
    with patch.context() as context:
        context.setattr(loader, "shipped_policies", lambda: {**shipped_policies(), name: file})
        for test in tests:
            try:
                drawn(test, 300)()
            except Exception:  # noqa: BLE001 - whatever fails, the change is noticed
                return True
    return False


@pytest.mark.deep
@pytest.mark.parametrize("name", [each for each in shipped_policies() if numbers(each, of=("signal", "let", "match"))])
def test_another_number_in_a_rule_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of a rule or signal escapes the expectations and the transcriptions."""
    tests = properties_of(name, monkeypatch)
    survivors = [
        (number, other, shipped_policies()[name].read_text()[:place].count("\n") + 1)
        for place, number in numbers(name, of=("signal", "let", "match"))
        for other in others(number)
        if not noticed(name, changed(name, place, number, other), tests, tmp_path, monkeypatch)
    ]
    assert [] == survivors


if __name__ == "__main__":
    RECORD.write_text(
        json.dumps({name: published(cachepolicy.load(name)) for name in shipped_policies()}, indent=1) + "\n"
    )
