"""The plugin for vLLM-Omni on stand-ins with the recorded interfaces; `tests/engines` runs the engine itself."""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.integrations import vllm_omni as plugin
from cachepolicy.tracing.trace import from_json
from tests.support import recorded_vllm_omni as omni
from tests.support.engine_models import FBC, POLICY
from tests.support.recorded_vllm_omni import Runner, TinyPipeline, request


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        omni.installed(patch)
        plugin._backend.cache_clear()
        plugin.register()
        yield
    plugin._backend.cache_clear()


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "some.cp"
    path.write_text(POLICY)
    return {"policy": str(path), "policies": {"fbc": FBC}}


def bare(*requests: Any) -> list[Any]:
    with torch.inference_mode():
        return [each.output for each in TinyPipeline().forward(omni.DiffusionRequestBatch(list(requests)))]


def applied(policy: Any, *, call_steps: int = 8, **params: Any) -> Any:
    """What `cachepolicy.apply` on the denoiser alone gives for one request."""
    pipeline = TinyPipeline()
    with torch.inference_mode(), cachepolicy.apply(pipeline.transformer, policy, steps=call_steps, **params):
        return pipeline.forward(omni.DiffusionRequestBatch([request("r", steps=call_steps)]))[0].output


# --- at the start


def test_the_entry_point_names_the_function() -> None:
    """vLLM-Omni finds `register` by the group of its plugins."""
    points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert "cachepolicy.integrations.vllm_omni:register" == points["vllm_omni.general_plugins"]["cachepolicy"]


def test_registering_twice_is_registering_once() -> None:
    """The second call finds its own wrappers; other backends are still those of the engine."""
    selector = sys.modules["vllm_omni.diffusion.cache.selector"]
    before = selector.get_cache_backend
    plugin.register()
    assert before is selector.get_cache_backend
    assert (
        selector.get_cache_backend is sys.modules["vllm_omni.diffusion.worker.diffusion_model_runner"].get_cache_backend
    )
    assert selector.get_cache_backend(None, None) is None
    with pytest.raises(ValueError, match="Unsupported cache backend: other"):
        selector.get_cache_backend("other", {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "names no policy"),
        ({}, "names no policy"),
        ("{", "is no JSON"),
        ([1], "the cache config is"),
        ({"policy": "fbc", "parms": {}}, "did you mean `params`"),
        ({"policy": "fbc", "params": 3}, "`params` of the cache config is `3`"),
        ({"policy": "fbc", "params": {"treshold": 1.0}}, "treshold"),
        ({"policy": "fbc", "params": {"threshold": "x"}}, "threshold"),
        ({"policy": "fbc", "options": {"samples": "worst"}}, "worst"),
        ({"policy": "fbc", "options": {"scheduler": "x"}}, "the engine provides it"),
        ({"policy": "nothing-like-it"}, "nothing-like-it"),
        ({"policy": "fbc", "policies": {"fast": {"policy": "pab", "params": {"no": 1}}}}, "no"),
        ({"policy": "fbc", "policies": {"fast": {"params": {}}}}, "`fast` names no policy"),
    ],
)
def test_a_mistake_in_the_config_stops_the_start(wrong: Any, message: str) -> None:
    """The error comes before the first request, and no hook is left on the model."""
    pipeline = TinyPipeline()
    with pytest.raises(PolicyError, match=message):
        Runner(wrong, pipeline)
    assert nn.Module.__call__ is type(pipeline.transformer).__call__
    assert "forward" not in vars(pipeline)


def test_a_policy_that_selects_nothing_stops_the_start(tmp_path: Path) -> None:
    """Every policy that a request may name is bound to the model when the server starts."""
    path = tmp_path / "some.cp"
    path.write_text('match "^no_such$" every 2 -> reuse\n')
    with pytest.raises(PolicyError, match="E200"):
        Runner({"policy": "fbc", "policies": {"x": {"policy": str(path)}}})


def test_a_failure_of_the_warm_up_stops_the_start(config: dict[str, Any]) -> None:
    """The engine's dummy request raises where a real one would be refused."""
    runner = Runner(config)
    runner.pipeline.transformer.blocks[2].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        runner.run([request("dummy_req_id", steps=4)])


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    """The error names what was looked for."""
    with pytest.raises(PolicyError, match="has no denoiser"):
        Runner({"policy": "fbc"}, nn.Module())


