"""Scores of pairs of embeddings: cosine, and its adaptive symmetric normalisation against a cohort.

Embeddings are tensors `(recordings, dim)` on any device, each recording embedded once; a pair is two row numbers.
Scores are NumPy arrays, as `raysv.verification.metrics` takes them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Scores = NDArray[np.float32]


@torch.no_grad()
def cosine_scores(embeddings: Tensor, enrolment_index: ArrayLike, test_index: ArrayLike, chunk: int = 32_768) -> Scores:
    """The cosine of each pair's embeddings.

    Args:
        embeddings: `(recordings, dim)`, of any length.
        enrolment_index, test_index: `(pairs,)` rows of `embeddings`.
        chunk: pairs looked up at a time, which bounds the memory.

    Returns: `(pairs,)`.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    enrolment, test = (torch.as_tensor(np.asarray(index)).split(chunk) for index in (enrolment_index, test_index))
    parts = [(unit[rows] * unit[others]).sum(1).cpu() for rows, others in zip(enrolment, test, strict=True)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def as_norm(
    scores: ArrayLike,
    embeddings: Tensor,
    enrolment_index: ArrayLike,
    test_index: ArrayLike,
    cohort: Tensor,
    top_n: int = 300,
    chunk: int = 4096,
) -> Scores:
    """Scores in standard deviations above what impostors reach, averaged over the pair's two sides.

    Each side's mean and deviation are those of its cosines with the `top_n` cohort embeddings closest to it.

    Args:
        scores: `(pairs,)` cosines of the pairs.
        embeddings: `(recordings, dim)`; the cohort statistics of each are computed once.
        enrolment_index, test_index: `(pairs,)` rows of `embeddings`.
        cohort: `(cohort, dim)` embeddings of other speakers, customarily one mean per training speaker.
        chunk: recordings compared with the cohort at a time, which bounds the memory.

    Returns: `(pairs,)`.
    Raises: ValueError where the cohort has fewer than `top_n` embeddings, or where an embedding is equally close to
        all its `top_n`, which leaves no deviation to divide by.
    Source: Karam et al. 2011, ICASSP; Matějka et al. 2017, Interspeech, "Analysis of score normalization in
        multilingual speaker recognition", S-norm 1 with top-N adaptation.
    """
    if not 2 <= top_n <= len(cohort):
        raise ValueError(f"top_n must lie between 2 and the cohort's {len(cohort)} embeddings, got {top_n}.")
    others = F.normalize(cohort.float(), dim=1)
    statistics = [_cohort_statistics(rows, others, top_n) for rows in embeddings.split(chunk)]
    means, deviations = torch.cat(statistics).cpu().numpy().T
    if (flat := deviations < 1e-6).any():  # the rounding of float32 cosines
        raise ValueError(
            f"Embedding {flat.argmax()} is equally close to {top_n} of the cohort. Does the cohort repeat an embedding?"
        )
    values = np.asarray(scores, dtype=np.float32)
    enrolment, test = (
        (values - means[side]) / deviations[side] for side in map(np.asarray, (enrolment_index, test_index))
    )
    return (enrolment + test) / 2


def _cohort_statistics(embeddings: Tensor, cohort: Tensor, top_n: int) -> Tensor:
    """Mean and deviation `(recordings, 2)` of the largest cosines of each embedding with a cohort of unit length."""
    closest = (F.normalize(embeddings.float(), dim=1) @ cohort.T).topk(top_n, dim=1).values
    return torch.stack([closest.mean(1), closest.std(1, correction=0)], dim=1)


def mean_embedding(embeddings: Tensor) -> Tensor:
    """The model `(dim,)` of a speaker enrolled with several recordings `(recordings, dim)`: their mean direction.

    Every recording counts alike, however long its embedding. Also what a cohort has for each of its speakers.
    """
    return F.normalize(embeddings.float(), dim=1).mean(0)


def centre(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Embeddings `(recordings, dim)` moved so that the population whose `mean` is `(dim,)` surrounds the origin.

    The mean is that of training or cohort embeddings, as they come from the encoder, never of the recordings tested.
    """
    return embeddings - mean
