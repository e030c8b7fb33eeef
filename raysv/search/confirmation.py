"""The best configurations of a search trained again from new seeds: which is best, and is it so beyond noise?

A search sees each configuration once, from one seed, on a few dozen speakers, and the lowest of many such EERs is low
by luck as well. So the best few, and the paper's setting beside them, run to the end from seeds that the search has
not seen, and what they have in the mean counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysv.config import read_yaml, write_yaml
from raysv.corpus.sets import PairSet
from raysv.learning.checkpoint import SCORES
from raysv.search.records import TrialRecord
from raysv.search.space import Space
from raysv.verification.confidence import Estimate, mean_over_seeds
from raysv.verification.evaluation import FEWEST_SPEAKERS, pair_speakers
from raysv.verification.metrics import INTERVAL_LEVEL, bootstrap_eers

CONFIRMATION_FILE = "confirmation.yaml"
SEED = "training.seed"
SEEDS = 2**31  # how many there are
PAPER = "paper"  # the name of its setting where no trial of the search had it


@dataclass(frozen=True)
class Candidate:
    """A configuration to be trained again: the trial it was, and its values by dotted key."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """What a candidate came to.

    Attributes:
        eers: on the dev pairs, after the last epoch, in the order of the seeds.
        estimate: their mean, with its interval over seeds and speakers.
    """

    name: str
    values: dict[str, Any]
    eers: list[float]
    estimate: Estimate


@dataclass(frozen=True)
class Confirmation:
    """Candidates, the lowest mean EER first.

    Attributes:
        paper: the name of the candidate that has the paper's setting, and `reference`, what that is to be called: a
            space may have no room for it, only for something near.
        gain: how much lower the winner's mean EER is than the paper's, paired over seeds and speakers; None where the
            paper's setting won itself or did not come to its end. Its interval is widened for having chosen the winner:
            with these seeds among what was confirmed, with these speakers among all that the search tried.
        failed: candidates of which a run failed.
    """

    seeds: list[int]
    speakers: int
    standings: list[Standing]
    paper: str
    reference: str
    gain: Estimate | None
    failed: list[str]

    @property
    def winner(self) -> Standing:
        """The candidate of the lowest mean EER."""
        return self.standings[0]

    @property
    def beyond_noise(self) -> bool:
        """Whether the winner beats the paper's setting by more than seeds and speakers explain."""
        return self.gain is not None and self.gain.low > 0

    def verdict(self) -> str:
        """In a sentence."""
        winner, level = self.winner, f"{100 * INTERVAL_LEVEL:g} % interval"
        estimate = winner.estimate
        interval = f"{level} {100 * estimate.low:.2f} to {100 * estimate.high:.2f}"
        text = f"{winner.name} has the lowest mean EER, {100 * estimate.mean:.2f} % ({interval})."
        if self.failed:
            text += f" Of {', '.join(self.failed)} a run failed, which cannot win."
        if winner.name == self.paper:
            return f"{text} It is {self.reference}: nothing that was found is better."
        if self.gain is None:
            return f"{text} There is nothing to compare it with: {self.reference} did not come to its end."
        points = f"{100 * self.gain.mean:.2f} points ({100 * self.gain.low:.2f} to {100 * self.gain.high:.2f})"
        if self.beyond_noise:
            return f"{text} Against {self.reference} that is lower by {points}: beyond the noise of seeds and speakers."
        return f"{text} Against {self.reference} that is lower by {points}: that may be chance."


def candidates(space: Space, trials: Sequence[TrialRecord]) -> list[Candidate]:
    """The `search.confirm` best trials that came to their end, and beside them the paper's setting.

    Returns: nothing where there is nothing to be compared with the paper's setting, or nothing is to be confirmed.
    """
    if not space.search.confirm or not space.ranges:
        return []
    paper = space.paper_point()
    chosen: list[Candidate] = []
    complete = (trial for trial in trials if trial.outcome == "complete" and trial.values != paper)
    for trial in sorted(complete, key=lambda trial: trial.eer):
        if len(chosen) < space.search.confirm and all(trial.values != other.values for other in chosen):
            chosen.append(Candidate(trial.name, trial.values))
    tried = next((trial.name for trial in trials if trial.values == paper), PAPER)
    return [*chosen, Candidate(tried, paper)] if chosen else []


def seeds(space: Space) -> list[int]:
    """The new seeds: those that follow on the search's own."""
    own = int(space.tree["training"]["seed"])
    return [(own + 1 + number) % SEEDS for number in range(space.search.confirm_seeds)]


