"""Work for another thread: when the thread is woken, and that all work is done."""

from collections.abc import Callable
from itertools import product

import pytest

from trio_pilot.brokers.thread_bridge import Mailbox


class OtherThread:
    """A thread that runs its wake-ups and its scheduled calls when a test asks for it."""

    def __init__(self, batch: int = 1) -> None:
        self.wakes: list[Callable[[], None]] = []
        self.plans: list[Callable[[], None]] = []
        self.done: list[int] = []
        self.mailbox = Mailbox(self.wakes.append, batch, self.plans.append)

    def put(self, number: int) -> None:
        self.mailbox.put(lambda: self.done.append(number))

    def put_in_the_middle_of_work(self, number: int) -> None:
        self.mailbox.put(lambda: self.put(number))

    def wake_up(self) -> None:
        while self.wakes:
            self.wakes.pop()()

    def look(self) -> None:
        due = self.plans.copy()
        self.plans.clear()
        assert len(due) <= 1
        for plan in due:
            plan()


@pytest.fixture
def thread() -> OtherThread:
    """A thread that has just done a piece of work, and is woken by three more."""
    thread = OtherThread(batch=3)
    thread.put(0)
    thread.wake_up()
    assert thread.done == [0]
    return thread


def test_only_the_first_piece_wakes_the_thread() -> None:
    thread = OtherThread()
    for number in range(3):
        thread.put(number)
    assert len(thread.wakes) == 1
    thread.wake_up()
    assert thread.done == [0, 1, 2]
    assert not thread.plans


def test_work_that_may_wait_is_done_a_batch_at_a_time(thread: OtherThread) -> None:
    thread.put(1)
    thread.put(2)
    assert not thread.wakes
    thread.put(3)
    assert len(thread.wakes) == 1
    thread.wake_up()
    assert thread.done == [0, 1, 2, 3]


def test_less_than_a_batch_waits_for_a_moment_only(thread: OtherThread) -> None:
    thread.put(1)
    assert not thread.wakes
    thread.look()
    assert thread.done == [0, 1]


def test_hurry_gets_the_work_done_at_once(thread: OtherThread) -> None:
    thread.put(1)
    thread.mailbox.hurry()
    thread.wake_up()
    assert thread.done == [0, 1]


def test_a_thread_without_work_sleeps_until_it_is_woken(thread: OtherThread) -> None:
    thread.look()
    assert not thread.plans
    thread.put(1)
    assert len(thread.wakes) == 1


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_order_of_events_leaves_work_undone(batch: int) -> None:
    for course in product(("put", "put meanwhile", "wake", "look"), repeat=7):
        thread, numbers = OtherThread(batch), iter(range(len(course)))
        for step in course:
            match step:
                case "put":
                    thread.put(next(numbers))
                case "put meanwhile":
                    thread.put_in_the_middle_of_work(next(numbers))
                case "wake":
                    thread.wake_up()
                case "look":
                    thread.look()
        while thread.wakes or thread.plans:
            thread.wake_up()
            thread.look()
        assert sorted(thread.done) == list(range(next(numbers, len(course)))), course
