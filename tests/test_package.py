"""What is shipped and what is public: the exports, what importing costs, and that every kind of install is whole."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cachepolicy
from cachepolicy._resources import shipped, shipped_policies

ROOT = Path(__file__).parents[1]
EXPORTS = [
    "CacheMixin",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "Policy",
    "PolicyError",
    "PyramidAttentionBroadcastConfig",
    "Run",
    "RunOptions",
    "__version__",
    "apply",
    "apply_faster_cache",
    "apply_first_block_cache",
    "apply_pyramid_attention_broadcast",
    "cache_context",
    "calibrate",
    "compare",
    "convert",
    "disable_cache",
    "enable_cache",
    "explain",
    "format",
    "is_cache_enabled",
    "load",
    "load_trace",
    "parse",
    "plan",
    "remove",
    "reset_stateful_cache",
    "simulate",
    "tune",
    "tune_levels",
    "tune_threshold",
]


def run_python(code: str, *, python: str = sys.executable, **options: object) -> str:
    """What the code prints, in a fresh process that runs elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= options.pop("environment", {})
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd="/", env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the public surface


def test_exports_are_pinned() -> None:
    """Exactly these names are public, all of them are there, and `dir` shows them."""
    assert EXPORTS == cachepolicy.__all__
    assert EXPORTS == dir(cachepolicy)
    assert [] == [name for name in EXPORTS if not hasattr(cachepolicy, name)]


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that is not there is missing in the usual way, so that `hasattr` and `from` work."""
    with pytest.raises(AttributeError, match="simulat"):
        cachepolicy.simulat  # noqa: B018


def test_the_package_is_an_ordinary_module() -> None:
    """No module of the package has the name of a public function, so importing one never replaces the function."""
    modules = {name.removesuffix(".py") for name in os.listdir(ROOT / "cachepolicy")}
    assert set() == modules & set(EXPORTS)


def test_the_version_is_that_of_the_project() -> None:
    """`__version__` is what pyproject.toml says, installed or not."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert stated == cachepolicy.__version__


def test_the_logger_is_silent_by_default() -> None:
    """A library does not write to the user's terminal: the logger has a handler that drops everything."""
    handlers = logging.getLogger("cachepolicy").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)


# --- what importing costs


def test_importing_brings_nothing_heavy() -> None:
    """`import cachepolicy` imports neither torch nor the parser nor pydantic."""
    code = "import sys, cachepolicy; print(*({'torch', 'diffusers', 'lark', 'pydantic', 'click'} & set(sys.modules)))"
    assert "" == run_python(code, environment={"PYTHONPATH": str(ROOT)})


def test_policies_are_handled_without_torch() -> None:
    """Parsing, checking, formatting, simulating and explaining work where torch cannot be imported at all."""
    code = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
import cachepolicy
from cachepolicy.reports import text as report_text
from cachepolicy.planning import check
policy = cachepolicy.load("pab")
assert cachepolicy.parse(cachepolicy.format(policy)) == policy
assert not [each for each in check.check("pab") if each.severity == "error"]
assert check.run_expectations("pab").hold
schedule = cachepolicy.simulate("pab", steps=10)
assert report_text.draw(schedule) and str(cachepolicy.explain("pab", "transformer_blocks.0.attn1@4", steps=10))
assert cachepolicy.plan("pab").sites
"""
    assert "" == run_python(code, environment={"PYTHONPATH": str(ROOT)})


def test_the_commands_need_no_torch() -> None:
    """Every command but `demo` starts without importing torch."""
    code = """
import sys
from click.testing import CliRunner
from cachepolicy.cli.commands import main
for arguments in ["list"], ["check", "pab"], ["test", "pab"], ["plan", "pab"], ["show", "pab"]:
    assert CliRunner().invoke(main, arguments).exit_code == 0, arguments
print("torch" in sys.modules)
"""
    assert "False" == run_python(code, environment={"PYTHONPATH": str(ROOT)})


def test_without_torch_the_extra_is_named() -> None:
    """Where torch is not installed, what needs it says how to install it; what needs no model works."""
    code = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
import cachepolicy
from cachepolicy.diffusers import FirstBlockCacheConfig, enable_cache
for attempt in (
    lambda: cachepolicy.apply(object(), "pab"),
    lambda: cachepolicy.remove(object()),
    lambda: cachepolicy.Run,
    lambda: enable_cache(object(), FirstBlockCacheConfig()),
):
    try:
        attempt()
    except ModuleNotFoundError as error:
        assert error.name == "torch" and 'pip install "cachepolicy[torch]"' in str(error), error
    else:
        raise AssertionError
assert cachepolicy.plan("pab").sites
"""
    assert "" == run_python(code, environment={"PYTHONPATH": str(ROOT)})


