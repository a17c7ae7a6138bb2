"""The language server: findings as one types, hover, completion, definitions, fixes and formatting, for any editor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from lsprotocol import types
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path

from cachepolicy import __version__
from cachepolicy._resources import documentation
from cachepolicy.errors import Diagnostic, PolicyError, Related
from cachepolicy.language.formatter import format as printed
from cachepolicy.language.parser import parse
from cachepolicy.lsp.code_actions import fixes
from cachepolicy.lsp.completion import CompletionSort, completions
from cachepolicy.lsp.document import PolicyDocument, Stretch, opened_document
from cachepolicy.lsp.hover import DocumentRange, definitions, hover
from cachepolicy.lsp.positions import Positions

PAUSE = 0.1
"""Seconds without a change, after which a text is checked."""
MOST_FINDINGS = 200
"""How many findings of one text are told."""
UNNECESSARY = frozenset({"W503", "W504", "W510"})
"""Warnings of what could be left out, which editors fade."""


class Server(LanguageServer):
    """The texts of one editor. They are checked one after the other, beside the answers to the editor's requests."""

    def __init__(self) -> None:
        # Whole texts: a policy is small, and about a whole text nobody can disagree.
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            "cachepolicy", __version__, text_document_sync_kind=types.TextDocumentSyncKind.Full
        )
        self.checker = ThreadPoolExecutor(1, thread_name_prefix="check")
        self.held = dict[str, PolicyDocument]()

    def document(self, uri: str) -> PolicyDocument:
        """The text that the editor holds at present."""
        text = self.workspace.get_text_document(uri).source
        held = self.held.get(uri)
        if held is None or held.text != text:
            path = to_fs_path(uri) if uri.startswith("file:") else None
            held = self.held[uri] = PolicyDocument(text, str(Path(path).absolute()) if path else "<text>")
        return held

    def positions(self, document: PolicyDocument) -> Positions:
        """The places of a document as this editor counts them."""
        encoding = self.workspace.position_encoding or types.PositionEncodingKind.Utf16
        return _positions(document.text, types.PositionEncodingKind(encoding))

    def offset(self, document: PolicyDocument, position: types.Position) -> int:
        """The place in a document that the editor means."""
        return self.positions(document).offset(position.line, position.character)

    def range(self, document: PolicyDocument, stretch: Stretch) -> types.Range:
        """A stretch of a document as this editor counts."""
        positions = self.positions(document)
        start, end = positions.position(stretch.start), positions.position(stretch.end)
        return types.Range(types.Position(*start), types.Position(*end))

    async def check(self, uri: str) -> None:
        """Tell what is wrong with a text, unless it changes before that is known."""
        document = self.document(uri)
        await asyncio.sleep(PAUSE)
        if self.held.get(uri) is not document:
            return
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self.checker, lambda: self._findings(uri, document))
        if self.held.get(uri) is document:
            told = [_diagnostic(self, uri, document, each) for each in found[:MOST_FINDINGS]]
            version = self.workspace.get_text_document(uri).version
            self.text_document_publish_diagnostics(types.PublishDiagnosticsParams(uri, told, version))

    def _findings(self, uri: str, document: PolicyDocument) -> Sequence[Diagnostic]:
        return document.findings if self.held.get(uri) is document else ()


@lru_cache(maxsize=8)
def _positions(text: str, encoding: types.PositionEncodingKind) -> Positions:
    return Positions(text, encoding)


SERVER = Server()


def serve() -> None:
    """Answer an editor over standard input and output, until it says goodbye or hangs up."""
    SERVER.start_io()


# --- texts -----------------------------------------------------------------------------------------------


@SERVER.feature(types.TEXT_DOCUMENT_DID_OPEN)
async def _open(ls: Server, params: types.DidOpenTextDocumentParams) -> None:
    await ls.check(params.text_document.uri)


@SERVER.feature(types.TEXT_DOCUMENT_DID_CHANGE)
async def _change(ls: Server, params: types.DidChangeTextDocumentParams) -> None:
    await ls.check(params.text_document.uri)


@SERVER.feature(types.TEXT_DOCUMENT_DID_SAVE)
async def _save(ls: Server, _params: types.DidSaveTextDocumentParams) -> None:
    """Other texts may use the one that was saved."""
    for uri in [*ls.held]:
        document = ls.document(uri)
        ls.held[uri] = PolicyDocument(document.text, document.name)
    await asyncio.gather(*(ls.check(uri) for uri in [*ls.held]))


@SERVER.feature(types.TEXT_DOCUMENT_DID_CLOSE)
def _close(ls: Server, params: types.DidCloseTextDocumentParams) -> None:
    ls.held.pop(params.text_document.uri, None)
    ls.text_document_publish_diagnostics(types.PublishDiagnosticsParams(params.text_document.uri, []))


# --- requests --------------------------------------------------------------------------------------------


@SERVER.feature(types.TEXT_DOCUMENT_HOVER)
def _hover(ls: Server, params: types.HoverParams) -> types.Hover | None:
    document = ls.document(params.text_document.uri)
    found = hover(document, ls.offset(document, params.position))
    if found is None:
        return None
    text = types.MarkupContent(types.MarkupKind.Markdown, found.text)
    return types.Hover(text, ls.range(document, found.stretch))


@SERVER.feature(types.TEXT_DOCUMENT_DEFINITION)
def _definition(ls: Server, params: types.DefinitionParams) -> list[types.Location]:
    document = ls.document(params.text_document.uri)
    places = definitions(document, ls.offset(document, params.position))
    return [_location(ls, params.text_document.uri, document, each) for each in places]


