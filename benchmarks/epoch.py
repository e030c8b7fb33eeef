"""An epoch of training on real speech with two augmented views of 2 s: `fit` against wespeaker's own loop.

    RAYSV_DATA=PACK python benchmarks/epoch.py --wespeaker CHECKOUT

Ours is `raysv.learning.training.fit`, whole: store, views at strength 0.5, AAM-Softmax and SupCon, in the precision
that `auto` chooses here and in float32. The peer is `run_epoch` of `wespeaker/utils/executor.py` on its own dataset
chain through a DataLoader built as its `train.py` does it (see `peers.py`), with the optimiser and schedules of its
`ecapa_tdnn.yaml`, with 0, 1 and 2 loader workers. It differs from that recipe in three ways, all in its favour: the
network is ECAPA_TDNN_c512, where the recipe's has the global context in its attention (`--model
ECAPA_TDNN_GLOB_c512`, the same weights as ours); speed perturbation is left out; and each worker reads 2 batches
ahead, PyTorch's default, where the recipe has 8: in an epoch as short as this one they would make up to 1664 crops
for the 640 that are used.

Both see the same utterances of the pack twice, in batches of the same number of crops. Counted are augmented crops that
went through an update, per second. Not in the time of either is the evaluation on dev pairs, nor in ours the decoding
of the recordings, which the first `fit` does once for all later ones. Shown are medians over the rounds, the first one
included. All with the allocator set as in raysv's own clusters.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine
from peers import (
    Speech,
    keep_freed_memory,
    our_config,
    real_speech,
    tableprint_and_torchnet,
    use_wespeaker,
    versions,
    wespeaker_dataset,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from raysv.learning.training import fit
from raysv.precision import compute_dtype

CROPS = 64  # in a batch
CHANNELS = 512
FRAMES = 198


def main() -> None:
    """Print augmented crops per second of each way and its ratio to the best way of the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wespeaker", type=Path, help="a checkout of its source; left out if not given")
    parser.add_argument(
        "--model", default=f"ECAPA_TDNN_c{CHANNELS}", help="its network; its recipe's own is ECAPA_TDNN_GLOB_c512"
    )
    parser.add_argument("--speakers", type=int, default=32, help="of the training list, ten utterances each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each, taking turns; the median counts")
    arguments = parser.parse_args()
    if not os.environ.get("RAYSV_DATA"):
        raise SystemExit("RAYSV_DATA must name the pack of real speech.")
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    print(machine())
    print(versions(arguments.wespeaker))
    automatic = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="raysv-epoch-") as name:
        folder = Path(name)
        speech = real_speech(folder, arguments.speakers)
        ways = {f"raysv, auto: {automatic}": ours(folder, speech, "auto"), "raysv, fp32": ours(folder, speech, "fp32")}
        if arguments.wespeaker:
            use_wespeaker(arguments.wespeaker)
            ways |= {
                f"wespeaker, {workers} loader workers": wespeaker(folder, speech, arguments.model, workers)
                for workers in (0, 1, 2)
            }
        crops: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, epoch in ways.items():
                crops[name].append(epoch())
    _print({name: statistics.median(values) for name, values in crops.items()}, 2 * len(speech.utterances))


def _print(crops: dict[str, float], per_epoch: int) -> None:
    peers = [rate for name, rate in crops.items() if not name.startswith("raysv")]
    print(f"Augmented crops per second, in an epoch of {per_epoch}; ratio to the peer's best")
    for name, rate in crops.items():
        ratio = f"{rate / max(peers):6.2f} x" if peers else ""
        print(f"  {name:30} {rate:7.1f} {ratio}")


def ours(folder: Path, speech: Speech, precision: str) -> Callable[[], float]:
    """One epoch of `fit`; returns its crops per second."""
    manifest = folder / "train.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["speaker", "path"])
        rows.writerows([speaker, path] for path, speaker in speech.utterances)
    config = our_config(
        folder / "cache",
        train=str(manifest),
        model={"channels": CHANNELS},
        batch={"speakers": CROPS // 4, "utterances_per_speaker": 2, "views": 2, "crop_seconds": 2.0},
        augment={"strength": 0.5},
        training={"epochs": 1, "precision": precision},
    )

    def epoch() -> float:
        reported: list[dict[str, float]] = []
        fit(config, lambda metrics, folder: reported.append(metrics))
        return reported[0]["speed/views_per_second"]

    return epoch


class Alone(nn.Module):
    """A model as DDP would wrap it: its loop reaches for `model.module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the model inside returns."""
        return self.module(features)


def wespeaker(folder: Path, speech: Speech, name: str, workers: int) -> Callable[[], float]:
    """One epoch of its loop; returns the crops per second."""
    tableprint_and_torchnet()
    from wespeaker.models import ecapa_tdnn
    from wespeaker.models.projections import get_projection
    from wespeaker.utils.executor import run_epoch
    from wespeaker.utils.schedulers import ExponentialDecrease, MarginScheduler

    dataset, classes = wespeaker_dataset(speech, folder, FRAMES)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=CROPS, drop_last=True, pin_memory=False, num_workers=workers
    )
    steps = 2 * len(speech.utterances) // CROPS
    model = getattr(ecapa_tdnn, name)(80, 192)
    projection = {"project_type": "arc_margin", "scale": 32.0, "easy_margin": False}
    model.add_module("projection", get_projection({**projection, "embed_dim": 192, "num_class": len(classes)}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    decrease = {"initial_lr": 0.1, "final_lr": 5e-5, "warm_up_epoch": 6, "warm_from_zero": True}
    scheduler = ExponentialDecrease(optimizer, num_epochs=150, epoch_iter=steps, scale_ratio=CROPS / 64, **decrease)
    margins = {"initial_margin": 0.0, "final_margin": 0.2, "increase_start_epoch": 20, "fix_start_epoch": 40}
    margin_scheduler = MarginScheduler(model, epoch_iter=steps, update_margin=True, **margins)
    configs = {"dataset_args": {"frontend": "fbank"}, "enable_amp": False, "log_batch_interval": 100}
    loop = (Alone(model), nn.CrossEntropyLoss(), optimizer, scheduler, margin_scheduler)
    count = 0

    def epoch() -> float:
        nonlocal count
        count += 1
        dataset.set_epoch(count)
        scaler, device = torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for CUDA's autocast, switched off
            run_epoch(loader, steps, *loop, count, logging.getLogger("peer"), scaler, device, configs)
        return steps * CROPS / (time.perf_counter() - started)

    return epoch


if __name__ == "__main__":
    main()
