"""How fast this machine trains, evaluates and generates, beside a dense twin, transformers and MiniMind.

    python -m scripts.benchmark                              what suits the machine: sizes, precisions, all kinds of work
    python -m scripts.benchmark --size cpu-16 --work train   one table
    python -m scripts.benchmark --json result.json

All contestants of a table run in one process, one after another in every round, so that a machine that slows down hits
all of them alike. Times are medians over rounds; a ratio is the median of the rounds' own ratios. Peak memory is that of a
process which runs one contestant alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.products import float32_library
from scripts import contestants, first_step, peers, saving
from scripts.contestants import Contestant, Field, Size
from train import cli
from train.describe import PEAK_BF16_FLOPS
from train.memory import keep_freed_memory
from train.precision import resolve_precision

QUICKSTART = "configs/quickstart/pretrain.yaml"
WORK = ("train", "evaluate", "generate", "save", "start")
GIB = 2**30
Seconds = dict[tuple[str, str], list[float]]  # of (contestant, precision), one a round


def race(competing: list[Contestant], device: torch.device, rounds: int, warm_up: int, settle: bool = True) -> Seconds:
    """Seconds of each contestant in each round. With `settle` each works once untimed before it is timed: what the one before
    left in caches and in the heap is no part of its own time."""
    for contestant in competing:
        for _ in range(warm_up):
            contestant.work()
    seconds: Seconds = {contestant.key: [] for contestant in competing}
    for r in range(rounds):
        first = r % len(competing)  # nobody always runs behind the same
        for contestant in competing[first:] + competing[:first]:
            if settle:
                contestant.work()
            seconds[contestant.key].append(_time(contestant.work, device))
    return seconds


def _time(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(seconds: Seconds, key: tuple[str, str], to: tuple[str, str]) -> float | None:
    """Median over rounds of key's time / to's time; None if one of them did not take part."""
    if key not in seconds or to not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[key], seconds[to], strict=True))


def speed_to_transformers(key: tuple[str, str], seconds: Seconds) -> float | None:
    """How many times as fast as the faster of transformers' ways our generation is; None for all else."""
    name, precision = key
    if not name.startswith(f"{contestants.OURS}, "):
        return None
    theirs = [(name.replace(contestants.OURS, peer, 1), precision) for peer in peers.EXPERTS.values()]
    ratios = [r for r in (ratio(seconds, peer, key) for peer in theirs) if r is not None]
    return min(ratios, default=None)


