"""The sessions of a run, and the assignment of calls to sessions.

A session is found by the key of `run.session(key)`, else by the pipeline call, the asyncio task or the thread. The last
three own their sessions, so a session is released together with its owner and needs no cleanup.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from contextvars import ContextVar
from typing import Any

from cachepolicy.engine.contexts import setting
from cachepolicy.engine.session_config import SessionConfig
from cachepolicy.engine.session_state import Lost, Session, State
from cachepolicy.engine.tuned_for import Guidance
from cachepolicy.errors import PolicyError, warn

# --- owners ----------------------------------------------------------------------------------------------


class Owner:
    """Owner of sessions without a key: a thread, a task or a pipeline call."""

    __slots__ = ("__weakref__", "name", "sessions")

    def __init__(self, name: str) -> None:
        self.name = f"{name} #{next(_numbers)}"
        self.sessions: weakref.WeakKeyDictionary[Sessions, Session] = weakref.WeakKeyDictionary()


_numbers = itertools.count(1)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.owner = Owner(threading.current_thread().name)


_THREAD = _Thread()
_TASKS: weakref.WeakKeyDictionary[Any, Owner] = weakref.WeakKeyDictionary()


def _owner() -> Owner:
    """Return the owner of the current task, else of the current thread."""
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 (asyncio documents it for frameworks)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType]
        task = asyncio.current_task()
        if task is not None:
            owner = _TASKS.get(task)
            if owner is None:
                owner = _TASKS[task] = Owner(task.get_name())
                task.add_done_callback(_done)
            return owner
    return _THREAD.owner


def _done(task: Any) -> None:
    """Release the owner of a finished task. The task itself may live on for its result."""
    _TASKS.pop(task, None)


# --- where a context stands ------------------------------------------------------------------------------


class Entered:
    """A context that has entered a session of one run, by key or by a pipeline call.

    Contexts are copied into tasks and threads, and the copies may outlive the session. `close` drops the references.
    """

    __slots__ = ("_sessions", "guidance", "key", "outer", "owner", "pipeline", "session_config")

    def __init__(
        self,
        sessions: Sessions,
        *,
        key: Hashable = None,
        owner: Owner | None = None,
        session_config: SessionConfig | None = None,
        pipeline: Any = None,
        guidance: Guidance | None = None,
    ) -> None:
        self._sessions = weakref.ref(sessions)
        self.key = key
        self.owner = owner
        self.session_config = session_config
        self.pipeline = pipeline
        self.guidance = guidance
        self.outer = ENTERED.get()

    def of(self, sessions: Sessions) -> bool:
        """Return True if the session belongs to this run."""
        return self._sessions() is sessions

    @property
    def open(self) -> bool:
        """False once the pipeline call has ended."""
        return self.key is not None or self.owner is not None

    def close(self) -> None:
        """Mark the pipeline call as ended."""
        self.key = self.owner = self.session_config = self.pipeline = self.guidance = None

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Assign the calls inside to this session."""
        return setting(ENTERED, self)


ENTERED: ContextVar[Entered | None] = ContextVar("cachepolicy_entered", default=None)


def entered(sessions: Sessions) -> Entered | None:
    """Return the innermost open session of this run, else of another run, or None.

    The pipeline call of another run also separates the sessions of this run.
    """
    here, first = ENTERED.get(), None
    while here is not None:
        if here.open:
            if here.of(sessions):
                return here
            first = first or here
        here = here.outer
    return first


# --- the sessions of one run -----------------------------------------------------------------------------


def _nobody() -> None: ...


_MOST_LOST = 4096  # sessions that the limit has ended in mid-trajectory and that may still go on


