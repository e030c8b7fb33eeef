"""The loop: views in, gradients through the encoder, dev pairs after every epoch.

`fit` runs anywhere: alone, or as one of several DDP workers whose process group somebody else has started. Results
leave through `report`; nothing here knows of Ray or MLflow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysv.config import Config, config_to_dict, flatten
from raysv.corpus.loading import open_corpus
from raysv.corpus.sets import Corpus, PairSet
from raysv.distributed import agree, gather, rank, together, wrap
from raysv.learning.checkpoint import Standing, describe_checkpoint, load_training_state, save_checkpoint
from raysv.learning.losses import AAMSupCon, Losses
from raysv.learning.scratch import scratch
from raysv.learning.views import Batch, ViewBatches, loader, make_views
from raysv.precision import at_least_float32, compute_dtype, dtype_name, dtype_named
from raysv.speech.encoder import SpeakerEncoder
from raysv.speech.features import BandMasks
from raysv.verification.evaluation import Evaluation, NotFiniteError, evaluate

Metrics = dict[str, float]
Report = Callable[[Metrics, Path | None], None]

CHECK_STEPS = 50  # how often the loss is looked at; every look makes a GPU wait for Python
MEASURES = ("loss/total", "loss/aam", "loss/supcon", "train/accuracy", "train/gradient_norm")  # of a step


class DivergedError(RuntimeError):
    """The loss, its gradient or the embeddings are infinite or no numbers; no further epoch can mend it."""

    def __init__(self, what: str, epoch: int) -> None:
        super().__init__(what)
        self.epoch = epoch


class Learner(nn.Module):
    """What is trained: the encoder and the class weights, from a worker's batch to the loss of the global one."""

    def __init__(self, config: Config, num_speakers: int) -> None:
        super().__init__()
        self.utterances = config.batch.size  # of the global batch
        self.encoder = SpeakerEncoder(config.model)
        self.loss = AAMSupCon(config.loss, num_speakers, config.model.embedding_dim)

    def forward(self, batch: Batch) -> Losses:
        """The losses of all workers' views together, the same on every worker."""
        masks = BandMasks(*batch.masks.unbind(-1))
        embeddings = self.encoder(make_views(batch), masks=masks).unflatten(0, (-1, batch.views))
        return self.loss(gather(at_least_float32(embeddings), self.utterances), gather(batch.speakers, self.utterances))


def fit(
    config: Config,
    report: Report,
    *,
    device: torch.device | None = None,
    resume: Path | None = None,
    tests: bool = False,
    checked: Mapping[str, str] | None = None,
) -> None:
    """Train one configuration.

    Args:
        report: called by every worker after every epoch with its metrics and, on the first worker, a folder that
            holds the checkpoint until the call returns. `dev/eer` among the metrics is the error rate to be judged by.
        device: where to compute; the CPU if not given.
        resume: a checkpoint of this configuration to go on from, which is reported once more; only its data may have
            moved.
        tests: whether to evaluate the test lists too, once, after the last epoch.
        checked: the `digests` of the corpus, if somebody has checked it: it is then taken as it was found, and loaded
            only on a node that does not have it.

    Raises: DivergedError when the loss becomes infinite or no number; ValueError when the data, the number of workers
        or the checkpoint do not fit.
    """
    device = device or torch.device("cpu")
    corpus = together(lambda: open_corpus(config.data, config.augment, checked or {}, tests=tests))
    if differing := [name for name, told in agree(corpus.digests).items() if told != corpus.digests.get(name)]:
        raise ValueError(
            f"Worker {rank()} finds other data below data.root than the first worker: {', '.join(differing)} differ. "
            "Give every node the same copy of the corpus and its lists."
        )
    run = _Run(config, corpus, device)
    history = run.restore(resume) if resume else []
    if history:
        # whoever asked again may not know where it stood, or may have decided on it: then nothing is trained beyond
        report(history[-1], resume if rank() == 0 else None)
    if len(history) >= config.training.epochs:
        return
    batches = iter(
        loader(run.batches, len(history) + 1, config.training.epochs, loader_workers(config, device), pin=run.on_gpu)
    )
    for epoch in range(len(history) + 1, config.training.epochs + 1):
        metrics = run.train_epoch(epoch, batches)
        dev = run.evaluate(corpus.dev, epoch)
        metrics |= dev.metrics("dev")
        if tests and epoch == config.training.epochs:
            for name, pairs in corpus.tests.items():
                metrics |= run.evaluate(pairs, epoch, np.random.default_rng(0)).metrics(name)
        history.append(metrics)
        if rank() > 0:
            report(metrics, None)
            continue
        with scratch() as folder:
            standing = Standing(config, history, dev, len(corpus.train.speakers), corpus.digest, run.computed)
            save_checkpoint(folder, standing, run.learner.encoder, run.state())
            report(metrics, folder)


