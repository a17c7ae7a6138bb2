"""The commands: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cachepolicy
from cachepolicy.cli import output
from cachepolicy.cli.commands import main
from cachepolicy.language import ir
from cachepolicy.language.parser import parse
from cachepolicy.planning import module_tree

GOOD = 'match "attn1$" every 2 -> reuse\n\nexpect "attn1$" over 4 steps: C R C R\n'
UGLY = 'match   "attn1$"   every 2->reuse # why\n'
BROKEN = 'match "attn1$" evry 2 -> reuse\nmatch "nowhere$" every 2 -> reuse\n'
UNFULFILLED = 'match "attn1$" every 2 -> reuse\nexpect "attn1$" over 4 steps: C R R R\n'
ATTENTION = "transformer_blocks.0.attn1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in a folder of its own; names of `files` are written there first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments, stdin=None, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.cp").write_bytes(text if isinstance(text, bytes) else text.encode())
        result = CliRunner().invoke(main, [str(each) for each in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


# --- check -----------------------------------------------------------------------------------------------


def test_check_of_a_sound_policy(run):
    """A shipped name, a path and standard input are fine alike."""
    result = run("check", "pab", "./good.cp", "-", stdin=GOOD, good=GOOD)
    assert "pab: fine\n./good.cp: fine\n-: fine\n" == result.stdout
    assert 0 == result.exit_code


def test_check_reports_all_files(run):
    """Every file's errors are told with their places, the sound files too, and the exit code is 1."""
    result = run("check", "bad.cp", "good.cp", "worse.cp", bad=BROKEN, good=GOOD, worse="match\n")
    assert "bad.cp:1:16" in result.stdout
    assert "did you mean `every`" in result.stdout
    assert "worse.cp:1" in result.stdout
    assert "good.cp: fine" in result.stdout
    assert 1 == result.exit_code


def test_check_of_nothing_readable(run):
    """A file that is not there is exit code 2, and the shipped names are offered."""
    result = run("check", "pap")
    assert "no shipped policy and no file `pap`" in result.stdout
    assert "did you mean `pab`" in result.stdout
    assert 2 == result.exit_code


def test_check_as_json(run):
    """Findings are a list of objects with code, place and help."""
    result = run("check", "--json", "-", stdin=BROKEN)
    findings = json.loads(result.stdout)
    assert (1, "<stdin>") == (findings[0]["span"]["line"], findings[0]["source"])
    assert 1 == result.exit_code
    assert [] == json.loads(run("check", "--json", "pab").stdout)


def test_warnings_are_no_failure(run):
    """A doubtful rule is reported, and the exit code stays 0."""
    twice = 'match "a" every 2 -> reuse\nmatch "a" every 3 -> reuse\n'
    result = run("check", "twice.cp", twice=twice)
    assert "warning[W510]" in result.stdout
    assert 0 == result.exit_code


@pytest.mark.parametrize("text", ["", "\ufeffmatch model every 2 -> reuse\r\n", "match\tmodel\n\tevery 2 -> reuse"])
def test_check_takes_what_editors_write(run, text):
    """Empty files, a byte order mark, CRLF and tabs are fine."""
    assert 0 == run("check", "-", stdin=text).exit_code


@pytest.mark.parametrize("junk", [b"\x00\xff\xfe", b"\xff" * 10, b"(" * 10_000, "münze".encode("latin-1")])
def test_junk_is_an_error_and_no_traceback(run, junk):
    """Any bytes are answered by a finding."""
    result = run("check", "junk.cp", junk=junk)
    assert "error[E" in result.stdout
    assert 1 == result.exit_code


# --- colour ----------------------------------------------------------------------------------------------


