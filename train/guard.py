"""What keeps a run alive: bad steps are skipped, signals are heard, and the host never waits for the device to know."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 0.98  # decay of the gradient norm's running mean: about 50 steps
SETTLED = 50  # accepted steps before a norm can be called a spike


@dataclass
class GuardState:
    """What a checkpoint keeps of StepGuard."""

    mean_norm: float = 0.0
    accepted_steps: float = 0.0
    bad_in_a_row: float = 0.0
    bad_total: float = 0.0


class StepGuard:
    """Accepts or refuses each step on the device: not finite, or a gradient norm above spike_factor x its running mean.

    `mean_norm`, `accepted_steps`, `bad_in_a_row`, `bad_total` are float32 scalars on the device (counts are exact to 2^24).
    """

    def __init__(self, device: torch.device, spike_factor: float) -> None:
        self.spike_factor = spike_factor
        self.mean_norm = torch.zeros((), device=device)
        self.accepted_steps = torch.zeros((), device=device)
        self.bad_in_a_row = torch.zeros((), device=device)
        self.bad_total = torch.zeros((), device=device)

    @torch.no_grad()
    def judge(self, norm: Tensor, loss: Tensor) -> Tensor:
        """norm and loss, scalars equal on all ranks -> bool scalar: whether the step may be taken."""
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        accepted = finite
        if self.spike_factor > 0:
            spike = (self.accepted_steps >= SETTLED) & (norm > self.spike_factor * self.mean_norm)
            accepted = finite & ~spike
        blended = torch.where(self.accepted_steps > 0, MEMORY * self.mean_norm + (1 - MEMORY) * norm, norm)
        self.mean_norm = torch.where(accepted, blended, self.mean_norm)
        self.accepted_steps = self.accepted_steps + accepted
        self.bad_in_a_row = torch.where(accepted, torch.zeros_like(self.bad_in_a_row), self.bad_in_a_row + 1)
        self.bad_total = self.bad_total + ~accepted
        return accepted

    def state(self) -> GuardState:
        return GuardState(**{field.name: getattr(self, field.name).item() for field in dataclasses.fields(GuardState)})

    def load_state(self, state: GuardState) -> None:
        for key, value in dataclasses.asdict(state).items():
            setattr(self, key, torch.full_like(getattr(self, key), value))


class LateReading:
    """Values of the device, read by the host a step later: both wait for the step before at most, never for the one under way."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def push(self, values: Tensor) -> list[float] | None:
        """Takes this step's values (1-D) and returns the previous step's, None at the first."""
        previous = self.pop()
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (host, event)
        else:
            self._pending = (values.clone(), None)
        return previous

    def pop(self) -> list[float] | None:
        """The values last pushed, once; None if there are none."""
        if self._pending is None:
            return None
        values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return values.tolist()


class StopSignals:
    """SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 (a scheduler's warning) ask for a stop after the current step;
    another one, a second or more later, ends the process at once.

    A second's grace, because one Ctrl-C often arrives twice: from the terminal, and passed on by torchrun or a script.
    A signal that the process was started to ignore, as nohup does with SIGHUP, stays ignored. Make it in the main thread.
    """

    GRACE_SECONDS = 1.0
    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.received, self._since = 0, 0.0
        self.heard = False  # the same for other threads, which hear it even while the main thread is in a call of C++
        woken, self._end = os.pipe()
        os.set_blocking(self._end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(woken,), name="signals", daemon=True).start()
        self._handlers_before = {}
        for number in self.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers_before[number] = signal.signal(number, self._on_signal)

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._end)

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received and now - self._since >= self.GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.received:
            self.received, self._since = number, now

    def _listen(self, woken: int) -> None:
        """Ends the process at a second signal where the main thread cannot: waiting for a lost process, it hears none."""
        first = None
        with open(woken, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                now, number = time.monotonic(), numbers[0]
                if number not in self.NUMBERS:
                    continue
                self.heard = True
                first = now if first is None else first
                if now - first >= self.GRACE_SECONDS:
                    time.sleep(0.5)  # the main thread's own way, if it can
                    os._exit(128 + number)
