"""A pytest plugin that collects policy files: the check of a file and each of its `expect` statements is a test.

Enable it with `-p cachepolicy.testing.plugin`, or with `pytest_plugins = ["cachepolicy.testing.plugin"]` in the
`conftest.py` of the root. It collects the `*.cp` and `*.cachepolicy` files in the folders that pytest searches. The
option `--no-policies`, or `policies = false` in the ini file, disables it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cachepolicy._resources import POLICY_SUFFIXES
from cachepolicy.errors import PolicyError, render
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.loader import load
from cachepolicy.planning.check import ExpectationOutcome, check, run_expectations


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--no-policies` and the ini setting `policies`."""
    group = parser.getgroup("cachepolicy")
    group.addoption("--no-policies", action="store_true", default=False, help="collect no expectations of policy files")
    parser.addini("policies", "collect the expectations of policy files", type="bool", default=True)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Return a collector for a policy file, None for other files or where the plugin is disabled."""
    if file_path.suffix not in POLICY_SUFFIXES or parent.config.getoption("--no-policies"):
        return None
    if not parent.config.getini("policies"):
        return None
    return PolicyFile.from_parent(parent, path=file_path)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class PolicyFile(pytest.File):
    """The tests of a policy file: one for its check, one for each of its expectations."""

    _outcomes: Sequence[ExpectationOutcome] | None = None

    @property
    def outcomes(self) -> Sequence[ExpectationOutcome]:
        """The outcomes of the expectations, in the order of the file. All run at the first access."""
        if self._outcomes is None:
            self._outcomes = run_expectations(self.path).outcomes
        return self._outcomes

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the check, then the expectations in the order of the file.

        A file that cannot be parsed has the check only, which then fails with the errors.
        """
        yield _item(self, "check", None)
        try:
            statements = load(self.path).statements
        except PolicyError:
            return
        names = Counter[str]()
        expectations = [statement for statement in statements if isinstance(statement, ir.Expect)]
        for number, expect in enumerate(expectations):
            name = " ".join(format_node(expect).split()).rpartition(":")[0]  # without the expected row
            names[name] += 1
            yield _item(self, name if names[name] == 1 else f"{name} ({names[name]})", (number, expect))


def _item(parent: PolicyFile, name: str, expect: tuple[int, ir.Expect] | None) -> pytest.Item:
    item: Any = PolicyItem.from_parent(parent, name=name)  # pyright: ignore[reportUnknownMemberType]
    item.expect = expect
    return item


class PolicyItem(pytest.Item):
    """The check of a policy file, or one of its expectations.

    `expect` holds the number of the expectation in the file and its statement; it is None for the check.
    """

    expect: tuple[int, ir.Expect] | None = None

    def runtest(self) -> None:
        """Raise PolicyError if the check finds errors, or the expectation does not hold."""
        if self.expect is None:
            findings = [finding for finding in check(self.path) if finding.severity == "error"]
        else:
            assert isinstance(self.parent, PolicyFile)
            findings = list(self.parent.outcomes[self.expect[0]].findings)
        if findings:
            raise PolicyError(findings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the findings as the command line does, and any other exception as pytest does."""
        if isinstance(excinfo.value, PolicyError):
            return render(excinfo.value.diagnostics)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return the file, the line of the expectation (from 0) and the name of the test."""
        span = self.expect[1].span if self.expect is not None else None
        return self.path, None if span is None else span.line - 1, f"{self.path.name}: {self.name}"
