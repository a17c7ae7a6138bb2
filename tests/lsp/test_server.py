"""The language server, asked by a real client over standard input and output."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("pygls")

from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types
from pygls.lsp.client import LanguageClient
from pygls.uris import from_fs_path

from cachepolicy.cli import output
from cachepolicy.cli.commands import main
from cachepolicy.language.formatter import format
from cachepolicy.language.vocabulary import KINDS, STATEMENT_WORDS
from cachepolicy.lsp._framing import MESSAGE_LIMIT, MessageReader
from tests.test_docs import ROOT

COMMAND = [sys.executable, "-m", "cachepolicy", "lsp", "--stdio"]
PATIENCE = 60
"""Seconds, on a machine that does other things."""
CURSOR = "|"
FACE = "\U0001f600"
"""Two code units of UTF-16, four of UTF-8, one character."""
PARAM = 'param interval: int = 3 in [1, 50] "compute every so many steps"\n'


class Editor:
    """An editor that waits for the answer to everything it asks."""

    def __init__(self, folder: Path, environment: dict[str, str], encodings: list[str] | None = None) -> None:
        self.folder, self.loop = folder, asyncio.new_event_loop()
        self.client = LanguageClient("test", "1")
        self.texts: dict[str, tuple[int, str]] = {}
        self.told: dict[str, types.PublishDiagnosticsParams] = {}
        self.news = asyncio.Event()
        self.client.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)(self._publish())
        self.wait(self.client.start_io(*COMMAND, env=environment))
        general = types.GeneralClientCapabilities(position_encodings=encodings) if encodings else None
        capabilities = types.ClientCapabilities(general=general)
        self.started = self.wait(
            self.client.initialize_async(types.InitializeParams(capabilities, root_uri=from_fs_path(str(folder))))
        )
        self.client.initialized(types.InitializedParams())

    def _publish(self):
        def publish(params: types.PublishDiagnosticsParams) -> None:
            self.told[params.uri] = params
            self.news.set()

        return publish

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE))

    def open(self, text: str, name: str = "new.cp") -> str:
        """The address of a new text, which need not be a file."""
        uri = from_fs_path(str(self.folder / f"{len(self.texts)}" / name))
        self.texts[uri] = 1, text
        item = types.TextDocumentItem(uri, "cachepolicy", 1, text)
        self.client.text_document_did_open(types.DidOpenTextDocumentParams(item))
        return uri

    def open_file(self, path: Path) -> str:
        uri = from_fs_path(str(path))
        self.texts[uri] = 1, path.read_text("utf-8")
        item = types.TextDocumentItem(uri, "cachepolicy", *self.texts[uri])
        self.client.text_document_did_open(types.DidOpenTextDocumentParams(item))
        return uri

    def change(self, uri: str, text: str) -> None:
        version = self.texts[uri][0] + 1
        self.texts[uri] = version, text
        whole = types.TextDocumentContentChangeWholeDocument(text)
        identifier = types.VersionedTextDocumentIdentifier(version, uri)
        self.client.text_document_did_change(types.DidChangeTextDocumentParams(identifier, [whole]))

    def findings(self, uri: str) -> list[types.Diagnostic]:
        """What the server says of the text as it is now."""

        async def published() -> None:
            while uri not in self.told or self.told[uri].version != self.texts[uri][0]:
                self.news.clear()
                await self.news.wait()

        self.wait(published())
        return list(self.told[uri].diagnostics)

    def codes(self, uri: str) -> list[Any]:
        return [each.code for each in self.findings(uri)]

    def said(self, uri: str, place: types.Range) -> str:
        """The text of a range on one line, counted in UTF-16."""
        line = self.texts[uri][1].split("\n")[place.start.line].encode("utf-16-le")
        return line[2 * place.start.character : 2 * place.end.character].decode("utf-16-le")

    def at(self, marked: str, name: str = "new.cp") -> tuple[types.TextDocumentIdentifier, types.Position]:
        """Opens a text with the cursor's place marked in it."""
        before, _, after = marked.partition(CURSOR)
        lines = before.split("\n")
        uri = self.open(before + after, name)
        column = len(lines[-1].encode("utf-16-le")) // 2
        return types.TextDocumentIdentifier(uri), types.Position(len(lines) - 1, column)

    def hover(self, marked: str) -> str | None:
        found = self.wait(self.client.text_document_hover_async(types.HoverParams(*self.at(marked))))
        return None if found is None else found.contents.value

    def completions(self, marked: str) -> list[str]:
        params = types.CompletionParams(*self.at(marked))
        return [each.label for each in self.wait(self.client.text_document_completion_async(params)) or ()]

    def definitions(self, place: tuple[types.TextDocumentIdentifier, types.Position]) -> list[types.Location]:
        return list(self.wait(self.client.text_document_definition_async(types.DefinitionParams(*place))) or ())

    def formatted(self, uri: str) -> str | None:
        """The text after its formatting; None where it is left alone."""
        options = types.FormattingOptions(2, insert_spaces=True)
        params = types.DocumentFormattingParams(types.TextDocumentIdentifier(uri), options)
        edits = self.wait(self.client.text_document_formatting_async(params))
        return None if edits is None else self.edited(uri, edits)

    def fixes(self, uri: str) -> dict[str, str]:
        """The quick fixes of a text, each with the text that comes of it."""
        lines = self.texts[uri][1].count("\n") + 1
        whole = types.Range(types.Position(0, 0), types.Position(lines, 0))
        context = types.CodeActionContext(self.findings(uri))
        params = types.CodeActionParams(types.TextDocumentIdentifier(uri), whole, context)
        actions = self.wait(self.client.text_document_code_action_async(params)) or ()
        return {each.title: self.edited(uri, each.edit.changes[uri]) for each in actions}

    def edited(self, uri: str, edits: list[types.TextEdit]) -> str:
        """The text after edits, which are counted in UTF-16."""
        text = self.texts[uri][1]
        for each in sorted(edits, key=lambda each: (each.range.start.line, each.range.start.character), reverse=True):
            start, end = (self._offset(text, place) for place in (each.range.start, each.range.end))
            text = text[:start] + each.new_text + text[end:]
        return text

    def _offset(self, text: str, place: types.Position) -> int:
        lines = text.split("\n")
        if place.line >= len(lines):
            return len(text)
        line = lines[place.line].encode("utf-16-le")[: 2 * place.character].decode("utf-16-le")
        return sum(len(each) + 1 for each in lines[: place.line]) + len(line)

    def shut_down(self) -> int:
        """Says goodbye; the server's exit code."""
        self.wait(self.client.shutdown_async(None))
        self.client.exit(None)
        process = self.client._server
        assert process is not None
        return self.wait(process.wait())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without torch: whoever imports it fails."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "torch.py").write_text('raise ModuleNotFoundError("no torch here", name="torch")\n')
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture(scope="module")
def editor(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """An editor with a server that has no torch."""
    editor = Editor(tmp_path_factory.mktemp("work"), environment)
    yield editor
    assert 0 == editor.shut_down()


# --- findings --------------------------------------------------------------------------------------------


def test_findings_as_one_types(editor: Editor) -> None:
    """A mistake is told with its place, code and way out, and gone once it is mended."""
    uri = editor.open('match "transfomer_blocks.*attn" evry 2 -> reuse\n')
    (found,) = editor.findings(uri)
    assert ("E001", "evry", types.DiagnosticSeverity.Error) == (
        found.code,
        editor.said(uri, found.range),
        found.severity,
    )
    assert "help: did you mean `every`?" in found.message
    editor.change(uri, 'match "transfomer_blocks.*attn" every 2 -> reuse\n')
    assert [] == editor.findings(uri)


def test_a_finding_leads_to_its_page(editor: Editor) -> None:
    """The code of a finding is a link to its page of the documentation, which is there."""
    (found,) = editor.findings(editor.open("match attention evry 2 -> reuse\n"))
    assert (ROOT / "docs" / "diagnostics" / "E001.md").as_uri() == found.code_description.href


def test_a_warning_is_a_warning(editor: Editor) -> None:
    """A parameter that is not used is a warning, and faded."""
    (found,) = editor.findings(editor.open(PARAM + "match attention every 2 -> reuse\n"))
    assert ("W503", types.DiagnosticSeverity.Warning) == (found.code, found.severity)
    assert [types.DiagnosticTag.Unnecessary] == list(found.tags or ())


def test_two_texts(editor: Editor) -> None:
    """Texts are checked by themselves, and a closed one has no findings."""
    one, other = editor.open("match attention evry 2 -> reuse\n"), editor.open("mach attention -> reuse\n")
    assert ["E001"] == editor.codes(one)
    assert ["E007"] == editor.codes(other)
    editor.change(one, "match attention every 2 -> reuse\n")
    assert [] == editor.codes(one)
    assert ["E007"] == editor.codes(other)
    editor.client.text_document_did_close(types.DidCloseTextDocumentParams(types.TextDocumentIdentifier(other)))
    editor.texts[other] = (None, "")  # what is published for a closed text has no version
    assert [] == editor.codes(other)


def test_only_the_last_of_many_changes_is_told(editor: Editor) -> None:
    """While someone types, what is found is found in the text as it is in the end."""
    uri = editor.open("")
    for end in range(1, 40):
        editor.change(uri, "match attention evry 2 -> reuse skipp"[:end])
    assert ["evry"] == [editor.said(uri, each.range) for each in editor.findings(uri)]


@pytest.mark.parametrize("text", [f'match "{FACE}" evry 2 -> reuse', f'# {FACE * 3}\n\tmatch\nmatch "é{FACE}" evry 2'])
def test_places_are_counted_as_editors_count(editor: Editor, text: str) -> None:
    """Behind letters that are two code units, a finding still stands where its word is."""
    uri = editor.open(text)
    assert "evry" in [editor.said(uri, each.range) for each in editor.findings(uri)]


@pytest.mark.parametrize(("encoding", "column"), [("utf-8", 15), ("utf-16", 13), ("utf-32", 12)])
def test_an_editor_says_how_it_counts(tmp_path: Path, environment: dict[str, str], encoding: str, column: int) -> None:
    """Columns are counted in the encoding that the editor prefers."""
    editor = Editor(tmp_path, environment, [encoding])
    uri = editor.open(f'match "ab{FACE}" evry 2 -> reuse')
    (found,) = editor.findings(uri)
    assert (encoding, column) == (editor.started.capabilities.position_encoding, found.range.start.character)
    params = types.HoverParams(types.TextDocumentIdentifier(uri), types.Position(0, column + len("evry 2 -> ")))
    assert "**`reuse`**" in editor.wait(editor.client.text_document_hover_async(params)).contents.value
    assert 0 == editor.shut_down()


def test_lines_end_as_editors_end_them(editor: Editor) -> None:
    """A line separator of Unicode, and other controls, end no line of a text."""
    text = "# a\u2028b\x0cc\x85d\nmatch attention evry 2 -> reuse\r\n"
    found = editor.findings(editor.open(text))
    assert {"E012"} == {each.code for each in found}
    assert {0} == {each.range.start.line for each in found}


def test_the_rule_that_shadows(editor: Editor) -> None:
    """A rule that never decides names the rule that comes before it, and its `match` leads there."""
    text = f"# {FACE}\nmatch attention every 2 -> reuse\n\nmatch attention when t > 5 every 3 -> reuse\n"
    uri = editor.open(text)
    (found,) = editor.findings(uri)
    (related,) = found.related_information
    assert ("W510", uri, 1) == (found.code, related.location.uri, related.location.range.start.line)
    (place,) = editor.definitions((types.TextDocumentIdentifier(uri), types.Position(3, 2)))
    assert related.location == place


def test_findings_in_what_is_used(editor: Editor, tmp_path: Path) -> None:
    """A mistake in a used policy is told at its `use`, with its place, and gone once that file is mended and saved."""
    other = tmp_path / "other.cp"
    other.write_text(f"# {FACE}\nmatch attention evry 2 -> reuse\n")
    (tmp_path / "mine.cp").write_text('use pab\nuse "./other.cp"\n')
    uri = editor.open_file(tmp_path / "mine.cp")
    (found,) = editor.findings(uri)
    assert ("E001", '"./other.cp"') == (found.code, editor.said(uri, found.range))
    (related,) = found.related_information
    assert (from_fs_path(str(other)), 1, 16) == (
        related.location.uri,
        related.location.range.start.line,
        related.location.range.start.character,
    )
    other.write_text("match attention every 2 -> reuse\n")
    del editor.told[uri]
    editor.client.text_document_did_save(types.DidSaveTextDocumentParams(types.TextDocumentIdentifier(uri)))
    assert [] == [each for each in editor.findings(uri) if each.severity == types.DiagnosticSeverity.Error]


def test_a_text_that_is_longer_than_its_file(editor: Editor, tmp_path: Path) -> None:
    """What is found in an unsaved text stands there, whatever its file holds."""
    (tmp_path / "mine.cp").write_text("match attention -> reuse\n")
    uri = editor.open_file(tmp_path / "mine.cp")
    editor.change(uri, "\n" * 30 + "match attention -> reuse\nmatch attention -> skip\n")
    (found,) = editor.findings(uri)
    assert ("W510", 31) == (found.code, found.range.start.line)


# --- hover -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        ("match atten|tion -> reuse", "**`attention`** takes attention modules"),
        ("match block when |t < 3 -> reuse", "**`t`** is the scheduler's timestep"),
        ("match block when t < 3 and |step > 2 -> reuse", "**`step`** is the number of the step"),
        ("match block every 2 from e|nd -> reuse", "**`every N from end`** computes when"),
        ("param end: int = 1\nmatch block every 2 from e|nd -> reuse", "**`every N from end`** computes when"),
        ("param all: range = (1, 2)\nmatch block when t in a|ll -> reuse", "param all: range = (1, 2)"),
        ("match block at most 2 in a r|ow -> reuse", "**`at most N in a row`** says that a site reuses while age ≤ N"),
        ("match block -> reuse resi|dual", "**`reuse residual`** answers with its input plus"),
        ("match block -> predict tay|lor(order: 1)", "**`taylor(order: m)`**"),
        ("signal s = l|1(output(model))", "mean|x|"),
        ("param x: in|t = 1", "**`int`** is a whole number"),
        ("|match block evry", "**`match SELECTOR"),
        (PARAM + "match block every inter|val -> reuse", "param interval: int = 3 in [1, 50]\n```\n\ncompute every so"),
        (
            "let late = progress > 0.5\nmatch block when la|te -> reuse",
            "let late = progress > 0.5\n```\n\na named value",
        ),
        ("param n: int =\nmatch block every |n -> reuse", "n: int ="),
        ("use pa|b", "Pyramid Attention Broadcast"),
        ("use 'pa|b.cp'", "Pyramid Attention Broadcast"),
        ("use pab with spatial_ev|ery = 3", "param spatial_every: int? = 2"),
        (f"param x: string = '{FACE}' # {FACE}\nmatch block and x| -> reuse", "param x: string"),
    ],
)
def test_hover(editor: Editor, marked: str, said: str) -> None:
    """Words of the language say what they do, names what they are, policies what they are called."""
    told = editor.hover(marked)
    assert told is not None
    assert said in told