@pytest.mark.parametrize("stated", [None, ["dit"], ["inner.model"], ["inner.model.blocks", "inner.model"]])
def test_denoisers_are_found_where_the_pipeline_has_them(config: dict[str, Any], stated: Any) -> None:
    """`_dit_modules` may name attributes, paths, and parts of each other."""

    class Elsewhere(TinyPipeline):
        def __init__(self) -> None:
            super().__init__()
            self.dit, self.inner, self._dit_modules = self.transformer, nn.Module(), stated
            self.inner.model = self.transformer
            del self.transformer

        def denoiser(self) -> Any:
            return self.dit

    runner = Runner(config, Elsewhere())
    (output,) = runner.run([request("r")])
    assert torch.equal(applied(cachepolicy.parse(POLICY)), output.output)
    assert "R" in str(output.cachepolicy["rows"])


# --- requests


def test_a_request_gets_what_apply_gives(config: dict[str, Any]) -> None:
    """With the params of the server, its own, in both forms, and with another policy of the server."""
    runner = Runner(config)
    expected = {2: applied(cachepolicy.parse(POLICY)), 4: applied(cachepolicy.parse(POLICY), n=4)}
    for said, n in [(..., 2), (None, 2), (True, 2), ({}, 2), ({"n": 4}, 4), ({"params": {"n": 4}}, 4), (..., 2)]:
        (output,) = runner.run([request("r", said)])
        assert torch.equal(expected[n], output.output), said
    (output,) = runner.run([request("r", {"policy": "fbc"})])
    assert torch.equal(applied("fbc", threshold=50.0), output.output)
    (output,) = runner.run([request("r")])
    assert torch.equal(expected[2], output.output)


def test_false_is_the_bare_model(config: dict[str, Any]) -> None:
    """Bitwise, and its record says so."""
    (output,) = Runner(config).run([request("r", False)])
    assert torch.equal(bare(request("r"))[0], output.output)
    assert output.cachepolicy["policy"] is False


def test_every_request_has_a_record(config: dict[str, Any]) -> None:
    """Steps, calls, the skipped share and a row a branch; the whole trace for a request that asks for it."""
    runner = Runner(config)
    (output,) = runner.run([request("one", {"options": {"trace": True}})])
    record = output.cachepolicy
    assert ("one", 8, 16, 1) == tuple(record[name] for name in ("session", "steps", "model_calls", "requests"))
    assert [{"first": {"blocks[1:4]": "CRCRCRCC"}, "1": {"blocks[1:4]": "CRCRCRCC"}}] == record["rows"]
    assert {"computed": 10, "reused": 6, "hidden": 0} == record["site_calls"]
    assert 6 / 16 == record["skipped_share"]
    (trajectory,) = from_json(json.dumps(record["trace"]))
    assert "CRCRCRCC" == trajectory.rows()["blocks[1:4]"]
    (output,) = runner.run([request("two")])
    assert "trace" not in output.cachepolicy
    assert "two" == output.cachepolicy["session"]


def test_an_audited_request_is_bare_and_tells_its_error(config: dict[str, Any]) -> None:
    """`options` of a request go to its session."""
    (output,) = Runner(config).run([request("r", {"options": {"audit": 1.0}})])
    assert torch.equal(bare(request("r"))[0], output.output)
    assert 0 < output.cachepolicy["audit_error"]


def test_the_record_reaches_the_caller(config: dict[str, Any]) -> None:
    """As `custom_output` of the engine's output, beside what was there."""
    (output,) = Runner(config).run([request("r")])
    shown = sys.modules["vllm_omni.diffusion.diffusion_engine"].format_diffusion_outputs(
        request=request("r"), od_config=None, diffusion_output=output, output_data=None, postprocess_output=None
    )
    assert output.cachepolicy == shown[0].custom_output["cachepolicy"]


def test_nothing_is_held_between_requests(config: dict[str, Any]) -> None:
    """A session ends with its request, also where the request failed."""
    runner = Runner(config)
    served = runner.cache_backend.requests.served
    runner.run([request("a"), request("b")])
    assert 0 == served.run.memory.held
    runner.pipeline.transformer.out.forward, broken = lambda *_: 1 / 0, runner.pipeline.transformer.out.forward
    with pytest.raises(ZeroDivisionError):
        runner.run([request("a")])
    runner.pipeline.transformer.out.forward = broken
    assert 0 == served.run.memory.held
    (output,) = runner.run([request("a")])
    assert torch.equal(applied(cachepolicy.parse(POLICY)), output.output)


