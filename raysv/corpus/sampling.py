"""Speaker-balanced batches: P speakers × K utterances, the same for any number of workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class SpeakerBatches:
    """The batches of every epoch, each of `speakers` different speakers with `utterances` different utterances.

    An epoch asks every speaker the same number of times, chosen so that it takes about as many utterances as the list
    has; who comes together and which utterances come is drawn anew in every epoch, from the seed and the epoch alone.

    Args:
        labels: `(recordings,)` class of each recording, 0 to the number of speakers − 1.
        names: the speakers' names, for messages.

    Raises: ValueError when such a batch cannot be formed.
    """

    def __init__(self, labels: Indices, names: list[str], speakers: int, utterances: int, seed: int) -> None:
        counts = np.bincount(labels, minlength=len(names))
        if speakers > len(names):
            raise ValueError(
                f"batch.speakers is {speakers}, but the training list has {len(names)} speakers and those of a batch "
                f"are all different. Set batch.speakers to {len(names)} or less."
            )
        if (few := np.flatnonzero(counts < utterances)).size:
            shown = ", ".join(f"{names[speaker]} ({counts[speaker]})" for speaker in few[:10])
            raise ValueError(
                f"batch.utterances_per_speaker is {utterances}, but {few.size} of {len(names)} training speakers have "
                f"fewer utterances: {shown}{', ...' if few.size > 10 else ''}. Lower it, or take those speakers out of "
                f"the training list (python -m raysv.prepare does with --min-utterances {utterances})."
            )
        self.speakers, self.utterances, self.seed = speakers, utterances, seed
        self._recordings = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self._rounds = max(1, round(len(labels) / (len(names) * utterances)))
        self.steps = self._rounds * len(names) // speakers

    def epoch(self, epoch: int) -> Indices:
        """The recordings of an epoch, `(steps, speakers × utterances)`; a speaker's are next to each other."""
        # a spawn key, because the seeds [seed, epoch] and [seed, epoch, 0] of another room give the same numbers
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        groups = [self._groups(recordings, generator) for recordings in self._recordings]
        order = self._order(generator)
        taken = np.zeros(len(groups), np.int64)
        batches = []
        for batch in order:
            batches.append(np.concatenate([groups[speaker][taken[speaker]] for speaker in batch]))
            taken[batch] += 1
        return np.stack(batches)

    def _groups(self, recordings: Indices, generator: np.random.Generator) -> Indices:
        """One speaker's recordings as `(rounds, utterances)`: shuffled, and again from the start when they run out."""
        whole = len(recordings) // self.utterances * self.utterances
        needed = -(-self._rounds * self.utterances // whole)
        shuffled = [generator.permutation(recordings)[:whole] for _ in range(needed)]
        return np.concatenate(shuffled).reshape(-1, self.utterances)[: self._rounds]

    def _order(self, generator: np.random.Generator) -> Indices:
        """The speakers of every batch, `(steps, speakers)`: round after round, none twice in a batch."""
        queue = np.zeros(0, np.int64)
        for _ in range(self._rounds):
            pending = queue[len(queue) // self.speakers * self.speakers :]
            shuffled = generator.permutation(len(self._recordings))
            late = np.isin(shuffled, pending)  # those who wait in the unfinished batch do not join it a second time
            queue = np.concatenate([queue, shuffled[~late], shuffled[late]])
        return queue[: self.steps * self.speakers].reshape(self.steps, self.speakers)
