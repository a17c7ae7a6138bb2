"""Real pipelines of diffusers with tiny parts: clocks, boundaries, and what may happen to a pipeline meanwhile."""

from __future__ import annotations

import gc
import tempfile
import warnings
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

import cachepolicy
from cachepolicy.engine.introspection import describe
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.planning.facts import Fact
from cachepolicy.testing import checks
from cachepolicy.testing.models import Probes
from tests.support import zoo
from tests.support.tiny_pipelines import PIPELINES, STEPS, Tiny, flux, ltx, normal, sd3, unet_sd, wan, wan22

pytestmark = pytest.mark.filterwarnings(
    "ignore:the policy reused nothing", "ignore::FutureWarning", "ignore::UserWarning:diffusers.*"
)

WINDOW = "match attention when 100 < t < 900 every 2 -> reuse"
STEPPED = "match attention every 3 -> reuse\nmatch feedforward when step > 0 every 2 -> reuse"


def simulated(tiny: Tiny, name: str, text: str) -> dict[str, dict[str, str]]:
    """The rows that the schedule has on the scheduler's timesteps, by branch."""
    schedule = cachepolicy.simulate(
        parse(text),
        steps=len(tiny.timesteps),
        timesteps=tiny.timesteps,
        branches=tiny.branches,
        skeleton=describe(getattr(tiny.pipe, name)),
    )
    return {branch: schedule.rows_of(branch) for branch in tiny.branches}


@pytest.mark.parametrize("name", PIPELINES)
def test_run_after_run_is_the_same_and_as_scheduled(name: str) -> None:
    """Two calls in a row give equal latents and equal traces: the schedule of the scheduler's own timesteps."""
    tiny = PIPELINES[name]()
    for text in (STEPPED,) if name == "unet_sd_edm" else (WINDOW, STEPPED):  # EDM's timesteps are in no known unit
        with cachepolicy.apply(tiny.pipe, parse(text)) as run:
            probes = [Probes(getattr(tiny.pipe, each)) for each in tiny.denoisers]
            assert torch.equal(tiny(), tiny())
            trajectories = run.trace.trajectories
        assert 2 * len(tiny.denoisers) == len(trajectories)
        for trajectory in trajectories:
            checks.well_formed(trajectory)
            checks.trace_agrees(trajectory)
            assert tiny.branches == trajectory.branches
        checks._executions_agree(trajectories[: len(trajectories)], _total(probes))
        for branch, rows in simulated(tiny, tiny.denoisers[0], text).items():
            for half in (0, len(tiny.denoisers)):
                parts = [each.rows(branch) for each in trajectories[half : half + len(tiny.denoisers)]]
                got = {site: "".join(part[site] for part in parts) for site in rows}
                if len(tiny.denoisers) == 1:
                    assert rows == got, (text, branch)
                else:
                    assert {len(tiny.timesteps)} == {len(row) for row in got.values()}


SHIPPED = {"pab": {"cross_every": 3}, "fbc": {"threshold": 0.5}, "fastercache": {}}
"""The shipped policies, with settings under which each reuses something on some pipeline."""


@pytest.mark.parametrize("policy", SHIPPED)
@pytest.mark.parametrize("name", [name for name in PIPELINES if not name.startswith("unet")])
def test_every_shipped_policy_runs_twice_alike(name: str, policy: str) -> None:
    """A second call of a real pipeline is as the first, under each policy."""
    tiny = PIPELINES[name]()
    # These two pipelines do not show whether they guide.
    guidance = True if name in {"pixart", "dit"} else None
    with cachepolicy.apply(tiny.pipe, policy, guidance=guidance, **SHIPPED[policy]) as run:
        assert torch.equal(tiny(), tiny())
        first, second = run.trace.trajectories[:: len(tiny.denoisers)][:2]
    assert [call.tick for call in first.calls] == [call.tick for call in second.calls]
    assert first.rows() == second.rows()


@pytest.mark.parametrize("name", ["wan", "flux_true_cfg", "qwenimage", "wan22"])
def test_sequential_guidance_is_approximated_as_planned(name: str) -> None:
    """The difference is kept up to the unconditional call of the last step, on each of the denoisers."""
    tiny = PIPELINES[name]()
    ranges = {} if name != "wan22" else {"uncond_range": (-1, 1001), "spatial_range": (-1, 1001)}
    with cachepolicy.apply(tiny.pipe, "fastercache", **ranges) as run:
        probes = [Probes(getattr(tiny.pipe, each)) for each in tiny.denoisers]
        tiny(num_inference_steps=10)
        trajectories = run.trace.trajectories
    for trajectory in trajectories:
        checks.well_formed(trajectory)
        checks.trace_agrees(trajectory)
        assert {} == trajectory.facts
        timesteps = [call.tick.t for call in trajectory.calls if call.tick.branch == "cond"]
        if name != "wan22":  # the second denoiser begins in mid-trajectory
            plan, clock = trajectory.plan, {"steps": len(timesteps), "timesteps": timesteps}
            planned = cachepolicy.simulate(plan, branches=tiny.branches, **clock)
            assert {each: planned.rows_of(each) for each in tiny.branches} == {
                each: trajectory.rows(each) for each in tiny.branches
            }
    assert "RRR" == trajectories[-1].rows("uncond")["model"][-3:]
    checks._executions_agree(trajectories, _total(probes))


