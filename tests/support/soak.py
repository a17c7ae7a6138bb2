"""What a soaked engine is made of: policies that between them use everything, and lanes that each run as alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, ToyDiT
from cachepolicy.tracing.trace import CallRecord
from tests.support.guided_toy import GuidedToy
from tests.support.plain_engine import PlainEngine

Mode = Literal["no_grad", "inference", "grad"]
Place = Literal["key", "thread", "task"]
MODES: dict[Mode, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}
TIMESTEPS = (950.0, 850.0, 700.0, 650.0, 500.0, 350.0, 250.0, 100.0)

_HEAD = 'signal head = residual("^blocks.0$")\nsignal drift = relative_l1(head, kept(head))\n'
_LOOSE = _HEAD + "match blocks[1:] while drift <= 5 -> reuse residual\n"
_MOVED = "signal moved = relative_l1(input(model), prev(input(model)))\n"
_TOLD = 'signal told = l1(argument("^blocks.0$", "context"), prev(argument("^blocks.0$", "context")))\n'
_HALF = "match feedforward every 2 -> predict linear(weight: 0.5)\n"
_TEXTS = {
    "attention": "match attention every 2 -> reuse",
    "rules": "match attention when 200 < t < 800 every 3 since compute -> reuse\nmatch feedforward on {0, 3} -> reuse",
    "whole": "match model every 2 -> reuse",
    "linear maps": 'match "to_q$" every 3 -> reuse\nmatch "up$" when step % 2 == 1 -> reuse',
    "residuals": "match block every 2 -> reuse residual\nmatch attention every 3 -> reuse",
    "span": "match blocks every 3 -> reuse residual",
    "tail": "match blocks[1:] every 2 -> reuse residual\nmatch attention every 3 -> reuse",
    "outputs of a span": "match blocks[0:2] on {0, 3, 4} -> reuse",
    "skip": "match blocks[1:2] when step in {2, 4} -> skip\nmatch attention every 2 -> reuse",
    "taylor": _HALF + "match attention every 3 -> predict taylor(order: 2)",
    "taylor of a span": "match blocks[1:] every 3 -> predict taylor(order: 1) of residual",
    "feedback": "match block every 4 -> predict linear(weight: 0.5, feedback: true) of residual",
    "feedback of outputs": "match attention every 4 -> predict hermite(order: 2, scale: 0.5, feedback: true)",
    "first block": _HEAD + "match blocks[1:] while drift <= 0.05 -> reuse residual",
    "first block, loose": _LOOSE + "match attention every 2 -> reuse",
    "sites by signal": _HEAD + 'match "^blocks.[12].attn$" while drift < 0.5 at most 2 in a row -> reuse',
    "whole by signal": _MOVED + "match model while sum(moved) < 0.5 -> reuse",
    "sums": _HEAD + 'match "^blocks.[12]$" while sum(drift) < 2 at most 3 in all -> reuse residual',
    "bounds": "match attention every 9 at most 2 in a row at most 3 in all -> reuse",
    "conditioning": _TOLD + "match feedforward while told < 0.001 -> reuse",
    "follow": "match attention every 3 -> reuse follow cond",
    "follow a signal": _HEAD + "match blocks[1:] while drift <= 1 -> reuse residual follow cond",
}
POLICIES = {name: parse(text) for name, text in _TEXTS.items()}


class StopNow(BaseException):
    """What no `except Exception` catches, as KeyboardInterrupt is."""


class Bombs:
    """Hooks on every module of a model, one of which may be told to raise when it is reached next."""

    def __init__(self, model: ToyDiT) -> None:
        self.armed: tuple[str, BaseException] | None = None
        self.handles = [module.register_forward_hook(self._at(name)) for name, module in model.named_modules()]

    def _at(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            if self.armed is not None and self.armed[0] == name:
                raise self.armed[1]

        return hook

    @contextlib.contextmanager
    def arm(self, name: str, error: BaseException) -> Iterator[None]:
        """Inside, the module `name` raises after it has run."""
        self.armed = name, error
        try:
            yield
        finally:
            self.armed = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def built(toy: Toy, dtype: torch.dtype) -> ToyDiT:
    """The toy's model, the same each time."""
    model = toy.build()
    model.__class__ = GuidedToy
    return model.to(dtype)


