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

CELLS_PER_PAIR = 64  # cells of a matrix product that cost less time than to look up a pair's two embeddings
CACHED_PAIRS = 4096  # whose embeddings fit a processor's cache


@torch.no_grad()
def cosine_scores(embeddings: Tensor, enrolment_index: ArrayLike, test_index: ArrayLike, chunk: int = 2**20) -> Scores:
    """The cosine of each pair's embeddings.

    Lists that cross their enrolments and tests are read off a matrix product; pairs too scattered for that are
    multiplied one by one. The two ways differ by the rounding of float32.

    Args:
        embeddings: `(recordings, dim)`, of any length.
        enrolment_index, test_index: `(pairs,)` rows of `embeddings`.
        chunk: pairs scored at a time, which bounds the memory to 4 · `CELLS_PER_PAIR` bytes for each of them.

    Returns: `(pairs,)`.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    pairs = torch.from_numpy(np.stack([enrolment_index, test_index]))
    return torch.cat([_cosines(unit, part) for part in pairs.split(chunk, dim=1)]).numpy()


def _cosines(unit: Tensor, pairs: Tensor) -> Tensor:
    """Products `(pairs,)`, on the CPU, of rows of unit length; `pairs` is `(2, pairs)`."""
    (enrolled, enrolment), (tested, test) = (_distinct(side, len(unit)) for side in pairs)
    if len(enrolled) * len(tested) <= CELLS_PER_PAIR * pairs.shape[1]:
        return (unit[enrolled] @ unit[tested].T)[enrolment, test].cpu()
    return torch.cat([(unit[rows] * unit[others]).sum(1) for rows, others in pairs.split(CACHED_PAIRS, dim=1)]).cpu()


def _distinct(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows, of `count`, that an index of any shape names, and the index into these; without sorting it."""
    named = torch.zeros(count, dtype=torch.bool)
    named[index] = True
    return named.nonzero().flatten(), (named.cumsum(0) - 1)[index]


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
        embeddings: `(recordings, dim)`; the cohort statistics of those that pairs name are computed once.
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
    named, sides = _distinct(torch.from_numpy(np.stack([enrolment_index, test_index])), len(embeddings))
    statistics = [_cohort_statistics(embeddings[rows], others, top_n) for rows in named.split(chunk)]
    means, deviations = torch.cat(statistics).cpu().T
    if (flat := deviations < 1e-6).any():  # the rounding of float32 cosines
        raise ValueError(
            f"Embedding {named[flat][0]} is equally close to {top_n} of the cohort. "
            "Does the cohort repeat an embedding?"
        )
    values = torch.from_numpy(np.asarray(scores, dtype=np.float32))
    enrolment, test = ((values - means[side]) / deviations[side] for side in sides)
    return ((enrolment + test) / 2).numpy()


def _cohort_statistics(embeddings: Tensor, cohort: Tensor, top_n: int) -> Tensor:
    """Mean and deviation `(recordings, 2)` of the largest cosines of each embedding with a cohort of unit length."""
    closest = (F.normalize(embeddings.float(), dim=1) @ cohort.T).topk(top_n, dim=1).values
    return torch.stack([closest.mean(1), closest.std(1, correction=0)], dim=1)


def mean_embeddings(embeddings: Tensor, owners: Tensor, count: int) -> Tensor:
    """The models `(count, dim)` of speakers enrolled with several recordings each: mean directions.

    Every recording counts alike, however long its embedding. Also what a cohort has for each of its speakers.

    Args:
        embeddings: `(recordings, dim)`.
        owners: `(recordings,)` which of `count` models each belongs to; one that owns nothing is zero.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    sums = directions.new_zeros(count, directions.shape[1]).index_add_(0, owners, directions)
    return sums / owners.bincount(minlength=count).clamp(min=1)[:, None]


def centre(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Embeddings `(recordings, dim)` moved so that the population whose `mean` is `(dim,)` surrounds the origin.

    The mean is that of training or cohort embeddings, as they come from the encoder, never of the recordings tested.
    Each recording counts alike in it, as in Kaldi's `ivector-mean` and in wespeaker, not each speaker. Centre first:
    models, cohorts and cosines are made of embeddings that have been centred.
    """
    return embeddings - mean
