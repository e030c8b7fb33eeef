"""Judge an encoder on a pair list: every recording embedded once, by all workers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import floating
from raysv.corpus.groups import Indices
from raysv.corpus.sets import PairSet
from raysv.corpus.store import WaveformStore, open_store
from raysv.corpus.utterances import Utterance
from raysv.distributed import gather, shard, world_size
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.metrics import PRIORS, ErrorRates, bootstrap_eer, error_rates
from raysv.verification.scoring import as_norm, centre, cosine_scores, mean_embeddings

FEWEST_SPEAKERS = 5  # for an interval: 4 can be drawn in 35 ways, which have no tails to speak of
CHUNK_SAMPLES = 1000 * SAMPLE_RATE  # about as much is converted to float at once


class NotFiniteError(ValueError):
    """An encoder whose embeddings hold infinities or NaN."""


class Interval(NamedTuple):
    """Between what the EER would lie if as many other speakers had been recorded."""

    low: float
    high: float
    speakers: int


@dataclass(frozen=True)
class Evaluation:
    """The scores of a pair list and what they amount to."""

    scores: npt.NDArray[np.float32]
    same_speaker: npt.NDArray[np.bool_]
    rates: ErrorRates
    interval: Interval | None = None

    def metrics(self, name: str) -> dict[str, float]:
        """EER, its interval if there is one, and minDCFs under the name of the list, as `report` takes them."""
        ends = {f"{name}/eer_low": self.interval.low, f"{name}/eer_high": self.interval.high} if self.interval else {}
        costs = {f"{name}/min_dcf_{prior:g}": cost for prior, cost in self.rates.min_dcf.items()}
        return {f"{name}/eer": self.rates.eer} | ends | costs


def embed_recordings(encoder: SpeakerEncoder, store: WaveformStore) -> Tensor:
    """Embeddings `(recordings, dim)` of a whole store, on the CPU, shared out over the workers and known to all.

    The rows of recordings that could not be used are zero.

    Raises: NotFiniteError.
    """
    longest_first = store.usable[np.argsort(-store.lengths[store.usable], kind="stable")]
    # every worker gets its part of the long ones; such a part is as long as a shard
    owned = np.concatenate([longest_first[worker :: world_size()] for worker in range(world_size())])
    mine = owned[shard(len(owned))]
    chunk = np.cumsum(store.lengths[mine]) // CHUNK_SAMPLES
    parts = [_embed(encoder, store, part) for part in np.split(mine, np.flatnonzero(np.diff(chunk)) + 1)]
    rows = gather(torch.cat(parts), len(owned)).float().cpu()
    if bad := int((~rows.isfinite().all(1)).sum()):
        raise NotFiniteError(f"The encoder's embeddings of {bad} of {len(rows)} recordings hold NaN or infinity.")
    embeddings = torch.zeros((len(store), rows.shape[1]))
    embeddings[torch.from_numpy(owned)] = rows
    return embeddings


def evaluate(
    encoder: SpeakerEncoder,
    pairs: PairSet,
    cohort: Tensor | None = None,
    top_n: int = 300,
    *,
    mean: Tensor | None = None,
    generator: np.random.Generator | None = None,
) -> Evaluation:
    """Score a pair list: EER, and minDCF at priors 0.01 and 0.05.

    Args:
        cohort: `(speakers, dim)`, to normalise the cosines by AS-Norm with the `top_n` closest of them; None: cosines.
        top_n: all of them where there are fewer; the normalisation is then not adaptive.
        mean: `(dim,)` of a population that the embeddings are centred on; the cohort must have been centred on it too.
        generator: the randomness of the EER's interval; None: no interval.

    Raises: NotFiniteError.
    """
    embeddings, enrolment, test = pair_embeddings(encoder, pairs, mean)
    scores = cosine_scores(embeddings, enrolment, test)
    if cohort is not None:
        scores = as_norm(scores, embeddings, enrolment, test, cohort, min(top_n, len(cohort)))
    rates = error_rates(scores, pairs.same_speaker, PRIORS)
    return Evaluation(scores, pairs.same_speaker, rates, eer_interval(scores, pairs, generator) if generator else None)


def eer_interval(scores: npt.ArrayLike, pairs: PairSet, generator: np.random.Generator) -> Interval | None:
    """The interval of the EER of a scored list over its speakers; None where they are fewer than `FEWEST_SPEAKERS`."""
    enrolment, test, count = pair_speakers(pairs)
    if count < FEWEST_SPEAKERS:
        return None
    return Interval(*bootstrap_eer(scores, pairs.same_speaker, enrolment, test, generator), count)


def pair_speakers(pairs: PairSet) -> tuple[Indices, Indices, int]:
    """The speaker of each pair's enrolment and of its test, and how many speakers there are."""
    enrolment = pairs.speakers[pairs.models.members[pairs.models.starts[pairs.enrolment]]]
    test = pairs.speakers[pairs.test]
    return enrolment, test, int(np.count_nonzero(np.bincount(np.concatenate([enrolment, test]))))


def pair_embeddings(
    encoder: SpeakerEncoder, pairs: PairSet, mean: Tensor | None = None
) -> tuple[Tensor, Indices, Indices]:
    """Embeddings of the enrolment models and of the recordings behind them, and each pair's two rows in them.

    Args:
        mean: `(dim,)`, see `evaluate`.
    """
    recordings = embed_recordings(encoder, pairs.store)
    if mean is not None:
        recordings = centre(recordings, mean)
    members = torch.tensor(pairs.models.members)
    owners = torch.from_numpy(np.repeat(np.arange(len(pairs.models)), pairs.models.sizes))
    models = mean_embeddings(recordings[members], owners, len(pairs.models))
    return torch.cat([models, recordings]), pairs.enrolment, len(models) + pairs.test


def embed_utterances(encoder: SpeakerEncoder, utterances: Sequence[Utterance], cache: Path) -> Tensor:
    """Embeddings `(utterances, dim)` of a list that scores are normalised by.

    Raises: ValueError when recordings of the list cannot be used.
    """
    store = open_store([spoken.path for spoken in utterances], cache)
    for path, why in store.problems.items():
        raise ValueError(
            f"{len(store.problems)} of {len(store)} recordings to normalise by cannot be used, first {path}: {why}. "
            "Mend them or take them out of the list."
        )
    return embed_recordings(encoder, store)


def speaker_means(embeddings: Tensor, utterances: Sequence[Utterance]) -> Tensor:
    """One embedding `(speakers, dim)` for each speaker of a list, as AS-Norm compares with.

    Args:
        embeddings: `(utterances, dim)`.
    """
    numbers: dict[str, int] = {}
    owners = [numbers.setdefault(spoken.speaker, len(numbers)) for spoken in utterances]
    return mean_embeddings(embeddings, torch.tensor(owners), len(numbers))


def _embed(encoder: SpeakerEncoder, store: WaveformStore, recordings: npt.NDArray[np.int64]) -> Tensor:
    return encoder.embed([torch.from_numpy(floating(store[index])) for index in recordings])