@SERVER.feature(types.TEXT_DOCUMENT_COMPLETION)
def _complete(ls: Server, params: types.CompletionParams) -> list[types.CompletionItem]:
    document = ls.document(params.text_document.uri)
    found = completions(document, ls.offset(document, params.position))
    return [
        types.CompletionItem(
            each.text,
            kind=_SORTS[each.sort],
            detail=each.detail or None,
            documentation=types.MarkupContent(types.MarkupKind.Markdown, each.says) if each.says else None,
            sort_text=f"{number:04}",
        )
        for number, each in enumerate(found)
    ]


_SORTS: Mapping[CompletionSort, types.CompletionItemKind] = {
    "word": types.CompletionItemKind.Keyword,
    "kind": types.CompletionItemKind.Class,
    "type": types.CompletionItemKind.TypeParameter,
    "clock": types.CompletionItemKind.Constant,
    "function": types.CompletionItemKind.Function,
    "name": types.CompletionItemKind.Variable,
    "policy": types.CompletionItemKind.Module,
    "method": types.CompletionItemKind.Method,
    "label": types.CompletionItemKind.Property,
    "letter": types.CompletionItemKind.EnumMember,
}


@SERVER.feature(types.TEXT_DOCUMENT_FORMATTING)
def _format(ls: Server, params: types.DocumentFormattingParams) -> list[types.TextEdit] | None:
    """The canonical style; a text with errors is left alone, as nobody knows what it means."""
    document = ls.document(params.text_document.uri)
    try:
        text = printed(parse(document.text))
    except PolicyError:
        return None
    whole = Stretch(0, len(document.text))
    return [] if text == document.text else [types.TextEdit(ls.range(document, whole), text)]


@SERVER.feature(
    types.TEXT_DOCUMENT_CODE_ACTION, types.CodeActionOptions(code_action_kinds=[types.CodeActionKind.QuickFix])
)
def _actions(ls: Server, params: types.CodeActionParams) -> list[types.CodeAction]:
    uri = params.text_document.uri
    document = ls.document(uri)
    start, end = ls.offset(document, params.range.start), ls.offset(document, params.range.end)
    return [
        types.CodeAction(
            fix.title,
            kind=types.CodeActionKind.QuickFix,
            diagnostics=[_diagnostic(ls, uri, document, finding)],
            is_preferred=True,
            edit=types.WorkspaceEdit(
                {uri: [types.TextEdit(ls.range(document, each.stretch), each.text) for each in fix.edits]}
            ),
        )
        for finding in document.findings
        if finding.span is not None and finding.span.start <= end and start <= finding.span.end
        for fix in fixes(document, finding)
    ]


# --- as the protocol says it -----------------------------------------------------------------------------


def _location(ls: Server, uri: str, document: PolicyDocument, place: DocumentRange) -> types.Location:
    address = uri if place.document is document else from_fs_path(place.document.name) or uri
    return types.Location(address, ls.range(place.document, place.stretch))


def _diagnostic(ls: Server, uri: str, document: PolicyDocument, finding: Diagnostic) -> types.Diagnostic:
    """A finding; one about a policy that is used stands at its `use`, and leads to its place there."""
    own, span = finding.source in (None, document.name), finding.span
    related = [_related(ls, uri, document, each) for each in finding.related]
    message = finding.message
    stretch = Stretch(span.start, span.end) if own and span else Stretch(0, 0)
    if not own:
        file = _file(document, finding.source or "")
        message = f"in `{file.name if file else finding.source}`: {message}"
        stretch = _use_of(document, file)
        related += [_related(ls, uri, document, Related("here", span, file.name))] if file and span else []
    address = documentation(f"diagnostics/{finding.code}.md")
    return types.Diagnostic(
        ls.range(document, stretch),
        f"{message}\nhelp: {finding.help}" if finding.help else message,
        severity=types.DiagnosticSeverity.Error if finding.severity == "error" else types.DiagnosticSeverity.Warning,
        code=finding.code,
        code_description=types.CodeDescription(address) if address else None,
        source="cachepolicy",
        tags=[types.DiagnosticTag.Unnecessary] if own and finding.code in UNNECESSARY else None,
        related_information=[each for each in related if each],
    )


def _related(
    ls: Server, uri: str, document: PolicyDocument, related: Related
) -> types.DiagnosticRelatedInformation | None:
    file = document if related.source == document.name else _file(document, related.source or "")
    if file is None:
        return None
    place = DocumentRange(file, Stretch(related.span.start, related.span.end))
    return types.DiagnosticRelatedInformation(_location(ls, uri, document, place), related.message)


def _file(document: PolicyDocument, source: str) -> PolicyDocument | None:
    """The file that a finding names: absolute, shipped, or relative to the working folder or to the document's."""
    names = (source, str(Path(source).absolute()), str(Path(document.name).parent / source))
    return next((file for each in names if (file := opened_document(each)) is not None), None)


def _use_of(document: PolicyDocument, file: PolicyDocument | None) -> Stretch:
    """The `use` that names a file; else the first, or the start of the text."""
    names = [name for chunk in document.source.chunks if chunk.word == "use" and (name := document.use(chunk))]
    stem = Path(file.name).stem if file else None
    named = (name for name in names if Path(document.said(name).strip("\"'")).stem == stem)
    return next(named, names[0] if names else Stretch(0, 0))
