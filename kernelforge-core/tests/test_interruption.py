from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from kernelforge.interruption import held_back


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """What Python does with Ctrl-C, also when the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    reached: list[str] = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("end of the block")
        reached.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_comes_first() -> None:
    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_done_in_other_threads() -> None:
    ran: list[bool] = []

    def work() -> None:
        with held_back():
            ran.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


def test_without_ctrl_c_nothing_happens() -> None:
    with held_back():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
