"""The picture server of the examples: many requests at once, each as alone."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("diffusers", "fastapi", "prometheus_client"):
    pytest.importorskip(needed)
httpx: Any = pytest.importorskip("httpx")
uvicorn: Any = pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[1] / "examples" / "serving"


def example(name: str) -> Any:
    """A module of the example, which is no package."""
    spec = importlib.util.spec_from_file_location(f"serving_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


load, server = example("load"), example("server")


@pytest.fixture(scope="module")
def studio() -> Iterator[Any]:
    """A server in a thread, on a port that is free."""
    made = server.Studio("fora", workers=3, waiting=20)
    serving = uvicorn.Server(uvicorn.Config(server.application(made), port=0, log_level="error"))
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    for _ in range(300):
        if serving.started:
            break
        time.sleep(0.1)
    port = serving.servers[0].sockets[0].getsockname()[1]
    made.url = f"http://127.0.0.1:{port}"
    yield made
    serving.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    assert not made.run.attached


def ask(studio: Any, **order: Any) -> Any:
    return httpx.post(f"{studio.url}/pictures", json={"label": "fox", "steps": 4, **order}, timeout=60)


def test_every_picture_is_what_it_is_alone(studio: Any) -> None:
    """Requests with their own params, steps and seeds, with the policy and without, all at once: byte for byte."""
    work = [job for job in load.jobs(9, (3, 7), seed=1) if not job.cancelled]

    async def both() -> list[Any]:
        return await asyncio.gather(
            *(load.load(studio.url, work, at_a_time=5, cached=cached) for cached in (True, False))
        )

    for cached, outcome in zip((True, False), asyncio.run(both()), strict=True):
        assert {"200": len(work)} == outcome.ends
        assert 0 == load.wrong(outcome, load.alone("fora", work, cached=cached))


def test_the_params_of_a_request_are_its_own(studio: Any) -> None:
    """Another interval draws another picture; the same one the same."""
    one, other, again = (ask(studio, steps=8, params={"interval": each}).content for each in (2, 6, 2))
    assert one == again
    assert one != other


def test_a_request_can_be_cancelled_and_leaves_nothing(studio: Any) -> None:
    """It ends with 409, and neither it nor its session is held on to."""
    ends = list[int]()
    thread = threading.Thread(target=lambda: ends.append(ask(studio, steps=200, name="long").status_code))
    thread.start()
    for _ in range(500):
        if httpx.delete(f"{studio.url}/pictures/long").status_code == 202:
            break
        time.sleep(0.01)
    thread.join(60)
    assert [409] == ends
    assert {} == studio.orders
    assert 200 == ask(studio).status_code


def test_a_client_that_hangs_up_cancels_its_request(studio: Any) -> None:
    """Its worker is free again long before the picture would be drawn."""
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{studio.url}/pictures", json={"label": "fox", "steps": 200, "name": "gone"}, timeout=0.2)
    for _ in range(600):
        if "gone" not in studio.orders:
            break
        time.sleep(0.05)
    assert {} == studio.orders


@pytest.mark.parametrize(
    ("order", "status", "said"),
    [
        ({"label": "unicorn"}, 422, "is none of"),
        ({"params": {"intervall": 2}}, 422, "did you mean `interval`"),
        ({"params": {"interval": 0}}, 422, "interval"),
        ({"steps": 0}, 422, "greater than or equal"),
        ({"nonsense": 1}, 422, "Extra inputs"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_to_its_client(studio: Any, order: Any, status: int, said: str) -> None:
    """A policy's own diagnostics reach the one who wrote the params."""
    answer = ask(studio, **order)
    assert status == answer.status_code
    assert said in answer.text


def test_metrics_count_requests_and_calls(studio: Any) -> None:
    """Outcomes, seconds, and what the sites did."""
    ask(studio)
    text = httpx.get(f"{studio.url}/metrics").text
    assert 'requests_total{outcome="drawn"}' in text
    assert 'site_calls_total{verdict="reuse"}' in text
    assert "requests_in_flight 0.0" in text
    assert "match attention or feedforward" in httpx.get(f"{studio.url}/policy").text
