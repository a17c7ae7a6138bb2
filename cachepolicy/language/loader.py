"""Loads policies by name and by path: shipped policies, files of the user, and files that `use` refers to."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeGuard, cast

from cachepolicy._resources import POLICY_SUFFIXES, policy_stem, shipped_policies
from cachepolicy._strict_json import InvalidDocumentError, validate_json
from cachepolicy.errors import Diagnostic, PolicyError, Span, suggestion
from cachepolicy.language import ir
from cachepolicy.language.parser import parse
from cachepolicy.language.semantics import check_names
from cachepolicy.language.sharing import HUB, HubName, fetch, packaged
from cachepolicy.language.source import Source, prepare_source
from cachepolicy.language.vocabulary import STATEMENT_WORDS, TEXT_LIMIT

SHIPPED = "<shipped>/"
"""What the names of shipped files begin with in `Policy.source_name`, so that no path is taken for one."""


# What the text of a policy starts with, and no name or path does.
_STATEMENT = re.compile(rf"\s*(?:{'|'.join(STATEMENT_WORDS)})\s+\S")

_OTHER_NAMES = {
    "firstblockcache": "fbc",
    "firstblock": "fbc",
    "pyramidattentionbroadcast": "pab",
    "fastforwardcaching": "fora",
    "learningtocache": "l2c",
    "textkvcache": "textkv",
}
"""Shipped policies by other names of their methods."""
_NOT_SHIPPED = {
    method.lower().replace("-", ""): method
    for method in (
        "ClusCa", "DiTFastAttn", "DuCa", "LazyDiT", "MeanCache", "SpeCa", "ToCa",
    )
}  # fmt: skip
"""Published methods by their names in lower case."""


def load(source: str | os.PathLike[str] | ir.Policy) -> ir.Policy:
    """Loads a policy.

    Args:
        source: Name of a shipped policy (`"pab"`, `"pab.cp"`) or of one of an installed package (`"acme:fast"`), path
            of a file, name of a file in a hub (`"hf:owner/repo:fast.cp@revision"`), or a `Policy`, which is returned
            unchanged. `.json` files hold the JSON form, `.cp` and `.cachepolicy` files hold the text. A bare name that
            matches both a shipped policy and a file in the working folder is ambiguous; `./pab.cp` selects the file.

    Returns:
        The policy.

    Raises:
        PolicyError: The policy does not exist (E150), the name is ambiguous (E151), the file is unreadable (E152),
            too large (E153) or not the JSON form of a policy (E154), a hub does not give it (E172) or gives another
            content than the name says (E171), or the text is invalid.
    """
    if isinstance(source, ir.Policy):
        return source
    if not isinstance(source, str):
        return _from_path(source)
    if source.startswith(SHIPPED):
        return _shipped(source.removeprefix(SHIPPED))
    if source.startswith(HUB):
        return _from_hub(HubName.parse(source))
    if "\n" in source or (_STATEMENT.match(source) and not is_file(Path(source))):
        message = "this is the text of a policy, and a name or a path is expected"
        raise PolicyError.of("E150", message, help="parse the text first: `cachepolicy.parse(text)`")
    if not _bare(source):
        return read_policy(Path(source), source)
    return _named(source, Path())


def _from_path(source: object) -> ir.Policy:
    if not isinstance(source, os.PathLike):
        kind, help = type(source).__name__, None
        if callable(source) and (hasattr(source, "forward") or hasattr(source, "components")):
            help = "the model is the first argument, the policy the second: `apply(model, policy)`"
        raise PolicyError.of("E150", f"a policy is a name, a path or a `Policy`, not a `{kind}`", help=help)
    name = os.fsdecode(cast("os.PathLike[str]", source))
    return read_policy(Path(name), name)


def _bare(name: str) -> bool:
    return not any(separator in name for separator in ("/", os.sep))


def _named(name: str, folder: Path) -> ir.Policy:
    """Loads a shipped policy, one of an installed package, or a file of `folder` by its bare name."""
    stem = policy_stem(name)
    names = (name, *(stem + suffix for suffix in POLICY_SUFFIXES))
    beside = next((file for file in names if is_file(folder / file)), None)
    if stem in shipped_policies():
        if beside is not None and not _same(folder / beside, shipped_policies()[stem]):
            raise PolicyError.of(
                "E151",
                f"`{name}` is a shipped policy and a file here",
                help=f"`./{beside}` is the file, `{SHIPPED}{stem}.cp` the shipped policy",
            )
        return _shipped(stem)
    if _is_there(folder / name):
        return read_policy(folder / name, name)
    package = packaged(name)
    if package is not None:
        return read_policy(package, name)
    raise PolicyError.of("E150", f"no shipped policy and no file `{name}`", help=_near(stem, folder))


def _near(stem: str, folder: Path) -> str | None:
    for suffix in (*POLICY_SUFFIXES, ".json"):
        if is_file(folder / (stem + suffix)):
            return f"there is a file `./{stem}{suffix}`"
    method = re.sub(r"[^a-z0-9]", "", stem.lower()).removesuffix("config")
    if method in _OTHER_NAMES:
        return f"its name here is `{_OTHER_NAMES[method]}`"
    for name in shipped_policies():
        if method == name.replace("_", ""):
            return f"its name here is `{name}`"
    if method in _NOT_SHIPPED:
        return f"{_NOT_SHIPPED[method]} is not shipped; write it as a policy file, or use one of `cachepolicy list`"
    if ":" in stem:
        return f"no installed package offers policies as `{stem.partition(':')[0]}`; `cachepolicy list` shows all"
    return suggestion(stem, list(shipped_policies())) or "`cachepolicy list` shows the shipped policies"


def _same(path: Path, policy: Traversable) -> bool:
    """Returns whether `path` is the file of the shipped policy itself."""
    return isinstance(policy, Path) and path.resolve() == policy.resolve()


def is_file(path: Path) -> bool:
    """Returns whether `path` is a regular file. A name that the file system rejects is not a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _from_hub(name: HubName) -> ir.Policy:
    content, found = fetch(name)
    shown = str(replace(found, sha256=None))
    is_json = found.file is not None and found.file.endswith(".json")
    policy = _from_json(content, shown) if is_json else parse(content, source=shown)
    return policy.model_copy(update={"source_name": shown})