@pytest.mark.parametrize(
    "marked",
    ["match 'atten|tion' -> reuse", "# mat|ch", "| ", "match bl |  ock", "use nothing|", "match foo| -> reuse"],
)
def test_hover_on_nothing(editor: Editor, marked: str) -> None:
    """Strings, comments, space and unknown names have nothing to say."""
    assert editor.hover(marked) is None


# --- completion ------------------------------------------------------------------------------------------

NAMES = (
    PARAM
    + """param window: range = (1, 2)
param names: list = ["a"]
let late = t > 5
table ratios = [1, 2]
signal head = output(model)
external strength: float
"""
)


@pytest.mark.parametrize(
    ("marked", "some", "none"),
    [
        ("|", set(STATEMENT_WORDS), {"when"}),
        ("ma|", {"match"}, {"attention"}),
        ("match |", {*KINDS, "each", "blocks", "not", "optional", "names"}, {"every", "window", "t", "late"}),
        ("match attention |", {"when", "every", "while", "->", "at most", "and"}, {"reuse", "t", "match"}),
        ("match attention ev|", {"every"}, {"evry"}),
        ("match attention\n  ev|", {"every"}, {"match"}),
        (
            "match attention when |",
            {"t", "step", "late", "ratios", "interval", "not", "min"},
            {"head", "l1", "prev", "off", "cross", "wiener"},
        ),
        ("match attention when t in |", {"window", "names"}, {"interval", "t"}),
        ("match attention while |", {"head", "l1", "kept", "sum", "gap", "t", "strength"}, {"output"}),
        ("match attention while sum(t, |", {"decay", "late"}, {"weight"}),
        ("signal x = input(model, |", {"tokens"}, {"head", "t"}),
        ("signal x = wiener(head, |", {"beta"}, {"decay"}),
        ("match attention while sum(|", {"head", "t"}, {"decay"}),
        ("match attention every |", {"interval", "off", "steps"}, {"head"}),
        ("match attention every 2 |", {"from end", "since compute", "offset", "->"}, {"when"}),
        ("match attention every 2 from |", {"end"}, {"t"}),
        ("match attention at most 2 in |", {"a row", "all"}, {"window"}),
        ("match attention -> |", {"reuse", "skip", "predict", "approximate uncond", "compute"}, {"t"}),
        ("match attention -> predict |", {"linear", "taylor", "hermite"}, {"spectral", "t"}),
        ("match attention -> predict hermite(order: 2, |", {"scale", "feedback"}, {"order", "weight", "t"}),
        ("match attention -> predict linear(weight: |", {"strength", "t", "ratios"}, {"head"}),
        ("match model -> approximate uncond |", {"spectral"}, {"linear"}),
        ("match attention -> reuse |", {"residual", "follow"}, {"when"}),
        ("match attention -> reuse follow |", {"cond", "uncond"}, {"t"}),
        ("use |", {"pab", "fbc", "fora"}, {"t"}),
        ("use pab with |", {"spatial_every", "spatial_range"}, {"interval", "t"}),
        ("use pab with spatial_every = 2, |", {"spatial_range"}, {"spatial_every"}),
        ("use pab with spatial_every = |", {"interval", "off"}, {"t", "head"}),
        ("param x: |", {"int", "list"}, {"t"}),
        ("param x: int = |", {"off", "true", "inf"}, {"t", "interval"}),
        ("external x: |", {"float"}, {"int"}),
        ("param |", set(), {"t", "interval"}),
        ("signal x = |", {"output", "residual", "head", "relative_l1", "prev", "cross", "wiener"}, {"sum", "strength"}),
        ("expect block over 3 |", {"steps"}, {"t"}),
        ("expect block over 3 steps with |", {"t", "sigma", "head", "interval"}, {"late", "min"}),
        ("expect block over 3 steps: |", {"C", "R"}, {"t"}),
        ("match attention when ) |", set(), {"t"}),
        ("# wh|", set(), {"when"}),
        ("match attention # ev|", set(), {"every"}),
        ("match 'a|", set(), {"attention"}),
    ],
)
def test_completion(editor: Editor, marked: str, some: set[str], none: set[str]) -> None:
    """What the parser would take there is offered, of names those that make sense there."""
    found = editor.completions(f"{NAMES}{marked}" if marked.strip(CURSOR) else marked)
    assert some <= set(found)
    assert set() == none & set(found)
    assert len(found) == len(set(found))


