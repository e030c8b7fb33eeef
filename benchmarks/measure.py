"""What the benchmarks share: the machine in a line, medians over interleaved repeats, a table with ratios."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine() -> str:
    """The machine and what matters of its software, in one line."""
    cpu = platform.processor() or platform.machine()
    if (described := Path("/proc/cpuinfo")).is_file():
        models = [line for line in described.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    units = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    bf16 = "".join(f", {name}" for name, there in units.items() if there)
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads{bf16}{gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way of doing a thing: one round to warm up, then round after round through all of them.

    Taking turns spreads whatever else the machine does over all ways alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
        print(f"\r{turn} of {repeats}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 20, end="\r", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, seconds: Mapping[str, float], reference: str, unit: str = "ms", per: int = 1) -> str:
    """Medians as lines of text, each with its ratio to the reference's.

    Args:
        reference: the way whose ratio is 1.
        unit: `s` or `ms`.
        per: how many things a repeat does; shown is the time of one.
    """
    factor = {"s": 1.0, "ms": 1e3}[unit] / per
    width = max(map(len, seconds))
    lines = [
        f"  {name:{width}}  {value * factor:10.3f} {unit}  {value / seconds[reference]:6.2f} x"
        for name, value in seconds.items()
    ]
    return "\n".join([title, *lines])
