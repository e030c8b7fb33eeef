"""What crosses the network in a training step, measured on links between hosts, beside the formula.

    sudo python benchmarks/network.py [--workers 2 3 4] [--channels 512] [--mbit 200]

Each worker is a process in a network namespace of this machine, joined to the others by a virtual cable; gloo talks
over it as between machines, and the kernel counts the bytes that each sends. A step is that of `fit`: forward, loss
over the gathered batch, backward, gradients averaged by DDP, on crops of half a second, since what is sent does not
depend on their length. With --mbit the cables are slowed to so many megabits a second, and the time of a step beside
the same at full speed says how much of the sending is hidden behind the computing.

The formula, for N workers, in bytes that each sends: an all-reduce of x bytes in a ring is 2 (N - 1) / N x, an
all-gather of x bytes from each (N - 1) x. All-reduced are the gradients of encoder and class weights (DDP), of the
embeddings of the whole batch, and two sums per channel of every BatchNorm, forward in float64 with their count and
backward in float32; gathered are each worker's embeddings and labels, int64. The rest is float32.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from measure import machine

from raysv.config import Config, config_from_dict
from raysv.distributed import BatchNorm1d, shard, wrap
from raysv.learning.training import Learner
from raysv.learning.views import Batch

NETWORK, INTERFACE, PORT = "10.213.9", "eth0", 29500
SPEAKERS, WARM_UP, STEPS = 2793, 2, 8  # CN-Celeb's training speakers
MACS = {512: 1.037e9, 1024: 2.649e9}  # published, of 200 frames
CROPS = (64, 512)  # of a GPU, on paper
HOP_MS = {25: 0.03, 400: 0.005}  # assumed, from one GPU to the next: TCP, and RDMA


def configuration(channels: int) -> Config:
    """A batch of the defaults, but short."""
    return config_from_dict({"model": {"channels": channels}, "batch": {"crop_seconds": 0.5}})


def formula(config: Config, workers: int) -> dict[str, float]:
    """Bytes that a worker sends in a step, by what they are."""
    learner = Learner(config, SPEAKERS)
    parameters = sum(weight.numel() for weight in learner.parameters())
    norms = [part.num_features for part in learner.modules() if isinstance(part, BatchNorm1d)]
    utterances, views, dim = config.batch.size, config.batch.views, config.model.embedding_dim
    reduce, gather = 2 * (workers - 1) / workers, workers - 1
    return {
        "gradients": reduce * 4 * parameters,
        "embeddings": (gather / workers + reduce) * 4 * utterances * views * dim + gather / workers * 8 * utterances,
        "BatchNorm": reduce * sum(8 * (2 * channels + 1) + 4 * 2 * channels for channels in norms),
    }


def work(number: int, workers: int, channels: int) -> None:
    """Be a worker; the first prints the bytes that it sent in a step, and the seconds of one."""
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    dist.init_process_group("gloo", f"tcp://{NETWORK}.1:{PORT}", rank=number, world_size=workers)
    torch.manual_seed(0)
    config = configuration(channels)
    learner = Learner(config, SPEAKERS)
    parallel = wrap(learner)
    batch = some_batch(config)
    sent, seconds = [], []
    for step in range(WARM_UP + STEPS):
        dist.barrier()
        before, started = bytes_sent(), time.perf_counter()
        learner.zero_grad(set_to_none=True)
        parallel(batch).total.backward()
        if step >= WARM_UP:
            sent.append(bytes_sent() - before)
            seconds.append(time.perf_counter() - started)
    if number == 0:
        print(statistics.median(sent), statistics.median(seconds), flush=True)
    dist.barrier()
    os._exit(0)  # DDP keeps gloo's threads, and Python may end under one


def some_batch(config: Config) -> Batch:
    """This worker's share of noise as a batch, undisturbed."""
    share = shard(config.batch.size)
    count, samples = share.stop - share.start, round(config.batch.crop_seconds * 16000)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        waveforms=torch.randint(-9999, 9999, (count, samples), dtype=torch.int16),
        speakers=torch.arange(share.start, share.stop) // config.batch.utterances_per_speaker,
        noise_rows=none,
        noise=torch.zeros(0, samples),
        snr_db=torch.zeros(0),
        room_rows=none,
        rooms=torch.zeros(0, 1),
        masks=torch.zeros(count * config.batch.views, 4, dtype=torch.int64),
        views=config.batch.views,
    )


