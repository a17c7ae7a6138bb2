"""What is found in a policy file once its text is sound: in what it uses, on the built-in model, in expectations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.check import check, run_expectations
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.simulation import simulate


def findings(path: Path) -> Sequence[Diagnostic]:
    """The findings of the first stage that has any, with the file shown by its name alone."""
    with contextlib.chdir(path.parent):
        found = check(Path(path.name))
        if found:
            return found
        policy = load(Path(path.name))
        try:
            plan = bind(resolve(policy), builtin())
        except PolicyError as error:
            return error.diagnostics
        if plan.warnings or not any(isinstance(each, ir.Expect) for each in policy.statements):
            return plan.warnings or simulate(plan, steps=8).warnings
        return run_expectations(policy).findings