WORDS = ["interval", "key", "steps", "policy", "params", "options", "audit", "trace", "fbc"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=15)
@given(
    said=st.lists(st.none() | st.dictionaries(st.sampled_from(WORDS), JSON, max_size=3) | JSON, min_size=2, max_size=6)
)
def test_garbage_is_refused_for_that_request_alone(said: list[Any]) -> None:
    """Whatever JSON requests say, the batch answers, their neighbour gets its picture, and the server goes on."""
    runner = Runner({"policy": "fora", "policies": {"fbc": FBC}})
    strange = [request(f"strange {index}", each, steps=3) for index, each in enumerate(said)]
    *answers, fine = runner.run([*strange, request("fine", {"interval": 3}, steps=3)])
    assert fine.error is None
    assert torch.equal(applied("fora", interval=3, call_steps=3), fine.output)
    for answer in answers:
        if answer.error is None:
            assert answer.output is not None
        else:
            assert (400, "BadRequestError") == (answer.error_status_code, answer.error_type)
            assert answer.error.startswith("cachepolicy: E")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (7, "E309: `cachepolicy` of the request is `7`"),
        ({"n": "x"}, "E161: `n` takes a whole number"),
        ({"n": -1}, "E16"),
        ({"m": 1}, "`m`"),
        ({"policy": "/etc/passwd"}, "E309: the server has no policy `/etc/passwd`"),
        ({"options": {"max_sessions": 1}}, "E309: `options` of the request has no `max_sessions`"),
        ({"options": {"steps": 0}}, "E309: `steps` is `0`"),
        ({"scheduler": 1}, "E309: `scheduler` is no param"),
    ],
)
def test_a_refusal_says_why(config: dict[str, Any], said: Any, message: str) -> None:
    """The caller gets the diagnostic, and the counter goes up by one."""
    runner = Runner(config)
    (output,) = runner.run([request("r", said)])
    assert message in output.error
    assert 1 == runner.cache_backend.requests.served.counts["refused"]


# --- batches


def test_requests_that_ask_for_the_same_share_a_batch(config: dict[str, Any]) -> None:
    """One call of the pipeline, one session; the trajectories of all are in its record."""
    runner = Runner(config)
    outputs = runner.run([request("a", {"n": 3}), request("b", {"params": {"n": 3}}, seed=1)])
    assert [["a", "b"]] == runner.pipeline.batches
    assert ["a+b", "a+b"] == [output.cachepolicy["session"] for output in outputs]
    assert 2 == outputs[0].cachepolicy["requests"]


def test_requests_that_differ_are_split(config: dict[str, Any]) -> None:
    """In params, policy, options, or in having a policy at all; each gets what it gets alone, in its own place."""
    runner = Runner(config)
    said = [..., {"n": 4}, False, {"policy": "fbc"}, {"n": 4}, {"options": {"audit": 1.0}}, "garbage"]
    requests = [request(f"r{index}", each, seed=index) for index, each in enumerate(said)]
    alone = [Runner(config).run([each])[0] for each in requests]
    together = runner.run(requests)
    assert [["r0"], ["r1", "r4"], ["r2"], ["r3"], ["r5"]] == runner.pipeline.batches
    for expected, got in zip(alone[:-1], together[:-1], strict=True):
        assert torch.allclose(expected.output, got.output, atol=1e-5)
    assert together[-1].error
    assert 1 == runner.cache_backend.requests.served.counts["split"]


