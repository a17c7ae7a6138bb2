"""The pytest plugin: a policy file's expectations are tests."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

GOOD = (
    "match attention every 2 -> reuse\nexpect attention over 4 steps: C R C R\nexpect attention over 4 steps: C R C R\n"
)


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "cachepolicy.testing.plugin", "-p", "no:xdist", "-v", *options)


def test_each_expectation_is_an_item(pytester: pytest.Pytester) -> None:
    """The check of the file and each `expect` pass by name, in both spellings of the suffix."""
    pytester.path.joinpath("one.cp").write_text(GOOD)
    pytester.path.joinpath("two.cachepolicy").write_text(GOOD)
    result = run(pytester)
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["*one.cp::check PASSED*", "*one.cp::expect attention over 4 steps PASSED*"])


def test_a_broken_expectation_fails_with_its_diagnostic(pytester: pytest.Pytester) -> None:
    """The failure is what `cachepolicy test` prints: the code, the line underlined, the reason."""
    pytester.path.joinpath("bad.cp").write_text(
        "match attention every 3 -> reuse\nexpect attention over 4 steps: C R C R\n"
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*E220*gives C R R C*", "*expect attention over 4 steps: C R C R*"])


def test_a_broken_file_fails_its_check_alone(pytester: pytest.Pytester) -> None:
    """A file that does not parse is one failure with all its errors, no error of the collection."""
    pytester.path.joinpath("bad.cp").write_text("match attention ever 3 -> reuse\nexpect attention over 4 steps: C\n")
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*bad.cp*"])


@pytest.mark.parametrize("way", ["option", "ini"])
def test_it_can_be_switched_off(pytester: pytest.Pytester, way: str) -> None:
    """With `--no-policies` or `policies = false` no policy file is collected."""
    pytester.path.joinpath("one.cp").write_text(GOOD)
    if way == "ini":
        pytester.makeini("[pytest]\npolicies = false\n")
    result = run(pytester, *(["--no-policies"] if way == "option" else []))
    result.assert_outcomes()
