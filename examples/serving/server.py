"""A picture server over the emoji model: many requests at once, each with its own params of one policy.

    python examples/serving/server.py --policy fora --port 8000

    curl -d '{"label": "fox", "steps": 30, "params": {"interval": 2}}' -H 'content-type: application/json' \
        127.0.0.1:8000/pictures > fox.png

`POST /pictures` draws one, `DELETE /pictures/NAME` cancels the request that named itself so, `GET /policy` is the
policy's text and params, `GET /metrics` is for Prometheus. A client that hangs up cancels its request too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import threading
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import cachepolicy
from cachepolicy.tools.emoji import NAMES, EmojiPipeline, load_pipeline

Param = bool | int | float | str | list[float] | None


class Order(BaseModel):
    """What a client asks for; `params` are the policy's, `cached` false runs the bare model."""

    model_config = ConfigDict(extra="forbid")

    label: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Annotated[int, Field(ge=1, le=200)] = 50
    guidance_scale: Annotated[float, Field(ge=1, le=20)] = 2.0
    cached: bool = True
    params: dict[str, Param] = {}
    name: Annotated[str, Field(max_length=100)] | None = None


class Cancelled(Exception):
    """The client does not want the picture any more."""


@dataclass
class Studio:
    """The model with its policy, and the requests that are being drawn."""

    policy: str
    workers: int
    waiting: int
    pipe: EmojiPipeline = field(default_factory=load_pipeline)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="draw")
        self.run = cachepolicy.apply(self.pipe, self.policy, max_sessions=self.workers + self.waiting)
        self.orders: dict[str, threading.Event] = {}
        self.metrics = Metrics()

    def close(self) -> None:
        """Let the requests end, and take the policy off."""
        for cancelled in self.orders.values():
            cancelled.set()
        self.pool.shutdown()
        self.run.remove()

    async def draw(self, order: Order, request: Request) -> bytes:
        """The picture, drawn in a worker; a client that hangs up stops it at its next step."""
        name = order.name or uuid.uuid4().hex
        if name in self.orders:
            raise HTTPException(409, f"a request named `{name}` is being drawn")
        if len(self.orders) >= self.workers + self.waiting:
            raise HTTPException(503, "too many requests", headers={"retry-after": "1"})
        cancelled = self.orders[name] = threading.Event()
        drawing = asyncio.get_running_loop().run_in_executor(self.pool, self._drawn, name, order, cancelled)
        try:
            while not drawing.done():
                await asyncio.wait([drawing], timeout=0.2)
                if await request.is_disconnected():
                    cancelled.set()
            return drawing.result()
        finally:
            cancelled.set()
            del self.orders[name]

    def _drawn(self, name: str, order: Order, cancelled: threading.Event) -> bytes:
        """One picture, on a pipeline of its own over the shared model: a scheduler runs one request at a time."""

        def go_on(*_: Any) -> None:
            if cancelled.is_set():
                raise Cancelled

        go_on()
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        pipe = self.run.share(scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        with self.run.session(name, **order.params) if order.cached else self.run.disabled():
            drawn = pipe([order.label], order.steps, order.guidance_scale, seed=order.seed, callback_on_step_end=go_on)
        self.metrics.count(self.run, name)
        buffer = io.BytesIO()
        drawn.images[0].save(buffer, format="PNG")
        return buffer.getvalue()


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Requests by outcome.", ["outcome"], registry=self.registry)
        self.drawing = Gauge("requests_in_flight", "Requests that wait or are being drawn.", registry=self.registry)
        self.seconds = Histogram("request_seconds", "Seconds a picture.", ["cached"], registry=self.registry)
        self.calls = Counter("site_calls", "Calls of sites by what they did.", ["verdict"], registry=self.registry)

    def count(self, run: cachepolicy.Run, session: str) -> None:
        """Add what the trace says of a session that has ended."""
        for trajectory in run.trace or ():
            if trajectory.session == session:
                for verdict, calls in trajectory.counts().items():
                    self.calls.labels(verdict).inc(calls)


def application(studio: Studio) -> FastAPI:
    """The server's routes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(title="Emoji", lifespan=lifespan)

    @app.post("/pictures", response_class=Response)
    async def pictures(order: Order, request: Request) -> Response:
        if order.label not in NAMES:
            raise HTTPException(422, f"`{order.label}` is none of {', '.join(NAMES)}")
        metrics = studio.metrics
        with metrics.drawing.track_inprogress():
            try:
                with metrics.seconds.labels(order.cached).time():
                    picture = await studio.draw(order, request)
            except Cancelled:
                metrics.requests.labels("cancelled").inc()
                raise HTTPException(409, "cancelled") from None
            except cachepolicy.PolicyError as error:
                metrics.requests.labels("refused").inc()
                raise HTTPException(422, str(error)) from error
            except HTTPException:
                metrics.requests.labels("refused").inc()
                raise
        metrics.requests.labels("drawn").inc()
        return Response(picture, media_type="image/png")

    @app.delete("/pictures/{name}", status_code=202)
    async def cancel(name: str) -> None:
        if name not in studio.orders:
            raise HTTPException(404, f"no request named `{name}` is being drawn")
        studio.orders[name].set()

    @app.get("/policy", response_class=Response)
    async def policy() -> Response:
        return Response(cachepolicy.format(studio.run.policy), media_type="text/plain")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(studio.metrics.registry), media_type="text/plain; version=0.0.4")

    return app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="fora")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2, help="pictures that are drawn at a time")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait for a worker")
    given = parser.parse_args()
    studio = Studio(given.policy, given.workers, given.waiting)
    uvicorn.run(application(studio), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
