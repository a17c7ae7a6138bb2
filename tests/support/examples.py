"""The policies of `tests/conformance/parse`, by name: published methods, and the line that started the project."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "conformance" / "parse"
NAMES = sorted(path.stem for path in FOLDER.glob("*.cp") if path.with_suffix(".json").exists())


def text(name: str) -> str:
    """The text of an example."""
    return (FOLDER / f"{name}.cp").read_text("utf-8")
