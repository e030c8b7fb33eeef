"""Speaker-balanced batches: P speakers × K utterances, the same for any number of workers."""

from __future__ import annotations

import numpy as np

from raysv.corpus.groups import Groups, Indices


class SpeakerBatches:
    """The batches of every epoch, each of `speakers` different speakers with `utterances` different utterances.

    An epoch asks every speaker the same number of times, chosen so that it takes about as many utterances as the list
    has; who comes together and which utterances come is drawn anew in every epoch, from the seed and the epoch alone.

    An epoch takes 8 bytes per utterance, and as many again while it is drawn.

    Args:
        by_speaker: the utterances of each speaker.
        names: the speakers' names, for messages.

    Raises: ValueError when such a batch cannot be formed.
    """

    def __init__(self, by_speaker: Groups, names: list[str], speakers: int, utterances: int, seed: int) -> None:
        counts = by_speaker.sizes
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
        self._by_speaker = by_speaker
        self._rounds = max(1, round(len(by_speaker.members) / (len(names) * utterances)))
        self.steps = self._rounds * len(names) // speakers

    def epoch(self, epoch: int) -> Indices:
        """The utterances of an epoch, `(steps, speakers × utterances)`; a speaker's are next to each other."""
        # a spawn key: the seeds [seed, epoch] would give the numbers of [seed, epoch, 0], which the first batch takes
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        groups = np.empty((len(self._by_speaker), self._rounds, self.utterances), np.int64)
        for group, own in zip(groups, self._by_speaker, strict=True):
            group[:] = self._groups(own, generator)
        taken = np.zeros(len(groups), np.int64)
        batches = np.empty((self.steps, self.speakers, self.utterances), np.int64)
        for batch, asked in zip(batches, self._order(generator), strict=True):
            batch[:] = groups[asked, taken[asked]]
            taken[asked] += 1
        return batches.reshape(self.steps, -1)

    def _groups(self, own: Indices, generator: np.random.Generator) -> Indices:
        """One speaker's utterances as `(rounds, utterances)`: shuffled, and again from the start when they run out."""
        whole = len(own) // self.utterances * self.utterances
        needed = -(-self._rounds * self.utterances // whole)
        shuffled = [generator.permutation(own)[:whole] for _ in range(needed)]
        return np.concatenate(shuffled).reshape(-1, self.utterances)[: self._rounds]

    def _order(self, generator: np.random.Generator) -> Indices:
        """The speakers of every batch, `(steps, speakers)`: round after round, none twice in a batch."""
        everyone = len(self._by_speaker)
        queue = np.empty((self._rounds, everyone), np.int64)
        for number in range(self._rounds):
            waiting = number * everyone % self.speakers
            pending = queue[number - 1, everyone - waiting :]
            shuffled = generator.permutation(everyone)
            late = np.isin(shuffled, pending)  # those who wait in the unfinished batch do not join it a second time
            queue[number] = np.concatenate([shuffled[~late], shuffled[late]])
        return queue.reshape(-1)[: self.steps * self.speakers].reshape(self.steps, self.speakers)
