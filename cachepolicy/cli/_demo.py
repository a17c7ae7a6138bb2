"""Output of the `demo` command: a progress bar, a table, a PNG file and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cachepolicy.cli._progress import progress_bar
from cachepolicy.cli.output import say, say_json, unwritable
from cachepolicy.engine.options import is_disabled
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.tuning.demo import Sampling, at_its_cost, measure, verdict


def show_demo(
    policy: ir.Policy,
    name: str,
    settings: Mapping[str, ir.Expression],
    sampling: Sampling,
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Compare the policy, write the pictures and a page, and print the table. Progress goes to standard error.

    Raises:
        PolicyError: The policy does not fit the model, or a file cannot be written (E152).
    """
    if not output.parent.is_dir():
        raise PolicyError.of("E152", f"`{output}` cannot be written: there is no folder `{output.parent}`")
    if is_disabled():
        say("note: `CACHEPOLICY_DISABLE` is set, so the policy is not attached", error=True)
    with progress_bar("sampling", "run") as progress:
        result = measure(policy, name, settings, sampling, progress)
    page = output.with_suffix(".html")
    baselines = at_its_cost(result, name)
    try:
        result.sheet(["uncached", name, *(row.name for row in baselines)], scale=3).save(output)
        result.report(page, title=f"{name} on the emoji model")
    except (OSError, ValueError) as error:
        raise unwritable(output, error) from error
    if as_json:
        say_json({**result.to_dict(), "output": str(output), "report": str(page)})
    else:
        say(f"{result}\n\n{verdict(result, name)}\n\nThe pictures are in {output}, and all of it is in {page}.")
