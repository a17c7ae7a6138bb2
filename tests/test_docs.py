"""The documents hold: policies parse and pass their expectations, the Python runs, the lists are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachepolicy.cli.commands import main
from cachepolicy.errors import render
from cachepolicy.language import ir, linker, reference, vocabulary
from cachepolicy.language.parser import parse
from cachepolicy.planning.check import check_text, run_expectations
from cachepolicy.planning.simulation import simulate
from cachepolicy.reports.text import draw

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:Save this as `(\S+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Fence:
    page: Path
    line: int
    language: str
    text: str
    file: str | None = None
    """The file that the reader was told to save it as."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(page: Path) -> Iterator[Fence]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Fence(page, text.count("\n", 0, found.start(3)) + 1, found[2], found[3], found[1])


WORDS = {
    *vocabulary.RESERVED,
    *vocabulary.CLOCK,
    *vocabulary.FUNCTIONS,
    *vocabulary.TYPES,
    *vocabulary.PREDICTORS,
    *vocabulary.APPROXIMATIONS,
    *vocabulary.PHRASES,
}
POLICIES = [fence for page in PAGES for fence in fences(page) if fence.language == "cachepolicy"]
PLAYED = [page for page in PAGES if any(fence.language in {"python", "console"} for fence in fences(page))]


@pytest.mark.parametrize("fence", POLICIES, ids=str)
def test_a_policy_in_the_documents_is_sound(fence: Fence) -> None:
    """Every policy that is shown parses, and the checker finds no error in it."""
    parse(fence.text, source=str(fence))
    found = check_text(fence.text, source=str(fence))
    assert [] == [each for each in found if each.severity == "error"]


@pytest.mark.parametrize("fence", [each for each in POLICIES if "\nexpect" in each.text], ids=str)
def test_an_expectation_in_the_documents_holds(fence: Fence) -> None:
    """The rows that the documents show are the rows that come out."""
    ran = run_expectations(parse(fence.text, source=str(fence)))
    assert [] == [each.message for outcome in ran.outcomes for each in outcome.findings]


