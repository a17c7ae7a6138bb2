"""Policies of other people: in installed packages, and in repositories of a Hugging Face hub.

A policy is data wherever it comes from: no code of a package or of a repository is imported or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path, PurePosixPath
from typing import Any

from cachepolicy._resources import POLICY_SUFFIXES, policy_stem
from cachepolicy.errors import PolicyError, counted, suggestion
from cachepolicy.language.vocabulary import TEXT_LIMIT

# --- installed packages ----------------------------------------------------------------------------------

GROUP = "cachepolicy.policies"
"""The group of entry points by which packages offer policies: `acme = "acme_policies.files"`."""


def packaged_policies() -> dict[str, Path]:
    """Returns the policy files of installed packages by name, in alphabetical order: `{"acme:fast": .../fast.cp}`.

    The value of an entry point is the dotted name of the package that holds the files. It is located, not imported.
    """
    return dict(
        sorted(
            (f"{entry.name}:{file.stem}", file)
            for entry in entry_points(group=GROUP)
            for folder in _folders(entry)
            if folder.is_dir()
            for file in folder.iterdir()
            if file.suffix in POLICY_SUFFIXES
        )
    )


def packaged(name: str) -> Path | None:
    """Returns the file of a policy `PACKAGE:NAME`, or None if no installed package offers policies as `PACKAGE`.

    Args:
        name: The name, with or without the suffix of a policy file.

    Raises:
        PolicyError: The package has no such policy (E150).
    """
    package, colon, policy = name.partition(":")
    if not colon or not entry_points(group=GROUP, name=package):
        return None
    policies = packaged_policies()
    known = f"{package}:{policy_stem(policy)}"
    if known not in policies:
        names = [name for name in policies if name.startswith(f"{package}:")]
        help = suggestion(known, names) or "`cachepolicy list` shows those that it has"
        raise PolicyError.of("E150", f"the installed package `{package}` has no policy `{policy}`", help=help)
    return policies[known]


def _folders(entry: EntryPoint) -> Iterator[Path]:
    """Yields the folders of the package that an entry point names."""
    outer, *inner = entry.value.split(".")
    try:
        # To find a module of a package imports the package, so only the outermost one is looked up.
        spec = importlib.util.find_spec(outer)
    except (ImportError, ValueError):
        return
    for location in (spec and spec.submodule_search_locations) or ():
        yield Path(location, *inner)


# --- repositories of a hub -------------------------------------------------------------------------------

HUB = "hf:"
"""What the names of policies in a hub begin with."""

_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^@#:\\]+))?(?:@(?P<revision>[\w./-]+))?(?:#sha256=(?P<sha256>\w+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORM = "hf:OWNER/REPOSITORY[:FILE][@REVISION][#sha256=DIGEST]"
_DEFAULT = "policy.cp"
"""The file that is meant where a repository has several and the name gives none."""


@dataclass(frozen=True, slots=True)
class HubName:
    """Name of a policy file in a repository.

    Attributes:
        repo: Owner and name of the repository.
        file: Path of the file in the repository, or None for the only policy file or `policy.cp`.
        revision: Branch, tag or commit, or None for the default branch.
        sha256: Digest that the bytes of the file must have, or None.
    """

    repo: str
    file: str | None = None
    revision: str | None = None
    sha256: str | None = None

    @staticmethod
    def parse(name: str) -> HubName:
        """Parses `hf:owner/repo[:file.cp][@revision][#sha256=...]`.

        Raises:
            PolicyError: The name has another form (E150).
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise PolicyError.of("E150", f"`{name}` does not name a policy in a hub", help=f"its form is `{_FORM}`")
        parsed = HubName(**match.groupdict())
        if parsed.file is not None:
            path = PurePosixPath(parsed.file)
            if path.is_absolute() or ".." in path.parts or path.suffix not in (*POLICY_SUFFIXES, ".json"):
                help = f"policy files end in {', '.join(POLICY_SUFFIXES)} or .json"
                raise PolicyError.of("E150", f"`{parsed.file}` is no policy file of a repository", help=help)
        if parsed.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", parsed.sha256):
            raise PolicyError.of("E150", "a SHA-256 digest has 64 hexadecimal digits in lower case")
        return parsed

    def __str__(self) -> str:
        parts = [HUB, self.repo]
        parts += [f":{self.file}"] if self.file else []
        parts += [f"@{self.revision}"] if self.revision else []
        parts += [f"#sha256={self.sha256}"] if self.sha256 else []
        return "".join(parts)

    def beside(self, name: str) -> HubName:
        """Returns the name of a file given by its path from the folder of this file, at the same revision."""
        assert self.file is not None
        return HubName(self.repo, str(PurePosixPath(self.file).parent / name), self.revision)


