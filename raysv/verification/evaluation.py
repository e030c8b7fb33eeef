"""Judge an encoder on a pair list: every recording embedded once, by all workers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import FULL_SCALE
from raysv.corpus.loading import PairSet
from raysv.corpus.store import WaveformStore, open_store
from raysv.corpus.utterances import Utterance
from raysv.distributed import gather, rank, world_size
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.metrics import ErrorRates, error_rates
from raysv.verification.scoring import as_norm, cosine_scores, mean_embedding

PRIORS = (0.01, 0.05)  # of a target pair, for minDCF
CHUNK_SAMPLES = 1000 * SAMPLE_RATE  # about as much is converted to float at once


class NotFiniteError(ValueError):
    """An encoder whose embeddings hold infinities or NaN."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a pair list and what they amount to."""

    scores: npt.NDArray[np.float32]
    same_speaker: npt.NDArray[np.bool_]
    rates: ErrorRates

    def metrics(self, name: str) -> dict[str, float]:
        """EER and minDCFs under the name of the list, as `report` takes them."""
        costs = {f"{name}/min_dcf_{prior:g}": cost for prior, cost in self.rates.min_dcf.items()}
        return {f"{name}/eer": self.rates.eer} | costs


def embed_recordings(encoder: SpeakerEncoder, store: WaveformStore) -> Tensor:
    """Embeddings `(recordings, dim)` of a whole store, on the CPU, shared out over the workers and known to all.

    The rows of recordings that could not be used are zero.

    Raises: NotFiniteError.
    """
    longest_first = store.usable[np.argsort(-store.lengths[store.usable], kind="stable")]
    mine = longest_first[rank() :: world_size()]  # every worker gets its part of the long ones
    chunk = np.cumsum(store.lengths[mine]) // CHUNK_SAMPLES
    parts = [_embed(encoder, store, part) for part in np.split(mine, np.flatnonzero(np.diff(chunk)) + 1)]
    rows = gather(torch.cat(parts)).float().cpu()
    owners = np.concatenate([longest_first[worker :: world_size()] for worker in range(world_size())])
    if bad := int((~rows.isfinite().all(1)).sum()):
        raise NotFiniteError(f"The encoder's embeddings of {bad} of {len(rows)} recordings hold NaN or infinity.")
    embeddings = torch.zeros((len(store), rows.shape[1]))
    embeddings[torch.from_numpy(owners)] = rows
    return embeddings


def evaluate(encoder: SpeakerEncoder, pairs: PairSet, cohort: Tensor | None = None, top_n: int = 300) -> Evaluation:
    """Score a pair list: EER, and minDCF at priors 0.01 and 0.05.

    Args:
        cohort: `(speakers, dim)`, to normalise the cosines by AS-Norm with the `top_n` closest of them; None: cosines.

    Raises: NotFiniteError.
    """
    embeddings, enrolment, test = pair_embeddings(encoder, pairs)
    scores = cosine_scores(embeddings, enrolment, test)
    if cohort is not None:
        scores = as_norm(scores, embeddings, enrolment, test, cohort, min(top_n, len(cohort)))
    return Evaluation(scores, pairs.same_speaker, error_rates(scores, pairs.same_speaker, PRIORS))


def cohort_embeddings(encoder: SpeakerEncoder, utterances: Sequence[Utterance], cache: Path) -> Tensor:
    """One embedding `(speakers, dim)` for each speaker of a list, as AS-Norm compares with.

    Raises: ValueError when recordings of the list cannot be used.
    """
    store = open_store([spoken.path for spoken in utterances], cache)
    for path, why in store.problems.items():
        raise ValueError(
            f"{len(store.problems)} of {len(store)} recordings of the cohort cannot be used, first {path}: {why}. "
            "Mend them or take them out of the list."
        )
    embeddings = embed_recordings(encoder, store)
    rows: dict[str, list[int]] = {}
    for index, spoken in enumerate(utterances):
        rows.setdefault(spoken.speaker, []).append(index)
    return torch.stack([mean_embedding(embeddings[places]) for places in rows.values()])


def pair_embeddings(
    encoder: SpeakerEncoder, pairs: PairSet
) -> tuple[Tensor, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Embeddings of the enrolment models and the test recordings of the pairs, and each pair's two rows in them."""
    recordings = embed_recordings(encoder, pairs.store)
    models, enrolment = np.unique(pairs.enrolment, return_inverse=True)
    tests, test = np.unique(pairs.test, return_inverse=True)
    enrolled = torch.stack([mean_embedding(recordings[torch.from_numpy(pairs.models[model])]) for model in models])
    return torch.cat([enrolled, recordings[torch.from_numpy(tests)]]), enrolment, len(models) + test


def _embed(encoder: SpeakerEncoder, store: WaveformStore, recordings: npt.NDArray[np.int64]) -> Tensor:
    return encoder.embed([torch.from_numpy(store[index].astype(np.float32)) / FULL_SCALE for index in recordings])