def row_of(contestant: Contestant, seconds: Seconds, peak: float | None, memory: float | None) -> dict:
    """What the table shows and the JSON holds of a contestant."""
    name, precision = contestant.key
    times = sorted(seconds[contestant.key])
    median = statistics.median(times)
    return {
        "name": name,
        "precision": precision,
        "seconds": median,
        "seconds_low": times[len(times) // 4],
        "seconds_high": times[-1 - len(times) // 4],
        "tokens_per_second": contestant.tokens / median,
        "ratio_to_twin": ratio(seconds, contestant.key, (contestants.TWIN, precision)),
        "ratio_to_dense_peer": ratio(seconds, contestant.key, (peers.DENSE, precision)),
        "speed_to_float32": ratio(seconds, (name, "float32"), contestant.key) if precision != "float32" else None,
        "speed_to_transformers": speed_to_transformers(contestant.key, seconds),
        "mfu": contestant.flops / median / peak if peak and contestant.flops else None,
        "peak_memory_gib": memory,
    }


COLUMNS = {
    "precision": lambda r: r["precision"],
    "ms (middle half of the rounds)": lambda r: (
        f"{r['seconds'] * 1e3:.1f} ({r['seconds_low'] * 1e3:.1f}-{r['seconds_high'] * 1e3:.1f})"
    ),
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "time / our twin": lambda r: _or_dash(r["ratio_to_twin"], ".2f"),
    f"time / {peers.DENSE}": lambda r: _or_dash(r["ratio_to_dense_peer"], ".2f"),
    "speed / float32": lambda r: _or_dash(r["speed_to_float32"], ".2f"),
    "speed / transformers": lambda r: _or_dash(r["speed_to_transformers"], ".2f"),
    "MFU": lambda r: _or_dash(r["mfu"], ".1%"),
    "peak GiB": lambda r: _or_dash(r["peak_memory_gib"], ".2f"),
}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: list[dict]) -> str:
    """Markdown, without the columns in which nobody has a figure."""
    cells = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    shown = {title: column for title, column in cells.items() if set(column) != {"-"}}
    lines = [["", *shown], ["---"] * (len(shown) + 1)]
    lines += [[row["name"], *(column[i] for column in shown.values())] for i, row in enumerate(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peak_memory(name: str, size: Size, field: Field, work: str) -> float:
    """GiB that a process of its own needs for this contestant, above what it needs with everything imported."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(sender, name, size, field, work))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise ValueError(f"{name}: the process that measures its memory died; leave it out with --no-memory") from None
    finally:
        child.join()


def _measure_memory(sender, name: str, size: Size, field: Field, work: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    if field.peers:
        peers.dense_peer(contestants.SIZES["cpu-16"].twin())  # its imports are no part of a model
    before = _peak_resident()
    contestant = contestants.BUILD[work](name, size, field)
    for _ in range(3):
        contestant.work()
    used = torch.cuda.max_memory_allocated() if field.device.type == "cuda" else _peak_resident() - before
    sender.send(used / GIB)


def _peak_resident() -> int:
    """Most bytes of memory that this process has had; getrusage would count its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(size: Size, work: str, fields: list[Field], rounds: int, with_memory: bool) -> list[dict]:
    """One table's rows, of all precisions."""
    device = fields[0].device
    if work == "generate":
        if device.type == "cpu":  # where `generate` leaves autocast out
            fields = [dataclasses.replace(fields[0], precision="float32")]
        competing = [contestant for field in fields for contestant in contestants.generation(size, field)]
        seconds = race(competing, device, rounds, 1, settle=False)
        return [row_of(contestant, seconds, None, None) for contestant in competing]
    products = [contestants.large_product(field) for field in fields]
    who = [(name, field) for field in fields for name in field.names()]
    competing = [contestants.BUILD[work](name, size, field) for name, field in who]
    seconds = race([*competing, *products], device, rounds, 3)
    large = {p.precision: p.flops / statistics.median(seconds[p.key]) for p in products}
    peaks = {precision: peak_flops(device, precision) or rate for precision, rate in large.items()}
    print("\nMFU is relative to " + ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {p}" for p, peak in peaks.items()))
    memory = [peak_memory(name, size, field, work) if with_memory else None for name, field in who]
    return [row_of(c, seconds, peaks[c.precision], gib) for c, gib in zip(competing, memory, strict=True)]


def profile(contestant: Contestant, device: torch.device, steps: int = 5, lines: int = 25) -> str:
    """Where a contestant's time goes: operators and kernels by their own time, milliseconds a step, Markdown."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    for _ in range(5):
        contestant.work()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            contestant.work()
        if on_gpu:
            torch.cuda.synchronize()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    rows = [
        f"| `{event.key[:90]}` | {getattr(event, own) / steps / 1e3:.2f} | {getattr(event, own) / total:.1%} | {event.count // steps} |"
        for event in events[:lines]
    ]
    head = [f"| {contestant.name}, {contestant.precision} | ms a step | share | calls |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, f"| together | {total / steps / 1e3:.2f} | | |"])


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The data sheet's dense bfloat16 rate of a known GPU; None elsewhere: then MFU is relative to a large product."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return PEAK_BF16_FLOPS.get(name)


def machine(device: torch.device, threads: int) -> dict:
    """What the figures were measured on: device, instructions, versions; no name of a machine."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
        name += (
            f", {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s), float32 products by {float32_library()}"
        )
    versions = {"torch": torch.__version__}
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    return {"device": name, "python": platform.python_version(), **versions}


def _arguments() -> argparse.Namespace:
    example = "python -m scripts.benchmark --size cpu-16 --work train --json result.json"
    parser = cli.parser(__doc__.split("\n\n")[0], example)
    add = parser.add_argument
    add("--size", nargs="+", choices=list(contestants.SIZES), help="default: those named after the device")
    add("--work", nargs="+", choices=WORK, default=list(WORK), help="default: all")
    add("--precision", nargs="+", choices=("float32", "bfloat16"), help="default: all the device is made for")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--rounds", type=int, default=15, help="default 15")
    add("--rows", type=int, help="rows of a step, in place of the size's own")
    add("--threads", type=int, default=1, help="CPU threads, default 1")
    add("--no-peers", action="store_true", help="without transformers' classes")
    add("--compile", action=argparse.BooleanOptionalAction, help="compiled contestants; default: on CUDA")
    add("--minimind", type=Path, metavar="FOLDER", help="a checkout of MiniMind, to time its MoE as well")
    add("--no-memory", action="store_true", help="without the processes that measure peak memory")
    add("--profile", action="store_true", help="also where the time of our training step goes")
    add("--config", default=QUICKSTART, help=f"for --work start, its data prepared; default {QUICKSTART}")
    add("--json", type=Path, metavar="FILE", help="writes the figures there too")
    arguments = parser.parse_args()
    for name in ("rounds", "threads", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} must be at least 1")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    return arguments


def main() -> None:
    arguments = _arguments()
    keep_freed_memory()
    # oneDNN keeps the newest 1,024 compiled kernels: too few for all contestants' shapes, so they would evict each other's.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    default = ["bfloat16"] if on_gpu or resolve_precision("auto", device) == "bfloat16" else []
    precisions = arguments.precision or ([] if on_gpu else ["float32"]) + default
    compiled = on_gpu if arguments.compile is None else arguments.compile
    fields = [Field(device, p, not arguments.no_peers, compiled, arguments.minimind) for p in precisions]
    about = machine(device, arguments.threads)
    if "start" in arguments.work:
        first_step.check_prepared(arguments.config)  # now, rather than after all tables
    results = []
    works = [work for work in arguments.work if work != "start"]
    names = arguments.size or [name for name in contestants.SIZES if name.startswith("gpu" if on_gpu else "cpu")]
    for name in names if works else ():
        size = contestants.SIZES[name]
        size = dataclasses.replace(size, rows=arguments.rows) if arguments.rows else size
        print(f"\n## {name}: {contestants.describe(size)}", flush=True)
        for work in works:
            if work == "save":
                figures = [saving.measure(size, field, arguments.rounds) for field in fields]
                print(f"\nsave\n\n{saving.text(figures)}", flush=True)
                results.append({"size": name, "work": work, "rows": figures})
                _write(arguments.json, about, results)
                continue
            rows = measure(size, work, fields, arguments.rounds, not arguments.no_memory)
            print(f"\n{work}\n\n{table(rows)}", flush=True)
            results.append({"size": name, "tokens": size.tokens, "work": work, "rows": rows})
            _write(arguments.json, about, results)
        for field in fields if arguments.profile else ():
            ours = contestants.COMPILED if compiled else contestants.OURS
            print(f"\n{profile(contestants.training(ours, size, field), device)}", flush=True)
    if "start" in arguments.work:
        figures = first_step.measure(arguments.config, max(3, arguments.rounds // 3), device)
        print(f"\nstart\n\n{first_step.text(figures)}", flush=True)
        results.append({"work": "start", **figures})
        _write(arguments.json, about, results)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))


def _write(path: Path | None, about: dict, results: list[dict]) -> None:
    """After each table, so that what was measured is not lost."""
    if path is not None:
        path.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
