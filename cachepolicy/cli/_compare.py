"""Implementation of the `compare` command: measures policies, numbers of steps and solvers on a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cachepolicy.cli import output
from cachepolicy.cli._progress import progress_bar
from cachepolicy.tuning.calls import Calls
from cachepolicy.tuning.compare import compare


def show_comparison(
    pipe: Any, calls: Calls, variants: Mapping[str, Any], *, converged: int | None, folder: Path, as_json: bool
) -> None:
    """Compare, write the files and print the table. Progress goes to standard error.

    Args:
        pipe: The pipeline.
        calls: Its calls.
        variants: What is compared, by name.
        converged: The steps of the converged run, None for none.
        folder: Where the files are written.
        as_json: Print JSON.

    Raises:
        PolicyError: A policy does not fit the pipeline, a call fails (E213), or a file cannot be written (E152).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pipe.set_progress_bar_config(disable=True)
        with progress_bar("sampling", "run") as progress:
            result = compare(pipe, calls.split()[0], variants, converged=converged, progress=progress)
        files: Sequence[Path] = result.save(folder)
    except OSError as error:
        raise output.unwritable(folder, error) from error
    if as_json:
        output.say_json({**result.to_dict(), "files": [str(file) for file in files]})
    else:
        output.say("\n".join([str(result), "", *map(str, files)]))
