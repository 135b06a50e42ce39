"""Signals become a flag that is read at the step boundary."""

import os
import signal

import pytest

from zeta.exit_codes import ExitCode
from zeta.run.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_the_scheduler_asks_to_save_and_requeue(number):
    with StopSignals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals.requested is ExitCode.REQUEUE


def test_a_person_asks_to_save_and_end_even_after_the_scheduler_did():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested is ExitCode.INTERRUPTED


def test_one_press_of_ctrl_c_that_is_passed_on_as_well_is_one():
    with StopSignals() as signals:
        for _ in range(3):  # a second one would end this process
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested is ExitCode.INTERRUPTED


def test_what_came_before_the_trainer_looked_is_not_lost():
    with StopSignals(interrupts=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignals() as signals:
            assert signals.requested is ExitCode.REQUEUE
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.requested is ExitCode.INTERRUPTED
    with StopSignals(interrupts=False), StopSignals() as signals:
        assert signals.requested is None


def test_ctrl_c_ends_at_once_while_there_is_nothing_to_save():
    with pytest.raises(KeyboardInterrupt), StopSignals(interrupts=False):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_forked_worker_ignores_what_is_meant_for_the_rank_but_can_be_terminated():
    with StopSignals():
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
