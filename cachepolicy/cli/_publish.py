"""The `publish` command: the card of a folder of policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cachepolicy._resources import POLICY_SUFFIXES
from cachepolicy._strict_json import InvalidDocumentError, load_json
from cachepolicy.cli import output
from cachepolicy.cli.options import as_called
from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import read_policy
from cachepolicy.planning.bind import bind
from cachepolicy.planning.check import check, run_expectations
from cachepolicy.planning.open_signals import simulate_open
from cachepolicy.reports.card import MARK, Published, card
from cachepolicy.tools.meta_model import Blueprint

_CARD, _COMPARISON = "README.md", "comparison.json"
_STEPS = 50


def publish(
    folder: Path,
    blueprint: Blueprint,
    model: str,
    *,
    steps: int | None,
    repo: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Write the card of a folder of policies, after all of them were checked.

    Args:
        folder: The folder.
        blueprint: The model for which the schedules are drawn.
        model: What the card calls it.
        steps: The number of steps of the schedules; by default, what a policy was tuned for, else 50.
        repo: Owner and name of the repository in a hub, or None.
        licence: The identifier of a licence, or None.
        force: Whether to replace a README that another author wrote.

    Raises:
        PolicyError: A policy has errors or an expectation that does not hold, or a file cannot be read or written.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in POLICY_SUFFIXES)
    except OSError as error:
        raise PolicyError.of("E152", f"`{folder}` cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not files:
        help = f"policy files end in {' or '.join(POLICY_SUFFIXES)}"
        raise PolicyError.of("E150", f"`{folder}` has no policies", help=help)
    target = folder / _CARD
    if target.exists() and not force and MARK not in target.read_text("utf-8", errors="replace").splitlines():
        help = "move it, or replace it with --force"
        raise PolicyError.of("E152", f"`{target}` was not written by this command", help=help)
    _require_sound(files)
    published = [_published(file, blueprint, steps) for file in files]
    text = card(published, model=model, repo=repo, licence=licence, comparison=_comparison(folder / _COMPARISON))
    output.write(str(target), text.encode())
    output.say(f"{target}: {'1 policy' if len(files) == 1 else f'{len(files)} policies'}")
    for one in published:
        output.say(f"  {one.file}  policy {one.schedule.plan.resolved.digest[:12]}  sha256 {one.sha256}")
    if repo is not None:
        output.say(f"upload it: hf upload {repo} {folder}")


def _require_sound(files: list[Path]) -> None:
    findings = list[Diagnostic]()
    for file in files:
        found = check(file)
        findings += found
        if not any(finding.severity == "error" for finding in found):
            findings += [finding for outcome in run_expectations(file).outcomes for finding in outcome.findings]
    if any(finding.severity == "error" for finding in findings):
        raise PolicyError(findings)
    output.report_findings(findings, error=True)


def _published(file: Path, blueprint: Blueprint, steps: int | None) -> Published:
    policy = read_policy(file, str(file))
    tuned = next((one.steps for one in policy.statements if isinstance(one, ir.Tuned)), _STEPS)
    skeleton = blueprint.skeleton
    guidance = blueprint.guidance
    plan = as_called(bind(resolve(policy, model=skeleton.facts), skeleton), blueprint, guidance)
    schedule = simulate_open(plan, steps=steps or tuned, branches=guidance.branches)
    return Published(file.name, file.read_bytes(), policy, schedule)


def _comparison(file: Path) -> Mapping[str, Any] | None:
    """Returns the saved comparison of the folder, or None if there is none."""
    if not file.exists():
        return None
    try:
        return cast("Mapping[str, Any]", load_json(file.read_bytes()))
    except (OSError, ValueError, InvalidDocumentError) as error:
        raise PolicyError.of("E154", f"`{file}` cannot be read as JSON: {error}") from error
