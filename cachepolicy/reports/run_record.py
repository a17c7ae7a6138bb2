"""What a report shows of the samples of a run: pictures, quality and seconds of each seed, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file of a report: its caption, its media type and its bytes."""

    caption: str
    kind: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The samples of a run.

    Attributes:
        title: The heading.
        facts: Names and values: the prompt, the seeds, the versions.
        heads: The heads of the table of samples.
        rows: Its rows.
        note: What the numbers of the table are.
        pictures: For each seed a heading and its pictures.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    pictures: Sequence[tuple[str, Sequence[Picture]]] = ()