def test_a_limit_that_does_not_admit_the_kept_difference_is_the_reason_of_the_compute() -> None:
    """The unconditional calls that the plan answers compute, the trace says why, and the simulator follows it."""
    tiny = PIPELINES["wan"]()
    with cachepolicy.apply(tiny.pipe, "fastercache", memory_limit=64) as run:
        tiny(num_inference_steps=10)
        trajectory = run.trace.last
    checks.trace_agrees(trajectory)
    assert "C" * 10 == trajectory.rows("uncond")["model"]
    assert {("model", step, "uncond") for step in (7, 8, 9)} == {key for key in trajectory.facts if key[0] == "model"}
    assert {Fact.OVER_LIMIT} == set(trajectory.facts.values())


def _total(probes: list[Probes]) -> dict[str, int]:
    total = dict[str, int]()
    for each in probes:
        each.remove()
        for name, count in each.take().items():
            total[name] = total.get(name, 0) + count
    return total


def test_a_distilled_pipeline_is_told_that_it_has_no_unconditional_half() -> None:
    """FasterCache reuses nothing on Flux; the warning says why, and what to set."""
    tiny = PIPELINES["flux"]()
    model = tiny.pipe.transformer
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    tiny.pipe.transformer = type(model).from_config(config | {"guidance_embeds": True}).eval()
    run = cachepolicy.apply(tiny.pipe, "fastercache")
    with run, pytest.warns(UserWarning, match="reused nothing") as caught:
        tiny()
    text = "\n".join(str(warning.message) for warning in caught)
    assert "rule 1: this model has no unconditional half, try `distilled=True`" in text
    assert not any(row.count("R") for row in run.trace.rows().values())
    with cachepolicy.apply(tiny.pipe, "fastercache", distilled=True) as run:
        tiny()
    assert any(row.count("R") for row in run.trace.rows().values())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_policy_that_never_reuses_changes_nothing(name: str) -> None:
    """Latents under an all-compute policy, and after `remove`, are the bare pipeline's; identity is restored."""
    tiny = PIPELINES[name]()
    bare = tiny()
    kept = {each: type(getattr(tiny.pipe, each)) for each in (*tiny.denoisers, "scheduler")}
    cls = type(tiny.pipe)
    never = "step < 0" if name == "unet_sd_edm" else "t < -9"
    with cachepolicy.apply(tiny.pipe, parse(f"match attention -> compute\nmatch block when {never} -> reuse")):
        assert torch.equal(bare, tiny())
    assert cls is type(tiny.pipe)
    assert kept == {each: type(getattr(tiny.pipe, each)) for each in kept}
    assert "_cachepolicy" not in tiny.pipe.__dict__
    assert torch.equal(bare, tiny())


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("unet_sd_edm", "wan22")])
@pytest.mark.parametrize("told", ["nothing", "scheduler", "timestep"])
def test_the_model_alone_keeps_the_same_time(name: str, told: str) -> None:
    """RootModel to the denoiser, with its argument, the scheduler or a function as clock: the pipeline's latents."""
    tiny = PIPELINES[name]()
    with cachepolicy.apply(tiny.pipe, parse(WINDOW)) as run:
        expected = tiny()
        rows = run.trace.rows()
    options: dict[str, Any] = {}
    if told == "scheduler":
        options["scheduler"] = tiny.pipe.scheduler
    if told == "timestep":
        if not hasattr(tiny.pipe, "current_timestep"):
            pytest.skip("the pipeline does not show its timestep")
        options["timestep"] = lambda: tiny.pipe.current_timestep
    with cachepolicy.apply(getattr(tiny.pipe, tiny.denoisers[0]), parse(WINDOW), **options) as run:
        for _ in range(2):
            assert torch.equal(expected, tiny())
            assert rows == run.trace.rows()


def test_a_policy_that_reads_t_is_refused_where_timesteps_are_in_no_known_unit() -> None:
    """EDM's timesteps are logarithms of noise levels, which no window of training timesteps can be compared with."""
    tiny = PIPELINES["unet_sd_edm"]()
    with (
        cachepolicy.apply(tiny.pipe, "pab.cp"),
        pytest.raises(PolicyError, match=r"E321.*go from 1\.09551 to -1\.55365"),
    ):
        tiny()


