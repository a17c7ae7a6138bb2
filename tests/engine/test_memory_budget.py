"""The limit on bytes: never exceeded, whoever asks, and what saves least goes first."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.engine.memory_budget import Account, Budget, Lease, bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("2 GiB", 2**31), ("1.5kib", 1536), ("10 B", 10),
        ("3TB", 3 * 10**12), ("2", None), ("2 gigs", None), ("GiB", None), ("-1MB", None), ("1e3MB", None),
        ("4iB", None), ("", None),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int | None) -> None:
    """Powers of 1024 with an `i`, of 1000 without; anything else is none."""
    assert size == bytes_of(text)


def test_what_saves_least_for_its_bytes_goes_first() -> None:
    """Room is made by what is worth less than what comes; what is worth more stays, and the new one does without."""
    account, gone = Account(Budget(100)), list[str]()
    shares = {name: Lease(account, lambda name=name: gone.append(name)) for name in "abcd"}
    assert shares["a"].admits(40, saving=400)
    assert shares["b"].admits(40, saving=80)
    assert not shares["c"].admits(60, saving=60)
    assert [] == gone
    assert shares["d"].admits(60, saving=600)
    assert ["b"] == gone
    assert [False, True, True, False] == [shares[name].refused for name in "abcd"]
    assert 100 == account.held


def test_nothing_is_given_up_for_what_does_not_fit_all_the_same() -> None:
    """Something larger than the limit is refused, and all else stays."""
    account, gone = Account(Budget(100)), list[int]()
    small = Lease(account, lambda: gone.append(1))
    assert small.admits(10, saving=1)
    assert not Lease(account).admits(101)
    assert [] == gone


def test_what_nobody_has_any_more_is_not_counted() -> None:
    """A share's bytes end with the share, an account's with the account."""
    budget = Budget(100)
    account = Account(budget)
    share = Lease(account)
    assert share.admits(70)
    share.shrink(50)
    assert 50 == budget.held
    del share
    assert 0 == budget.held
    other = Lease(account)
    assert other.admits(100)
    del account, other
    assert 0 == budget.held


def test_a_session_that_waits_gets_its_fair_share() -> None:
    """The first takes all while it is alone; when the second has had to do without, it goes down to a half."""
    budget = Budget(100)
    first, second = Account(budget), Account(budget)
    many = [Lease(first) for _ in range(10)]
    assert all(share.admits(10, saving=number) for number, share in enumerate(many))
    late = Lease(second)
    assert not late.admits(20, saving=1)
    first.give_way()
    assert 50 == first.held
    assert [True] * 5 + [False] * 5 == [share.refused for share in many]
    assert late.admits(20, saving=1)
    assert not many[0].admits(40, saving=math.inf) or first.held <= 50
    assert budget.held <= 100


Steps = Sequence[tuple[int, int, int, int]]


def play(budget: Budget, accounts: Sequence[Account], steps: Steps, seen: list[int]) -> None:
    shares = {(account, number): Lease(accounts[account]) for account in range(len(accounts)) for number in range(4)}
    for account, number, size, saving in steps:
        share = shares[account % len(accounts), number]
        match saving % 5:
            case 0:
                accounts[account % len(accounts)].give_way()
            case 1:
                share.shrink(size // 2)
            case _:
                share.admits(size, saving)
        seen.append(budget.held)


moves = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 120), st.integers(0, 50)), max_size=40)


@given(moves)
def test_the_limit_is_never_exceeded(steps: Steps) -> None:
    """Whatever several sessions ask for in turn."""
    budget, seen = Budget(100), list[int]()
    play(budget, [Account(budget) for _ in range(3)], steps, seen)
    assert all(0 <= held <= 100 for held in seen)


def test_threads_share_a_limit() -> None:
    """Many at once never hold more than the limit, and all come to an end."""
    budget, seen = Budget(100), list[int]()
    steps = [(0, number % 4, 7 * number % 60, 11 * number % 50) for number in range(300)]
    threads = [threading.Thread(target=play, args=(budget, [Account(budget)], steps, seen)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert 8 * 300 == len(seen)
    assert max(seen) <= 100