# --- definitions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marked", "declared"),
    [
        (f'{PARAM}match block every interval| -> reuse "{FACE}"', "interval"),
        ("match block when la|te -> reuse\nlet late = t > 5", "late"),
        (f"param x: string = '{FACE}'; param\nmatch x| -> reuse", "x"),
    ],
)
def test_definitions_of_names(editor: Editor, marked: str, declared: str) -> None:
    """A name leads to its declaration, also a broken one, wherever that stands."""
    document, position = editor.at(marked)
    (found,) = editor.definitions((document, position))
    assert (document.uri, declared) == (found.uri, editor.said(found.uri, found.range))


def test_definitions_in_used_policies(editor: Editor, tmp_path: Path) -> None:
    """A used policy leads to its file, and a setting to the parameter there."""
    (tmp_path / "other.cp").write_text(f'# {FACE}\nparam often: int = 2 "{FACE}"\nmatch block every often -> reuse\n')
    (tmp_path / "mine.cp").write_text('use pab\nuse "./other.cp" with often = 3\n')
    document = types.TextDocumentIdentifier(editor.open_file(tmp_path / "mine.cp"))
    (policy,) = editor.definitions((document, types.Position(0, 5)))
    assert (ROOT / "policies" / "pab.cp").as_uri() == policy.uri
    (file,) = editor.definitions((document, types.Position(1, 8)))
    (setting,) = editor.definitions((document, types.Position(1, 25)))
    assert [from_fs_path(str(tmp_path / "other.cp"))] * 2 == [file.uri, setting.uri]
    assert types.Range(types.Position(1, 6), types.Position(1, 11)) == setting.range