class _Run:
    """A learner with its optimiser and batches, between two epochs."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device) -> None:
        self.config, self.device, self.on_gpu = config, device, device.type == "cuda"
        self.batches = ViewBatches(config, corpus)
        torch.manual_seed(config.training.seed)
        self.learner = Learner(config, len(corpus.train.speakers)).to(device)
        self.parallel = wrap(self.learner)
        self.optimizer = _optimizer(config, self.learner)
        # on machines that differ, what the first worker's computes fast
        self.precision = agree(compute_dtype(config.training.precision, device))

    @property
    def computed(self) -> str:
        """On which kind of device, and in which format."""
        return f"{self.device.type}, {dtype_name(self.precision)}"

    def train_epoch(self, epoch: int, batches: Any) -> Metrics:
        """One pass over the training list; the metrics are means over its steps."""
        self.learner.train()
        steps, started = self.batches.steps, time.perf_counter()
        totals = torch.zeros(len(MEASURES), device=self.device)
        for step in range(steps):
            learning_rate, margin = self._follow_schedules(epoch - 1 + (step + 0.5) / steps)
            totals += self._step(next(batches).to(self.device))
            if (step + 1) % CHECK_STEPS == 0 or step + 1 == steps:
                self._refuse_divergence(totals, epoch, step + 1)
        seconds = time.perf_counter() - started
        loss = self.config.loss
        terms = {"loss/aam": loss.classifies, "loss/supcon": loss.contrasts}
        measured = dict(zip(MEASURES, (totals / steps).tolist(), strict=True))
        return {
            "epoch": epoch,
            **{name: value for name, value in measured.items() if terms.get(name, True)},
            "schedule/learning_rate": learning_rate,
            "schedule/margin": margin,
            "speed/views_per_second": steps * self.config.batch.size * self.config.batch.views / seconds,
            "speed/epoch_seconds": seconds,
        }

    def evaluate(self, pairs: PairSet, epoch: int, generator: np.random.Generator | None = None) -> Evaluation:
        """Judge the encoder as it is after an epoch, with the interval of its EER where there is a generator."""
        try:
            return evaluate(self.learner.encoder, pairs, generator=generator)
        except NotFiniteError as error:
            raise DivergedError(f"Training diverged in epoch {epoch}: {error} {self._advice}", epoch) from error

    def _step(self, batch: Batch) -> Tensor:
        """One update; returns its `MEASURES`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            losses = self.parallel(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        return torch.stack([*losses, norm]).detach()

    def _follow_schedules(self, progress: float) -> tuple[float, float]:
        learning_rate = learning_rate_at(self.config, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.learner.loss.margin = margin_at(self.config, progress)
        return learning_rate, self.learner.loss.margin

    def _refuse_divergence(self, totals: Tensor, epoch: int, step: int) -> None:
        loss, *_, norm = totals.tolist()
        if not math.isfinite(loss + norm):
            what = f"The gradient's norm became {norm}" if math.isfinite(loss) else f"The loss became {loss}"
            raise DivergedError(f"{what} in epoch {epoch}, at or before step {step}. {self._advice}", epoch)

    @property
    def _advice(self) -> str:
        rate = self.config.optimizer.learning_rate
        return f"Lower optimizer.learning_rate (it is {rate:g}) or lengthen its warm-up."

    def state(self) -> dict[str, Any]:
        """What going on needs beside the encoder's weights. Batches follow from the seed and the epoch alone."""
        return {"loss": self.learner.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, folder: Path) -> list[Metrics]:
        """Stand where a checkpoint stands; returns the metrics of the epochs before."""
        _refuse_other(self.config, folder)
        # in the format that it began with: `auto` may mean another one here
        self.precision = dtype_named(describe_checkpoint(folder)[1]["computed"].rpartition(" ")[2])
        encoder, state, history = load_training_state(folder)
        self.learner.encoder.load_state_dict(encoder)
        self.learner.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        return history


def learning_rate_at(config: Config, epochs: float) -> float:
    """The learning rate after so many epochs: a straight line up, then half a cosine down to the final share."""
    schedule = config.optimizer
    if epochs < schedule.warmup_epochs:
        return schedule.learning_rate * epochs / schedule.warmup_epochs
    falling = config.training.epochs - schedule.warmup_epochs
    progress = (epochs - schedule.warmup_epochs) / falling if falling else 0.0
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return schedule.learning_rate * (schedule.final_learning_rate + (1 - schedule.final_learning_rate) * cosine)


def margin_at(config: Config, epochs: float) -> float:
    """The margin after so many epochs: a straight line from 0 up to its value."""
    warmup = config.loss.margin_warmup_epochs
    return config.loss.margin * (min(1.0, epochs / warmup) if warmup else 1.0)


def _refuse_other(config: Config, folder: Path) -> None:
    """Refuse a checkpoint of another configuration, whatever it calls its data."""
    here, there = (flatten(config_to_dict(of)) for of in (config, describe_checkpoint(folder)[0]))
    differing = [key for key in here if here[key] != there.get(key) and not key.startswith("data.")]
    if differing:
        told = ", ".join(f"{key} is {there.get(key)!r} there and {here[key]!r} here" for key in differing)
        raise ValueError(f"{folder} is a checkpoint of another configuration: {told}. Go on with that, or start anew.")


def _optimizer(config: Config, learner: Learner) -> torch.optim.Optimizer:
    chosen = config.optimizer
    decayed = [weight for weight in learner.parameters() if weight.dim() > 1]
    free = [weight for weight in learner.parameters() if weight.dim() <= 1]  # biases and norms
    groups = [{"params": decayed, "weight_decay": chosen.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if chosen.name == "sgd":
        nesterov = chosen.momentum > 0
        return torch.optim.SGD(groups, chosen.learning_rate, momentum=chosen.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, chosen.learning_rate, fused=True)


def loader_workers(config: Config, device: torch.device) -> int:
    """Processes that read audio ahead for a worker on a device."""
    if config.data.loader_workers is not None:
        return config.data.loader_workers
    return 4 if device.type == "cuda" else 0  # on a CPU the model takes all there is