class _Terminal:
    def __init__(self, *, is_terminal):
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_only_where_it_is_seen_and_wanted(monkeypatch, is_terminal, environment, expected):
    """A terminal has colour unless `NO_COLOR` says otherwise; a pipe has none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert expected is output.coloured(_Terminal(is_terminal=is_terminal))


@pytest.mark.parametrize("command", [("check", "bad.cp"), ("plan", "bad.cp"), ("plan", "pab")])
def test_colour_reaches_what_is_printed(run, monkeypatch, command):
    """With colour there are escapes, without there are none."""
    assert "\x1b" not in run(*command, bad=BROKEN).output
    monkeypatch.setattr(output, "coloured", lambda _: True)
    assert "\x1b" in run(*command, bad=BROKEN).output


# --- fmt -------------------------------------------------------------------------------------------------


def test_fmt_rewrites_a_file_once(run, tmp_path):
    """The file holds the canonical text with its comments; a second run changes nothing."""
    result = run("fmt", "ugly.cp", ugly=UGLY)
    assert ("ugly.cp: reformatted\n", 0) == (result.stdout, result.exit_code)
    text = (tmp_path / "ugly.cp").read_text()
    assert 'cachepolicy 1\n\nmatch "attn1$" every 2 -> reuse  # why\n' == text
    assert "" == run("fmt", "ugly.cp").stdout
    assert text == (tmp_path / "ugly.cp").read_text()


def test_fmt_check_writes_nothing(run, tmp_path):
    """Files that would change are named, with exit code 1."""
    result = run("fmt", "--check", "ugly.cp", ugly=UGLY)
    assert ("ugly.cp: would be reformatted\n", 1) == (result.stdout, result.exit_code)
    assert UGLY == (tmp_path / "ugly.cp").read_text()
    run("fmt", "ugly.cp")
    assert 0 == run("fmt", "--check", "ugly.cp").exit_code


def test_fmt_of_standard_input(run):
    """Standard input is formatted to standard output; `--check` only looks."""
    assert ('cachepolicy 1\n\nmatch "attn1$" every 2 -> reuse  # why\n', 0) == _outcome(run("fmt", "-", stdin=UGLY))
    assert ("<stdin>: would be reformatted\n", 1) == _outcome(run("fmt", "--check", "-", stdin=UGLY))


def _outcome(result):
    return result.stdout, result.exit_code


def test_fmt_leaves_broken_files_alone(run, tmp_path):
    """A file that does not parse is reported and kept; the others are still formatted."""
    result = run("fmt", "bad.cp", "ugly.cp", "none.cp", bad=BROKEN, ugly=UGLY)
    assert "bad.cp:1:16" in result.stderr
    assert "no file `none.cp`" in result.stderr
    assert "ugly.cp: reformatted\n" == result.stdout
    assert BROKEN == (tmp_path / "bad.cp").read_text()
    assert 2 == result.exit_code


def test_fmt_leaves_the_json_form_alone(run, tmp_path):
    """A policy's JSON form is not overwritten with text."""
    (tmp_path / "p.json").write_text("{}")
    result = run("fmt", "p.json")
    assert 2 == result.exit_code
    assert "{}" == (tmp_path / "p.json").read_text()


# --- plan ------------------------------------------------------------------------------------------------


def test_plan_draws_a_grid(run):
    """Without a model the built-in skeleton is drawn, with what the settings change."""
    result = run("plan", "pab", "--steps", "10", "--set", "spatial_every=3", "--set", "spatial_range=(-1, 1001)")
    assert "transformer_blocks.0-7.attn1" in result.stdout
    assert "CRRCRRCRRC\n" in result.stdout
    assert 0 == result.exit_code


def test_plan_on_named_sites_and_timesteps(run):
    """Named sites are the model, and as many steps are drawn as there are timesteps."""
    options = ("--site", ATTENTION, "--timesteps", "999,500,400,50")
    result = run("plan", "pab", "--json", *options)
    plan = json.loads(result.stdout)
    assert {"": {ATTENTION: "CRCC"}} == plan["rows"]
    assert [999, 500, 400, 50] == plan["timesteps"]
    assert 0 == result.exit_code