@pytest.mark.parametrize("make", [flux, sd3, wan, ltx])
def test_the_number_of_steps_and_of_images_may_change_between_runs(make: Any) -> None:
    """Each call is a trajectory of its own: what came before changes nothing."""
    tiny = make()
    changes = [{"num_inference_steps": 4}, {"num_inference_steps": 7}, {}]
    if make is flux:
        changes.append({"num_images_per_prompt": 2})
    expected = []
    for change in changes:
        with cachepolicy.apply(tiny.pipe, parse(STEPPED)):
            expected.append(tiny(**change))
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)):
        for change, wanted in [*zip(changes, expected, strict=True)] * 2:
            assert torch.equal(wanted, tiny(**change))


class Stop(BaseException):
    """Raised by a callback in the middle of a run."""


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_aborted_call_leaves_nothing(at: int) -> None:
    """A callback that raises, or interrupts, part-way: the next call is as from a fresh pipeline."""
    tiny = flux()
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)):
        expected = tiny()

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise Stop
        return kwargs

    def interrupt(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe._interrupt = True
        return kwargs

    with cachepolicy.apply(tiny.pipe, parse(STEPPED)) as run:
        with pytest.raises(Stop):
            tiny(callback_on_step_end=stop)
        assert torch.equal(expected, tiny())
        tiny(callback_on_step_end=interrupt)
        assert at + 1 == len(run.trace.last.calls)
        assert torch.equal(expected, tiny())


def test_nothing_is_kept_between_calls() -> None:
    """When a pipeline call has returned no history is alive."""
    import weakref

    tiny, kept = flux(), list[Any]()
    hook = lambda _, __, output: kept.append(weakref.ref(output[0] if isinstance(output, tuple) else output))  # noqa: E731
    tiny.pipe.transformer.transformer_blocks[0].attn.register_forward_hook(hook)
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)) as run:
        tiny()
        gc.collect()
        assert kept
        assert all(each() is None for each in kept)
        assert () == run._sessions.keys


# --- what may happen to a pipeline -----------------------------------------------------------------------


def image_to_image(pipe: Any) -> Any:
    parts = {name: part for name, part in pipe.components.items() if name not in ("safety_checker", "image_encoder")}
    return diffusers.StableDiffusionImg2ImgPipeline(**parts, safety_checker=None, requires_safety_checker=False)


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_image_to_image_counts_from_where_it_starts(strength: float) -> None:
    """The loop begins within the scheduler's timesteps: step 0 is its first, `steps` what it runs."""
    tiny = unet_sd(diffusers.EulerDiscreteScheduler())
    pipe = image_to_image(tiny.pipe)
    arguments = {name: value for name, value in tiny.arguments.items() if name not in ("height", "width")}
    other = Tiny(pipe, {**arguments, "image": normal(1, 4, 8, 8), "strength": strength, "num_inference_steps": 10})
    with cachepolicy.apply(pipe, parse(STEPPED)) as run:
        assert torch.equal(other(), other())
    calls = run.trace.last.calls
    late = [float(t) for t in pipe.scheduler.timesteps[10 - int(10 * strength) :]]
    assert [(step, t, len(late)) for step, t in enumerate(late)] == [
        (call.tick.step, call.tick.t, call.tick.steps) for call in calls
    ]


def test_a_shared_denoiser_serves_both_pipelines() -> None:
    """`from_pipe` shares the model: it runs under the one policy in both, and a second policy is refused."""
    tiny = unet_sd(diffusers.EulerDiscreteScheduler())
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.pipe, requires_safety_checker=False)
    assert other.unet is tiny.pipe.unet
    arguments = {name: value for name, value in tiny.arguments.items() if name not in ("height", "width")}
    second = Tiny(other, {**arguments, "image": normal(1, 4, 8, 8), "strength": 0.8})
    with cachepolicy.apply(other, parse(WINDOW)):
        expected = second()
    with cachepolicy.apply(tiny.pipe, parse(WINDOW)) as run:
        first = tiny()
        assert torch.equal(expected, second())
        assert torch.equal(first, tiny())
        assert torch.equal(expected, second())
        assert 4 == len(run.trace)
        with pytest.raises(PolicyError, match="E301"):
            cachepolicy.apply(other, parse(WINDOW))
    with cachepolicy.apply(other, parse(WINDOW)):
        assert torch.equal(expected, second())


def test_a_replaced_denoiser_is_refused_at_the_call() -> None:
    """A policy does not silently run on nothing: E303 names the part, and `remove` still restores all."""
    tiny = flux()
    old, new = tiny.pipe.transformer, zoo.build("flux", seed=3)
    run = cachepolicy.apply(tiny.pipe, parse(WINDOW))
    tiny.pipe.transformer = new
    with pytest.raises(PolicyError, match="E303") as caught:
        tiny()
    assert "`transformer`" in str(caught.value)
    run.remove()
    assert not any("_cachepolicy" in each.__dict__ for each in (*old.modules(), *new.modules()))
    tiny()


