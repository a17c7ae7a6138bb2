"""A progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from tqdm import tqdm

from cachepolicy.tools.sampling import Progress


@contextmanager
def progress_bar(description: str, unit: str) -> Generator[Progress]:
    """Show a bar of what is done, of a number that may grow.

    Args:
        description: What is done at first.
        unit: What is counted, in the singular.
    """
    # A log file does not need a progress line every 0.1 seconds.
    interval = 0.1 if sys.stderr.isatty() else 5
    with tqdm(total=0, unit=unit, file=sys.stderr, desc=description, leave=False, mininterval=interval) as bar:

        def progress(done: int, total: int, phase: str) -> None:
            bar.total = total
            bar.set_description(phase, refresh=False)
            bar.update(done - bar.n)

        yield progress
