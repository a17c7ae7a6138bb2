"""Predictors of other packages: found by their entry point, imported where a policy names them, checked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from cachepolicy.errors import PolicyError
from cachepolicy.language import installed_predictors
from cachepolicy.language.linker import resolve
from cachepolicy.language.parser import parse
from cachepolicy.planning.history_spec import history_depth
from cachepolicy.planning.predictors import TOO_LARGE, coefficients, weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "predictor_package"


def install(folder: Path, module: str, code: str, *names: str) -> None:
    """Lays a package with predictors into a folder, as an installer would."""
    (folder / f"{module}.py").write_text(dedent(code))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = {module}:{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[{installed_predictors.GROUP}]\n{entries}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of modules."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = installed_predictors._loaded  # pyright: ignore[reportPrivateUsage]
    loaded.cache_clear()
    yield tmp_path
    loaded.cache_clear()
    for module in [name for name, one in sys.modules.items() if str(tmp_path) in str(getattr(one, "__file__", ""))]:
        del sys.modules[module]


@pytest.fixture
def example(folder: Path) -> Path:
    """The example of the documentation, installed."""
    code = (EXAMPLE / "cachepolicy_damped.py").read_text()
    install(folder, "cachepolicy_damped", code, "damped")
    return folder


def codes(caught: pytest.ExceptionInfo[PolicyError]) -> list[str]:
    return [finding.code for finding in caught.value.diagnostics]


@pytest.mark.usefixtures("example")
def test_a_policy_names_an_installed_predictor() -> None:
    """It is checked, and its weights are those of the function."""
    policy = parse('match attention every 4 -> predict damped(damping: 1 / age, along: "t")')
    (rule,) = resolve(policy).rules
    assert 2 == history_depth(rule.action)  # pyright: ignore[reportArgumentType]
    found = coefficients("damped", [4, 2], 6, {"damping": 0.5, "along": "t"})
    assert (1.375, -0.375) == pytest.approx(found)
    assert (1.0,) == coefficients("damped", [4], 6, {"damping": 0.5})


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("", "E108"), ("damping: true", "E111"), ("damping: 1, order: 1", "E108"), ('damping: 1, along: "time"', "E124")],
)
def test_its_arguments_are_checked(arguments: str, code: str) -> None:
    """By the parameters of the function."""
    with pytest.raises(PolicyError) as caught:
        parse(f"match attention every 4 -> predict damped({arguments})")
    assert [code] == codes(caught)


@pytest.mark.usefixtures("example")
def test_the_package_is_imported_only_where_a_policy_names_it() -> None:
    """Other policies, other unknown names and the list of names leave it alone."""
    parse("match attention every 4 -> predict newton(order: 2)")
    assert "damped" in installed_predictors.installed_names()
    assert "cachepolicy_damped" not in sys.modules
    with pytest.raises(PolicyError, match="did you mean `damped`"):
        parse("match attention every 4 -> predict dampd(damping: 1)")
    assert "cachepolicy_damped" not in sys.modules
    parse("match attention every 4 -> predict damped(damping: 1)")
    assert "cachepolicy_damped" in sys.modules


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("selector", ["attention", "blocks[1:]", "model"])
def test_the_engine_answers_with_it(selector: str) -> None:
    """A trend that is not damped is linear extrapolation."""
    torch = pytest.importorskip("torch")
    import cachepolicy
    from cachepolicy.testing.models import Toy, inputs, sample

    found = list[Any]()
    for predictor in ("damped(damping: 1)", "taylor(order: 1)"):
        policy = parse(f"match {selector} every 3 -> predict {predictor}")
        with torch.no_grad(), cachepolicy.apply(Toy().build(), policy) as run:
            found.append(
                torch.stack(list(sample(run.target, [900.0 - 100 * step for step in range(8)], *inputs(Toy()))))
            )
            assert run.trace is not None
            assert "R" in next(iter(run.trace.rows().values()))
    assert torch.allclose(*found, atol=1e-5)


def test_an_unknown_name_says_what_to_install() -> None:
    """With the source that the policy names."""
    with pytest.raises(PolicyError) as caught:
        parse('source "https://example.org/kalman"\nmatch attention -> predict kalman(noise: 1)')
    (finding,) = caught.value.diagnostics
    assert "E107" == finding.code
    assert "install the package" in (finding.help or "")
    assert "https://example.org/kalman" in (finding.help or "")


BROKEN = """
import math
def few(places, place):
    return [1.0]
def words(places, place):
    return ["1"] * len(places)
def nothing(places, place):
    return [math.nan] * len(places)
def divides(places, place):
    return [1 / 0] * len(places)
def fails(places, place):
    raise RuntimeError("no")
def takes(places):
    return [1.0]
def anything(places, place, **more):
    return [1.0]
def listed(places, place, *, values: list):
    return [1.0]
def deep(places, place):
    return [1.0]
deep.results = 99
def linear(places, place, *, weight: float):
    return [0.0] * len(places)
"""
NAMES = ("few", "words", "nothing", "divides", "fails", "takes", "anything", "listed", "deep", "linear", "missing")


@pytest.fixture
def broken(folder: Path) -> Path:
    install(folder, "broken_predictors", BROKEN, *NAMES)
    return folder


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["takes", "anything", "listed", "deep", "missing"])
def test_a_function_that_is_no_predictor_is_refused(name: str) -> None:
    """When the policy is read, with the name of the package."""
    with pytest.raises(PolicyError, match=r"broken_predictors 1\.0") as caught:
        parse(f"match attention every 4 -> predict {name}()")
    assert ["E170"] == codes(caught)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["few", "words", "fails"])
def test_faulty_weights_are_refused(name: str) -> None:
    """Another number of weights than of results, values that are no numbers, and a failure name the package."""
    with pytest.raises(PolicyError, match=r"broken_predictors 1\.0") as caught:
        weights(name, [4, 2], 6, {})
    assert ["E170"] == codes(caught)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["nothing", "divides"])
def test_weights_that_are_not_finite_make_the_site_compute(name: str) -> None:
    """They stand for an answer that is too large, as those of any predictor."""
    assert TOO_LARGE == weights(name, [4, 2], 6, {})


@pytest.mark.usefixtures("broken")
def test_the_predictors_of_the_language_are_not_replaced() -> None:
    """A package with a predictor `linear` changes nothing."""
    assert "linear" not in installed_predictors.installed_names()
    assert (1.5, -0.5) == coefficients("linear", [4, 2], 6, {"weight": 0.5})


def test_the_example_is_installed_and_used_without_torch(tmp_path: Path) -> None:
    """`pip install` of the example, then a check and a plan in a process that has no torch."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source")  # building leaves files in it
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot build it here: {done.stderr.strip().splitlines()[-1]}")
    code = f"""
        import sys
        sys.path.insert(0, {str(target)!r})
        sys.modules["torch"] = None
        import cachepolicy
        policy = cachepolicy.parse("match attention every 3 -> predict damped(damping: 0.8)")
        print(cachepolicy.plan(policy).sites[0].name)
        """
    ran = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False)
    assert ran.stdout.strip(), ran.stderr
