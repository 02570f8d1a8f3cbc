"""Two machines, made of this one: two network namespaces with a cable between them, and torchrun in each.

The namespaces have no names. Each lives as long as its holder, a `cat` that ends with the process that made it, whatever
happens to that one: nothing of them is left behind.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..train.conftest import ROOT, environment
from .conftest import is_alive

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PATIENCE = (
    "keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10,join_timeout=120"  # of the rendezvous, seconds
)


class Machine:
    """A network of its own, with one torchrun in it."""

    def __init__(self, number: int, enter: list[str]) -> None:
        self.number, self.address = number, f"10.201.0.{number + 1}"
        self.holder = _holder([*enter, "unshare", "--net"])
        self.enter = [*enter, "nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]
        self.torchrun: subprocess.Popen | None = None
        self.log: Path | None = None

    def space(self) -> str:
        return os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def ip(self, *command: str) -> None:
        """`ip command` in this network; OSError with the reason if that is refused."""
        done = subprocess.run([*self.enter, "ip", *command], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(command)}: {done.stderr.strip()}")

    def start(
        self, workplace: Path, name: str, *overrides: str, max_restarts: int = 0, interface: str = "cable"
    ) -> None:
        """torchrun as docs/several_machines.md has it, but for less patience; machine 0 is where the others meet."""
        self.log = workplace / f"{name}-machine-{self.number}.log"
        torchrun = [
            "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--max-restarts={max_restarts}", f"--signals-to-handle={SIGNALS}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=10.201.0.1:29400", f"--rdzv-id={name}", f"--local-addr={self.address}",
            f"--rdzv-conf=is_host={int(self.number == 0)},{PATIENCE}",
        ]  # fmt: skip
        command = ["train.pretrain", str(workplace / "pretrain.yaml"), f"name={name}", *overrides]
        with open(self.log, "a") as log:
            self.torchrun = subprocess.Popen(
                [*self.enter, sys.executable, "-m", *torchrun, "-m", *command],
                cwd=ROOT,
                env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": interface},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        """All that torchrun and its processes printed here, in all starts."""
        return self.log.read_text(errors="replace") if self.log and self.log.is_file() else ""

    def processes(self) -> list[int]:
        """What runs in this network, without its holder."""
        found = []
        for pid in (int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if pid != self.holder.pid and os.readlink(f"/proc/{pid}/ns/net") == self.space() and is_alive(pid):
                    found.append(pid)
        return found

    def trains(self) -> bool:
        """Whether a process other than torchrun runs here."""
        return any(pid != self.torchrun.pid for pid in self.processes())

    def lose_power(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.torchrun is not None:
            self.torchrun.wait()

    def remove(self) -> None:
        self.lose_power()
        _release(self.holder)


class TwoMachines:
    """Machines `a` (where they meet, rank 0) and `b`, and a cable."""

    def __init__(self, enter: list[str]) -> None:
        self.both: list[Machine] = []
        try:
            for number in (0, 1):
                self.both.append(Machine(number, enter))
            self.a, self.b = self.both
            self.a.ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(self.b.holder.pid))
            for machine in self.both:
                machine.ip("link", "set", "lo", "up")
                machine.ip("address", "add", f"{machine.address}/24", "dev", "cable")
                machine.ip("link", "set", "cable", "up")
        except OSError:
            self.remove()
            raise

    def cut(self) -> None:
        self.b.ip("link", "set", "cable", "down")

    def mend(self) -> None:
        self.b.ip("link", "set", "cable", "up")

    def start(self, workplace: Path, name: str, *overrides: str, **options: int | str) -> None:
        for machine in self.both:
            machine.start(workplace, name, *overrides, **options)

    def codes(self) -> list[int | None]:
        """torchrun's exit codes; None where it still runs."""
        return [machine.torchrun.poll() for machine in self.both]

    def remove(self) -> None:
        for machine in self.both:
            machine.remove()


@contextlib.contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """OSError with the reason where network namespaces are not to be had. Not root: root in a user namespace of one's own."""
    enter, owner = [], None
    if os.geteuid() != 0:
        owner = _holder(["unshare", "--user", "--map-root-user"])
        enter = ["nsenter", f"--user=/proc/{owner.pid}/ns/user", "--preserve-credentials"]
    try:
        machines = TwoMachines(enter)
        try:
            yield machines
        finally:
            machines.remove()
    finally:
        if owner is not None:
            _release(owner)


def training_starts(said: str) -> list[int]:
    """From which step rank 0 went on at each start, by its first line: 0 is the beginning."""
    return [int(step or 0) for step in re.findall(r"^run  .*?(?:resumed at step (\d+))?$", said, re.MULTILINE)]


def _holder(command: list[str]) -> subprocess.Popen:
    """A `cat` in new namespaces; it ends when this process closes its input, or ends."""
    holder = subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    if not holder.stdout.readline():  # what `cat` returns once it runs
        raise OSError(holder.stderr.read().decode(errors="replace").strip())
    return holder


def _release(holder: subprocess.Popen) -> None:
    holder.stdin.close()
    holder.wait()
    holder.stdout.close()
    holder.stderr.close()