# --- formatting and fixes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"match   attention every 2->reuse # {FACE}",
        'policy x\n\n\n\nmatch "a"\n  -> reuse\n\n# end\n',
        "\ufeffmatch attention\r\n  every 2 -> reuse\r\n",
        "",
    ],
)
def test_formatting(editor: Editor, text: str) -> None:
    """The whole text becomes its canonical form."""
    assert format(text) == editor.formatted(editor.open(text))


def test_a_text_with_errors_is_not_formatted(editor: Editor) -> None:
    """Nobody knows what a text with errors means, so it stays as it is."""
    assert editor.formatted(editor.open("match   attention evry 2 -> reuse")) is None


@pytest.mark.parametrize(
    ("text", "title", "fixed"),
    [
        (f'match "{FACE}" evry 2 -> reuse', "Change to `every`", f'match "{FACE}" every 2 -> reuse'),
        ("mach attention -> reuse", "Change to `match`", "match attention -> reuse"),
        ("match atention -> reuse", "Change to `attention`", "match attention -> reuse"),
        (
            PARAM + "match block every intervall -> reuse",
            "Change to `interval`",
            PARAM + "match block every interval -> reuse",
        ),
        ("match block when timestep > 5 -> reuse", "Change to `t`", "match block when t > 5 -> reuse"),
        ("use pba", "Change to `pab`", "use pab"),
        ("match block -> predict taylr(order: 1)", "Change to `taylor`", "match block -> predict taylor(order: 1)"),
        (
            "match block when t > 5 && step > 2 -> reuse",
            "Change to `and`",
            "match block when t > 5 and step > 2 -> reuse",
        ),
        ("match block every 2 => reuse", "Change to `->`", "match block every 2 -> reuse"),
        ("match block\nevery 2 -> reuse", "Indent the line", "match block\n  every 2 -> reuse"),
        ("match block -> reuse\u200e\u202e", "Delete the character", "match block -> reuse\u200e"),
        (
            "match block -> reuse\n\n# more often\nmatch block when t > 5 every 2 -> reuse # why",
            "Move the rule before line 1",
            "# more often\nmatch block when t > 5 every 2 -> reuse # why\nmatch block -> reuse\n\n",
        ),
    ],
)
def test_fixes(editor: Editor, text: str, title: str, fixed: str) -> None:
    """Where the way out is one word or one line, it is a click away."""
    assert fixed == editor.fixes(editor.open(text))[title]


