"""Policies of installed packages and of repositories in a hub, which here is a local server."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachepolicy.cli.commands import main
from cachepolicy.errors import PolicyError
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import load
from cachepolicy.language.parser import parse
from cachepolicy.language.sharing import HubName, packaged_policies
from cachepolicy.language.vocabulary import TEXT_LIMIT

FAST = "policy fast\nmatch attention every 3 -> reuse\n"
SLOW = "policy slow\nmatch attention every 2 -> reuse\n"


def code(name: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        load(name)
    return caught.value.diagnostics[0].code


# --- installed packages ----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `acme_policies` with policies below it. To import it is an error."""
    folder = tmp_path / "site"
    files = folder / "acme_policies" / "files"
    files.mkdir(parents=True)
    (folder / "acme_policies" / "__init__.py").write_text("raise RuntimeError('a policy is data')\n")
    (files / "__init__.py").write_text("raise RuntimeError('a policy is data')\n")
    (files / "fast.cp").write_text(FAST)
    (files / "whole.cp").write_text("use './fast.cp'\n")
    (files / "notes.txt").write_text("no policy")
    info = folder / "acme_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[cachepolicy.policies]\nacme = acme_policies.files\ngone = not_there.at_all\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    return files


def test_packages_offer_policies_without_being_imported(package: Path) -> None:
    """Files are found by the entry point, with and without suffix; no module of the package is imported."""
    assert {"acme:fast": package / "fast.cp", "acme:whole": package / "whole.cp"} == packaged_policies()
    assert "fast" == load("acme:fast").name
    assert load("acme:fast") == load("acme:fast.cp")
    assert not {name for name in sys.modules if name.startswith("acme_policies")}


@pytest.mark.usefixtures("package")
def test_policies_use_those_of_packages(tmp_path: Path) -> None:
    """A policy of a package uses files beside it; texts and files use policies of packages by name."""
    assert 1 == len(resolve(load("acme:whole"), {}).rules)
    assert 1 == len(resolve(parse("use 'acme:fast'\n"), {}).rules)
    (tmp_path / "mine.cp").write_text("use 'acme:fast.cp'\n")
    assert 1 == len(resolve(load("./mine.cp"), {}).rules)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("acme:fats", "acme:fast"),
        ("other:fast", "no installed package offers policies as `other`"),
        ("gone:fast", "`cachepolicy list`"),
    ],
)
def test_a_name_that_no_package_has_says_what_there_is(name: str, help: str) -> None:
    """The nearest policy of the package, or that there is no such package."""
    with pytest.raises(PolicyError, match="E150") as caught:
        load(name)
    assert help in str(caught.value.diagnostics[0].help)


@pytest.mark.usefixtures("package")
def test_the_list_shows_policies_of_packages() -> None:
    """`cachepolicy list` shows them by the name that loads them; one that is no policy is shown with its error."""
    shown = CliRunner().invoke(main, ["list"])
    assert (0, True) == (shown.exit_code, "acme:fast" in shown.output)
    names = [row["name"] for row in json.loads(CliRunner().invoke(main, ["list", "--json"]).output)]
    assert ["acme:fast", "acme:whole"] == [name for name in names if ":" in name]


def test_one_faulty_policy_of_a_package_does_not_hide_the_others(package: Path) -> None:
    """It is listed with what is wrong."""
    (package / "faulty.cp").write_text("match -> \n")
    shown = CliRunner().invoke(main, ["list"])
    assert 0 == shown.exit_code
    assert "acme:fast" in shown.output
    assert "error[E" in next(line for line in shown.output.splitlines() if line.startswith("acme:faulty"))


# --- repositories of a hub -------------------------------------------------------------------------------