def bytes_sent() -> int:
    """Of this namespace's cable, so far."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


@contextlib.contextmanager
def cables(workers: int, mbit: int | None) -> Iterator[list[str]]:
    """Namespaces in one network; yields their names."""
    names = [f"raysv-n{number}" for number in range(1, workers + 1)]
    bridge = "raysv-nbr"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            ip("link", "set", name, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", INTERFACE, "up")
            if mbit:
                limit = ["tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms"]
                run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", INTERFACE, "root", *limit)
        yield names
    finally:
        for name in names:  # a namespace that is deleted takes its cable with it, but only after a while
            subprocess.run(["ip", "link", "del", name], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def ip(*arguments: str) -> None:
    """Call `ip`."""
    run("ip", *arguments)


def run(*command: str) -> None:
    """Call a program, which must succeed."""
    subprocess.run(command, check=True)


def measure(workers: int, channels: int, mbit: int | None) -> tuple[float, float]:
    """Bytes that the first worker sends in a step, and a step's seconds."""
    with cables(workers, mbit) as names:
        arguments = ["--work", "--workers", str(workers), "--channels", str(channels)]
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, __file__, *arguments, "--number", str(number)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, name in enumerate(names)
        ]
        printed = [process.communicate()[0] for process in processes]
    sent, seconds = map(float, printed[0].split())
    return sent, seconds


def curve(config: Config, tflops: float, crops: int, macs: float) -> None:
    """Print how training would scale, by the formula and by what is assumed of machines; nothing here is measured.

    Args:
        crops: of each GPU, whose global batch grows with the GPUs.
        macs: multiply-adds of a crop's forward pass; backward takes twice as many.
    """
    layers = sum(isinstance(part, BatchNorm1d) for part in Learner(config, SPEAKERS).modules())
    utterances = crops // config.batch.views
    network = 1e3 * 6 * macs * crops / (tflops * 1e12)
    print(f"\nOn paper: {crops} crops a GPU, {network:.1f} ms for the network, {layers} BatchNorms. ms a step:\n")
    heads = ["GPUs", "Gbit/s of each", "loss", "gradients", "embeddings", "BatchNorm", "of that, waiting"]
    heads += ["efficiency", "gradients hidden"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for workers in (8, 64, 512):
        for gbit in (25, 400):
            scaled = config_from_dict(
                {
                    "model": {"channels": config.model.channels},
                    "batch": {"speakers": utterances * workers // config.batch.utterances_per_speaker},
                }
            )
            sent = formula(scaled, workers)
            gradients, embeddings, norms = (8e3 * part / (gbit * 1e9) for part in sent.values())
            views = crops * workers  # every worker has the loss of all
            loss = 1e3 * 6 * views * (views + SPEAKERS) * config.model.embedding_dim / (tflops * 1e12)
            hop = HOP_MS[gbit]
            tree, ring = 2 * math.ceil(math.log2(workers)) * hop, (workers - 1) * hop
            waiting = layers * 2 * tree
            embeddings, norms = embeddings + 2 * ring + tree, norms + waiting
            rest = loss + embeddings + norms
            bare, hidden = network / (network + gradients + rest), network / (max(network, gradients) + rest)
            times = (f"{part:.2f}" for part in (loss, gradients, embeddings, norms, waiting))
            print(f"| {workers} | {gbit} | {' | '.join(times)} | {bare:.0%} | {hidden:.0%} |")


def main() -> None:
    """Print measured and calculated bytes for every number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--mbit", type=int, help="slow the cables to so much")
    parser.add_argument("--curve", action="store_true", help="only print how it would scale, by the formula")
    parser.add_argument("--tflops", type=float, default=150, help="that a GPU is assumed to compute in bf16")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.number, chosen.workers[0], chosen.channels)
    if chosen.curve:
        for crops in CROPS:
            curve(configuration(chosen.channels), chosen.tflops, crops, MACS[chosen.channels])
        return
    print(machine())
    print("MB that each worker sends in a step\n")
    print("| workers | gradients | embeddings, labels | BatchNorm | together | measured | measured / formula |")
    print("|---|---|---|---|---|---|---|")
    for workers in chosen.workers:
        parts = formula(configuration(chosen.channels), workers)
        whole = sum(parts.values())
        sent, seconds = measure(workers, chosen.channels, None)
        cells = [*(f"{part / 1e6:.3f}" for part in parts.values()), f"{whole / 1e6:.2f}", f"{sent / 1e6:.2f}"]
        print(f"| {workers} | {' | '.join(cells)} | {sent / whole:.3f} |", flush=True)
        if chosen.mbit:
            _, slowed = measure(workers, chosen.channels, chosen.mbit)
            wire = 8 * sent / chosen.mbit / 1e6
            print(f"  a step takes {seconds:.2f} s; over {chosen.mbit} Mbit/s {slowed:.2f} s,", end=" ")
            print(f"{slowed - seconds:.2f} more, where {wire:.2f} s are on the wire", flush=True)


if __name__ == "__main__":
    main()
