"""A pytest plugin: every `expect` of a policy file is a test.

Switch it on with `-p cachepolicy.testing.plugin` or `pytest_plugins = ["cachepolicy.testing.plugin"]` in the root's
conftest. It collects `*.cp` and `*.cachepolicy` where pytest looks for tests; `--no-policies`, or `policies = false` in
the ini file, leaves them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cachepolicy._resources import SUFFIXES
from cachepolicy.errors import PolicyError, render
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.loader import load
from cachepolicy.planning.check import ExpectationOutcome, check, run_expectations


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch."""
    group = parser.getgroup("cachepolicy")
    group.addoption("--no-policies", action="store_true", default=False, help="collect no expectations of policy files")
    parser.addini("policies", "collect the expectations of policy files", type="bool", default=True)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A policy file is a collection of its expectations."""
    if file_path.suffix not in SUFFIXES or parent.config.getoption("--no-policies"):
        return None
    if not parent.config.getini("policies"):
        return None
    return PolicyFile.from_parent(parent, path=file_path)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class PolicyFile(pytest.File):
    """A policy file: one item for its soundness, one for each of its expectations."""

    _outcomes: Sequence[ExpectationOutcome] | None = None

    @property
    def outcomes(self) -> Sequence[ExpectationOutcome]:
        """What came of the expectations; they run once, when the first is asked for."""
        if self._outcomes is None:
            self._outcomes = run_expectations(self.path).outcomes
        return self._outcomes

    def collect(self) -> Iterator[pytest.Item]:
        """The items, in the order of the file; of a file that cannot be read, the check alone."""
        yield _item(self, "check", None)
        try:
            statements = load(self.path).statements
        except PolicyError:
            return
        names = Counter[str]()
        for number, expect in enumerate(each for each in statements if isinstance(each, ir.Expect)):
            name = _name(expect)
            names[name] += 1
            yield _item(self, name if names[name] == 1 else f"{name} ({names[name]})", (number, expect))


def _name(expect: ir.Expect) -> str:
    """The expectation without its row."""
    return " ".join(format_node(expect).split()).rpartition(":")[0]


def _item(parent: PolicyFile, name: str, expect: tuple[int, ir.Expect] | None) -> pytest.Item:
    item: Any = PolicyItem.from_parent(parent, name=name)  # pyright: ignore[reportUnknownMemberType]
    item.expect = expect
    return item


class PolicyItem(pytest.Item):
    """The check of a file, or one expectation: it fails with the findings as the command line shows them."""

    expect: tuple[int, ir.Expect] | None = None

    def runtest(self) -> None:
        """Fail where there is an error to tell."""
        if self.expect is None:
            findings = [each for each in check(self.path) if each.severity == "error"]
        else:
            assert isinstance(self.parent, PolicyFile)
            findings = list(self.parent.outcomes[self.expect[0]].findings)
        if findings:
            raise PolicyError(findings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The findings; anything else as pytest shows it."""
        if isinstance(excinfo.value, PolicyError):
            return render(excinfo.value.diagnostics)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The file, the line of the expectation, and its name."""
        span = self.expect[1].span if self.expect is not None else None
        return self.path, None if span is None else span.line - 1, f"{self.path.name}: {self.name}"