def test_a_denoiser_may_be_none() -> None:
    """Of two denoisers one may be missing; without any the error says what to pass."""
    tiny = wan()
    assert tiny.pipe.transformer_2 is None
    with cachepolicy.apply(tiny.pipe, parse(WINDOW)) as run:
        assert ["transformer"] == list(run.plans)
    empty = diffusers.FluxPipeline(
        scheduler=tiny.pipe.scheduler, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=None,
    )  # fmt: skip
    with pytest.raises(PolicyError, match="E300"):
        cachepolicy.apply(empty, parse(WINDOW))


def test_two_denoisers_have_a_plan_each() -> None:
    """Wan 2.2 hands over at a boundary: absolute steps in both, and each computes before it reuses."""
    tiny = wan22()
    with cachepolicy.apply(tiny.pipe, parse("match attention every 5 -> reuse")) as run:
        assert ["transformer", "transformer_2"] == list(run.plans)
        tiny()
        first, second = run.trace.trajectories
    assert ("CRRR", "CC") == (first.rows("cond")["blocks.0.attn1"], second.rows("cond")["blocks.0.attn1"])
    assert [4, 5] == [call.tick.step for call in second.calls if call.tick.branch == "cond"]


def test_a_replaced_scheduler_is_followed() -> None:
    """The clock is that of the scheduler that the pipeline has when it is called."""
    tiny = unet_sd(diffusers.DDIMScheduler())
    with cachepolicy.apply(tiny.pipe, parse(WINDOW)) as run:
        tiny()
        tiny.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
        tiny()
        assert tiny.timesteps == [call.tick.t for call in run.trace.last.calls]
        scheduler = tiny.pipe.scheduler
    assert diffusers.HeunDiscreteScheduler is type(scheduler)


def test_guidance_that_is_switched_off_part_way_computes_and_goes_on() -> None:
    """A batch that shrinks to its conditional half fits no history: the step computes and the count goes on."""
    tiny = unet_sd(diffusers.DDIMScheduler())

    def off(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    told = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with cachepolicy.apply(tiny.pipe, parse("match attention every 2 -> reuse")) as run:
        first, second = tiny(**told), tiny(**told)
    assert torch.equal(first, second)
    steps = [call.tick.step for each in run.trace for call in each.calls]
    assert [*range(STEPS)] * 2 == steps
    row = "".join(next(iter(each.rows().values())) for each in run.trace)[-STEPS:]
    assert "CRCCCR" == row


def test_the_policy_is_not_saved_with_the_model() -> None:
    """`save_pretrained` writes the plain model; what is loaded computes bare."""
    tiny = flux()
    bare = tiny()
    with tempfile.TemporaryDirectory() as folder, cachepolicy.apply(tiny.pipe, parse(WINDOW)):
        tiny.pipe.transformer.save_pretrained(folder)
        loaded = diffusers.FluxTransformer2DModel.from_pretrained(folder)
        assert diffusers.FluxTransformer2DModel is type(loaded)
        assert not any("_cachepolicy" in each.__dict__ for each in loaded.modules())
    tiny.pipe.transformer = loaded
    assert torch.equal(bare, tiny())


def test_a_pipeline_with_a_policy_says_so_when_applied_again() -> None:
    """E301 on the pipeline and on its denoiser."""
    tiny = flux()
    with cachepolicy.apply(tiny.pipe, parse(WINDOW)):
        for target in (tiny.pipe, tiny.pipe.transformer):
            with pytest.raises(PolicyError, match="E301"):
                cachepolicy.apply(target, parse(WINDOW))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cachepolicy.apply(tiny.pipe, parse(WINDOW)).remove()


def test_a_refused_policy_leaves_the_pipeline_alone() -> None:
    """Nothing is attached to any of the parts when one of them does not fit."""
    tiny = wan22()
    with pytest.raises(PolicyError, match="E200"):
        cachepolicy.apply(tiny.pipe, parse('match "no_such" -> reuse'))
    parts = [tiny.pipe, tiny.pipe.scheduler, *tiny.pipe.transformer.modules(), *tiny.pipe.transformer_2.modules()]
    assert not any("_cachepolicy" in each.__dict__ for each in parts)


def test_the_shipped_policy_runs_on_a_pipeline() -> None:
    """The README's lines, on a tiny Flux."""
    tiny = flux()
    with cachepolicy.apply(tiny.pipe, "pab.cp", spatial_every=3) as run:
        tiny()
    assert "CCRCRR" == run.trace.rows()["transformer_blocks.0.attn"]
    assert "12 of 24 site calls skipped" in str(run.trace)