@pytest.mark.parametrize(
    "text", ["let x =", "match block when t = 5 -> reuse", "match block -> predict taylor", "let 5 = x"]
)
def test_no_fix_without_certainty(editor: Editor, text: str) -> None:
    """Where a person has to decide, nothing is offered."""
    assert {} == editor.fixes(editor.open(text))


# --- hardships -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\ud800 match",
        "\x00\x01\x02",
        "(" * 5000,
        "match " + "not " * 3000 + "block -> reuse",
        '"' * 999,
        "\n" * 9999 + "match\r\rmatch",
        "use use use with = =",
        "match blocks[:" * 50,
        f"expect block over 99999999999999999999 steps: {'C ' * 5000}",
    ],
    ids=range(9),
)
def test_nonsense_is_answered(editor: Editor, text: str) -> None:
    """Whatever a text holds, it is checked, and every request about any place in it is answered."""
    uri = editor.open(text)
    editor.findings(uri)
    document = types.TextDocumentIdentifier(uri)
    for line, column in (0, 0), (0, 5), (0, len(text)), (10**6, 10**6):
        place = types.Position(line, column)
        editor.wait(editor.client.text_document_hover_async(types.HoverParams(document, place)))
        editor.wait(editor.client.text_document_completion_async(types.CompletionParams(document, place)))
        editor.definitions((document, place))
    editor.formatted(uri)


