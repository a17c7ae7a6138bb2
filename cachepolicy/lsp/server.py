"""The language server: diagnostics, hover, completion, definitions, quick fixes and formatting, for any editor."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from lsprotocol import types
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path

from cachepolicy import __version__
from cachepolicy._resources import documentation
from cachepolicy.errors import Diagnostic, PolicyError, Related, visible
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.parser import parse
from cachepolicy.lsp._code_actions import fixes
from cachepolicy.lsp._completion import CompletionSort, completions
from cachepolicy.lsp._framing import MessageReader
from cachepolicy.lsp._hover import DocumentRange, definitions, hover
from cachepolicy.lsp._positions import Positions
from cachepolicy.lsp.document import PolicyDocument, TextRange, opened_document

PAUSE = 0.1
"""Seconds without a change after which a text is checked."""
FINDINGS_LIMIT = 200
"""The largest number of published diagnostics per text."""
UNNECESSARY = frozenset({"W503", "W504", "W510"})
"""Warnings about text that could be deleted, which editors fade."""


class Server(LanguageServer):
    """The texts of one editor. One thread checks them, while the server answers requests."""

    def __init__(self) -> None:
        # The editor sends whole texts: a policy is small, and incremental changes can get out of step.
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            "cachepolicy", __version__, text_document_sync_kind=types.TextDocumentSyncKind.Full
        )
        self.checker = ThreadPoolExecutor(1, thread_name_prefix="check")
        self.held = dict[str, PolicyDocument]()

    def document(self, uri: str) -> PolicyDocument:
        """Returns the current text in the editor."""
        text = self.workspace.get_text_document(uri).source
        held = self.held.get(uri)
        if held is None or held.text != text:
            path = to_fs_path(uri) if uri.startswith("file:") else None
            held = self.held[uri] = PolicyDocument(text, str(Path(path).absolute()) if path else "<text>")
        return held

    def positions(self, document: PolicyDocument) -> Positions:
        """Returns the positions of a document in the encoding of this editor."""
        encoding = self.workspace.position_encoding or types.PositionEncodingKind.Utf16
        return _positions(document.text, types.PositionEncodingKind(encoding))

    def offset(self, document: PolicyDocument, position: types.Position) -> int:
        """Returns the offset of an editor's position in a document."""
        return self.positions(document).offset(position)

    def range(self, document: PolicyDocument, text_range: TextRange) -> types.Range:
        """Returns a range of a document in the encoding of this editor."""
        positions = self.positions(document)
        return types.Range(positions.position(text_range.start), positions.position(text_range.end))

    async def check(self, uri: str) -> None:
        """Publishes the diagnostics of a text, unless it changes in the meantime."""
        document = self.document(uri)
        await asyncio.sleep(PAUSE)
        if self.held.get(uri) is not document:
            return
        loop = asyncio.get_running_loop()
        findings = await loop.run_in_executor(self.checker, lambda: self._findings(uri, document))
        if self.held.get(uri) is document:
            diagnostics = [_diagnostic(self, uri, document, finding) for finding in findings[:FINDINGS_LIMIT]]
            version = self.workspace.get_text_document(uri).version
            self.text_document_publish_diagnostics(types.PublishDiagnosticsParams(uri, diagnostics, version))

    def _findings(self, uri: str, document: PolicyDocument) -> Sequence[Diagnostic]:
        return document.findings if self.held.get(uri) is document else ()


@lru_cache(maxsize=8)
def _positions(text: str, encoding: types.PositionEncodingKind) -> Positions:
    return Positions(text, encoding)


SERVER = Server()


def serve() -> None:
    """Serves an editor over standard input and output until it exits or closes the stream."""
    reader = MessageReader(sys.stdin.buffer, _refuse)
    SERVER.start_io(cast("BinaryIO", reader))


def _refuse(reason: str) -> None:
    """Answers a message that cannot be read. Its id is unknown, so the answer has none."""
    error = {"code": types.ErrorCodes.InvalidRequest, "message": visible(reason)}
    body = json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()
    # One write, since the server may write from another thread.
    sys.stdout.buffer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    sys.stdout.buffer.flush()


# --- texts -----------------------------------------------------------------------------------------------


@SERVER.feature(types.TEXT_DOCUMENT_DID_OPEN)
async def _open(ls: Server, params: types.DidOpenTextDocumentParams) -> None:
    await ls.check(params.text_document.uri)


@SERVER.feature(types.TEXT_DOCUMENT_DID_CHANGE)
async def _change(ls: Server, params: types.DidChangeTextDocumentParams) -> None:
    await ls.check(params.text_document.uri)


