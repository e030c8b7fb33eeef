"""Parameters and multiply-adds of ECAPA-TDNNs, and how far ours is from wespeaker's with the same weights.

python benchmarks/encoder_size.py [--wespeaker CHECKOUT]

Multiply-adds are those of convolutions and matrix products, for one utterance of 200 frames (2 s) of 80 mel bands.
SpeechBrain's model is counted where it is installed, wespeaker's where a checkout is named.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from measure import machine
from peers import use_wespeaker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raysv.speech.ecapa import ECAPATDNN

FRAMES, MELS = 200, 80
WIDTHS = (512, 1024)
RENAMED = (  # from ours to wespeaker's, one after the other
    (r"^norm", "bn"),
    (r"^embedding", "linear"),
    (r"^aggregate", "conv"),
    (r"^pool.hidden", "pool.linear1"),
    (r"^pool.logits", "pool.linear2"),
    (r"res2.layers.(\d).conv", r"1.convs.\1"),
    (r"res2.layers.(\d).norm", r"1.bns.\1"),
    (r"gate.squeeze", "3.linear1"),
    (r"gate.excite", "3.linear2"),
    (r"enter", "0"),
    (r"leave", "2"),
    (r"^stem", "layer1"),
    (r"^blocks.0", "layer2.se_res2block"),
    (r"^blocks.1", "layer3.se_res2block"),
    (r"^blocks.2", "layer4.se_res2block"),
    (r"\bnorm", "bn"),
)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wespeaker", type=Path, help="a checkout of github.com/wenet-e2e/wespeaker")
    checkout = parser.parse_args().wespeaker
    if checkout:
        use_wespeaker(checkout)
    print(machine())
    print(f"{'':34}  parameters  multiply-adds")
    for channels in WIDTHS:
        for name, model, features in models(channels, bool(checkout)):
            parameters = sum(weight.numel() for weight in model.parameters())
            print(f"{name:34} {parameters / 1e6:8.3f} M  {multiply_adds(model, features) / 1e9:9.4f} G")
    if checkout:
        print("\nlargest relative distance of our embeddings from wespeaker's, C = 512, the same random weights")
        for frames in (FRAMES, 10):
            as_it_is = distance(frames)
            with mock.patch("torch.var", functools.partial(torch.var, correction=0)):
                biased = distance(frames)
            print(
                f"{frames:4} frames: {as_it_is:.1e}, with the variance of their context biased like ours {biased:.1e}"
            )


def models(channels: int, with_wespeaker: bool) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The name of each model of a width, the model, and features as it takes them."""
    features = torch.randn(1, MELS, FRAMES)
    yield f"raysv C={channels}", ECAPATDNN(channels=channels), features
    if with_wespeaker:
        yield f"wespeaker GLOB_c{channels}", wespeaker_model(channels), features.mT
    try:
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    except ModuleNotFoundError:
        return
    for aggregated in (1536, 3072):
        widths = [channels] * 4 + [aggregated]
        yield f"speechbrain C={channels}, MFA {aggregated}", ECAPA_TDNN(MELS, channels=widths), features.mT


def multiply_adds(model: nn.Module, features: Tensor) -> float:
    """What convolutions and matrix products multiply and add for these features."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(features)
    return counter.get_total_flops() / 2


def wespeaker_model(channels: int) -> nn.Module:
    """Wespeaker's ECAPA-TDNN with the global context in its attention."""
    from wespeaker.models.ecapa_tdnn import ECAPA_TDNN

    return ECAPA_TDNN(channels, MELS, 192, global_context_att=True)


def distance(frames: int) -> float:
    """How far our embeddings are from wespeaker's with its weights and random statistics, relative to their norm."""
    torch.manual_seed(0)
    theirs, ours = wespeaker_model(512).eval(), ECAPATDNN().eval()
    for values in theirs.state_dict().values():
        if values.dim() == 1:
            values.add_(torch.rand_like(values) - 0.5)
    weights = theirs.state_dict()
    ours.load_state_dict(
        {name: weights[their_name(name)].view_as(values) for name, values in ours.state_dict().items()}
    )
    features = torch.randn(8, MELS, frames)
    with torch.inference_mode():
        expected = theirs(features.mT)[-1]
        return float(((ours(features) - expected).norm(dim=1) / expected.norm(dim=1)).max())


def their_name(name: str) -> str:
    """What wespeaker calls a weight of ours."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


if __name__ == "__main__":
    main()
