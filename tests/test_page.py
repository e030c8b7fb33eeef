import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from raysv.search.confirmation import Confirmation, Standing
from raysv.search.page import importance, make_report
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC, TIME
from raysv.search.space import space_from_dict
from raysv.search.study import Study, note_start
from raysv.verification.confidence import Estimate

EPOCHS, TRIALS = 4, 12
TREE = {
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "scale": {"loguniform": [10, 60]}},
    "training": {"epochs": EPOCHS},
    "search": {"trials": TRIALS, "confirm": 0},
}


def trial(folder: Path, number: int, epochs: int, slope: float) -> TrialRecord:
    """A trial whose EER follows its margin, with a checkpoint that holds its curve."""
    values = {"loss.margin": 0.2 + 0.02 * number, "loss.scale": 30.0 + 2 * (number * 5 % 7)}
    if number == 0:
        values = {"loss.margin": 0.2, "loss.scale": 30.0}
    curve = [0.4 - 0.02 * epoch + slope * values["loss.margin"] for epoch in range(1, epochs + 1)]
    place = folder / f"t{number:03d}"
    place.mkdir()
    lines = [{TIME: epoch, METRIC: eer, "speed/epoch_seconds": 2.0} for epoch, eer in enumerate(curve, 1)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "det.csv").write_text("p_miss,p_fa\n0.0,1.0\n0.1,0.2\n1.0,0.0\n")
    metrics: dict[str, Any] = lines[-1] | {"checkpoint_path": str(place)}
    outcome = "complete" if epochs == EPOCHS else "pruned"
    return TrialRecord(place.name, f"id{number}", values, metrics, outcome, "", str(place))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    trials = [trial(tmp_path, number, EPOCHS if number < 4 else 2, slope=0.3) for number in range(TRIALS)]
    note_start(tmp_path, tags={"raysv.git": "abc<123>", "raysv.seed": "0"})
    return Study(space_from_dict(TREE, "small"), trials)


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<svg.*?</svg>|<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_the_page_says_in_words_what_the_numbers_say(study: Study, tmp_path: Path) -> None:
    said = words(make_report(study, tmp_path).page)
    assert "12 configurations were tried, searching margin and scale." in said
    assert "8 of them were stopped early, which saved 33 % of the epochs." in said  # 4 · 4 + 8 · 2 of 48
    assert "Lowest in the search was t000 with 38.00 % EER (margin 0.2, scale 30)." in said
    assert "how much of that EER is luck is not known" in said
    assert "32 of 48" in said
    assert "1:04" in said  # 32 epochs of 2 seconds


def test_the_page_needs_nothing_beside_itself_and_is_well_formed(study: Study, tmp_path: Path) -> None:
    report = make_report(study, tmp_path)
    assert not re.search(r"(src|href)=\"(?!#|data:)", report.page.replace('xlink:href="#', ""))
    assert "<script" not in report.page and "abc<123>" not in report.page and "abc&lt;123&gt;" in report.page
    figures = re.findall(r"<svg.*?</svg>", report.page, flags=re.S)
    assert len(figures) == len(report.figures) == 6
    for figure in figures:
        ElementTree.fromstring(figure)


def test_what_moves_the_error_rate_is_important_and_what_does_not_is_not(study: Study) -> None:
    curves = {one.name: {2: 0.4 + one.values["loss.margin"]} for one in study.trials}
    found = importance(study, curves)
    assert found is not None
    epoch, shares = found
    assert epoch == study.space.grace_epochs == 2
    assert shares["loss.margin"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_too_few_trials_or_no_differences_say_nothing_of_importance(study: Study) -> None:
    same = {one.name: {2: 0.3} for one in study.trials}
    assert importance(study, same) is None
    few = {name: {2: 0.1 * number} for number, name in enumerate(list(same)[:5])}
    assert importance(study, few) is None


def test_a_confirmed_study_leads_with_the_verdict(study: Study, tmp_path: Path) -> None:
    standings = [
        Standing("t001", study.trials[1].values, [0.1, 0.12], Estimate(0.11, 0.08, 0.14)),
        Standing("t000", study.trials[0].values, [0.15, 0.13], Estimate(0.14, 0.11, 0.17)),
    ]
    confirmed = Confirmation([1, 2], 20, standings, "t000", "the paper's setting", Estimate(0.03, 0.01, 0.05), ["t002"])
    said = words(make_report(Study(study.space, study.trials, confirmation=confirmed), tmp_path).page)
    assert "From new seeds, t001 has the lowest mean EER, 11.00 % (90 % interval 8.00 to 14.00)." in said
    assert "that is lower by 3.00 points (1.00 to 5.00): beyond the noise of seeds and speakers." in said
    assert "Of t002 a run failed, which cannot win." in said
    assert "t000 (paper)" in said
    assert "confirmed mean EER" in said


def test_a_space_of_words_alone_has_no_slices_and_its_figures_can_be_drawn(study: Study, tmp_path: Path) -> None:
    words_alone = {"optimizer": {"name": {"choice": ["adamw", "sgd"]}}, "search": {"trials": 2}}
    space = space_from_dict(words_alone | {"training": {"epochs": EPOCHS}}, "w")
    trials = [dataclasses.replace(one, values={"optimizer.name": "sgd"}) for one in study.trials]
    report = make_report(Study(space, trials), tmp_path)
    assert "slices" not in report.figures
    for figure in report.figures.values():
        figure.savefig(io.BytesIO(), format="png")


def test_what_a_failed_trial_did_not_train_was_not_saved(study: Study, tmp_path: Path) -> None:
    failed = dataclasses.replace(study.trials[-1], outcome="error", reason="killed")
    said = words(make_report(Study(study.space, [*study.trials[:4], failed]), tmp_path).page)
    assert "16 of 16" in said


def test_a_trial_whose_checkpoint_is_out_of_reach_still_has_its_last_result(study: Study, tmp_path: Path) -> None:
    (tmp_path / "t003" / "metrics.jsonl").unlink()
    assert "t003" in words(make_report(study, tmp_path).page)


def test_a_study_of_one_run_has_a_page_too(study: Study, tmp_path: Path) -> None:
    lone = Study(space_from_dict({"search": {"trials": 1}}, "run"), study.trials[:1])
    said = words(make_report(lone, tmp_path).page)
    assert "A single run." in said


def test_without_any_result_there_is_nothing_to_report(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no result yet"):
        make_report(Study(study.space, []), tmp_path)