def test_a_huge_text_is_bounded(editor: Editor) -> None:
    """Of a text with very many mistakes some are told, one beyond the limits is not parsed, and the server goes on."""
    many = editor.open("match attention evry 2 -> reuse\n" * 4000)
    huge = editor.open("match attention every 2 -> reuse\n" * 100_000)
    assert 200 == len(editor.findings(many))
    assert ["E013"] == editor.codes(huge)
    assert "**`attention`**" in (editor.hover("match atten|tion -> reuse") or "")


def test_requests_about_unknown_texts(editor: Editor) -> None:
    """A text that was never opened and is no file is an error of that request alone."""
    with pytest.raises(Exception, match="nowhere"):
        editor.wait(
            editor.client.text_document_hover_async(
                types.HoverParams(types.TextDocumentIdentifier("file:///nowhere.cp"), types.Position(0, 0))
            )
        )
    assert [] == editor.codes(editor.open("match attention -> reuse"))


def framed(message: Any) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def test_nonsense_on_the_wire(environment: dict[str, str]) -> None:
    """Messages that are none are refused, and those behind them are answered."""
    start = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"capabilities": {}, "processId": None, "rootUri": None},
    }
    nonsense = [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"jsonrpc": "2.0"}',
        b'{"jsonrpc": "2.0", "method": 5}',
        b"[" * 9000,
    ]
    wrong = {"jsonrpc": "2.0", "id": 2, "method": "textDocument/hover", "params": {"textDocument": 7}}
    unknown = {"jsonrpc": "2.0", "id": 3, "method": "no/such", "params": None}
    goodbye = {"jsonrpc": "2.0", "id": 4, "method": "shutdown", "params": None}
    leave = {"jsonrpc": "2.0", "method": "exit", "params": None}
    talk = b"nonsense\r\n" + b"".join(map(framed, [start, *nonsense, wrong, unknown, goodbye, leave]))
    done = subprocess.run(COMMAND, input=talk, capture_output=True, env=environment, timeout=PATIENCE, check=False)
    answers = [json.loads(each) for each in bodies(done.stdout)]
    answered = {each.get("id"): each for each in answers if "id" in each and "method" not in each}
    assert "capabilities" in answered[1]["result"]
    assert "error" in answered[3]
    assert answered[4]["result"] is None
    assert 0 == done.returncode


