"""An encoder made in no time, and its checkpoint; beside `learning_fixtures`, which does without PyTorch."""

from pathlib import Path

import numpy as np
import torch
from learning_fixtures import tiny_config, voice

from raysv.learning.checkpoint import Standing, save_checkpoint
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.evaluation import Evaluation
from raysv.verification.metrics import error_rates


def tiny_encoder():
    """An encoder of random weights, in eval mode, whose BatchNorm knows what voices look like."""
    torch.manual_seed(0)
    encoder = SpeakerEncoder(tiny_config(Path()).model)
    with torch.no_grad():
        for speaker in range(10):
            encoder(torch.from_numpy(np.stack([voice(speaker, take) for take in range(2)])).float())
    return encoder.eval()


def write_checkpoint(folder, config, encoder, scores=(0.9, 0.3, 0.5, 0.1), same_speaker=(True, True, False, False)):
    """The checkpoint of an encoder after two epochs, as if its dev pairs had these scores."""
    scores, same_speaker = np.array(scores, np.float32), np.array(same_speaker)
    dev = Evaluation(scores, same_speaker, error_rates(scores, same_speaker))
    history = [{"epoch": epoch, "loss/total": 3.0 / epoch, "dev/eer": 0.5 / epoch} for epoch in (1, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    state = {"loss": {"aam.weight": torch.ones(7, 16)}, "optimizer": {"state": {}, "param_groups": []}}
    save_checkpoint(folder, Standing(config, history, dev, 7, "0123456789abcdef", "cpu, float32"), encoder, state)
    return folder
