from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_fixtures import tiny_config, write_corpus

from raysv.corpus.loading import load_corpus
from raysv.corpus.sets import PairSet
from raysv.search import confirmation
from raysv.search.confirmation import (
    Candidate,
    candidates,
    conclude,
    points,
    read_confirmation,
    seeds,
    write_confirmation,
)
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space, space_from_dict
from raysv.verification.confidence import mean_over_seeds
from raysv.verification.evaluation import pair_speakers
from raysv.verification.metrics import bootstrap_eers

EPOCHS = 3
PAPER = {"loss.margin": 0.2, "augment.strength": 0.5}
TREE = {
    "loss": {"margin": {"uniform": [0.0, 0.5]}},
    "augment": {"strength": {"uniform": [0.0, 1.0]}},
    "training": {"epochs": EPOCHS, "seed": 7},
    "search": {"trials": 5, "confirm": 2, "confirm_seeds": 3},
}


@pytest.fixture
def space() -> Space:
    return space_from_dict(TREE, "small")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    """The pairs of a tiny corpus: four speakers, which are too few for an interval over speakers."""
    config = tiny_config(write_corpus(tmp_path_factory.mktemp("confirmation") / "corpus"))
    return load_corpus(config.data, config.augment).dev


def record(name: str, eer: float, values: dict[str, Any], outcome: str = "complete", folder: str = "") -> TrialRecord:
    return TrialRecord(name, f"id-{name}", values, {TIME: EPOCHS, METRIC: eer}, outcome, "", folder)


def margin(value: float) -> dict[str, Any]:
    return {"loss.margin": value, "augment.strength": 0.1}


SEARCHED = [
    record("t000", 0.12, PAPER),
    record("t001", 0.10, margin(0.1)),
    record("t002", 0.05, margin(0.3), "pruned"),
    record("t003", 0.11, margin(0.4)),
    record("t004", 0.10, margin(0.1)),
]


def test_the_best_that_came_to_their_end_are_candidates_each_once_and_the_paper_s_setting_is(space: Space) -> None:
    assert candidates(space, SEARCHED) == [
        Candidate("t001", margin(0.1)),
        Candidate("t003", margin(0.4)),
        Candidate("t000", PAPER),
    ]
    assert candidates(space, SEARCHED[1:])[-1] == Candidate("paper", PAPER)  # although no trial had it
    best_is_paper = [record("t000", 0.01, PAPER), *SEARCHED[1:]]
    assert [candidate.name for candidate in candidates(space, best_is_paper)] == ["t001", "t003", "t000"]


def test_nothing_is_confirmed_where_nothing_is_to_be_or_nothing_ended(space: Space) -> None:
    off = space_from_dict(TREE | {"search": {"confirm": 0}}, "small")
    assert candidates(off, SEARCHED) == []
    assert candidates(space, [SEARCHED[2]]) == []
    assert candidates(space, SEARCHED[:1]) == []  # the paper's setting alone has nothing to be compared with
    assert candidates(space_from_dict({"search": {"trials": 1}}, "run"), [record("t000", 0.1, {})]) == []


def test_every_candidate_runs_with_every_new_seed_the_first_seed_first(space: Space) -> None:
    chosen = candidates(space, SEARCHED)
    assert seeds(space) == [8, 9, 10]
    last = space_from_dict(TREE | {"training": {"epochs": EPOCHS, "seed": 2**31 - 1}}, "last")
    assert seeds(last) == [0, 1, 2]
    again = points(space, chosen)
    assert len(again) == 9
    assert again[:3] == [candidate.values | {"training.seed": 8} for candidate in chosen]
    assert space.config(again[0]).training.seed == 8


def confirming(
    folder: Path, dev: PairSet, space: Space, noise: dict[str, list[float]], failed: str = ""
) -> list[TrialRecord]:
    """Runs of all candidates: scores are labels with so much noise, by seed."""
    runs = []
    for candidate in candidates(space, SEARCHED):
        for number, (seed, amount) in enumerate(zip(seeds(space), noise[candidate.name], strict=True)):
            generator = np.random.default_rng([number, len(runs)])
            scores = dev.same_speaker + amount * generator.normal(size=len(dev.same_speaker))
            place = folder / f"{candidate.name}-{seed}"
            place.mkdir()
            np.save(place / "dev_scores.npy", scores.astype(np.float32))
            outcome = "error" if failed == candidate.name and number == 1 else "complete"
            eer = 0.1 * amount
            runs.append(record(place.name, eer, candidate.values | {"training.seed": seed}, outcome, str(place)))
    return runs


NOISE = {"t001": [1.1, 1.0, 1.2], "t003": [0.7, 0.8, 0.6], "t000": [1.6, 1.5, 1.7]}