PING = {"jsonrpc": "2.0", "id": 7, "method": "shutdown", "params": None}
BROKEN = {
    "longer than memory": b"Content-Length: 1000000000000\r\n\r\n{}",
    "longer than a number": b"Content-Length: " + b"9" * 6000 + b"\r\n\r\n",
    "longer than the limit": b"Content-Length: %d\r\n\r\n" % (MESSAGE_LIMIT + 1) + b" " * (MESSAGE_LIMIT + 1),
    "negative": b"Content-Length: -5\r\n\r\n{}",
    "no number": b"Content-Length: five\r\n\r\n{}",
    "another script's digits": "Content-Length: \u0665\r\n\r\n{}".encode(),
    "nothing": b"Content-Length:\r\n\r\n{}",
    "zero": b"Content-Length: 0\r\n\r\n",
    "absent": b'Content-Type: application/json\r\n\r\n{"jsonrpc": "2.0"}',
    "absent, in lines": b'X: y\r\n\r\n{\r\n\r\n"jsonrpc":\r\n\r\n"2.0"}\r\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_length_that_cannot_be_is_answered_and_skipped(environment: dict[str, str], name: str) -> None:
    """The server says what is wrong, allocates nothing, and answers the next message."""
    start = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"capabilities": {}}}
    leave = {"jsonrpc": "2.0", "method": "exit", "params": None}
    talk = framed(start) + BROKEN[name] + framed(PING) + framed(leave)
    done = subprocess.run(COMMAND, input=talk, capture_output=True, env=environment, timeout=PATIENCE, check=False)
    answers = [json.loads(body) for body in bodies(done.stdout)]
    (complaint,) = [answer["error"] for answer in answers if "method" not in answer and answer["id"] is None]
    assert -32600 == complaint["code"]
    assert "was skipped" in complaint["message"]
    assert [1, 7] == [answer["id"] for answer in answers if answer.get("id") is not None]
    assert 0 == done.returncode


