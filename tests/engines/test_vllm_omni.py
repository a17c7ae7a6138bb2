"""The plugin in the engine: one start for many requests, in one process and with worker processes.

Needs an environment with vLLM-Omni, which `bash .ci/engines` makes.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm_omni")

import numpy as np

from tests.support.engine_models import FBC, POLICY

HERE = Path(__file__).parent

REQUESTS: list[dict[str, Any]] = [
    {},
    {"said": False},
    {"said": {"n": 4}},
    {"said": {"n": "x"}},
    {"said": "garbage"},
    {"said": {"policy": "/etc/passwd"}},
    {"said": {"policy": "fbc", "options": {"trace": True}}},
    {"said": {"options": {"audit": 1.0}}},
    {"seed": 1},
    {},
]
TOGETHER: list[dict[str, Any]] = [
    {"group": "g", "seed": 1},
    {"group": "g", "seed": 2},
    {"group": "g", "said": {"n": 4}},
    {"group": "g", "seed": 3, "said": {"n": 4}},
    {"group": "g", "said": False},
    {"group": "g", "said": {"n": []}},
    {"said": {"n": 4}},
    {},
]


VIDEO = {"num_frames": 5}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny pipelines, random weights, and the policy."""
    made = tmp_path_factory.mktemp("omni")
    for kind in ("sd3", "flux", "wan"):
        command = [sys.executable, str(HERE / "save_tiny.py"), kind, str(made / kind)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    (made / "some.cp").write_text(POLICY)
    return made


class Started:
    """Starts the engine with some arguments at most once, and keeps what came of its requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shipped = {name: {"policy": name} for name in ("pab", "fora")}
        self.config = {"policy": str(folder / "some.cp"), "policies": {"fbc": FBC, **shipped}}

    @functools.cache  # noqa: B019 (there is one for the session)
    def outcome(self, name: str) -> dict[str, Any]:
        engine, requests = _STARTS[name]
        if name != "bare":
            config = self.config if name != "wrong" else {**self.config, "params": {"m": 1}}
            engine = {"cache_backend": "cachepolicy", "cache_config": config, **engine}
        job, output = self.folder / f"{name}.json", self.folder / f"{name}-results.json"
        kind = name if name in {"flux", "wan"} else "sd3"
        told = {"folder": str(self.folder / kind), "engine": engine, "requests": requests, "output": str(output)}
        job.write_text(json.dumps(told))
        with (self.folder / f"{name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, str(HERE / "start_omni.py"), str(job)],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=900,
                check=False,
            )
        text = (self.folder / f"{name}.log").read_text()
        assert output.exists(), text[-5000:]
        return {**json.loads(output.read_text()), "log": text}

    def results(self, name: str) -> list[dict[str, Any]]:
        return self.outcome(name)["results"]


_STARTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "bare": ({}, [{}, {"seed": 1}]),
    "one process": ({}, REQUESTS),
    "worker processes": (
        {"distributed_executor_backend": "mp", "max_num_seqs": 4, "request_batch_max_wait_ms": 1000},
        [*REQUESTS, *TOGETHER],
    ),
    "tensor parallel": ({"tensor_parallel_size": 2}, REQUESTS),
    "sequence parallel": ({"ulysses_degree": 2}, REQUESTS),
    "wrong": ({}, []),
    "flux": ({}, [{}, {"said": False}, *({"said": {"policy": name}} for name in ("fbc", "pab", "fora"))]),
    "wan": (
        {},
        [
            {"more": VIDEO, "extra": extra, "said": said}
            for extra in ({}, {"sample_solver": "euler", "flow_shift": 2.0}, {})
            for said in ({"options": {"trace": True}}, False)
        ],
    ),
}


@pytest.fixture(scope="session")
def started(folder: Path) -> Started:
    return Started(folder)


EVERY = ["one process", "worker processes", "tensor parallel", "sequence parallel"]


def pixels(result: dict[str, Any]) -> Any:
    assert "error" not in result, result["error"]
    return np.asarray(result["pixels"])


@pytest.mark.parametrize("name", EVERY)
def test_requests_are_served_as_they_ask(started: Started, name: str) -> None:
    """The params of the server, its own params, another policy, an audit, and again."""
    results = started.results(name)
    rows = [each["record"]["rows"][0]["first"] for index, each in enumerate(results[:10]) if index in {0, 2, 6, 9}]
    span = "transformer_blocks[1:4]"
    assert ["CRCRCRCC", "CRRRCRRC", "CRRRRRRR", "CRCRCRCC"] == [each[span] for each in rows]
    assert np.array_equal(pixels(results[0]), pixels(results[9]))
    assert not np.array_equal(pixels(results[0]), pixels(results[2]))
    assert 0 < results[7]["record"]["audit_error"]
    assert results[6]["record"]["trace"]["trajectories"]


@pytest.mark.parametrize("name", EVERY)
def test_garbage_is_refused_and_the_server_goes_on(started: Started, name: str) -> None:
    """The caller gets an error of the client with the diagnostic."""
    results = started.results(name)
    for index, code in ((3, "E161"), (4, "E309"), (5, "E309")):
        assert results[index]["error"].startswith(f"OmniClientError: cachepolicy: {code}")
    pixels(results[8])


@pytest.mark.parametrize("name", ["one process", "worker processes"])
def test_false_is_the_engine_without_us(started: Started, name: str) -> None:
    """Bitwise, for one process a model; an audited request too."""
    results, bare = started.results(name), started.results("bare")
    assert np.array_equal(pixels(bare[0]), pixels(results[1]))
    assert np.array_equal(pixels(bare[0]), pixels(results[7]))
    assert bare[0]["record"] is None


@pytest.mark.parametrize("name", ["tensor parallel", "sequence parallel"])
def test_processes_decide_together(started: Started, name: str) -> None:
    """Signals lead to the same reuse as in one process, and to nearly the same picture."""
    alone, divided = (pixels(started.results(each)[6]) for each in ("one process", name))
    assert np.abs(alone - divided).max() <= 8


def test_requests_of_a_batch_that_differ_are_kept_apart(started: Started) -> None:
    """Those that ask for the same share a batch; each gets what it gets alone, but for rounding."""
    results = started.results("worker processes")
    together = results[len(REQUESTS) :]
    assert together[5]["error"].startswith("OmniClientError: cachepolicy: E161")
    records = [each.get("record") for each in together]
    assert 2 == records[0]["requests"] == records[1]["requests"]
    assert records[0]["session"] == records[1]["session"] != records[2]["session"]
    assert records[4]["policy"] is False
    assert np.abs(pixels(results[8]) - pixels(together[0])).max() <= 8
    assert np.abs(pixels(results[2]) - pixels(together[2])).max() <= 8
    assert np.abs(pixels(results[1]) - pixels(together[4])).max() <= 8
    assert np.array_equal(pixels(results[0]), pixels(together[7]))


def test_a_mistake_stops_the_start(started: Started) -> None:
    """The engine does not come up, and its log has the diagnostic."""
    outcome = started.outcome("wrong")
    assert outcome["start"]
    assert [] == outcome["results"]
    assert "error[E160]: the policy has no parameter `m`" in outcome["log"]


def test_flux_is_served(started: Started) -> None:
    """With the policy of the server, without one, and with others that requests name."""
    results = started.results("flux")
    records = [each["record"] for each in results]
    assert [4 / 8, 7 / 8] == [records[index]["skipped_share"] for index in (0, 2)]
    assert all(0 < each["skipped_share"] for each in (records[3], records[4]))
    assert 5 == len({each["record"]["session"] for each in results})
    for index in (0, 2, 3, 4):
        assert not np.array_equal(pixels(results[1]), pixels(results[index]))


def test_wan_is_served_by_the_scheduler_of_each_request(started: Started) -> None:
    """Both experts run under the policy, by the timesteps of the scheduler that the request asks for."""
    results = started.results("wan")
    for index, shift in ((0, 5.0), (2, 2.0), (4, 5.0)):
        trace = results[index]["record"]["trace"]
        calls = [call for trajectory in trace["trajectories"] for call in trajectory["calls"] if call["branch"] == ""]
        assert list(range(8)) == [call["step"] for call in calls]
        noise = [1 - step / 8 for step in range(8)]
        expected = [1000 * shift * each / (1 + (shift - 1) * each) for each in noise]
        assert pytest.approx(expected, abs=1.0) == [call["t"] for call in calls]
        assert {"transformer", "transformer_2"} == set(results[index]["record"]["digests"])
        assert 0 < results[index]["record"]["skipped_share"]
        assert not np.array_equal(pixels(results[index]), pixels(results[index + 1]))