def test_plan_of_branches_and_signals(run):
    """Branches have rows of their own, and a signal's numbers decide."""
    text = (
        'signal x = input("^transformer_blocks.0$")\nsignal d = l1(x, prev(x))\nmatch "attn2$" while d < 0.5 -> reuse\n'
    )
    options = ("--steps", "3", "--branch", "cond", "--branch", "uncond", "--signal", "d=[0.1, 0.9, 0.1]")
    result = run("plan", "-", "--json", *options, stdin=text)
    rows = json.loads(result.stdout)["rows"]
    assert ["cond", "uncond"] == list(rows)
    assert "CCR" == rows["cond"]["transformer_blocks.0.attn2"]


def test_plan_of_a_config_builds_no_weights(run):
    """A diffusers folder, its config file and a pipeline's folder give the model's own sites."""
    pytest.importorskip("diffusers")
    folder = Path(str(cachepolicy._resources.shipped("data"))) / "emoji-dit"
    for path in (folder, folder / "config.json"):
        result = run("plan", "pab", "--model", path, "--json")
        plan = json.loads(result.stdout)
        assert "DiTTransformer2DModel" == plan["model"]
        assert [f"transformer_blocks.{block}.attn1" for block in range(8)] == [each["name"] for each in plan["sites"]]


def test_plan_of_a_skeleton_file(run, tmp_path):
    """A skeleton that was written to a file is a model."""
    module_tree.write_tree(module_tree.sites_skeleton([ATTENTION]), tmp_path / "model.json")
    result = run("plan", "pab", "--model", "model.json", "--steps", "3")
    assert f"{ATTENTION}  C" in result.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "it is not JSON"),
        ('{"a": 1}', "no skeleton of a model"),
        ('{"_class_name": "DiffusionPipeline"}', "no model class"),
        ('{"_class_name": "os.system"}', "no model class"),
        ('{"_class_name": ["x"]}', "no model class"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": "many"}', "can be built"),
    ],
)
def test_a_model_that_cannot_be_read(run, tmp_path, content, said):
    """What describes no model is a clear error with exit code 2, and nothing but a model class is called."""
    if content is not None:
        if "_class_name" in content:
            pytest.importorskip("diffusers")
        (tmp_path / "model.json").write_text(content)
    result = run("plan", "pab", "--model", "model.json")
    assert said in result.stderr
    assert 2 == result.exit_code


def test_a_folder_without_a_config(run, tmp_path):
    """An empty folder is no model."""
    result = run("plan", "pab", "--model", tmp_path)
    assert "holds no `config.json`" in result.stderr
    assert 2 == result.exit_code


