from types import SimpleNamespace

from raysv.search.cards import TrialCard


def test_names_of_trials_abbreviate_as_far_as_they_stay_apart() -> None:
    values = {"loss.margin": 0.25, "loss.scale": 24, "augment.strength": 0.5, "optimizer.name": "sgd"}
    card = TrialCard.of(SimpleNamespace(trial_id="id0", experiment_tag="1_x", config=values))
    assert card == TrialCard("id0", "t000 m0.25 sc24 st0.5 nsgd", values)