def test_a_batch_that_cannot_be_split_computes(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """All of its requests are served without a policy; a counter and a log line say so."""
    with pytest.MonkeyPatch.context() as patch:
        omni.installed(patch, omni.ForwardContext(paged_kv_runtime=object()))
        plugin.register()
        runner = Runner(config)
        requests = [request("a", seed=1), request("b", {"n": 4}), request("c", "garbage")]
        with caplog.at_level(logging.WARNING, "vllm_omni.cachepolicy"):
            outputs = runner.run(requests)
    for expected, output in zip(bare(*requests), outputs[:2], strict=False):
        assert torch.equal(expected, output.output)
    assert outputs[2].error
    assert 1 == runner.cache_backend.requests.served.counts["computed_together"]
    assert "a+b+c" in caplog.text
    assert "all compute" in caplog.text


def test_the_scheduler_keeps_requests_apart_that_differ() -> None:
    """Its key has what a request says; requests that say nothing have the key of the engine."""
    module = sys.modules["vllm_omni.diffusion.sched.request_scheduler"]
    key = module.build_request_batch_sampling_params_key
    assert omni.build_request_batch_sampling_params_key(request("a")) == key(request("a"))
    assert key(request("a", {"n": 2, "m": 1})) == key(request("b", {"m": 1, "n": 2}))
    assert 4 == len({key(request("a", said)) for said in (..., False, {"n": 2}, {"n": 3})})


def test_what_is_no_json_is_refused_too(config: dict[str, Any]) -> None:
    """A caller in Python may say anything; neither the scheduler nor the batch fails."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    cycle: dict[str, Any] = {}
    cycle["n"] = cycle
    module = sys.modules["vllm_omni.diffusion.sched.request_scheduler"]
    said = [{1: 2, "n": 3}, {"n": {1: 2, "a": 3}}, {"n": deep}, cycle, object(), {"n": object()}]
    requests = [request(f"r{index}", each, steps=2) for index, each in enumerate(said)]
    assert len(said) == len({module.build_request_batch_sampling_params_key(each) for each in requests})
    *refused, fine = Runner(config).run([*requests, request("fine", steps=2)])
    assert all(output.error for output in refused)
    assert fine.error is None


def test_each_sample_of_a_batch_is_judged(config: dict[str, Any]) -> None:
    """Signals take the largest change of any sample, unless the config says otherwise."""
    for options, expected in (({}, "max"), ({"samples": "mean"}, "mean")):
        runner = Runner({**FBC, "options": options})
        assert expected == runner.cache_backend.requests.served.run._attachment.session_config.options.samples


# --- the clock


def test_the_scheduler_may_change_within_a_request(config: dict[str, Any]) -> None:
    """As in Wan, whose pipeline makes the scheduler that a request asks for after its `forward` has begun."""
    schedulers = pytest.importorskip("diffusers").schedulers

    class Changing(TinyPipeline):
        def __init__(self) -> None:
            super().__init__()
            self.scheduler: Any = schedulers.FlowMatchEulerDiscreteScheduler()

        def forward(self, req: Any) -> Any:
            params = req.sampling_params_list[0]
            if params.extra_args.get("flow_shift"):
                self.scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=params.extra_args["flow_shift"])
            self.scheduler.set_timesteps(params.num_inference_steps)
            x, y = omni.inputs(omni.TOY, seed=params.seed)
            for t in self.scheduler.timesteps:
                noise = self.transformer(x, t[None], y)
                x = self.scheduler.step(noise, t, x, return_dict=False)[0]
            return [omni.DiffusionOutput(output=x)]

    runner = Runner(config, Changing())
    lengths = set[int]()
    for shift, steps in ((None, 6), (5.0, 6), (None, 8), (3.0, 4)):
        asked = request("r", steps=steps)
        asked.sampling_params.extra_args["flow_shift"] = shift
        (output,) = runner.run([asked])
        (row,) = output.cachepolicy["rows"][0]["first"].values()
        plain = Changing()
        plain.scheduler = runner.pipeline.scheduler
        with torch.inference_mode(), cachepolicy.apply(plain.transformer, cachepolicy.parse(POLICY)) as run:
            expected = plain.forward(omni.DiffusionRequestBatch([asked]))[0].output  # by the timestep argument
            assert [row] == list(run.trace.rows().values())
        assert torch.equal(expected, output.output)
        lengths.add(len(row))
    assert {4, 6, 8} == lengths


def test_a_pair_for_the_first_block_becomes_the_stream() -> None:
    """Stable Diffusion 3 of vLLM-Omni hands its first block what a layer returned, a tensor and None."""
    name, layer = next(iter(plugin._UNPACKED.items()))

    class Pairing(nn.Module):
        def forward(self, x: Any) -> Any:
            return x, None

    module, _, last = name.rpartition(".")
    denoiser = type(last, (nn.Module,), {"__module__": module})()
    denoiser.add_module(layer, Pairing())
    other = nn.Module()
    other.add_module(layer, Pairing())
    x = torch.ones(2)
    for each in (denoiser, other):
        plugin.unpack(each)
    assert denoiser.get_submodule(layer)(x) is x
    assert (x, None) == other.get_submodule(layer)(x)