def test_plan_answers_syntax_and_selectors_at_once(run):
    """A broken rule does not hide that another rule selects nothing."""
    for result in (run("plan", "bad.cp", bad=BROKEN), run("plan", "-", stdin=BROKEN)):
        assert "did you mean `every`" in result.stderr
        assert '`"nowhere$"` takes nothing' in result.stderr
        assert "" == result.stdout
        assert 1 == result.exit_code


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "spatial_evry=3"), "did you mean `spatial_every`"),
        (("--set", "spatial_every=soon"), "spatial_every"),
        (("--set", "spatial_every"), "is not NAME=VALUE"),
        (("--set", "spatial_every=((("), "spatial_every"),
        (("--set", "spatial_every=0"), "spatial_every"),
        (("--timesteps", "1,x"), "numbers separated by commas"),
        (("--timesteps", "1,2", "--steps", "3"), "2 timesteps for 3 steps"),
        (("--site", "a..b"), "no module name"),
        (("--site", "a", "--model", "b"), "exclude each other"),
        (("--signal", "nope=1"), "nope"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_wrong_options_are_usage_errors(run, options, said):
    """What is wrong with the command and not with the policy is exit code 2, without a traceback."""
    result = run("plan", "pab", *options)
    assert said in result.stderr
    assert 2 == result.exit_code


@pytest.mark.parametrize(
    "command", [("plan",), ("plan", "pab"), ("plan", "pab", "--model"), ("test", "pab", "--model")]
)
def test_a_hub_id_is_recognised(run, command):
    """A hub id in the place of a folder is named as such, with the command that downloads its configuration."""
    arguments = ("plan", "some-org/Some-1.0", "pab") if command == ("plan", "pab") else (*command, "some-org/Some-1.0")
    result = run(*arguments)
    assert (
        "error[E210]: there is no folder `some-org/Some-1.0`, which looks like the hub id of a model" in result.stderr
    )
    assert "hf download some-org/Some-1.0 --include '*.json' --local-dir Some-1.0" in result.stderr
    assert 2 == result.exit_code


@pytest.mark.parametrize("path", ["policies/mine.cp", "folder/mine", "./mine", "nothing"])
def test_a_path_is_not_taken_for_a_hub_id(run, tmp_path, path):
    """A path with the suffix of a policy, or in a folder that exists, is reported as a missing policy."""
    (tmp_path / "folder").mkdir()
    result = run("plan", path)
    assert "error[E150]" in result.stderr
    assert 2 == result.exit_code


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (("diff", "fbc", "pab"), "`--signal drift=0.05`"),
        (("explain", "fbc", "model@3"), "`--signal drift=0.05`"),
        (("plan", "-"), "`--sigmas 1.0,0.75,...`"),
    ],
)
def test_missing_numbers_are_asked_for_as_options(run, command, advice):
    """The help names the option that gives the number, not an argument of the library."""
    result = run(*command, stdin='match "attn1$" when sigma > 0.5 every 2 -> reuse')
    assert advice in result.stderr
    assert "signals=" not in result.output
    assert "`apply`" not in result.output


@pytest.mark.parametrize("value", ["a", '"0.05"', "true", "[0.1, a]", "1/0", "step"])
def test_a_signal_takes_numbers(run, value):
    """Anything else is a usage error that names the signal."""
    result = run("plan", "fbc", "--signal", f"drift={value}")
    assert 2 == result.exit_code
    assert "`drift`" in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_advised_options_work(run):
    """Following the help of a signal and of a sigma gives a plan."""
    assert 0 == run("plan", "fbc", "--signal", "drift=0.05").exit_code
    sigmas = run("plan", "-", "--sigmas", "1.0,0.75", stdin='match "attn1$" when sigma > 0.5 every 2 -> reuse')
    assert 0 == sigmas.exit_code


def test_counts_agree_with_their_nouns(run):
    """One site is `1 site`, several are `2 sites`; the same for steps, calls, rules and expectations."""
    one = run("plan", "-", "--site", "a", "--steps", 1, stdin='match "a" every 2 -> reuse')
    assert "owns 1 call, answers 0" in one.stdout
    assert "1 step, 1 site: 0 of 1 site call skipped" in one.stdout
    two = run("plan", "-", "--site", "a", "--site", "b", "--steps", 2, stdin='match "a|b" every 2 -> reuse')
    assert "2 steps, 2 sites: 2 of 4 site calls skipped" in two.stdout
    assert (
        "1 of 1 expectation holds, 1 rule not reached" in run("test", "-", stdin=GOOD + 'match "ff$" -> reuse').stdout
    )
    wrong = run("check", "-", stdin='match "a" -> reuse\nexpect "a" over 2 steps: C\n').stdout
    assert "the row has 1 letter for 2 steps" in wrong


def test_errors_as_json(run):
    """With `--json` the findings are JSON on standard output."""
    result = run("plan", "--json", "bad.cp", bad=BROKEN)
    assert {"E2", "E0"} == {each["code"][:2] for each in json.loads(result.stdout)}
    assert 1 == result.exit_code


# --- explain ---------------------------------------------------------------------------------------------


