# diffusers comes without complete types: what a scheduler gets and returns is not known in the strict sense.
# pyright: basic
"""Records uncached runs: what reaches the scheduler, as inner products, and which model computed it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachepolicy.engine.actions import hidden_states
from cachepolicy.errors import PolicyError
from cachepolicy.tuning.solver import SolverTrace

ELEMENTS = 64
"""Elements of a sample on which the weights of the solver are measured."""
MEMORY_LIMIT = 1 << 30
"""Bytes of the outputs of one run above which they are kept in a file, in float16."""


SAME = 0.01
"""Largest deviation of a denoiser's latents from a multiple of the sample, relative to the largest one."""


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """One recorded run, of one output: a picture, or the sound beside it.

    Args:
        gram: Inner products of the outputs of all calls, divided by their number of elements, `(N, N)`, float64.
        scale: Standard deviation of the sample after each call, `(N,)`.
        elements: Number of elements of the sample.
        solver: What a few elements went through.
        models: Index of the denoiser that ran before each call of the scheduler, `(N,)`.
        timesteps: The timestep of each call, `(N,)`.
        rows: Rows of the batches that the denoisers ran before each call, both halves of guidance counted, `(N,)`.
        residual: The inner products of the outputs minus the latents that the denoiser was called with, `(N, N)`. None
            where the denoiser's latents and outputs are no tensors of one shape, or are not the scheduler's.
    """

    gram: torch.Tensor
    scale: tuple[float, ...]
    elements: int
    solver: SolverTrace
    models: tuple[int, ...]
    timesteps: tuple[float, ...]
    rows: tuple[float, ...]
    residual: torch.Tensor | None = None

    @property
    def starts(self) -> frozenset[int]:
        """The calls at which another denoiser takes over."""
        return frozenset(call for call in range(1, len(self.models)) if self.models[call] != self.models[call - 1])


def record(
    run: Callable[[], Any],
    schedulers: Sequence[Any],
    models: Sequence[nn.Module],
    stepped: Callable[[], None] | None = None,
) -> list[OutputRecord]:
    """Run a function once and record what it gives the schedulers.

    The classes of the schedulers are patched for the time of the run, so that copies which a pipeline makes of them are
    recorded too. Other threads are not recorded.

    Args:
        run: Samples once, without a policy.
        schedulers: The schedulers of the pipeline.
        models: Its denoisers.
        stepped: Called after each step of the scheduler that is stepped first.

    Returns:
        A record for each scheduler that was stepped, in the order of their first steps.

    Raises:
        PolicyError: No scheduler was stepped (E400).
    """
    recorder = _Recorder(threading.get_ident(), stepped)
    with contextlib.ExitStack() as stack:
        for cls in dict.fromkeys(_stepping_class(scheduler) for scheduler in schedulers):
            stack.enter_context(recorder.patched(cls))
        for index, model in enumerate(models):
            stack.callback(model.register_forward_hook(recorder.seen(index), with_kwargs=True).remove)
        stack.callback(recorder.close)
        run()
        records = [stream.finished() for stream in recorder.streams.values()]
    if not records:
        names = ", ".join(f"`{type(scheduler).__name__}`" for scheduler in schedulers) or "no scheduler"
        raise PolicyError.of(
            "E400",
            f"the run stepped none of its schedulers: {names}",
            help="pass the scheduler that the sampling function steps: `scheduler=`",
        )
    return records


def _stepping_class(scheduler: Any) -> type:
    """Return the class that defines the `step` of a scheduler."""
    return next(cls for cls in type(scheduler).__mro__ if "step" in cls.__dict__)


