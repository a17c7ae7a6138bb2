"""Output of the commands: diagnostics, with colour on terminals, and exit codes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, NoReturn, ParamSpec

import click

from cachepolicy.errors import Diagnostic, PolicyError, render, to_json

FINE, FINDINGS, UNUSABLE = 0, 1, 2
"""Exit codes: nothing wrong; the policy is wrong or an expectation fails; the command or a file cannot be used."""

_ABOUT_THE_COMMAND = frozenset(
    "E150 E151 E152 E153 E160 E161 E162 E210 E211 E250 E252 E253 E254 E255 E256 E257 E258 E260".split()  # noqa: SIM905
)
"""Codes that are the caller's mistake and not the policy's, where they have no place in its text."""

_EXTRAS = {
    **dict.fromkeys(("diffusers", "torch", "tqdm", "PIL", "safetensors"), "diffusers"),
    **dict.fromkeys(("pygls", "lsprotocol"), "lsp"),
}
"""The extra of the package that installs a library."""

P = ParamSpec("P")


def exit_code(findings: Sequence[Diagnostic]) -> int:
    """Returns the exit code for the diagnostics of a command."""
    errors = [each for each in findings if each.severity == "error"]
    if not errors:
        return FINE
    usage = all(each.span is None and each.code in _ABOUT_THE_COMMAND for each in errors)
    return UNUSABLE if usage else FINDINGS


def coloured(stream: IO[Any]) -> bool:
    """True where colour can be seen and is not refused by `NO_COLOR`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """The width of the terminal, or 120 where the output is no terminal."""
    return shutil.get_terminal_size((120, 24)).columns


def say(text: str = "", *, error: bool = False) -> None:
    """Write a line to standard output, or error, as it is."""
    click.echo(text, err=error, color=True)


def say_json(data: object) -> None:
    """Writes data as JSON."""
    say(json.dumps(data, ensure_ascii=False, indent=2))


def report_findings(findings: Sequence[Diagnostic], *, error: bool = False) -> None:
    """Writes diagnostics with their source locations."""
    stream = sys.stderr if error else sys.stdout
    if findings:
        say(render(findings, colour=coloured(stream)), error=error)


def fail(findings: Sequence[Diagnostic], *, as_json: bool = False) -> NoReturn:
    """End the command for what was found: text on standard error, or JSON on standard output."""
    if as_json:
        say(to_json(findings))
    else:
        report_findings(findings, error=True)
    raise SystemExit(exit_code(findings) or FINDINGS)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose policy errors, and what is not installed, are told instead of traced."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PolicyError as error:
            fail(error.diagnostics, as_json=bool(kwargs.get("as_json")))
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            say(f'error: `{error.name}` is not installed: pip install "cachepolicy[{extra}]"', error=True)
            raise SystemExit(UNUSABLE) from error
        except BrokenPipeError:
            raise  # click ends quietly when the reader has gone
        except OSError as error:
            say(f"error: the output cannot be written: {(error.strerror or str(error)).lower()}", error=True)
            raise SystemExit(UNUSABLE) from error

    return run