def _shipped(name: str) -> ir.Policy:
    stem, policies = policy_stem(name), shipped_policies()
    if stem not in policies:
        raise PolicyError.of("E150", f"no shipped policy `{stem}`", help=suggestion(stem, list(policies)))
    return parse(policies[stem].read_bytes(), source=f"{SHIPPED}{policies[stem].name}")


def read_policy(path: Path, shown: str) -> ir.Policy:
    """Reads a policy file. The policy stores its absolute path, which `use` resolves names against.

    Args:
        path: Path of the file.
        shown: Name of the file in diagnostics.

    Returns:
        The policy.

    Raises:
        PolicyError: The file is missing (E150), unreadable (E152) or too large (E153), or its content is invalid.
    """
    content = _content(path, shown)
    policy = _from_json(content, shown) if path.suffix == ".json" else parse(content, source=shown)
    return policy.model_copy(update={"source_name": str(path.absolute())})


def _content(path: Path, shown: str) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise PolicyError.of("E152", f"`{shown}` is a folder", help="a policy is a file")
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError.of("E152", f"`{shown}` is no regular file")
        with path.open("rb") as file:
            content = file.read(TEXT_LIMIT + 1)
    except FileNotFoundError as error:
        near = _near(policy_stem(path.name), path.parent)
        raise PolicyError.of("E150", f"no file `{shown}`", help=near) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError.of("E152", f"`{shown}` cannot be read: {reason.lower()}") from error
    if len(content) > TEXT_LIMIT:
        raise PolicyError.of("E153", f"`{shown}` is too large: a policy has at most {TEXT_LIMIT} bytes")
    return content


def _from_json(content: bytes, shown: str) -> ir.Policy:
    """Parses the JSON form of a policy and applies the checks that apply to a text."""
    try:
        policy = validate_json(content, ir.Policy.model_validate_json)
    except InvalidDocumentError as error:
        raise PolicyError.of("E154", f"`{shown}` holds no policy: {error}") from error
    errors = [replace(finding, source=shown) for finding in check_names(policy) if finding.severity == "error"]
    if errors:
        raise PolicyError(errors)
    return policy


