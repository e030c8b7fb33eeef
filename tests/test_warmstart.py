import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from raysv.search import warmstart
from raysv.search.proposals import OptunaProposals
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC, TIME
from raysv.search.samplers import make_sampler
from raysv.search.space import Space, space_from_dict
from raysv.search.study import Study, note_start
from raysv.search.warmstart import earlier_trials

EPOCHS = 3
TREE = {
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "scale": {"loguniform": [10, 60]}},
    "training": {"epochs": EPOCHS},
}


def trial(folder: Path, name: str, epochs: int = EPOCHS, outcome: str = "complete", **values: float) -> TrialRecord:
    checkpoint = folder / name
    checkpoint.mkdir()
    curve = [{TIME: epoch, METRIC: 0.4 - 0.1 * epoch} for epoch in range(1, epochs + 1)]
    (checkpoint / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    tried = {"loss.margin": 0.2, "loss.scale": 30.0} | {f"loss.{key}": value for key, value in values.items()}
    metrics: dict[str, Any] = curve[-1] | {"checkpoint_path": str(checkpoint)}
    return TrialRecord(name, name, tried, metrics, outcome, "", str(checkpoint))


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study with two trials that ended, one that was stopped early and one that died."""
    folder = tmp_path / "before"
    folder.mkdir()
    note_start(folder, data_hash="abc")
    trials = [
        trial(folder, "t000"),
        trial(folder, "t001", margin=0.4, scale=50.0),
        trial(folder, "t002", 1, "pruned", margin=0.1),
        trial(folder, "t003", 1, "error", margin=0.1),
    ]
    monkeypatch.setattr(warmstart, "read_study", lambda _: Study(space_from_dict(TREE, "before"), trials))
    return folder


def space(**loss: Any) -> Space:
    return space_from_dict(TREE | {"loss": TREE["loss"] | loss}, "now")  # type: ignore[operator]


def test_trials_come_with_their_values_their_curves_and_how_they_ended(earlier: Path) -> None:
    known = earlier_trials(space(), earlier, "abc")
    assert [found.state for found in known.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    first, second, pruned = known.trials
    assert first.params == {"loss.margin": 0.2, "loss.scale": 30.0}
    assert first.value == pytest.approx(0.1)
    assert first.intermediate_values == pytest.approx({1: 0.3, 2: 0.2, 3: 0.1})
    assert second.user_attrs == {"study": "before", "trial": "t001"}
    assert list(pruned.intermediate_values) == [1]
    assert str(known) == "3 trials of before"


def test_what_lies_outside_the_space_is_left_out_and_counted(earlier: Path) -> None:
    narrower = earlier_trials(space(scale={"loguniform": [10, 40]}), earlier, "abc")
    assert (len(narrower.trials), narrower.left_out) == (2, 1)
    assert str(narrower) == "2 trials of before; 1 lie outside this space"
    fixed = earlier_trials(space(scale=50.0), earlier, "abc")
    assert [found.params for found in fixed.trials] == [{"loss.margin": 0.4}]


def test_a_key_that_was_fixed_then_and_is_open_now_has_the_value_it_was_fixed_at(earlier: Path) -> None:
    wider = earlier_trials(space(temperature={"loguniform": [0.03, 0.5]}), earlier, "abc")
    assert {found.params["loss.temperature"] for found in wider.trials} == {0.07}


@pytest.mark.parametrize(
    ("loss", "told"), [({"contrast_weight": 2.0}, "differ in what it holds"), ({"kind": "aam"}, "None of the 3 trials")]
)
def test_where_nothing_fits_that_is_an_error(earlier: Path, loss: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        earlier_trials(space(**loss), earlier, "abc")


def test_error_rates_of_other_data_or_of_other_lengths_are_refused(earlier: Path) -> None:
    with pytest.raises(ValueError, match=r"before learned from other data \(data hash abc, here xyz\)"):
        earlier_trials(space(), earlier, "xyz")
    longer = space_from_dict(TREE | {"training": {"epochs": 9}}, "now")
    with pytest.raises(ValueError, match="have 3 epochs, here 9"):
        earlier_trials(longer, earlier, "abc")


def test_the_sampler_knows_them_and_they_are_no_trials_of_the_study(earlier: Path, tmp_path: Path) -> None:
    known = earlier_trials(space(), earlier, "abc")
    search = OptunaProposals(
        space().ranges,
        epochs=EPOCHS,
        storage=f"sqlite:///{tmp_path / 'optuna.db'}",
        study_name="now",
        points=[{"loss.margin": 0.3, "loss.scale": 20.0}],
        earlier=known.trials,
        sampler=make_sampler("tpe", space().ranges, 0),
    )
    assert search.suggest("a") == {"loss.margin": 0.3, "loss.scale": 20.0}  # first points come first all the same
    search.on_trial_complete("a", {TIME: EPOCHS, METRIC: 0.2})
    states = [found.state for found in search._known()]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
