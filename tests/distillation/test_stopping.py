"""Ctrl-C and SIGTERM as a wish."""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from diffusers_wadi.distillation.stopping import StopSignals

ALONE = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_next_acts_as_usual(number):
    former = signal.getsignal(number)
    with StopSignals(ALONE) as stop:
        assert stop.wanted(look=False) is None and signal.getsignal(number) != former
        signal.raise_signal(number)
        assert stop.wanted(look=False) == number
        assert signal.getsignal(number) == former
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(number) == former


def test_processes_agree_when_all_of_them_look():
    def gather(mine):
        asked.append(mine.item())
        return torch.cat([mine, torch.tensor([signal.SIGTERM])])

    asked = []
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    with StopSignals(two) as stop:
        assert stop.wanted(look=False) is None and not asked
        assert stop.wanted(look=True) == signal.SIGTERM and asked == [0]
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted(look=False) is None
        assert stop.wanted(look=True) == signal.SIGTERM and asked == [0, signal.SIGINT]


def test_threads_have_no_handlers():
    seen = []

    def work():
        with StopSignals(ALONE) as stop:
            seen.append(stop.wanted(look=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
