"""train/memory.py: freed blocks are not handed back and faulted in again, and nothing else changes."""

import json
import subprocess
import sys

import pytest

from train import memory

from .conftest import ROOT, environment

CODE = """
import json, resource, sys
import torch
from train.memory import keep_freed_memory

torch.set_num_threads(1)
for _ in range(int(sys.argv[1])):
    keep_freed_memory()

def allocate_and_free():
    blocks = [torch.ones(2 * 2**20) for _ in range(25)]  # 25 blocks of 8 MiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

rounds = []
for _ in range(6):
    before = faults()
    allocate_and_free()
    rounds.append(faults() - before)
torch.manual_seed(0)
x = torch.randn(300, 300, requires_grad=True)
y = (x @ x).softmax(-1).square().sum()
y.backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"faults": rounds, "value": y.item(), "gradient": x.grad.double().sum().item(), "peak": peak}))
"""
PAGES = 25 * 8 * 2**20 // 4096  # that the blocks cover, of the smallest pages there are


def run(calls: int) -> dict:
    # glibc begins with this threshold and raises it as blocks are freed; whether the heap's end is then handed back depends
    # on what small block happens to lie there. Held still, every run without the call is the same.
    fixed = {**environment(), "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run([sys.executable, "-c", CODE, str(calls)], cwd=ROOT, env=fixed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
    return json.loads(done.stdout)


def has_mallopt() -> bool:
    import ctypes

    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.slow
@pytest.mark.skipif(not has_mallopt(), reason="needs glibc")
def test_what_a_step_freed_the_next_one_takes_without_page_faults():
    """Twice called is as good as once; results and the peak of memory are the same."""
    without, once, twice = (run(calls) for calls in (0, 1, 2))
    for kept in (once, twice):
        # The second round may still ask for a little, where small blocks came to lie between the large ones.
        assert kept["faults"][1] < PAGES / 2 and max(kept["faults"][3:]) < PAGES / 100, (
            f"{kept['faults']} faults a round"
        )
        assert (kept["value"], kept["gradient"]) == (without["value"], without["gradient"])
        assert kept["peak"] < without["peak"] + 1.5 * 64 * 1024, "KiB; it grows by what the heap grows by, at most"
    # Pages of 2 MiB, where the system hands them out, are 512 times fewer: fewer faults, and many all the same.
    assert min(without["faults"][1:]) > 20 * max(1, *once["faults"][3:]), f"{without['faults']}: nothing to save here"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_called(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("no glibc to open here"))
    memory.keep_freed_memory()


def test_a_libc_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()


def test_the_thresholds_are_in_the_order_that_keeps_them(monkeypatch):
    """Blocks below 32 MiB, the largest that glibc takes, come from a heap that is never trimmed."""
    calls = []

    class Libc:
        def mallopt(self, parameter: int, value: int) -> int:
            return calls.append((parameter, value)) or 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc())
    memory.keep_freed_memory()
    values = dict(calls)
    assert values[-3] == 32 * 2**20 and values[-1] == 2**31 - 1 and values[-2] > 0
    assert all(0 < value < 2**31 for value in values.values()), "mallopt takes an int"