def fetch(name: HubName) -> tuple[bytes, HubName]:
    """Reads a policy file of a repository, from the cache of `huggingface_hub` where it is there.

    A file at a commit is read from the cache without a request. At a branch or tag the hub is asked first; if it cannot
    be reached, the cached state of the branch is used. The variables of `huggingface_hub` apply: `HF_ENDPOINT`,
    `HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_TOKEN`.

    Args:
        name: Name of the file.

    Returns:
        The bytes of the file, and its name with its file, commit and digest filled in.

    Raises:
        PolicyError: `huggingface_hub` is not installed, or the file cannot be had (E172); the file is too large
            (E153); its digest is another (E171).
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        help = "pip install 'cachepolicy[hub]'"
        raise PolicyError.of("E172", f"`{name}` needs the package `huggingface_hub`", help=help) from error
    hub = _Hub(huggingface_hub, errors, name)
    file = name.file or hub.only_file()
    path = hub.path(file)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    # The cache has a folder for each commit: `snapshots/COMMIT/FILE`.
    commit = path.parts[-1 - len(PurePosixPath(file).parts)]
    found = replace(name, file=file, revision=commit if _COMMIT.fullmatch(commit) else name.revision, sha256=digest)
    if name.sha256 not in (None, digest):
        help = f"compare the two files before you use this one; its name is `{found}`"
        raise PolicyError.of("E171", f"`{replace(name, sha256=None)}` has another digest than its name says", help=help)
    return content, found


class _Hub:
    """Access to the repository of one policy through `huggingface_hub`."""

    def __init__(self, library: Any, errors: Any, name: HubName) -> None:
        self._library, self._errors, self._name = library, errors, name
        # The library reads the variables when it is imported, which may be before they were set.
        self._endpoint = os.environ.get("HF_ENDPOINT")
        self._place = {"repo_id": name.repo, "revision": name.revision, "cache_dir": os.environ.get("HF_HUB_CACHE")}

    def path(self, file: str) -> Path:
        """Returns the path of a file in the cache, after a download where one is needed."""
        if _COMMIT.fullmatch(self._name.revision or ""):
            cached = self._library.try_to_load_from_cache(filename=file, **self._place)
            if isinstance(cached, str):
                return Path(cached)
        url = self._library.hf_hub_url(self._name.repo, file, revision=self._name.revision, endpoint=self._endpoint)

        def download(offline: bool) -> str:
            if not offline:
                size = self._library.get_hf_file_metadata(url).size
                if size is None or size > TEXT_LIMIT:
                    message = f"`{self._name}` is too large: a policy has at most {TEXT_LIMIT} bytes"
                    raise PolicyError.of("E153", message)
            return self._library.hf_hub_download(
                filename=file, endpoint=self._endpoint, local_files_only=offline, **self._place
            )

        return Path(self._ask(download))

    def only_file(self) -> str:
        """Returns the policy file that is meant where the name gives none."""

        def names(offline: bool) -> list[str]:
            if offline:
                folder = Path(self._library.snapshot_download(local_files_only=True, **self._place))
                return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
            api = self._library.HfApi(endpoint=self._endpoint)
            return api.list_repo_files(self._name.repo, revision=self._name.revision)

        files = sorted(file for file in self._ask(names) if file.endswith(POLICY_SUFFIXES))
        if _DEFAULT in files or len(files) == 1:
            return _DEFAULT if _DEFAULT in files else files[0]
        shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        help = f"name one of them: {shown}" if files else f"policy files end in {', '.join(POLICY_SUFFIXES)}"
        raise PolicyError.of("E172", f"`{self._name}` has {counted(len(files), 'policy file')}", help=help)

    def _ask(self, request: Any) -> Any:
        """Returns what a request gives, or what the cache gives if the hub cannot be reached.

        Args:
            request: A function of whether to use the cache alone.
        """
        errors = self._errors
        missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
        try:
            return request(False)
        except PolicyError:
            raise
        except Exception as error:  # which library raises for a failed connection depends on the version
            reason = " ".join(str(error).split("\n\n")[0].split())[:200]
            if isinstance(error, missing) and not isinstance(error, errors.LocalEntryNotFoundError):
                help = "a private repository needs a token: `hf auth login`, or the variable `HF_TOKEN`"
                raise PolicyError.of("E172", f"no policy `{self._name}`: {reason}", help=help) from error
            try:
                return request(True)
            except Exception:  # noqa: BLE001 (for the same reason)
                help = "it is not in the cache either"
                raise PolicyError.of("E172", f"`{self._name}` cannot be read: {reason}", help=help) from error