def test_explain_names_the_rule_and_its_clauses(run):
    """The verdict, the rule and each clause with the values it read."""
    result = run("explain", "pab", f"{ATTENTION}@17")
    assert f"{ATTENTION} reuses at step 17" in result.stdout
    assert "when t in (100, 800)" in result.stdout
    told = json.loads(run("explain", "pab", f"{ATTENTION}@17", "--json").stdout)
    assert ("reuse", 1) == (told["verdict"], told["rule"])
    assert told["asked"][0]["clauses"][0]["holds"] is True


@pytest.mark.parametrize("place", ["nowhere@3", ATTENTION, f"{ATTENTION}@50", f"{ATTENTION}@x"])
def test_explain_of_no_place(run, place):
    """A place that the schedule does not have is exit code 2."""
    assert 2 == run("explain", "pab", place).exit_code


# --- test ------------------------------------------------------------------------------------------------


def test_expectations_that_hold(run):
    """Each expectation is listed, and the exit code is 0."""
    result = run("test", "good.cp", "-", "pab", stdin=GOOD, good=GOOD)
    assert 'ok      expect "attn1$" over 4 steps: C R C R' in result.stdout
    assert "good.cp: 1 of 1 expectation holds" in result.stdout
    assert 0 == result.exit_code


def test_an_expectation_that_fails(run):
    """The failing row is shown with the step that differs, with exit code 1."""
    result = run("test", "bad.cp", bad=UNFULFILLED)
    assert "FAILED  expect" in result.stdout
    assert "step 2 differs" in result.stdout
    assert "bad.cp: 0 of 1 expectation holds" in result.stdout
    assert 1 == result.exit_code
    assert json.loads(run("test", "--json", "bad.cp").stdout)["bad.cp"]["hold"] is False


def test_a_policy_without_expectations_is_linked(run):
    """What is wrong with its params and names is an error of `test` too."""
    grown = "".join(["let a0 = step\n", *(f"let a{n + 1} = a{n} + a{n}\n" for n in range(20))])
    result = run("test", "grown.cp", grown=f"{grown}match attention when a20 > 1 every 2 -> reuse\n")
    assert "error[E165]" in result.output
    assert 1 == result.exit_code


def test_a_rule_that_is_not_reached(run):
    """An uncovered rule is a warning that fails nothing."""
    result = run("test", "half.cp", half=GOOD + "match feedforward every 2 -> reuse\n")
    assert "no expectation reaches" in result.stdout
    assert 0 == result.exit_code


def test_expectations_on_a_model(run, tmp_path):
    """`--model` says on what the expectations run."""
    module_tree.write_tree(module_tree.sites_skeleton(["layers.0.mlp"]), tmp_path / "model.json")
    assert 1 == run("test", "good.cp", "--model", "model.json", good=GOOD).exit_code


# --- list and show ---------------------------------------------------------------------------------------


def test_the_shipped_policies_are_listed(run):
    """Every shipped policy has a line, also where a file of its name stands in the folder."""
    names = [line.split()[0] for line in run("list").stdout.splitlines()]
    assert list(cachepolicy._resources.shipped_policies()) == names
    listed = json.loads(run("list", "--json").stdout)
    assert {"name", "title", "source"} == set(listed[0])
    assert 0 == run("list", pab=GOOD).exit_code


def test_show_prints_text_that_reads_back(run):
    """The text is canonical, the JSON form equals it, and the schema describes it."""
    policy = cachepolicy.load("pab")
    assert policy == parse(run("show", "pab").stdout)
    assert policy == ir.Policy.model_validate_json(run("show", "pab", "--json").stdout)
    assert "Rule" in json.loads(run("show", "--schema").stdout)["$defs"]
    assert 2 == run("show").exit_code


def test_the_version(run):
    """`--version` prints the package's version."""
    assert f"cachepolicy {cachepolicy.__version__}\n" == run("--version").stdout


# --- demo ------------------------------------------------------------------------------------------------

DEMO = ("demo", "--steps", "3", "--pictures", "2")