class _Recorder:
    """What one run gave the schedulers so far."""

    def __init__(self, thread: int, stepped: Callable[[], None] | None) -> None:
        self.streams = dict[int, _Stream]()
        self._thread = thread
        self._stepped = stepped
        self._model = 0
        self._rows = 0
        self._latents: torch.Tensor | None = None

    @contextlib.contextmanager
    def patched(self, cls: type) -> Generator[None]:
        """Replace the `step` of a class by one that records."""
        original: Callable[..., Any] = cls.__dict__["step"]
        signature = inspect.signature(original)

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(scheduler, *args, **kwargs)
            stream = self.streams.setdefault(id(scheduler), _Stream())
            bound = signature.bind(scheduler, *args, **kwargs)
            stream.before(scheduler, bound.arguments, self._model, self._rows, self._latents)
            self._rows = 0
            result = original(scheduler, *args, **kwargs)
            stream.after(result)
            if self._stepped is not None and stream is next(iter(self.streams.values())):
                self._stepped()
            return result

        cls.step = step
        try:
            yield
        finally:
            cls.step = original

    def seen(self, index: int) -> Callable[..., None]:
        """Return a hook that notes which denoiser ran last, and on which latents."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
            latents = hidden_states(args, kwargs)
            self._model = index
            self._rows += 1 if latents is None or not latents.ndim else len(latents)
            output = _first_tensor(answer)
            fits = latents is not None and output is not None and latents.shape == output.shape
            self._latents = latents if fits else None

        return hook

    def close(self) -> None:
        """Remove the files of all streams."""
        for stream in self.streams.values():
            stream.outputs.close()
            stream.residuals.close()


class _Outputs:
    """The outputs of one run: in memory, or in a file where they are large."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.elements = 0
        self._limit = limit
        self._bytes = 0
        self._kept = list[torch.Tensor]()
        self._files = list[Any]()

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, output: torch.Tensor) -> None:
        """Keep an output."""
        kept = output.detach().reshape(-1).float().cpu()
        if kept.data_ptr() == output.data_ptr():
            kept = kept.clone()
        self.elements = len(kept)
        self._bytes += kept.nbytes
        if self._bytes > self._limit:
            kept = self._spilled(kept)
        self._kept.append(kept)

    def _spilled(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor maps the file, so that the system can drop it from memory.
        file = tempfile.NamedTemporaryFile(prefix="cachepolicy-", suffix=".f16")  # noqa: SIM115 (closed by `close`)
        self._files.append(file)
        mapped = torch.from_file(file.name, shared=True, size=len(tensor), dtype=torch.float16)
        return mapped.copy_(tensor)

    def gram(self) -> torch.Tensor:
        """Return the inner products of all outputs per element, in float64."""
        count = len(self._kept)
        gram = torch.zeros(count, count, dtype=torch.float64)
        # Pieces bound the memory of the float64 copies.
        piece = max(1, (1 << 24) // max(count, 1))
        for begin in range(0, self.elements, piece):
            rows = torch.stack([kept[begin : begin + piece].double() for kept in self._kept])
            gram += rows @ rows.T
        return gram / max(self.elements, 1)

    def close(self) -> None:
        """Remove the files."""
        self._kept.clear()
        for file in self._files:
            file.close()
        self._files.clear()


@dataclass(slots=True)
class _Stream:
    """The calls of one scheduler."""

    scheduler: Any = None
    outputs: _Outputs = field(default_factory=_Outputs)
    residuals: _Outputs = field(default_factory=_Outputs)
    timesteps: list[Any] = field(default_factory=list[Any])
    arguments: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    scale: list[float] = field(default_factory=list[float])
    models: list[int] = field(default_factory=list[int])
    rows: list[float] = field(default_factory=list[float])
    picked: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    start: torch.Tensor | None = None
    _index: torch.Tensor | None = None

    def before(
        self, scheduler: Any, arguments: dict[str, Any], model: int, rows: int, latents: torch.Tensor | None
    ) -> None:
        inputs = {name: value for name, value in arguments.items() if name not in ("self", "return_dict")}
        output, timestep, sample = (inputs.pop(name) for name in ("model_output", "timestep", "sample"))
        if self._index is None or self.start is None:
            # A scheduler is copied before it is stepped, with the timesteps that the pipeline has set.
            self.scheduler = copy.deepcopy(scheduler)
            generator = torch.Generator().manual_seed(0)
            self._index = torch.randint(sample.numel(), (ELEMENTS,), generator=generator).to(sample.device)
            self.start = self._pick(sample)
        self.outputs.append(output)
        given = None if output.shape != sample.shape else _scaled(sample, latents)
        if given is not None:
            self.residuals.append(output.float() - given.float())
        self.picked.append(self._pick(output))
        self.timesteps.append(timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep)
        self.arguments.append({name: value for name, value in inputs.items() if isinstance(value, bool | int | float)})
        self.models.append(model)
        self.rows.append(float(rows))

    def after(self, result: Any) -> None:
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        self.scale.append(float(sample.detach().float().std()))

    def _pick(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._index is not None
        # Some models also predict a variance, in further channels, which the index does not reach.
        return tensor.reshape(-1)[self._index % tensor.numel()].double().cpu()

    def finished(self) -> OutputRecord:
        assert self.start is not None
        gram = self.outputs.gram()
        return OutputRecord(
            gram=gram,
            scale=tuple(self.scale),
            elements=self.outputs.elements,
            solver=SolverTrace(self.scheduler, self.timesteps, self.arguments, self.start, torch.stack(self.picked)),
            models=tuple(self.models),
            timesteps=tuple(float(timestep) for timestep in self.timesteps),
            # Where a step has no call of its own, as those of the sound, whose outputs come with the picture's, all
            # steps count alike.
            rows=tuple(self.rows) if all(self.rows) else (1.0,) * len(self.rows),
            residual=self.residuals.gram() if len(self.residuals) == len(self.outputs) else None,
        )


def _first_tensor(answer: Any) -> torch.Tensor | None:
    """Return what a denoiser answers: a tensor, or the first one of a tuple or of an output of diffusers."""
    parts = [*answer.values()] if isinstance(answer, Mapping) else answer
    first = parts[0] if isinstance(parts, list | tuple) and parts else parts
    return first if isinstance(first, torch.Tensor) else None


def _scaled(sample: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows of a denoiser's latents that are a multiple of a scheduler's sample, None if none are.

    Args:
        sample: The sample, `(B, ...)`.
        latents: The latents, which may have the sample twice, for guidance.
    """
    if latents is None or latents.shape[1:] != sample.shape[1:]:
        return None
    wanted = sample.detach().float()
    for rows in latents.detach().split(len(sample)):
        if rows.shape == sample.shape:
            given = rows.float()
            factor = (given * wanted).sum() / wanted.square().sum().clamp(min=1e-12)
            if (given - factor * wanted).abs().max() <= SAME * given.abs().max():
                return rows
    return None