@SERVER.feature(types.TEXT_DOCUMENT_DID_SAVE)
async def _save(ls: Server, _params: types.DidSaveTextDocumentParams) -> None:
    """Checks all texts again, because others may use the saved one."""
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
    content = hover(document, ls.offset(document, params.position))
    if content is None:
        return None
    return types.Hover(_markdown(content.text), ls.range(document, content.range))


@SERVER.feature(types.TEXT_DOCUMENT_DEFINITION)
def _definition(ls: Server, params: types.DefinitionParams) -> list[types.Location]:
    document = ls.document(params.text_document.uri)
    declared = definitions(document, ls.offset(document, params.position))
    return [_location(ls, params.text_document.uri, document, declaration) for declaration in declared]


@SERVER.feature(types.TEXT_DOCUMENT_COMPLETION)
def _complete(ls: Server, params: types.CompletionParams) -> list[types.CompletionItem]:
    document = ls.document(params.text_document.uri)
    return [
        types.CompletionItem(
            completion.text,
            kind=_SORTS[completion.sort],
            detail=completion.detail or None,
            documentation=_markdown(completion.documentation) if completion.documentation else None,
            sort_text=f"{number:04}",
        )
        for number, completion in enumerate(completions(document, ls.offset(document, params.position)))
    ]


def _markdown(text: str) -> types.MarkupContent:
    return types.MarkupContent(types.MarkupKind.Markdown, text)


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
    """Formats the text in the canonical style. A text with syntax errors is not changed."""
    document = ls.document(params.text_document.uri)
    try:
        text = format_policy(parse(document.text))
    except PolicyError:
        return None
    whole = TextRange(0, len(document.text))
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
                {uri: [types.TextEdit(ls.range(document, edit.range), edit.text) for edit in fix.edits]}
            ),
        )
        for finding in document.findings
        if finding.span is not None and finding.span.start <= end and start <= finding.span.end
        for fix in fixes(document, finding)
    ]


# --- types of the protocol -------------------------------------------------------------------------------


def _location(ls: Server, uri: str, document: PolicyDocument, target: DocumentRange) -> types.Location:
    address = uri if target.document is document else from_fs_path(target.document.name) or uri
    return types.Location(address, ls.range(target.document, target.range))


def _diagnostic(ls: Server, uri: str, document: PolicyDocument, finding: Diagnostic) -> types.Diagnostic:
    """Converts a finding. A finding in a used policy is shown at the `use`, with a link to its position there."""
    own, span = finding.source in (None, document.name), finding.span
    related = [_related(ls, uri, document, other) for other in finding.related]
    message = finding.message
    text_range = TextRange(span.start, span.end) if own and span else TextRange(0, 0)
    if not own:
        file = _file(document, finding.source or "")
        message = f"in `{file.name if file else finding.source}`: {message}"
        text_range = _use_of(document, file)
        related += [_related(ls, uri, document, Related("here", span, file.name))] if file and span else []
    address = documentation(f"diagnostics/{finding.code}.md")
    return types.Diagnostic(
        ls.range(document, text_range),
        f"{message}\nhelp: {finding.help}" if finding.help else message,
        severity=types.DiagnosticSeverity.Error if finding.severity == "error" else types.DiagnosticSeverity.Warning,
        code=finding.code,
        code_description=types.CodeDescription(address) if address else None,
        source="cachepolicy",
        tags=[types.DiagnosticTag.Unnecessary] if own and finding.code in UNNECESSARY else None,
        related_information=[information for information in related if information],
    )


def _related(
    ls: Server, uri: str, document: PolicyDocument, related: Related
) -> types.DiagnosticRelatedInformation | None:
    file = document if related.source == document.name else _file(document, related.source or "")
    if file is None:
        return None
    target = DocumentRange(file, TextRange(related.span.start, related.span.end))
    return types.DiagnosticRelatedInformation(_location(ls, uri, document, target), related.message)


def _file(document: PolicyDocument, source: str) -> PolicyDocument | None:
    """Returns the file of a finding: absolute, shipped, or relative to the working folder or the document's folder."""
    names = (source, str(Path(source).absolute()), str(Path(document.name).parent / source))
    return next((file for name in names if (file := opened_document(name)) is not None), None)


def _use_of(document: PolicyDocument, file: PolicyDocument | None) -> TextRange:
    """Returns the range of the `use` that names a file, else of the first `use`, else the start of the text."""
    names = [name for chunk in document.source.chunks if chunk.word == "use" and (name := document.use(chunk))]
    stem = Path(file.name).stem if file else None
    named = (name for name in names if Path(document.text_of(name).strip("\"'")).stem == stem)
    return next(named, names[0] if names else TextRange(0, 0))
