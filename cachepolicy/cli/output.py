"""Output of the commands: diagnostics, with colour on terminals, and exit codes."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, ParamSpec, cast

import click

from cachepolicy.errors import Diagnostic, PolicyError, render, to_json

FINE, FINDINGS, UNUSABLE = 0, 1, 2
"""Exit codes: no error; an error in a policy or a failed expectation; an unusable command line or file."""

_COMMAND_CODES = frozenset(
    """E150 E151 E152 E153 E160 E161 E162 E169 E171 E172 E210 E211 E212 E213 E250 E252 E253 E254 E255 E256 E257 E258
    E260 E402 E403 E405 E406 E407 E408""".split()  # noqa: SIM905
)
"""Codes of mistakes in the command line, not in a policy, if the diagnostic has no source location."""

_EXTRAS = {
    **dict.fromkeys(("diffusers", "torch", "tqdm", "PIL", "safetensors"), "diffusers"),
    **dict.fromkeys(("pygls", "lsprotocol"), "lsp"),
    "huggingface_hub": "hub",
}
"""The extra of the package that installs a library."""

_Parameters = ParamSpec("_Parameters")


def exit_code(findings: Sequence[Diagnostic]) -> int:
    """Returns the exit code for the diagnostics of a command."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return FINE
    usage = all(error.span is None and error.code in _COMMAND_CODES for error in errors)
    return UNUSABLE if usage else FINDINGS


def coloured(stream: IO[Any]) -> bool:
    """Returns True for a terminal that shows colours, unless `NO_COLOR` is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Returns the width of the terminal, or 120 if the output is not a terminal."""
    return shutil.get_terminal_size((120, 24)).columns


def say(text: str = "", *, error: bool = False) -> None:
    """Writes a line, including its escape sequences, to standard output or standard error."""
    click.echo(text, err=error, color=True)


def say_json(data: object) -> None:
    """Writes data as JSON. Numbers that are not finite become null, since JSON has none."""
    say(json.dumps(_finite(data), ensure_ascii=False, indent=2))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in cast("dict[Any, Any]", data).items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in cast("Sequence[Any]", data)]
    return data


def report_findings(findings: Sequence[Diagnostic], *, error: bool = False) -> None:
    """Writes diagnostics with their source locations."""
    stream = sys.stderr if error else sys.stdout
    if findings:
        say(render(findings, colour=coloured(stream)), error=error)


def unwritable(path: str | Path, error: Exception) -> PolicyError:
    """Returns the error (E152) for a file or folder that cannot be written."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return PolicyError.of("E152", f"`{path}` cannot be written: {reason.lower()}")


def write(path: str, content: bytes) -> None:
    """Writes a file.

    Raises:
        PolicyError: It cannot be written (E152).
    """
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise unwritable(path, error) from error


def _with_option_help(finding: Diagnostic) -> Diagnostic:
    """Replaces help about arguments of `simulate` and `apply` by help about the options of the command."""
    if finding.code == "E257" and (name := re.search("`(.+?)`", finding.message)):
        one = f"{name[1]}=0.05" if name[1].replace(".", "").isidentifier() else f"'{name[1]}=0.05'"
        help = f"give its value: `--signal {one}`, or one value per step: `--signal '{name[1]}=[0.05, ...]'`"
    elif finding.code == "E250" and "`sigma`" in finding.message:
        help = "give the sigma of each step: `--sigmas 1.0,0.75,...`"
    else:
        return finding
    return replace(finding, help=help)


def guarded(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Wraps a command so that expected failures end it with a message and an exit code.

    Expected failures are policy errors, a missing optional library, and output that cannot be written.
    """

    @functools.wraps(command)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PolicyError as error:
            findings = error.diagnostics
            if "signals" in kwargs:  # the command simulates, so it has the options of a clock
                findings = [_with_option_help(finding) for finding in findings]
            if kwargs.get("as_json"):
                say(to_json(findings))
            else:
                report_findings(findings, error=True)
            raise SystemExit(exit_code(findings) or FINDINGS) from error
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            say(f'error: `{error.name}` is not installed: pip install "cachepolicy[{extra}]"', error=True)
            raise SystemExit(UNUSABLE) from error
        except BrokenPipeError:
            raise  # click exits silently when the reader closed the pipe
        except OSError as error:
            say(f"error: the output cannot be written: {(error.strerror or str(error)).lower()}", error=True)
            raise SystemExit(UNUSABLE) from error

    return run
