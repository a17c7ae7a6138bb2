"""The golden diagnostics, and the pages of the documentation that show them.

`tests/golden/CODE.cp` (or `.json`) is a policy with this one finding, `CODE.txt` how it is shown, `CODE.md` what to
know about it; `docs/diagnostics/CODE.md` is made of the two. `python -m tests.support.goldens` writes what is derived.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cachepolicy.errors import CODES, Diagnostic, render
from cachepolicy.language import ir
from cachepolicy.language.parser import check_names, recover
from tests.support import bindings, examples

GOLDEN = Path(__file__).parents[1] / "golden"
PAGES = Path(__file__).parents[2] / "docs" / "diagnostics"
TOO_LARGE_TO_KEEP = {
    "E013": "# not a policy\n" * 80_000,
    "E014": "table ratios = [" + "1, " * 16_000 + "1]\n",
}
EXPLAINED = sorted(path.stem for path in GOLDEN.glob("*.md"))
SHOWN = sorted({path.stem for path in [*GOLDEN.glob("*.cp"), *GOLDEN.glob("*.json")]} | TOO_LARGE_TO_KEEP.keys())


def findings(code: str) -> Sequence[Diagnostic]:
    """What is found in the golden input of `code`."""
    if code in TOO_LARGE_TO_KEEP:
        return recover(TOO_LARGE_TO_KEEP[code], source=f"{code}.cp")[1]
    path = GOLDEN / f"{code}.cp"
    if path.exists():
        return recover(path.read_bytes(), source=path.name)[1] or bindings.findings(path)
    return check_names(ir.Policy.model_validate_json(path.with_suffix(".json").read_bytes()))


def page(code: str) -> str:
    """The documentation's page for `code`."""
    text = [f"# {code}: {CODES[code]}", "", (GOLDEN / f"{code}.md").read_text("utf-8").strip()]
    shown = GOLDEN / f"{code}.txt"
    if shown.exists():
        text += ["", "```text", shown.read_text("utf-8").rstrip(), "```"]
    return "\n".join(text) + "\n"


def index() -> str:
    """The page of all codes."""
    lines = ["# Diagnostics", "", "Every finding has a code that stays what it is. `E` are errors, `W` warnings.", ""]
    lines += ["| code | meaning |", "| --- | --- |"]
    lines += [f"| {f'[{code}]({code}.md)' if code in EXPLAINED else code} | {CODES[code]} |" for code in sorted(CODES)]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", ":glob:", "", "E*", "W*", "```"]) + "\n"


def conformance(name: str) -> tuple[Path, str]:
    """The expected result of a conformance text: its policy as JSON, or its errors."""
    path = examples.FOLDER / f"{name}.cp"
    policy, found = recover(path.read_bytes(), source=path.name)
    errors = [each for each in found if each.severity == "error"]
    if not errors:
        return path.with_suffix(".json"), json.dumps(policy.model_dump(mode="json"), indent=1) + "\n"
    places = [{"code": each.code, "line": each.span.line, "column": each.span.column} for each in errors if each.span]
    return path.with_suffix(".errors.json"), json.dumps(places, indent=1) + "\n"


def write() -> None:
    """Writes everything that is derived."""
    for code in SHOWN:
        (GOLDEN / f"{code}.txt").write_text(render(findings(code)) + "\n", "utf-8")
    PAGES.mkdir(parents=True, exist_ok=True)
    for code in EXPLAINED:
        (PAGES / f"{code}.md").write_text(page(code), "utf-8")
    (PAGES / "index.md").write_text(index(), "utf-8")
    for path in examples.FOLDER.glob("*.cp"):
        expected, text = conformance(path.stem)
        expected.write_text(text, "utf-8")


if __name__ == "__main__":
    write()