class Sessions:
    """The sessions of one run, at most `most` with state. Beyond it, the least recently used ends.

    Sessions of owners are held by weak references. Dead references are removed at the next lookup, so that no lock is
    taken in a finalizer.

    Args:
        most: The largest number of sessions with state.
        finished: Called with the name and the state of each root model when a session ends without an error.

    Attributes:
        continued: How often a session went on after the limit had ended it in mid-trajectory.
    """

    def __init__(self, most: int, finished: Callable[[str, State], None]) -> None:
        self._most = most
        self._finished = finished
        self._lock = threading.Lock()
        self._recent: OrderedDict[object, Session | weakref.ref[Session]] = OrderedDict()
        self._lost: OrderedDict[int, Lost] = OrderedDict()
        self.continued = 0
        self._newest: Callable[[], Session | None] = _nobody
        """The session of an owner that was used last, if it is the newest of all."""

    def begin(self) -> tuple[Session, Entered | None]:
        """Begin a call in its session.

        Returns:
            The session, and the context that was entered, or None.

        Raises:
            PolicyError: A call of another thread is running in the session (E312).
        """
        here = entered(self)
        owner = (here.owner if here is not None else None) or _owner()
        with self._lock:
            if here is not None and here.key is not None:
                session = self._named(here.key)
            else:
                session = owner.sessions.get(self)
                if session is None:
                    session = owner.sessions[self] = Session(owner.name)
                if self._newest() is not session:
                    self._newest = weakref.ref(session)
                    self._touch(self._newest, self._newest)
            # Enter under the lock, so that `_make_room` in another thread does not end the session in between.
            session.enter()
        return session, here

    def named(self, key: Hashable) -> Session:
        """Return the session of a key, and create it if needed."""
        with self._lock:
            return self._named(key)

    def _named(self, key: Hashable) -> Session:
        session = self._recent.get(("session", key))
        if not isinstance(session, Session):
            session = Session(key)
            session.lost = self._lost.pop(hash(key), None)
        self._touch(("session", key), session)
        self._newest = _nobody
        return session

    def _touch(self, key: object, session: Session | weakref.ref[Session]) -> None:
        known = key in self._recent
        self._recent[key] = session
        self._recent.move_to_end(key)
        if not known and len(self._recent) > self._most:
            self._make_room()

    def _make_room(self) -> None:
        """Remove dead references, then end the least recently used sessions in which no call runs."""
        for key, session in list(self._recent.items()):
            if isinstance(session, weakref.ref) and session() is None:
                del self._recent[key]
        newest = next(reversed(self._recent))
        for key, entry in list(self._recent.items()):
            if len(self._recent) <= self._most:
                break
            session = entry() if isinstance(entry, weakref.ref) else entry
            if key is not newest and (session is None or not session.busy):
                del self._recent[key]
                if session is not None:
                    self._lose(session, keyed=not isinstance(entry, weakref.ref))

    def _lose(self, session: Session, *, keyed: bool) -> None:
        """End a session beyond the limit. If its trajectory was under way, its next call tells whether it goes on."""
        lost = (session.clock.t, session.clock.direction) if session.under_way else session.lost
        session.end()
        session.lost = lost
        if keyed and lost is not None:
            # Hashes, because keys may hold what their owners want to be gone.
            self._lost[hash(session.key)] = lost
            if len(self._lost) > _MOST_LOST:
                self._lost.popitem(last=False)

    def continues(self, session: Session) -> None:
        """Count a session that goes on although the limit has ended it, and warn of the first (W602)."""
        with self._lock:
            self.continued += 1
            first = self.continued == 1
        if first:
            warn(
                "W602",
                f"more than `max_sessions={self._most}` sessions are under way: `{session.key}` has lost its histories"
                " in mid-trajectory and computes anew",
                help="raise `max_sessions`, or end what is done with `run.reset(key)`; `run.memory` counts on",
            )

    def agree(self, key: Hashable, session_config: SessionConfig) -> None:
        """Apply settings to the session of a key. A session with different settings ends first.

        Raises:
            PolicyError: The trajectory of the session is running with other settings (E313).
        """
        session = self.named(key)
        if session.session_config is not None and session.session_config.differs(session_config):
            if session.under_way:
                raise PolicyError.of(
                    "E313",
                    f"the trajectory of the session `{key}` is under way with other params",
                    help=f"leave them out to go on with those, or `run.reset({key!r})` first",
                )
            self.end(session)
        session.session_config = session_config

    @contextlib.contextmanager
    def inside(self, key: Hashable, session_config: SessionConfig | None) -> Generator[None]:
        """Return a context manager: the calls inside belong to the session of a key, with these settings if given."""
        if session_config is not None:
            self.agree(key, session_config)
        with Entered(self, key=key, session_config=session_config).inside():
            yield

    def restart(self, key: Hashable) -> None:
        """End the trajectory of a session. Its settings stay."""
        session = self.named(key)
        session_config = session.session_config
        self.end(session)
        session.session_config = session_config

    def drop(self, key: Hashable) -> None:
        """End the session of a key."""
        with self._lock:
            session = self._recent.pop(("session", key), None)
            self._lost.pop(hash(key), None)
        if isinstance(session, Session):
            self.end(session)

    def end_current(self) -> None:
        """End the session of the current context."""
        here = entered(self)
        if here is not None:
            self.end_at(here)
        else:
            self._end_of(_owner())

    def end_at(self, here: Entered, *, failed: bool = False) -> None:
        """End the session that a context has entered. On failure, notify the processes that share its samples."""
        if here.key is None:
            if here.owner is not None:
                self._end_of(here.owner, failed=failed)
            return
        session = self._recent.get(("session", here.key))
        if isinstance(session, Session):
            self.end(session, failed=failed)

    def _end_of(self, owner: Owner, *, failed: bool = False) -> None:
        session = owner.sessions.get(self)
        if session is not None:
            self.end(session, failed=failed)

    def end(self, session: Session, *, failed: bool = False) -> None:
        """Release the state of a session. Its trace stays. Takes no lock, so that a finalizer may call it."""
        for name, state in session.end():
            if failed:
                state.abandon()
            else:
                self._finished(name, state)

    def clear(self) -> None:
        """End all sessions."""
        for session in self.alive():
            self.end(session)
        with self._lock:
            self._newest = _nobody
            self._recent.clear()
            self._lost.clear()

    def alive(self) -> list[Session]:
        """Return the sessions whose owners are alive."""
        with self._lock:
            sessions = [entry() if isinstance(entry, weakref.ref) else entry for entry in self._recent.values()]
        return [session for session in sessions if session is not None]

    @property
    def keys(self) -> tuple[object, ...]:
        """The keys, or the names of the owners, of the sessions with state."""
        return tuple(session.key for session in self.alive() if session.states)
