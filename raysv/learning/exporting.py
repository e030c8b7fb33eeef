"""A checkpoint's encoder as one ONNX file: waveforms in, embeddings out, without PyTorch."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from raysv.config import SAMPLE_RATE
from raysv.learning.checkpoint import encoder_facts, load_encoder
from raysv.speech.encoder import SHORTEST_SAMPLES, SpeakerEncoder
from raysv.speech.features import FRAME_SAMPLES

WAVEFORMS, EMBEDDINGS = "waveforms", "embeddings"  # the graph's input and output
TOLERANCE = 1e-4  # of an embedding's length
CHECKED_SAMPLES = (SHORTEST_SAMPLES, 3 * SAMPLE_RATE, 12 * SAMPLE_RATE)
EXPLAINED = (
    "Speaker encoder. waveforms (n, samples): mono speech in [-1, 1) at 16 kHz, n of one length; repeat what is "
    "shorter than half a second. embeddings (n, embedding_dim), not normalised: of one speaker where their cosine "
    "reaches the threshold."
)


def export_onnx(checkpoint: Path, target: Path) -> float | None:
    """Write an encoder, its features included, as an ONNX file that explains itself: whole and right, or not at all.

    Input `waveforms`, `(n, samples)` float32 of any n and from 25 ms on; output `embeddings`, `(n, dim)`, those of
    `SpeakerEncoder.forward`. `encoder_facts` are the file's metadata.

    Returns: the largest distance of its embeddings from PyTorch's, in lengths of an embedding; None where onnxruntime
        is not there to compute it.
    Raises: ValueError when the folder is no checkpoint, onnxscript is missing, or the file computes something else.
    """
    if find_spec("onnxscript") is None:
        raise ValueError("Writing ONNX needs raysv's extra onnx. Install it: pip install onnxscript onnxruntime")
    encoder, facts = load_encoder(checkpoint), encoder_facts(checkpoint)
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"{target} cannot be written: name a file in a folder that is there.")
    program = _exported(encoder)
    program.model.doc_string = EXPLAINED
    program.model.metadata_props.update(facts)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        program.save(partial)
        distance = _distance(partial, encoder) if find_spec("onnxruntime") else None
        if distance is not None and not distance <= TOLERANCE:  # nor where it is not a number
            raise ValueError(
                f"The embeddings of the ONNX file are {distance:.1e} of their length away from PyTorch's, more than "
                f"{TOLERANCE:g}; it was not kept. Report the versions of torch, onnxscript and onnxruntime."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return distance


def _exported(encoder: SpeakerEncoder) -> Any:
    """The encoder as PyTorch's ONNX program, without the lines of source that it came from."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # comes with onnxscript

    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    shapes = {WAVEFORMS: {0: Dim("n"), 1: Dim("samples", min=FRAME_SAMPLES)}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)  # PyTorch 2.11 of itself
        program: Any = torch.onnx.export(
            encoder,
            (torch.zeros(2, SAMPLE_RATE),),
            dynamo=True,
            verbose=False,
            input_names=[WAVEFORMS],
            output_names=[EMBEDDINGS],
            dynamic_shapes=shapes,
        )
    ClearMetadataAndDocStringPass()(program.model)
    return program


def _distance(file: Path, encoder: SpeakerEncoder) -> float:
    """How far a file's embeddings of noise, after a while of digital silence, lie from the encoder's at most."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator, largest = np.random.default_rng(0), 0.0
    for samples in CHECKED_SAMPLES:
        waveforms = 0.1 * generator.standard_normal((2, samples), np.float32)
        waveforms[:, : samples // 4] = 0
        (embeddings,) = session.run([EMBEDDINGS], {WAVEFORMS: waveforms})
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(waveforms)).numpy()
        distances = np.linalg.norm(embeddings - expected, axis=1) / np.linalg.norm(expected, axis=1)
        largest = np.maximum(largest, distances.max())  # `max` would pass over what is not a number
    return float(largest)