JUNK = st.sampled_from([*BROKEN.values(), b"x", b"\r\n", b"\n", b"Content-Length: 3\r\n"])


@given(st.lists(JUNK, max_size=4))
def test_any_bytes_are_followed_by_the_next_message(junk: list[bytes]) -> None:
    """Whatever comes before it, a message whose header is right is read whole, unless a wrong length swallowed it."""
    asked = list[int]()

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    stream = Stream(b"".join(junk) + b"Content-Length: 4\r\n\r\ntrueContent-Length: 5\r\nX: y\r\n\r\nfalse")
    reader = MessageReader(stream, lambda _: None)
    read = list[bytes]()
    while header := reader.readline():
        length = int(header.removeprefix(b"Content-Length: "))
        assert b"\r\n" == reader.readline()
        read.append(reader.read(length))
    assert max(asked) <= MESSAGE_LIMIT
    assert b"false" == read[-1]
    assert b"true" == read[-2] or b"Content-Length: 3\r\n" in junk


def bodies(stream: bytes) -> Iterator[bytes]:
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        yield rest[:length]
        stream = rest[length:]


def test_the_end_of_the_input_is_the_end(environment: dict[str, str]) -> None:
    """An editor that is gone takes its server with it."""
    done = subprocess.run(COMMAND, input=b"", capture_output=True, env=environment, timeout=PATIENCE, check=False)
    assert (0, b"") == (done.returncode, done.stdout)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pygls, the command says what to install."""
    monkeypatch.delitem(sys.modules, "cachepolicy.lsp.server", raising=False)
    monkeypatch.setitem(sys.modules, "lsprotocol", None)
    result = CliRunner().invoke(main, ["lsp"])
    assert output.UNUSABLE == result.exit_code
    assert 'pip install "cachepolicy[lsp]"' in result.output
