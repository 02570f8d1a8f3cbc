"""Bad steps are refused and counted on the device; signals ask for a stop and a second one ends the process."""

import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.guard import MEMORY, SETTLED, GuardState, LateReading, StepGuard, StopSignals

from .conftest import ROOT, environment

CPU = torch.device("cpu")


def judge(guard: StepGuard, norm: float, loss: float = 1.0) -> bool:
    accepted = guard.judge(torch.tensor(norm), torch.tensor(loss, dtype=torch.float64))
    assert accepted.dtype == torch.bool and accepted.shape == ()
    return bool(accepted)


def settled(spike_factor: float = 3.0, norm: float = 2.0) -> StepGuard:
    guard = StepGuard(CPU, spike_factor)
    for _ in range(SETTLED):
        assert judge(guard, norm)
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["norm", "loss"])
def test_what_is_not_finite_is_refused(bad, where):
    guard = settled(spike_factor=0.0)
    assert not judge(guard, **{"norm": 2.0, where: bad})
    assert guard.mean_norm.item() == pytest.approx(2.0), "a refused step moved the running mean"
    assert judge(guard, 2.0)


def test_spikes_are_refused_only_when_asked_for_and_settled():
    assert judge(settled(spike_factor=0.0), 1e9)
    guard = settled(spike_factor=3.0, norm=2.0)
    assert judge(guard, 5.9)
    assert not judge(guard, 7.0)
    assert judge(guard, 2.0)
    young = StepGuard(CPU, 3.0)
    assert all(judge(young, norm) for norm in (2.0, 100.0, 1.0)), "the first norms vary: nothing is a spike yet"


def test_bad_steps_are_counted_in_a_row_and_in_all():
    guard = settled()
    for norm in (math.nan, math.nan, 2.0, math.inf, 1e6, math.nan):
        judge(guard, norm)
    assert guard.bad_in_a_row == 3 and guard.bad_total == 5
    assert guard.accepted_steps == SETTLED + 1


@given(st.lists(st.sampled_from([0.5, 1.0, 4.0, 1e5, math.nan, math.inf]), max_size=90), st.integers(0, 90))
def test_a_saved_and_loaded_guard_goes_on_as_if_nothing_had_happened(norms, cut):
    whole, first, second = (StepGuard(CPU, 3.0) for _ in range(3))
    expected = [judge(whole, norm) for norm in norms]
    found = [judge(first, norm) for norm in norms[:cut]]
    second.load_state(first.state())
    found += [judge(second, norm) for norm in norms[cut:]]
    assert found == expected
    assert second.state() == whole.state()


def test_the_usual_norm_is_that_of_the_last_fifty_accepted_steps_or_so():
    guard = settled(norm=2.0)
    for norm in (4.0, math.nan, 1e9, 4.0):  # two are refused
        judge(guard, norm)
    assert guard.mean_norm.item() == pytest.approx(MEMORY * (MEMORY * 2 + (1 - MEMORY) * 4) + (1 - MEMORY) * 4)


def test_a_checkpoint_keeps_all_that_the_guard_knows():
    guard = settled()
    judge(guard, math.nan)
    state = guard.state()
    assert state == GuardState(mean_norm=2.0, accepted_steps=SETTLED, bad_in_a_row=1, bad_total=1)
    tensors = {name: value for name, value in vars(guard).items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == vars(state).keys(), "a number of the guard is not saved, or one that it lacks is"


def test_a_reading_comes_one_step_late_and_once():
    readings = LateReading()
    values = torch.tensor([1.0, 2.0])
    assert readings.pop() is None
    assert readings.push(values) is None
    values += 10  # the device goes on; what was pushed stays
    assert readings.push(values) == [1.0, 2.0]
    assert readings.pop() == [11.0, 12.0]
    assert readings.pop() is None


@pytest.fixture
def handlers():
    kept = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_each_signal_that_asks_for_a_stop_is_noted(handlers, name):
    number = signal.Signals[name]
    signals = StopSignals()
    assert signals.received == 0
    signal.raise_signal(number)
    assert signals.received == number


def test_nohup_is_respected(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals()
    signal.raise_signal(signal.SIGHUP)
    assert signals.received == 0, "a run started with nohup must not stop when the terminal closes"


def test_another_signal_later_ends_the_process_at_once_but_an_echo_of_the_first_does_not():
    code = (
        "import time\nfrom train.guard import StopSignals\nsignals = StopSignals()\nprint('ready', flush=True)\n"
        "while not signals.received: time.sleep(0.01)\nprint(int(signals.received), flush=True)\n"
        "time.sleep(signals.GRACE_SECONDS + 0.3)\nprint('still there', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n", "the first signal must only be noted"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "still there\n", "one Ctrl-C may arrive twice"
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and time.monotonic() - begin < 20