def points(space: Space, chosen: Sequence[Candidate]) -> list[dict[str, Any]]:
    """What is to be trained: every candidate with the first new seed, then every one with the next."""
    return [candidate.values | {SEED: seed} for seed in seeds(space) for candidate in chosen]


def conclude(
    space: Space, chosen: Sequence[Candidate], runs: Sequence[TrialRecord], dev: PairSet, searched: int
) -> Confirmation:
    """What the runs of a confirmation say.

    Args:
        runs: of the candidates; their checkpoints hold the scores of the dev pairs.
        searched: among how many trials the candidates were chosen, on the same speakers.

    Raises: ValueError when no candidate came to its end with every seed.
    """
    eers, drawn = _collect(space, chosen, runs, dev)
    speakers = pair_speakers(dev)[2]
    standings = [
        Standing(
            candidate.name,
            candidate.values,
            eers[candidate.name],
            _as_rate(mean_over_seeds(eers[candidate.name], drawn.get(candidate.name), speakers)),
        )
        for candidate in chosen
        if candidate.name in eers
    ]
    if not standings:
        raise ValueError("No configuration could be confirmed: of each a run failed. MLflow has the reasons.")
    standings.sort(key=lambda standing: standing.estimate.mean)
    paper_point = space.paper_point()
    paper = next(candidate.name for candidate in chosen if candidate.values == paper_point)
    winner, gain = standings[0], None
    if winner.name != paper and paper in eers:
        others = len(chosen) - 1  # among which the winner was chosen
        lower = np.subtract(eers[paper], eers[winner.name])
        by_speakers = drawn[paper] - drawn[winner.name] if drawn else None
        gain = mean_over_seeds(
            lower, by_speakers, speakers, chosen_by_seeds=others, chosen_by_speakers=max(others, searched)
        )
    failed = [candidate.name for candidate in chosen if candidate.name not in eers]
    return Confirmation(seeds(space), speakers, standings, paper, space.reference(), gain, failed)


def _as_rate(estimate: Estimate) -> Estimate:
    """Few seeds make wide intervals, but no error rate is below 0 or above 1."""
    return Estimate(estimate.mean, max(estimate.low, 0.0), min(estimate.high, 1.0))


def _collect(
    space: Space, chosen: Sequence[Candidate], runs: Sequence[TrialRecord], dev: PairSet
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """By candidate, the EERs of its seeds, and their mean as other speakers would have given it, in the same draws."""
    enrolment, test, speakers = pair_speakers(dev)
    eers: dict[str, list[float]] = {}
    drawn: dict[str, Any] = {}
    for candidate in chosen:
        own = [_run(runs, candidate.values | {SEED: seed}) for seed in seeds(space)]
        if any(run is None for run in own):
            continue
        ended = [run for run in own if run is not None]
        eers[candidate.name] = [run.eer for run in ended]
        if speakers >= FEWEST_SPEAKERS:
            rounds = [
                bootstrap_eers(
                    np.load(Path(run.checkpoint, SCORES), allow_pickle=False),
                    dev.same_speaker,
                    enrolment,
                    test,
                    np.random.default_rng(0),
                )
                for run in ended
            ]
            drawn[candidate.name] = np.mean(rounds, axis=0)
    return eers, drawn


def _run(runs: Sequence[TrialRecord], values: Mapping[str, Any]) -> TrialRecord | None:
    """The run with these values that came to its end."""
    return next((run for run in runs if run.values == values and run.outcome == "complete"), None)


def write_confirmation(confirmation: Confirmation, folder: Path) -> None:
    """Keep what a confirmation came to in the study's folder."""
    tree = asdict(confirmation)
    for standing in tree["standings"]:
        standing["estimate"] = list(standing["estimate"])
    tree["gain"] = list(confirmation.gain) if confirmation.gain else None
    header = f"The best configurations of study {folder.name} trained again from new seeds.\n{confirmation.verdict()}"
    aside = folder / f"{CONFIRMATION_FILE}.partial"
    write_yaml(tree, aside, header)
    os.replace(aside, folder / CONFIRMATION_FILE)  # a driver may be killed while it writes


def read_confirmation(folder: Path) -> Confirmation | None:
    """What a confirmation came to; None where there was none."""
    file = folder / CONFIRMATION_FILE
    if not file.is_file():
        return None
    tree = read_yaml(file)
    try:
        standings = [Standing(**{**one, "estimate": Estimate(*one["estimate"])}) for one in tree.pop("standings")]
        gain = tree.pop("gain")
        return Confirmation(**tree, standings=standings, gain=Estimate(*gain) if gain else None)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is none that a confirmation wrote: {error}. Remove it and --resume the study."
        ) from error