def test_the_demo_end_to_end(run, tmp_path):
    """Pictures, a page and a table with the baselines, with the progress on standard error."""
    pytest.importorskip("diffusers")
    text = 'param n: int = 2\nmatch "attn1$" every n -> reuse\n'
    result = run(*DEMO, "--policy", "own.cp", "--set", "n=3", "--output", "out.png", own=text)
    assert 0 == result.exit_code
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "own on the emoji model" in (tmp_path / "out.html").read_text()
    for words in ("UniPC, ", "converged", "Against the uncached run, own is", "x as fast"):
        assert words in result.stdout
    assert "run" in result.stderr


def test_the_demo_as_json(run, tmp_path):
    """All numbers are there as data, and the policy that ships for the model is the default."""
    pytest.importorskip("diffusers")
    result = run("demo", "--steps", "2", "--pictures", "1", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert ["uncached", "tuned"] == [row["name"] for row in rows[:2]]
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--policy", "nowhere.cp"), 2, "no file"),
        (("--policy", "-"), 1, "takes nothing"),
        (("--output", "no/such/folder.png"), 2, "no folder"),
        (("--set", "x=1"), 2, "no parameter `x`"),
        (("--pictures", "0"), 2, "--pictures"),
    ],
)
def test_the_demo_refuses_clearly(run, options, code, said):
    """What is wrong with its input is told before anything runs."""
    pytest.importorskip("diffusers")
    result = run(*DEMO, *options, stdin='match "nowhere$" every 2 -> reuse\n')
    assert said in result.stderr
    assert code == result.exit_code


@pytest.mark.parametrize("command", [("demo",), ("plan", "pab", "--model", "config.json")])
def test_without_diffusers_the_extra_is_named(run, tmp_path, monkeypatch, command):
    """The command to install what is missing is told, with exit code 2."""
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    for name in [
        each
        for each in sys.modules
        if each in {"cachepolicy.cli._demo", "cachepolicy.tuning.demo", "cachepolicy.tools.emoji"}
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run(*command)
    assert 'pip install "cachepolicy[diffusers]"' in result.stderr
    assert 2 == result.exit_code


# --- as a process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["check", "pab"], ["plan", "pab"], ["fmt", "--check", "-"], ["list"], ["test", "pab"], ["--help"]]
)
def test_commands_import_no_torch(command, tmp_path):
    """Torch is imported by the demo and for a diffusers model only."""
    code = (
        "import sys\nfrom cachepolicy.cli.commands import main\n"
        f"sys.argv = ['cachepolicy', *{command!r}]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env=_environment(), input=b"cachepolicy 1\n", timeout=60
    )