def test_the_lowest_mean_wins_and_is_compared_with_the_paper_s(space: Space, dev: PairSet, tmp_path: Path) -> None:
    found = conclude(space, candidates(space, SEARCHED), confirming(tmp_path, dev, space, NOISE), dev, len(SEARCHED))
    assert [standing.name for standing in found.standings] == ["t003", "t001", "t000"]
    assert found.winner.eers == pytest.approx([0.07, 0.08, 0.06])
    assert found.winner.estimate.mean == pytest.approx(0.07)
    assert (found.paper, found.failed, found.speakers) == ("t000", [], 4)
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0.09)
    assert found.beyond_noise  # each seed gains about 0.09, and four speakers are too few to be drawn from
    assert "Against the paper's setting that is lower by 9.00 points" in found.verdict()
    assert "beyond the noise" in found.verdict()


def test_speakers_widen_the_interval_where_there_are_enough(
    space: Space, dev: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = confirming(tmp_path, dev, space, NOISE)
    alone = conclude(space, candidates(space, SEARCHED), runs, dev, len(SEARCHED))
    monkeypatch.setattr(confirmation, "FEWEST_SPEAKERS", 4)
    both = conclude(space, candidates(space, SEARCHED), runs, dev, len(SEARCHED))
    width = [found.winner.estimate.high - found.winner.estimate.low for found in (both, alone)]
    scores = [np.load(Path(run.checkpoint, "dev_scores.npy")) for run in runs]
    assert both.winner.estimate.mean == alone.winner.estimate.mean
    # more variance, and more degrees of freedom: compared with the seeds' alone at as many, it is wider
    assert width[0] != width[1]
    by_speakers = np.mean(
        [
            bootstrap_eers(own, dev.same_speaker, *pair_speakers(dev)[:2], np.random.default_rng(0))
            for own in scores[3:6]  # of t003
        ],
        axis=0,
    )
    expected = mean_over_seeds(both.winner.eers, by_speakers, 4)
    assert (both.winner.estimate.low, both.winner.estimate.high) == (max(expected.low, 0), expected.high)


def test_a_gain_that_seeds_do_not_agree_on_may_be_chance(space: Space, dev: PairSet, tmp_path: Path) -> None:
    noise = NOISE | {"t003": [0.1, 1.9, 1.0]}
    found = conclude(space, candidates(space, SEARCHED), confirming(tmp_path, dev, space, noise), dev, len(SEARCHED))
    assert found.winner.name == "t003"
    assert not found.beyond_noise
    assert found.verdict().endswith("that may be chance.")


def test_where_the_space_has_no_room_for_the_paper_s_setting_it_is_not_called_so() -> None:
    narrow = space_from_dict(TREE | {"loss": {"kind": "aam", "margin": {"uniform": [0.3, 0.5]}}}, "narrow")
    assert narrow.reference() == "what this space has nearest to the paper's setting (loss.kind aam, loss.margin 0.3)"
    assert space_from_dict(TREE, "small").reference() == "the paper's setting"


def test_the_paper_s_setting_may_win_itself(space: Space, dev: PairSet, tmp_path: Path) -> None:
    noise = NOISE | {"t000": [0.1, 0.2, 0.1]}
    found = conclude(space, candidates(space, SEARCHED), confirming(tmp_path, dev, space, noise), dev, len(SEARCHED))
    assert (found.winner.name, found.gain) == ("t000", None)
    assert "nothing that was found is better" in found.verdict()


@pytest.mark.parametrize("failed", ["t003", "t000"])
def test_a_candidate_of_which_a_run_failed_cannot_win_and_is_named(
    space: Space, dev: PairSet, tmp_path: Path, failed: str
) -> None:
    found = conclude(
        space, candidates(space, SEARCHED), confirming(tmp_path, dev, space, NOISE, failed), dev, len(SEARCHED)
    )
    assert found.failed == [failed]
    assert f"Of {failed} a run failed, which cannot win." in found.verdict()
    assert found.winner.name == ("t001" if failed == "t003" else "t003")
    assert (found.gain is None) == (failed == "t000")


def test_where_of_every_candidate_a_run_failed_nothing_is_confirmed(space: Space, dev: PairSet) -> None:
    with pytest.raises(ValueError, match="of each a run failed"):
        conclude(space, candidates(space, SEARCHED), [], dev, len(SEARCHED))


def test_a_confirmation_is_read_as_it_was_written(space: Space, dev: PairSet, tmp_path: Path) -> None:
    assert read_confirmation(tmp_path) is None
    found = conclude(space, candidates(space, SEARCHED), confirming(tmp_path, dev, space, NOISE), dev, len(SEARCHED))
    write_confirmation(found, tmp_path)
    assert read_confirmation(tmp_path) == found
    assert found.verdict() in (tmp_path / "confirmation.yaml").read_text()


def test_a_file_that_no_confirmation_wrote_is_named(tmp_path: Path) -> None:
    (tmp_path / "confirmation.yaml").write_text("standings: [{name: t000}]\n")
    with pytest.raises(ValueError, match=r"confirmation\.yaml is none that a confirmation wrote"):
        read_confirmation(tmp_path)