class Twin:
    """A model of a lane's own, on which nothing else ever happens, and the plain engine beside it."""

    def __init__(self, toy: Toy, dtype: torch.dtype, policy: cachepolicy.Policy) -> None:
        self.model = built(toy, dtype)
        self.bombs = Bombs(self.model)
        self.run = cachepolicy.apply(self.model, policy, steps=len(TIMESTEPS))
        self.plain = PlainEngine(built(toy, dtype), self.run.plan)

    def last(self) -> CallRecord:
        """The call that has just been."""
        assert self.run.trace is not None
        assert self.run.trace.last is not None
        return self.run.trace.last.calls[-1]

    def close(self) -> None:
        """Take everything off."""
        self.run.remove()
        self.bombs.remove()


class Tasks:
    """Coroutines that take turns on one thread, each of which does what it is given."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._queues = list[asyncio.Queue[Any]]()
        self._tasks = list[asyncio.Task[None]]()

    def open(self) -> Callable[[Callable[[], Any]], Any]:
        """A new task; calling what this gives runs a function in it."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks.append(self.loop.create_task(_work(queue)))

        async def ask(job: Callable[[], Any]) -> Any:
            answer = self.loop.create_future()
            queue.put_nowait((job, answer))
            return await answer

        return lambda job: _given(self.loop.run_until_complete(ask(job)))

    def close(self) -> None:
        """End all tasks and the loop."""
        self.loop.run_until_complete(self._ended())
        self.loop.close()

    async def _ended(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _work(queue: asyncio.Queue[Any]) -> None:
    while True:
        job, answer = await queue.get()
        answer.set_result(_tried(job))
        del job, answer


def _tried(job: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    # Not by way of the future: what is no `Exception` would end the loop.
    try:
        return job(), None
    except BaseException as error:  # noqa: BLE001 (it is raised where it is asked for)
        return None, error


def _given(answer: tuple[Any, BaseException | None]) -> Any:
    value, error = answer
    if error is not None:
        raise error
    return value


@dataclass
class Lane:
    """One caller with sampling loops of its own, where its calls come from, and what it is at."""

    number: int
    place: Place
    branches: int
    named: bool
    twin: Twin | None
    carry: Callable[[Callable[[], Any]], Any] = lambda job: job()
    close: Callable[[], None] = lambda: None
    mode: Mode = "no_grad"
    batch: int = 1
    tokens: int = 4
    step: int = 0
    draws: int = 0
    x: Tensor = field(init=False)
    ys: list[Tensor] = field(init=False)

    def draw(self, width: int, dtype: torch.dtype, *, prompt: bool = True, latents: bool = True) -> None:
        """New latents, new conditionings, or both."""
        self.draws += 1
        generator = torch.Generator().manual_seed(1000 * self.number + self.draws)
        if latents:
            self.x = torch.randn(self.batch, self.tokens, width, generator=generator).to(dtype)
        if prompt:
            drawn = torch.randn(self.branches, self.batch, 3, width, generator=generator).to(dtype)
            self.ys = [each.clone() for each in drawn]

    def begin(self) -> None:
        """The next step is the first of a trajectory."""
        self.step = 0


def threaded(lane: Lane) -> None:
    """Give a lane a thread of its own."""
    pool = ThreadPoolExecutor(1)
    lane.carry = lambda job: pool.submit(job).result()
    lane.close = pool.shutdown


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return one.shape == other.shape and one.dtype is other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({4: torch.int32, 8: torch.int64, 2: torch.int16}[tensor.element_size()])
