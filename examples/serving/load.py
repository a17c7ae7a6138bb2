"""Load the picture server, check every picture, and compare throughput with the policy and without.

    python examples/serving/load.py --requests 60 --at-a-time 8

Starts a server on 127.0.0.1, unless `--url` names one that runs. Each round sends the same requests twice, with the
policy and without it, in turns; labels, seeds, steps and params differ from request to request. Every picture is
compared, byte for byte, with one that was drawn alone in this process; every tenth request is cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import cachepolicy
from cachepolicy.tools.emoji import NAMES, load_pipeline

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One request: what is drawn, with which params, and whether it is given up."""

    number: int
    label: str
    seed: int
    steps: int
    interval: int
    cancelled: bool

    def order(self, *, cached: bool) -> dict[str, Any]:
        """The body of the request."""
        params = {"interval": self.interval} if cached else {}
        name = f"{'cached' if cached else 'bare'}-{self.number}"
        return {
            "name": name,
            "label": self.label,
            "seed": self.seed,
            "steps": self.steps,
            "cached": cached,
            "params": params,
        }


@dataclass
class Outcome:
    """One round of one way: how the requests ended, the pictures of those drawn, and the seconds of all."""

    ends: Counter[str] = field(default_factory=Counter)
    pictures: dict[int, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0


def jobs(count: int, steps: tuple[int, int], seed: int) -> list[Job]:
    """Seeded requests that differ in everything."""
    dice = random.Random(seed)
    return [
        Job(
            number,
            dice.choice(NAMES),
            dice.randrange(1000),
            dice.randint(*steps),
            dice.choice([2, 3, 4]),
            cancelled=number % 10 == 9,
        )
        for number in range(count)
    ]


async def load(url: str, work: list[Job], at_a_time: int, *, cached: bool) -> Outcome:
    """Send all requests, no more than `at_a_time` at once."""
    outcome, gate = Outcome(), asyncio.Semaphore(at_a_time)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(job: Job) -> None:
            async with gate:
                order = job.order(cached=cached)
                sending = asyncio.create_task(client.post("/pictures", json=order))
                if job.cancelled:
                    await _cancel(client, order["name"], sending)
                answer = await sending
            outcome.ends[str(answer.status_code)] += 1
            if answer.status_code == 200:
                outcome.pictures[job.number] = answer.content
                outcome.steps += job.steps

        started = time.perf_counter()
        await asyncio.gather(*map(one, work))
        outcome.seconds = time.perf_counter() - started
    return outcome


async def _cancel(client: httpx.AsyncClient, name: str, sending: asyncio.Task[httpx.Response]) -> None:
    """Cancel a request as soon as the server knows it, unless it is drawn before."""
    for _ in range(1000):
        if sending.done() or (await client.delete(f"/pictures/{name}")).status_code != 404:
            return
        await asyncio.sleep(0.01)


def alone(policy: str, work: list[Job], *, cached: bool) -> dict[int, bytes]:
    """Each picture as it comes out in a process that draws nothing else."""
    pipe, pictures = load_pipeline(), dict[int, bytes]()
    pipe.set_progress_bar_config(disable=True)
    for job in work:
        attached = cachepolicy.apply(pipe, policy, interval=job.interval) if cached else contextlib.nullcontext()
        with attached:
            buffer = io.BytesIO()
            pipe([job.label], job.steps, seed=job.seed).images[0].save(buffer, format="PNG")
            pictures[job.number] = buffer.getvalue()
    return pictures


def wrong(outcome: Outcome, expected: dict[int, bytes]) -> int:
    """How many pictures are not what they are alone."""
    return sum(picture != expected[number] for number, picture in outcome.pictures.items())


@contextlib.contextmanager
def server(policy: str, port: int) -> Iterator[str]:
    """A server in a process of its own, until the end of the `with`."""
    command = [sys.executable, str(HERE / "server.py"), "--policy", policy, "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the server has ended")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/policy").raise_for_status()
            return
        time.sleep(0.1)
    raise SystemExit("the server does not answer")


def main() -> None:
    """Run the rounds and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--at-a-time", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 40))
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--url")
    given = parser.parse_args()
    work = jobs(given.requests, tuple(given.steps), seed=0)
    ways = {True: "with fora", False: "without"}
    expected = {cached: alone("fora", work, cached=cached) for cached in ways}
    totals, ratios = {cached: Outcome() for cached in ways}, list[float]()
    bad = Counter[bool]()
    with contextlib.nullcontext(given.url) if given.url else server("fora", given.port) as url:
        for number in range(given.rounds):
            throughput = dict[bool, float]()
            for cached in (True, False) if number % 2 else (False, True):
                outcome = asyncio.run(load(url, work, given.at_a_time, cached=cached))
                throughput[cached] = outcome.steps / outcome.seconds
                totals[cached].ends += outcome.ends
                bad[cached] += wrong(outcome, expected[cached])
            ratios.append(throughput[True] / throughput[False])
        metrics = httpx.get(f"{url}/metrics").text
    for cached, name in ways.items():
        ends = ", ".join(f"{count} x {status}" for status, count in sorted(totals[cached].ends.items()))
        print(f"{name}: {ends}; {bad[cached]} wrong pictures")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
    print(f"steps a second, with the policy over without: {spread}")
    print("\n".join(line for line in metrics.splitlines() if line.startswith("requests_total")))


if __name__ == "__main__":
    main()
