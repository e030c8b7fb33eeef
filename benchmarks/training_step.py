"""One training step on the CPU: forward, loss, backward, optimiser, for 32 views of 2 s; ours and two peers'.

    python benchmarks/training_step.py --channels 512 1024 --threads 2 --wespeaker CHECKOUT

Every network gets the same 198 frames of 80 mels, 1000 classes and the same optimiser: PyTorch's SGD with Nesterov
momentum, not fused as the optimisers of `fit` are.
Ours is the whole loss, AAM-Softmax and SupCon, with clipped gradients; the peers' is their AAM-Softmax. wespeaker's
model is timed in both forms: GLOB, which has the parameters and the attention of ours, and the lighter one without the
global context. SpeechBrain's aggregates 3 C channels: its recipe's 3072 at the recipe's C = 1024, where ours and
wespeaker's always have 1536, and those 1536 at C = 512. All with the allocator set as in raysv's own clusters (see
`peers.py`).

Printed beside it: what a step of `fit` does outside the network, part by part, with its own optimiser, fused AdamW; and
how near the network comes to its floor, the time that the bare matrix products of its convolutions and linear layers
take at their shapes (forward, and backward for weights and for inputs).
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measure import machine, medians, table
from peers import keep_freed_memory, use_wespeaker, versions
from torch import Tensor, nn

from raysv.config import Config, ModelConfig, config_from_dict
from raysv.corpus.loading import load_corpus
from raysv.learning.losses import AAMSupCon
from raysv.learning.views import ViewBatches, make_views
from raysv.speech.ecapa import ECAPATDNN
from raysv.speech.encoder import SpeakerEncoder
from raysv.speech.features import BandMasks, Fbank, mask_bands, mean_normalise

VIEWS, FRAMES, MELS, CLASSES, DIM = 32, 198, 80, 1000, 192
Step = Callable[[], object]


def main() -> None:
    """Print medians of whole steps, of the parts of ours, and the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[512], help="widths of the network")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--wespeaker", type=Path, help="a checkout of its source; left out if not given")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.wespeaker:
        use_wespeaker(arguments.wespeaker)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(machine())
        print(versions(arguments.wespeaker))
        for channels in arguments.channels:
            _print_steps(channels, arguments.precision, bool(arguments.wespeaker), arguments.repeats)
        for precision in arguments.precision:
            _print_parts(arguments.channels[0], precision, arguments.repeats)


def _print_steps(channels: int, precisions: list[str], with_wespeaker: bool, repeats: int) -> None:
    features, labels = torch.randn(VIEWS, MELS, FRAMES), torch.arange(VIEWS) // 2
    learners = {"raysv": our_learner(channels), "SpeechBrain": speechbrain_learner(channels)}
    if with_wespeaker:
        learners |= {
            "wespeaker GLOB": wespeaker_learner(f"ECAPA_TDNN_GLOB_c{channels}"),
            "wespeaker": wespeaker_learner(f"ECAPA_TDNN_c{channels}"),
        }
    ways = {
        f"{name}, {precision}": _step(model, loss, features, labels, precision)
        for precision in precisions
        for name, (model, loss) in learners.items()
    }
    if "fp32" in precisions:
        ways["raysv, fp32, from waveforms"] = _waveform_step(channels, labels)
    seconds = medians(ways, repeats)
    peer = min((name for name in ways if "raysv" not in name and precisions[0] in name), key=seconds.__getitem__)
    print(table(f"A step of {VIEWS} × 2 s, C = {channels}, in ratio to {peer}", seconds, peer))
    floors = {precision: floor_seconds(ECAPATDNN(channels=channels), precision) for precision in precisions}
    for precision, (floor, operations) in floors.items():
        step = seconds[f"raysv, {precision}"]
        print(
            f"  floor, {precision}: {operations / 1e9:.0f} GFLOP at {operations / floor / 1e9:.0f} GFLOP/s, "
            f"{floor * 1e3:.0f} ms: {floor / step:.0%} of our step"
        )