@pytest.mark.parametrize("page", PLAYED, ids=lambda page: page.name)
def test_a_page_can_be_played(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, a page's files can be saved, its Python runs, and its commands print what the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    names: dict[str, object] = {"__name__": "__main__", "pipe": _pipeline()}
    for fence in fences(page):
        if fence.file is not None:
            Path(fence.file).write_text(fence.text, encoding="utf-8")
        elif fence.language == "python":
            exec(compile("\n" * (fence.line - 1) + fence.text, str(page), "exec"), names)
        elif fence.language == "console":
            printed = "".join(map(_printed, re.findall(r"^\$ (.*)$", fence.text, re.MULTILINE)))
            assert without_hash(fence.text) == without_hash(printed)


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for fence in fences(page)
    if fence.language == "sh"
    for line in fence.text.replace("\\\n", " ").splitlines()
    if line.startswith("cachepolicy ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=str)
def test_a_command_in_the_documents_has_these_options(page: str, line: str) -> None:
    """The command exists and takes the arguments and options that the documents give it."""
    outer = main.make_context("cachepolicy", ["list"])
    name, command, rest = main.resolve_command(outer, shlex.split(line, comments=True)[1:])
    assert command is not None
    command.make_context(name, rest, parent=outer)


def without_hash(text: str) -> str:
    """The text without hashes of policies, which a document need not follow."""
    return re.sub(r"\b[0-9a-f]{12}\b", "...", text)


def _printed(command: str) -> str:
    """The command behind its prompt, and what it prints."""
    name, *arguments = shlex.split(command)
    assert name == "cachepolicy"
    return f"$ {command}\n{CliRunner().invoke(main, arguments).output}"


def _pipeline() -> object:
    """A real pipeline, few steps long, that takes whatever the documents' reader would ask for."""
    pytest.importorskip("diffusers")
    from cachepolicy.tools.emoji import EmojiPipeline, load_pipeline

    class AnyPipeline(EmojiPipeline):
        def __call__(self, *_prompt: object, **options: object) -> object:
            taken = ("num_inference_steps", "guidance_scale", "generator", "output_type")
            given = {name: value for name, value in options.items() if name in taken}
            return super().__call__([0], **{"num_inference_steps": 8, **given})

    loaded = load_pipeline()
    pipe = AnyPipeline(loaded.transformer, loaded.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_settings_of_editors_can_be_read() -> None:
    """What a reader copies into the settings of an editor is TOML and JSON, and starts the language server."""
    page = {each.language: each.text for each in fences(ROOT / "docs" / "editors.md")}
    server = tomllib.loads(page["toml"])["language-server"]["cachepolicy"]
    commands = [[server["command"], *server["args"]], json.loads(page["json"])["cachepolicy.command"]]
    assert "lsp" in main.commands
    assert [["cachepolicy", "lsp"], ["cachepolicy", "lsp"]] == [command[-2:] for command in commands]
    assert 'cmd = { "cachepolicy", "lsp" }' in page["lua"]


def test_links_lead_somewhere() -> None:
    """Relative links of the documents name files that are there."""
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("#") and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert [] == broken


def test_the_plan_in_the_readme_is_what_plan_draws() -> None:
    """The grid that the README shows is the grid of its own policy."""
    readme = ROOT / "README.md"
    rule = next(fence for fence in fences(readme) if fence.text.startswith('match "^transformer_blocks'))
    shown = next(fence for fence in fences(readme) if "transformer_blocks.0-7.attn1  C" in fence.text)
    drawn = draw(simulate(parse(rule.text), steps=20), width=120)
    assert without_hash(drawn).strip() == without_hash(shown.text).strip()


def test_the_large_plan_in_the_readme_is_what_plan_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a model of the size of FLUX.1-dev is that of the policy above it."""
    pytest.importorskip("diffusers")
    readme = list(fences(ROOT / "README.md"))
    (policy,) = [fence for fence in readme if fence.file == "mine.cp"]
    shown = next(fence for fence in readme if "TFLOP" in fence.text)
    (tmp_path / "mine.cp").write_text(policy.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    command = ["plan", str(ROOT / "examples" / "flux-dev.json"), "mine.cp", "--steps", "50"]
    assert without_hash(shown.text).strip() == without_hash(CliRunner().invoke(main, command).stdout).strip()


def test_the_figures_in_the_readme_are_those_of_the_run() -> None:
    """Its table and its sentences have the saved numbers."""
    pytest.importorskip("diffusers")
    from benchmarks import headline

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    run = json.loads((headline.RESULTS / "dit.json").read_text(encoding="utf-8"))
    assert headline.table(run) in readme
    prose = " ".join(readme.split())
    near = {name: {row["name"]: row for row in _rows(name)} for name in ("dit", "flux")}

    def said(form: str, name: str, *figures: tuple[str, str, str]) -> str:
        return form.format(*(near[name][row][f"psnr_{reference}"][part] for row, reference, part in figures))

    solver = "UniPC on the steps of tuned"
    parts = [(row, "converged", part) for part in ("mean", "p10") for row in (solver, "tuned")]
    assert said("{:.1f} dB against {:.1f}, worst tenth {:.1f} against {:.1f};", "dit", *parts) in prose
    assert said("of the small Flux {:.1f} against {:.1f})", "flux", *parts[:2]) in prose
    means = [(row, "uncached", "mean") for row in ("tuned", "14 steps", "UniPC, 14 steps")]
    assert said("{:.1f} dB with its tuned policy, {:.1f} with 14 steps and {:.1f} with UniPC", "flux", *means) in prose


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "docs" / "headline" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_the_coverage_in_the_readme_is_that_of_the_table() -> None:
    """The numbers of models and classes, and of those that First Block Cache runs on, are counted there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    covered = json.loads((ROOT / "tests" / "data" / "coverage.json").read_text(encoding="utf-8")).values()
    runs = [sum(model["fbc"][side] in {"equal", "runs", "told"} for model in covered) for side in ("ours", "diffusers")]
    classes = re.search(r"\d+ tiny seeded models of (\d+) classes", (ROOT / "docs" / "coverage.md").read_text("utf-8"))
    assert classes is not None
    said = (
        f"{len(covered)} models of {classes[1]} classes of diffusers; First Block Cache runs on {runs[0]} of them, and"
    )
    assert f"{said} diffusers' own on {runs[1]}" in " ".join(readme.split())


def test_the_error_in_the_readme_is_what_check_says() -> None:
    """The mistake that the README shows is told as the README shows it."""
    shown = next(fence for fence in fences(ROOT / "README.md") if fence.text.startswith("error[")).text
    line = re.search(r"^1 \| (.*)$", shown, re.MULTILINE)
    assert line is not None
    assert render(check_text(line[1] + "\n", source="mine.cp")).strip() == shown.strip()


def language() -> str:
    return (ROOT / "docs" / "language.md").read_text(encoding="utf-8")


def test_the_reference_lists_the_reserved_words() -> None:
    """The reserved words of the reference are those of the language."""
    listed = language().partition("## Reserved words")[2].partition("```text")[2].partition("```")[0]
    assert vocabulary.RESERVED == set(listed.split())


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables of a page with the heading that each stands under, cells without links and escapes."""
    section = ""
    rows = list[list[str]]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", LINK_TEXT.sub(r"\1", line).strip("|"))
            rows.append([cell.strip().replace("\\|", "|") for cell in cells])
        elif rows:
            yield section, [rows[0], *rows[2:]]
            rows = []
        if line.startswith("##"):
            section = re.sub(r"[^a-z0-9 ]", "", line.lower()).strip().replace(" ", "-")


LINK_TEXT = re.compile(r"\[(`[^`]*`)\]\([^)]*\)")


@pytest.mark.parametrize("table", reference.TABLES, ids=lambda table: table.sort)
def test_what_editors_say_is_what_the_reference_says(table: reference.ReferenceTable) -> None:
    """The tables of the reference are those that editors show, form by form, in the sections that they name."""
    (rows,) = [
        rows
        for section, (head, *rows) in tables(language())
        if head[:2] == [table.sort, table.verb] and section == table.section
    ]
    assert table.says == {cells[0].replace("`", ""): cells[1] for cells in rows}


@pytest.mark.parametrize("word", sorted(WORDS))
def test_every_word_is_explained(word: str) -> None:
    """Every word of the language, and every fixed phrase, has a form that says what it does."""
    assert reference.explain_word(word)


def test_the_reference_states_the_limits() -> None:
    """The limits of the reference are those that are counted."""
    table = language().partition("## Limits")[2]
    stated = [int(number.replace(",", "")) for number in re.findall(r"^\|.+\| ([0-9,]+) \|$", table, re.MULTILINE)]
    from cachepolicy.language.params import LIST_LIMIT

    assert [
        vocabulary.TEXT_LIMIT,
        vocabulary.TOKEN_LIMIT,
        vocabulary.DEPTH_LIMIT,
        vocabulary.NUMBER_LIMIT,
        vocabulary.REGEX_LIMIT,
        vocabulary.KEPT_LIMIT,
        vocabulary.EXPECTATION_LIMIT,
        vocabulary.ORDER_LIMIT,
        LIST_LIMIT,
        linker.USE_DEPTH_LIMIT,
        linker.USE_LIMIT,
        linker.RULE_LIMIT,
    ] == stated


def test_the_example_policies_are_what_the_reference_shows() -> None:
    """`fora`, which opens the reference, is shipped under this name and means the same."""
    shown = next(each.text for each in POLICIES if "policy fora" in each.text)
    rules = [
        [each for each in policy.statements if isinstance(each, ir.Rule)]
        for policy in (parse(shown), linker.load("fora"))
    ]
    assert rules[0] == rules[1]