def test_torch_is_an_extra() -> None:
    """The smallest install brings no torch; the extras that use it do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert [] == [each for each in project["dependencies"] if each.startswith(("torch", "diffusers"))]
    extras = project["optional-dependencies"]
    assert ["torch>=2.4"] == extras["torch"]
    assert any(each.startswith("torch>=") for each in extras["diffusers"])


# --- what is shipped

WHOLE = """
import cachepolicy
from cachepolicy.planning.check import run_expectations
from cachepolicy._resources import documentation, shipped, shipped_policies, template
assert cachepolicy.__version__
assert all(map(template, ("report.html", "macros.html", "notebook.html", "report.css", "report.js")))
assert shipped("data").joinpath("emoji-dit", "config.json").is_file()
assert shipped("data").joinpath("emoji-dit", "diffusion_pytorch_model.safetensors").is_file()
assert shipped("data").joinpath("emoji-flux", "model_index.json").is_file()
assert shipped("data").joinpath("emoji-flux", "transformer", "diffusion_pytorch_model.safetensors").is_file()
assert documentation("language.md#when") and documentation("diagnostics/E001.md")
for name in shipped_policies():
    assert run_expectations(name).hold
print(*shipped_policies())
"""
"""Uses the grammar, every policy and the data of an installation."""


def test_a_plain_checkout_is_whole(tmp_path: Path) -> None:
    """A copy of the files finds its grammar, policies and data without being installed."""
    for folder in ("cachepolicy", "grammars", "policies", "data", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    assert " ".join(shipped_policies()) == run_python(WHOLE, environment={"PYTHONPATH": str(tmp_path)})


def test_every_file_of_the_data_has_its_licence() -> None:
    """Data that is not ours alone carries its licences with it."""
    assert all((each / "LICENSE.md").is_file() for each in Path(str(shipped("data"))).iterdir() if each.is_dir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution and of the wheel that is built from it, as `build` makes them."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def installed(tmp_path: Path, *what: str) -> str:
    """The Python of a new environment with this installed in it; its dependencies are those of the environment here."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    outer = run_python("import sysconfig; print(sysconfig.get_path('purelib'))")
    inner = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))", python=python))
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", *what]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": outer})
    (inner / "outer.pth").write_text(outer)
    return python


@pytest.mark.deep
def test_a_wheel_is_whole(built: Path, tmp_path: Path) -> None:
    """The wheel holds the package with its grammar, policies, data and type marker, and nothing else."""
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cachepolicy"} == {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert "cachepolicy/py.typed" in names
    assert [] == [name for name in names if "__pycache__" in name or "/tests/" in name]
    python = installed(tmp_path, str(wheel))
    assert " ".join(shipped_policies()) == run_python(WHOLE, python=python)
    assert str(tmp_path) in run_python("import cachepolicy; print(cachepolicy.__file__)", python=python)


@pytest.mark.deep
def test_a_source_distribution_is_whole(built: Path, tmp_path: Path) -> None:
    """The source distribution installs, and the result is the same."""
    (source,) = built.glob("*.tar.gz")
    python = installed(tmp_path, str(source))
    assert " ".join(shipped_policies()) == run_python(WHOLE, python=python)
    assert str(tmp_path) in run_python("import cachepolicy; print(cachepolicy.__file__)", python=python)


@pytest.mark.deep
def test_an_editable_installation_is_live(built: Path, tmp_path: Path) -> None:
    """An editable installation reads the policies of the checkout, also those that were added since."""
    assert built.is_dir()
    checkout = tmp_path / "checkout"
    subprocess.run(["tar", "-xf", *map(str, built.glob("*.tar.gz")), "-C", str(tmp_path)], check=True)
    next(tmp_path.glob("cachepolicy-*")).rename(checkout)
    python = installed(tmp_path, "-e", str(checkout))
    (checkout / "policies" / "added.cp").write_text("match attention every 2 -> reuse\n")
    assert "added" in run_python(WHOLE, python=python).split()