def our_learner(channels: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Our network, and our whole loss of two views of each utterance."""
    network, loss = ECAPATDNN(channels=channels), AAMSupCon(Config().loss, CLASSES, DIM)
    model = nn.ModuleDict({"network": network, "loss": loss})
    model.forward = network.forward
    return model, lambda embeddings, labels: loss(embeddings.unflatten(0, (-1, 2)), labels[::2]).total


def wespeaker_learner(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Its network of this name with its ArcMargin projection, as `train.py` joins them."""
    from wespeaker.models import ecapa_tdnn
    from wespeaker.models.projections import ArcMarginProduct

    network = getattr(ecapa_tdnn, name)(MELS, DIM)
    projection = ArcMarginProduct(DIM, CLASSES, scale=32.0, margin=0.2)
    model = nn.ModuleDict({"network": network, "projection": projection})
    model.forward = lambda features: network(features.mT.contiguous())[-1]
    return model, lambda embeddings, labels: nn.functional.cross_entropy(
        _logits(projection, embeddings, labels), labels
    )


def _logits(projection: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    outputs = projection(embeddings, labels)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def speechbrain_learner(channels: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Its network, classifier and loss, as its VoxCeleb recipe joins them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
        from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
    network = ECAPA_TDNN(MELS, channels=[channels] * 4 + [3 * channels], lin_neurons=DIM)
    classifier = Classifier(DIM, out_neurons=CLASSES)
    loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))
    model = nn.ModuleDict({"network": network, "classifier": classifier})
    model.forward = lambda features: network(features.mT.contiguous())
    return model, lambda embeddings, labels: loss(classifier(embeddings), labels[:, None])


def _step(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, labels: Tensor, precision: str
) -> Step:
    """A whole update of all the model's weights."""
    optimizer, clipped = _optimizer(model), "loss" in dict(model.named_children())
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)


def _waveform_step(channels: int, labels: Tensor) -> Step:
    encoder, loss = SpeakerEncoder(ModelConfig(channels=channels)), AAMSupCon(Config().loss, CLASSES, DIM)
    model = nn.ModuleDict({"encoder": encoder, "loss": loss})
    model.forward = encoder.forward
    waveforms = 0.1 * torch.randn(VIEWS, 32_000)
    return _step(model, lambda rows, who: loss(rows.unflatten(0, (-1, 2)), who[::2]).total, waveforms, labels, "fp32")


def _print_parts(channels: int, precision: str, repeats: int) -> None:
    """What a step of `fit` consists of, each part alone, on the synthetic corpus."""
    batch = {"speakers": 8, "utterances_per_speaker": 2, "views": 2, "crop_seconds": 2.0}
    with tempfile.TemporaryDirectory(prefix="raysv-training-step-") as folder:
        config = config_from_dict({"data": {"cache": folder}, "batch": batch})
        batches = ViewBatches(config, load_corpus(config.data, config.augment))
        seconds = medians(_parts(batches, channels, precision), 3 * repeats)
    print(table(f"Parts of our step, C = {channels}, {precision}, in ratio to the network's", seconds, "network"))
    rest = sum(seconds.values()) - seconds["network"]
    print(f"  outside the network: {rest / sum(seconds.values()):.1%} of the step")


def _parts(batches: ViewBatches, channels: int, precision: str) -> Mapping[str, Step]:
    network, fbank = ECAPATDNN(channels=channels).train(), Fbank()
    loss = AAMSupCon(Config().loss, CLASSES, DIM)
    both = nn.ModuleList([network, loss])
    optimizer, batch = torch.optim.AdamW(both.parameters(), 1e-4, fused=True), batches[1, 0]
    waveforms = make_views(batch)
    masks = BandMasks(*batch.masks.unbind(-1))
    features = mask_bands(mean_normalise(fbank(waveforms)), masks)
    embeddings = torch.randn(VIEWS // 2, 2, DIM, requires_grad=True)
    numbers = [*loss(embeddings, batch.speakers), torch.ones(())]

    def through_network() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            rows = network(features)
        rows.backward(torch.ones_like(rows))

    def through_loss() -> None:
        loss.zero_grad(set_to_none=True)
        loss(embeddings, batch.speakers).total.backward()

    return {
        "network": through_network,
        "sampling and reading": lambda: batches[1, int(time.monotonic() * 1e6) % batches.steps],
        "noise, babble, reverb": lambda: make_views(batch),
        "fbank": lambda: mask_bands(mean_normalise(fbank(waveforms)), masks),
        "AAM + SupCon": through_loss,
        "gradient clipping": lambda: nn.utils.clip_grad_norm_(both.parameters(), 5.0),
        "optimiser, fused AdamW": optimizer.step,
        "numbers for the log": lambda: torch.stack(numbers).detach(),
    }


def floor_seconds(network: nn.Module, precision: str) -> tuple[float, float]:
    """Seconds and floating-point operations of the bare matrix products of a step, forward and backward."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    seconds, operations, measured = 0.0, 0.0, {}
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv1d | nn.Linear):
            continue
        outputs, inputs = layer.weight.flatten(1).shape
        rows = VIEWS if isinstance(layer, nn.Linear) else VIEWS * FRAMES
        if name == "pool.hidden":
            inputs //= 3  # mean and deviation are multiplied once per utterance
        shape = (rows, inputs, outputs)
        if shape not in measured:
            measured[shape] = _product_seconds(*shape, dtype)
        seconds += measured[shape]
        operations += 3 * 2 * rows * inputs * outputs
    return seconds, operations


def _product_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    values, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    gradient, times = torch.randn(rows, outputs, dtype=dtype), []
    for _ in range(4):
        started = time.perf_counter()
        values @ weight.T, gradient @ weight, gradient.T @ values
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