MISTAKES = {
    "a missing folder": (["run", "nowhere"], "there is no folder `nowhere`"),
    "a hub id": (["run", "some-org/some-model"], "looks like the hub id of a pipeline"),
    "no pipeline": (["run", "."], "`.` holds no pipeline"),
    "a misspelt parameter": (["run", "flux", "--policy", "pab", "--set", "spatial_evry=3"], "mean `spatial_every`?"),
    "a policy that is not there": (["run", "flux", "--policy", "pap"], "did you mean `pab`?"),
    "parameters of no policy": (["run", "flux", "--set", "spatial_every=3"], "--set needs --policy"),
    "a prompt without a text encoder": (["run", "flux", "--prompt", "a cat"], "cannot encode the prompt"),
    "neither prompt nor embeddings": (["run", "flux"], "`--embeds FILE`"),
    "embeddings that are not there": (["run", "flux", "--embeds", "no.pt"], "there is no file `no.pt`"),
    "embeddings of no known form": (["run", "flux", "--embeds", "model_index.json"], "is not a file of tensors"),
    "a dtype": (["run", "flux", "--dtype", "int8"], "'int8' is not one of"),
    "an argument": (["run", "flux", "--argument", "height"], "`height` is not NAME=VALUE"),
    "a hub id for plan": (["plan", "some-org/some-model"], "looks like the hub id of a model"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_before_heavy_imports(mistake, tmp_path):
    """`run` and `plan` answer a mistake in their arguments without importing torch or diffusers."""
    command, said = MISTAKES[mistake]
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "text_encoder": [None, None], "transformer": ["diffusers", "X"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    code = (
        "import sys\nfrom cachepolicy.cli.commands import main\n"
        f"sys.argv = ['cachepolicy', *{command!r}]\n"
        "try: main()\nexcept SystemExit as end: print(end.code, {'torch', 'diffusers', 'numpy'} & set(sys.modules))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=_environment(), timeout=60,
    )  # fmt: skip
    assert said in process.stderr
    assert "2 set()\n" == process.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written(tmp_path):
    """A full disk is told in a sentence, with exit code 2."""
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "cachepolicy", "plan", "pab"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path, env=_environment(), timeout=60,
        )  # fmt: skip
    assert 2 == process.returncode
    assert "cannot be written" in process.stderr
    assert "Traceback" not in process.stderr


def test_it_runs_as_a_module(tmp_path):
    """`python -m cachepolicy` is the command, and its exit code is the process's."""
    (tmp_path / "bad.cp").write_text(BROKEN)
    process = subprocess.run(
        [sys.executable, "-m", "cachepolicy", "check", "bad.cp"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment(), timeout=60,
    )  # fmt: skip
    assert 1 == process.returncode
    assert "bad.cp:1:16" in process.stdout
    assert "\x1b" not in process.stdout
    assert "Traceback" not in process.stderr


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(cachepolicy.__file__).parents[1])}


def test_convert_prints_a_policy_or_names_the_field(run):
    """The output is a policy; what it cannot say is an error, and an unknown file an unusable one."""
    setting = json.dumps({"Fn_compute_blocks": 2, "max_warmup_steps": 3})
    result = run("convert", "a.cp", a=setting)
    assert 0 == result.exit_code
    assert result.stdout.endswith("use dbcache with first = 2, threshold = 0.08, warmup = 3\n")
    result = run("convert", "a.cp", a=setting.replace("max_warmup_steps", "downsample_factor"))
    assert "error[E168]: `downsample_factor` of" in result.stderr
    assert 1 == result.exit_code
    for content in ("{}", "{", '{"a": 1, "a": 2}'):
        result = run("convert", "a.cp", a=content)
        assert "error[E169]" in result.stderr
        assert 2 == result.exit_code


def test_list_of_a_model_shows_its_presets(run, tmp_path):
    """Published settings for the class and configuration of a model, as text and as JSON."""
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 30, "in_channels": 16, "ffn_dim": 64}
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text(json.dumps(config))
    result = run("list", "--model", "wan")
    assert (
        "taylorseer: preset wan  (github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-Wan2.1)\n"
        "  interval = 5, first = 1, order = 1\n" in result.stdout
    )
    assert "teacache: preset wan_t2v_1_3b  (" in result.stdout
    assert ', chosen by name: preset="wan_i2v_480"\n' in result.stdout
    assert "ratios = [1.0, ..., 0.81838] of 50\n" in result.stdout
    listed = json.loads(run("list", "--model", "wan", "--json").stdout)
    taken = [(each["name"], each["preset"]) for each in listed if not each["by_name"]]
    assert {("easycache", "wan"), ("fbc", "wan"), ("magcache", "wan_t2v_1_3b"), ("teacache", "wan_t2v_1_3b")} <= {
        *taken
    }
    assert len({name for name, _ in taken}) == len(taken)
    assert ("teacache", "wan_t2v_14b") not in taken
    (tmp_path / "wan" / "config.json").write_text(json.dumps(config | {"_class_name": "SD3Transformer2DModel"}))
    others = json.loads(run("list", "--model", "wan", "--json").stdout)
    assert [] == [each["preset"] for each in others if not each["by_name"]]
