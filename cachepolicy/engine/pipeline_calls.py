"""Pipeline calls: each is one trajectory in a session, run at once or in pieces."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, cast

from cachepolicy.engine.class_swap import ATTRIBUTE, Method
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.engine.sessions import Entered, Owner, Sessions, entered
from cachepolicy.engine.tuned_for import Guidance, guidance_numbers


class PipelineCall:
    """One call of a pipeline: a session of its own, unless a key is entered, and one trajectory.

    A generator or coroutine runs in pieces. Between the pieces, the context of the caller is restored.
    """

    def __init__(
        self,
        sessions: Sessions,
        pipeline: Any,
        follower: SchedulerFollower | None,
        guidance: Guidance,
    ) -> None:
        self._sessions = sessions
        self._pipeline = pipeline
        self._guidance = guidance
        self._follower = follower
        self._here: Entered | None = None

    def piece(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: calls inside belong to this pipeline call."""
        if self._here is None:
            if self._follower is not None:
                self._follower.restart()
            outer = entered(self._sessions)
            if outer is not None and outer.of(self._sessions) and outer.key is not None:
                self._sessions.restart(outer.key)
                known: dict[str, Any] = {"key": outer.key, "session_config": outer.session_config}
            else:
                known = {"owner": Owner(type(self._pipeline).__name__)}
            self._here = Entered(self._sessions, pipeline=self._pipeline, guidance=self._guidance, **known)
        return self._here.inside()

    @contextlib.contextmanager
    def whole(self) -> Generator[None]:
        """Span the whole pipeline call, and end its session on exit or error."""
        failed = True
        try:
            yield
            failed = False
        finally:
            self.close(failed=failed)

    def close(self, *, failed: bool = False) -> None:
        """End the session. Takes no lock, because a generator may be closed by the garbage collector."""
        if self._here is not None:
            self._sessions.end_at(self._here, failed=failed)
            self._here.close()

    # --- in pieces ---------------------------------------------------------------------------------------

    def generator(self, inner: Any) -> Generator[Any, Any, Any]:
        """Run the generator `inner` in pieces."""
        with self.whole():
            return (yield from self._pieces(inner))

    async def coroutine(self, inner: Any) -> Any:
        """Run the coroutine `inner` in pieces, from one await to the next."""
        with self.whole():
            return await _awaited(self._pieces(inner))

    async def asynchronous(self, inner: Any) -> AsyncGenerator[Any, Any]:
        """Run the asynchronous generator `inner` in pieces."""
        following = inner.asend(None)
        with self.whole():
            while True:
                try:
                    piece = await _awaited(self._pieces(following))
                except StopAsyncIteration:
                    return
                try:
                    following = inner.asend((yield piece))
                except GeneratorExit:
                    await _awaited(self._pieces(inner.aclose()))
                    raise
                except BaseException as error:  # noqa: BLE001 (it is the inner generator's to handle)
                    following = inner.athrow(error)

    def _pieces(self, inner: Any) -> Generator[Any, Any, Any]:
        send: Callable[[Any], Any] = inner.send
        value: Any = None
        while True:
            try:
                with self.piece():
                    piece = send(value)
            except StopIteration as stop:
                return stop.value
            try:
                value, send = (yield piece), inner.send
            except GeneratorExit:
                with self.piece():
                    inner.close()
                raise
            except BaseException as error:  # noqa: BLE001 (it is the inner generator's to handle)
                value, send = error, inner.throw


@types.coroutine
def _awaited(pieces: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    return (yield from pieces)


def pipeline_override(original: Method) -> Method:
    """Build the `__call__` of a pipeline."""
    in_pieces = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    deferred = any(kind(original) for kind in in_pieces)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handle = self.__dict__.get(ATTRIBUTE)
        if handle is None:
            return original(self, *args, **kwargs)
        # The arguments are read only where a policy says what it was tuned for.
        guidance = functools.partial(guidance_numbers, self, original, (self, *args), kwargs)
        call: PipelineCall = handle.attachment.call_of(self, guidance)
        if deferred:
            return _steered(call, original(self, *args, **kwargs))
        try:
            with call.piece():
                result = original(self, *args, **kwargs)
        except BaseException:
            call.close(failed=True)
            raise
        return _steered(call, result)

    return __call__


def _steered(call: PipelineCall, result: Any) -> Any:
    """Return the result of a call. A generator or coroutine is wrapped to run in the call's session."""
    if inspect.isgenerator(result):
        return call.generator(result)
    if inspect.iscoroutine(result):
        return call.coroutine(cast("Coroutine[Any, Any, Any]", result))
    if inspect.isasyncgen(result):
        return call.asynchronous(result)
    call.close()
    return result