@dataclass
class Hub:
    """A hub with one repository `acme/cp`: its files by commit, and its branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    branches: dict[str, str] = field(default_factory=dict[str, str])
    requests: list[str] = field(default_factory=list[str])
    down: bool = False

    def push(self, number: int, **files: str) -> str:
        """Add a commit with these files (`fast` is `fast.cp`) to the branch `main`, and return it."""
        commit = f"{number:040x}"
        self.commits[commit] = {f"{name}.cp": text.encode() for name, text in files.items()}
        self.branches["main"] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        if self.down:
            return 503, {}, b""
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "models", "acme", "cp"]:
            commit = self.commit(parts[5].partition("?")[0])  # .../tree/REVISION or .../revision/REVISION
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            files = self.commits[commit]
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            info = {"id": "acme/cp", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {}, json.dumps(tree if parts[4] == "tree" else info).encode()
        if parts[:3] == ["acme", "cp", "resolve"]:
            commit = self.commit(parts[3])
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            content = self.commits[commit].get("/".join(parts[4:]))
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def commit(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which is read from the environment on import
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = served.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 (the server's own name)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    server.shutdown()
    server.server_close()


def test_a_file_of_a_repository_is_loaded_by_branch_and_by_commit(hub: Hub) -> None:
    """A branch gives its present state, a commit always the same; the policy knows its commit."""
    first = hub.push(1, fast=FAST)
    old = load("hf:acme/cp:fast.cp")
    hub.push(2, fast=SLOW)
    assert ("fast", f"hf:acme/cp:fast.cp@{first}") == (old.name, old.source_name)
    assert "slow" == load("hf:acme/cp:fast.cp").name
    assert "slow" == load("hf:acme/cp:fast.cp@main").name
    assert old == load(f"hf:acme/cp:fast.cp@{first}")


def test_the_only_policy_of_a_repository_needs_no_name(hub: Hub) -> None:
    """Of several it is `policy.cp`, else the name has to say which."""
    hub.push(1, fast=FAST)
    assert "fast" == load("hf:acme/cp").name
    hub.push(2, fast=FAST, policy=SLOW)
    assert "slow" == load("hf:acme/cp").name
    hub.push(3, fast=FAST, slow=SLOW)
    with pytest.raises(PolicyError, match=r"has 2 policy files(.|\n)*fast\.cp, slow\.cp") as caught:
        load("hf:acme/cp")
    assert "E172" == caught.value.diagnostics[0].code


def test_a_digest_pins_the_bytes(hub: Hub) -> None:
    """The same bytes are taken, others are refused."""
    hub.push(1, fast=FAST)
    pinned = f"hf:acme/cp:fast.cp@main#sha256={hashlib.sha256(FAST.encode()).hexdigest()}"
    assert "fast" == load(pinned).name
    hub.push(2, fast=FAST.replace("3", "9"))
    assert "E171" == code(pinned)


def test_files_of_a_repository_use_each_other_at_one_commit(hub: Hub) -> None:
    """`use` reads the file beside the policy from the same commit, and nothing outside the repository."""
    first = hub.push(1, whole="use './fast.cp'\n", fast=FAST)
    hub.push(2, whole="use './fast.cp'\n", fast="match attention every 3 -> reuse\nmatch feedforward -> compute\n")
    assert 1 == len(resolve(load(f"hf:acme/cp:whole.cp@{first}"), {}).rules)
    assert 2 == len(resolve(load("hf:acme/cp:whole.cp"), {}).rules)
    for name in ("../other.cp", "/etc/passwd", "hf:acme/cp:fast.cp"):
        hub.push(3, whole=f"use '{name}'\n", fast=FAST)
        with pytest.raises(PolicyError, match="E155"):
            resolve(load("hf:acme/cp:whole.cp"), {})
    with pytest.raises(PolicyError, match="E155"):
        resolve(parse("use 'hf:acme/cp:fast.cp'\n"), {})


def test_the_cache_serves_where_the_hub_does_not(hub: Hub) -> None:
    """A commit in the cache needs no request; of a branch the cached state is taken; what was never read fails."""
    first = hub.push(1, fast=FAST, slow=SLOW)
    load("hf:acme/cp:fast.cp")
    hub.requests.clear()
    load(f"hf:acme/cp:fast.cp@{first}")
    assert [] == hub.requests
    hub.down = True
    assert "fast" == load("hf:acme/cp:fast.cp").name
    assert "fast" == load("hf:acme/cp").name
    assert "E172" == code("hf:acme/cp:slow.cp")


@pytest.mark.parametrize(
    "name",
    [
        "hf:acme", "hf:", "hf:acme/cp/fast.cp", "hf:acme/cp:../fast.cp", "hf:acme/cp:/etc/fast.cp",
        "hf:acme/cp:model.bin", "hf:acme/cp:fast.cp#sha256=12", "hf:acme/cp:fast.cp@", "hf:acme/cp:a\\b.cp",
    ],
)  # fmt: skip
def test_names_of_another_form_are_refused(name: str) -> None:
    """Nothing is requested for a name that cannot be one of a policy."""
    assert "E150" == code(name)


@pytest.mark.parametrize(
    "name", ["hf:acme/cp:gone.cp", "hf:acme/cp:fast.cp@gone", "hf:acme/gone:fast.cp", "hf:acme/gone"]
)
def test_what_a_hub_does_not_have_is_named(hub: Hub, name: str) -> None:
    """No file, no revision, no repository."""
    hub.push(1, fast=FAST)
    assert "E172" == code(name)


def test_a_file_that_is_too_large_is_not_downloaded(hub: Hub) -> None:
    """Its size is asked for first."""
    hub.push(1, fast="#" * (TEXT_LIMIT + 1))
    assert "E153" == code("hf:acme/cp:fast.cp")
    assert 1 == len(hub.requests)


def test_a_faulty_policy_is_reported_with_the_name_that_leads_to_it(hub: Hub) -> None:
    """The text is checked like any file."""
    first = hub.push(1, fast="match attention every -> reuse\n")
    with pytest.raises(PolicyError) as caught:
        load("hf:acme/cp:fast.cp")
    assert f"hf:acme/cp:fast.cp@{first}" == caught.value.diagnostics[0].source


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `huggingface_hub` is optional."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PolicyError, match=r"cachepolicy\[hub\]") as caught:
        load("hf:acme/cp:fast.cp")
    assert "E172" == caught.value.diagnostics[0].code


def test_names_are_written_as_they_are_read() -> None:
    """`str` is the inverse of `parse`."""
    for name in ("hf:a/b", "hf:a/b:c/d.cp", "hf:a/b@main", f"hf:a/b:c.cp@{'0' * 40}#sha256={'0' * 64}"):
        assert name == str(HubName.parse(name))