# --- use -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Identity of a policy.

    Attributes:
        key: Unique key of the policy.
        shown: Name that chains of `use` print.
    """

    key: str
    shown: str


def origin(policy: ir.Policy) -> Origin:
    """Returns the origin of a policy: a shipped policy, a file, or a text."""
    name = policy.source_name
    if name is not None and name.startswith(SHIPPED):
        return Origin(name, name.removeprefix(SHIPPED))
    if _is_file_name(name):
        return Origin(os.path.realpath(name), Path(name).name)
    return Origin(f"<text {id(policy)}>", policy.name or name or "<text>")


def load_used(name: str, user: ir.Policy) -> ir.Policy:
    """Loads the policy that `use NAME` refers to.

    It is a shipped policy, one of an installed package, or a file in or below the folder of `user`. Files of a
    repository in a hub use files of the same repository at the same commit.

    Args:
        name: The name in the `use` statement.
        user: The policy that contains the statement.

    Returns:
        The used policy.

    Raises:
        PolicyError: E150 to E154, E172 and E171 as for `load`. E155 if the path is absolute or leaves the folder, if
            it names a hub, or if `user` is a text, which has no folder.
    """
    if "\\" in name:
        raise _outside(name, "folders are separated by `/`")
    if name.startswith(HUB):
        raise _outside(name, "a policy in a hub is loaded by name, and not by another policy")
    folder = _folder(user)
    repository = _repository(user)
    if repository is not None and not (_bare(name) and (policy_stem(name) in shipped_policies() or ":" in name)):
        _refuse_ways_out(name)
        return _from_hub(repository.beside(name))
    if _bare(name) and (folder is None or policy_stem(name) in shipped_policies() or not _is_there(folder / name)):
        return _named(name, folder) if folder is not None else _without_folder(name)
    if folder is None:
        raise _outside(name, "a text has no folder, so it uses shipped policies only")
    _refuse_ways_out(name)
    target = Path(os.path.realpath(folder / name))
    if not target.is_relative_to(os.path.realpath(folder)):
        raise _outside(name, "the link leads out of the policy's folder")
    return read_policy(target, name)


def _without_folder(name: str) -> ir.Policy:
    """Loads a shipped policy or one of an installed package by name."""
    package = packaged(name)
    return _shipped(name) if package is None else read_policy(package, name)


def _refuse_ways_out(name: str) -> None:
    parts = name.split("/")
    if ".." in parts or name.startswith("/") or ":" in parts[0]:
        raise _outside(name, "write a shipped name, or a file beside this policy as `./other.cp`")


def _outside(name: str, help: str) -> PolicyError:
    return PolicyError.of("E155", f"`use` reaches files beside the policy only, not `{name}`", help=help)


def _repository(policy: ir.Policy) -> HubName | None:
    """Returns the name in a hub that a policy was read by, or None."""
    name = policy.source_name
    return HubName.parse(name) if name is not None and name.startswith(HUB) else None


def _folder(policy: ir.Policy) -> Path | None:
    name = policy.source_name
    return Path(name).parent if _is_file_name(name) else None


def _is_file_name(name: str | None) -> TypeGuard[str]:
    """Returns whether `name` is the path of a file. Only `read` sets absolute names."""
    return name is not None and Path(name).is_absolute()


def path_of(source_name: str | None) -> Path | None:
    """Returns the path of the file that `Policy.source_name` refers to, or `None` for a text."""
    if source_name is None or not source_name.startswith(SHIPPED):
        return Path(source_name) if _is_file_name(source_name) else None
    policy_path = shipped_policies().get(policy_stem(source_name.removeprefix(SHIPPED)))
    return policy_path if isinstance(policy_path, Path) else None


def chain(origins: Sequence[Origin]) -> str:
    """Formats a chain of `use` for error messages, as in `a.cp -> b.cp -> a.cp`."""
    return " -> ".join(policy.shown for policy in origins)


# --- places ----------------------------------------------------------------------------------------------


def located(finding: Diagnostic, policy: ir.Policy, span: Span | None) -> Diagnostic:
    """Adds the name and the lines of the policy's text to a diagnostic.

    Args:
        finding: The diagnostic. It is returned unchanged if it has a source.
        policy: The policy that the diagnostic is about.
        span: Location that is used if the diagnostic has none.

    Returns:
        The diagnostic with its location.
    """
    if finding.source is not None:
        return finding
    finding = replace(finding, span=finding.span or span)
    name = policy.source_name
    if policy.text is None or name is None:
        return replace(finding, source=name)
    shown = os.path.relpath(name) if _is_file_name(name) else name
    return _prepared(policy.text, name if shown.startswith("..") else shown).locate(finding)


@lru_cache(maxsize=4)  # a policy may have many findings
def _prepared(text: str, name: str) -> Source:
    return prepare_source(text, name)[0]
