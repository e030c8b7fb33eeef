import contextlib
import functools
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.tune
from learning_fixtures import write_audio

from raysv.search import cluster, stages, tuner
from raysv.search.cluster import Allotment
from raysv.search.confirmation import Candidate
from raysv.search.space import ResourcesConfig, Space, space_from_dict
from raysv.search.study import open_study, started
from raysv.search.trial import Job

TREE = {"loss": {"margin": {"uniform": [0.0, 0.5]}}, "search": {"trials": 6, "confirm": 1}}
SEARCH_RECORDS = ("optuna.db", "stopping.jsonl")
CORPUS: Any = SimpleNamespace(digests={}, digest="abc", left_out={}, train=SimpleNamespace(speakers=[]))


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which the tuner lies, committed."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file = tmp_path / "raysv" / "search" / "tuner.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(tuner, "__file__", str(file))
    return tmp_path


def test_the_revision_tells_whether_the_source_differs_from_it(checkout: Path) -> None:
    clean = tuner.git_revision()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (checkout / "notes.txt").write_text("not source")
    assert tuner.git_revision() == clean
    (checkout / "raysv" / "new.py").write_text("")
    assert tuner.git_revision() == clean + "+changes"


def test_the_revision_of_a_checkout_that_only_holds_the_environment_is_not_told(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / ".venv" / "raysv" / "search" / "tuner.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(tuner, "__file__", str(installed))
    assert tuner.git_revision() == "unknown"


@pytest.fixture
def space() -> Space:
    return space_from_dict(TREE, "small")


@pytest.fixture
def folder(space: Space, tmp_path: Path) -> Path:
    """A study that an earlier driver left with the records of its search."""
    folder = open_study(space, tmp_path, "sqlite:///mlflow.db", "mine")
    for name in SEARCH_RECORDS:
        (folder / name).write_text("from before")
    return folder


@pytest.fixture
def cluster_has_room_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many trials the cluster has room for."""

    def allot(resources: ResourcesConfig, most_trials: int, to_come: Any, room: int) -> Allotment:
        return Allotment(0.0, min(room, most_trials), room, room, "gloo", "node:10.0.0.1")

    return lambda room: monkeypatch.setattr(cluster, "allot", functools.partial(allot, room=room))


def test_a_resumed_study_keeps_its_number_of_trials_at_a_time(
    space: Space, folder: Path, cluster_has_room_for: Any
) -> None:
    cluster_has_room_for(3)
    assert tuner._allot(space, folder, resume=False).concurrent_trials == 3
    assert started(folder)["concurrent_trials"] == 3
    cluster_has_room_for(100)
    assert tuner._allot(space, folder, resume=True).concurrent_trials == 3
    cluster_has_room_for(2)
    with pytest.raises(ValueError, match=r"study runs 3 trials at a time, but this cluster has room for 2\. Resume it"):
        tuner._allot(space, folder, resume=True)
    assert started(folder)["concurrent_trials"] == 3


def test_a_study_that_starts_anew_takes_the_room_there_is(
    space: Space, folder: Path, cluster_has_room_for: Any
) -> None:
    cluster_has_room_for(3)
    assert tuner._allot(space, folder, resume=False).concurrent_trials == 3
    cluster_has_room_for(100)
    assert tuner._allot(space, folder, resume=False).concurrent_trials == 6


@pytest.mark.parametrize(("trials", "period"), [(1, "1"), (999, "1"), (1000, "auto")])
def test_bookkeeping_is_written_every_second_unless_trials_are_very_many(trials: int, period: str) -> None:
    assert tuner.tune_settings(trials)["TUNE_GLOBAL_CHECKPOINT_S"] == period


def as_found(trials: int, unsearched: int = 1, **more: Any) -> Any:
    """A study as far as the tuner looks at one."""
    nothing = {"broken": 0, "candidates": [], "confirming": [], "unconfirmed": False, "unfinished": 0}
    fields = nothing | {"trials": ["x"] * trials, "unsearched": unsearched} | more
    return SimpleNamespace(**fields, table=lambda: "", write=lambda _: None)


@pytest.fixture
def stages_run(monkeypatch: pytest.MonkeyPatch, cluster_has_room_for: Any) -> list[tuple[str, bool]]:
    """The stages that a driver runs, and whether it goes on with them."""
    done: list[tuple[str, bool]] = []
    monkeypatch.setattr(tuner, "tune_settings", lambda trials: {})
    monkeypatch.setattr(cluster, "connected", lambda: contextlib.nullcontext(("here", [])))
    monkeypatch.setattr(cluster, "alive", lambda: [{}])
    monkeypatch.setattr(tuner, "publish", lambda *_: None)
    monkeypatch.setattr(tuner, "run_stage", lambda stage, *_, resume: done.append((stage.kind, resume)))
    cluster_has_room_for(1)
    return done


@pytest.mark.parametrize("trials", [0, 1])
def test_a_study_goes_on_with_its_trials_or_starts_anew_where_it_has_none(
    space: Space, folder: Path, stages_run: list[Any], monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    monkeypatch.setattr(tuner, "read_study", lambda _: as_found(trials))
    tuner.run_study(space, folder, CORPUS, "sqlite:///mlflow.db", resume=True)
    assert stages_run == [("trial", bool(trials))]


@pytest.mark.parametrize("confirming", [0, 1])
def test_a_study_whose_search_has_ended_goes_on_with_its_confirmation(
    space: Space, folder: Path, stages_run: list[Any], monkeypatch: pytest.MonkeyPatch, confirming: int
) -> None:
    chosen = [Candidate("t000", {"loss.margin": 0.2})]
    found = as_found(
        6, unsearched=0, candidates=chosen, unconfirmed=True, confirming=["x"] * confirming, unfinished=1, space=space
    )
    monkeypatch.setattr(tuner, "read_study", lambda _: found)
    tuner.run_study(space, folder, CORPUS, "sqlite:///mlflow.db", resume=True)
    assert stages_run == [("confirmation", bool(confirming))]
    assert started(folder)["candidates"] == [{"name": "t000", "values": {"loss.margin": 0.2}}]


def test_a_study_with_trials_that_died_repeats_them_before_it_confirms(
    space: Space, folder: Path, stages_run: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "read_study", lambda _: as_found(6, unsearched=0, broken=1))
    tuner.run_study(space, folder, CORPUS, "sqlite:///mlflow.db", resume=True)
    assert stages_run == [("trial", True)]


def test_a_confirmation_that_starts_anew_forgets_what_a_killed_driver_had_proposed(
    space: Space, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver died before Tune had noted a run: a point that it took must not be missing now."""
    (folder / "optuna.db").unlink()
    monkeypatch.setattr(stages, "make_tuner", lambda stage, *_: SimpleNamespace(fit=lambda: None))
    stage = stages.confirmation_stage(space, folder, [Candidate("t000", {"loss.margin": 0.2})])
    stage.proposals().suggest("taken")
    job = Job(space, 0.0, str(folder), {}, room=1, head="")
    stages.run_stage(stage, job, folder, 1, "sqlite:///mlflow.db", resume=False)
    again = stage.proposals()
    seeds = [(again.suggest(str(number)) or {})["training.seed"] for number in range(3)]
    assert seeds == [1, 2, 3]


@pytest.mark.parametrize("resume", [True, False])
def test_a_stage_that_starts_anew_leaves_nothing_of_one_that_died_before_its_first_trial(
    space: Space, folder: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    done: list[str] = []
    monkeypatch.setattr(stages, "_forget", lambda *_: None)  # the records here are none of Optuna's
    monkeypatch.setattr(ray.tune.Tuner, "restore", lambda *_, **__: SimpleNamespace(fit=lambda: done.append("go on")))
    monkeypatch.setattr(stages, "make_tuner", lambda *_: SimpleNamespace(fit=lambda: done.append("anew")))
    job = Job(space, 0.0, str(folder), {}, room=1, head="")
    stages.run_stage(stages.search_stage(space, folder), job, folder, 1, "sqlite:///mlflow.db", resume=resume)
    assert done == ["go on" if resume else "anew"]
    assert all((folder / name).exists() == resume for name in SEARCH_RECORDS)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("optuna.db", None, r"No file .*optuna\.db"),
        ("stopping.jsonl", "hello\n", r"stopping\.jsonl, line 1: not an entry"),
    ],
)
def test_a_study_whose_records_are_lost_or_damaged_does_not_go_on(
    space: Space, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, told: str
) -> None:
    monkeypatch.setattr(tuner, "tune_settings", lambda trials: {})
    monkeypatch.setattr(tuner, "read_study", lambda folder: SimpleNamespace(trials=["x"]))
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        tuner.run_study(space, folder, CORPUS, "sqlite:///mlflow.db", resume=True)


def test_a_study_that_goes_on_with_other_code_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for revision, expected in (
        ("abc", ""),
        ("abc", ""),
        ("def", "Code     def from now on; so far the study ran abc. MLflow's tags follow.\n"),
    ):
        tuner._note_tags(folder, {"raysv.git": revision, "raysv.seed": "0"})
        assert capsys.readouterr().out == expected
        assert started(folder)["tags"] == {"raysv.git": revision, "raysv.seed": "0"}


def test_recordings_that_are_left_out_are_named_before_a_study(
    tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio(tiny_corpus / "train-0/0.wav", np.zeros(2000))
    data = {"root": str(tiny_corpus), "skip_bad_audio": True}
    tree = {"data": data, "batch": {"speakers": 4, "crop_seconds": 0.5}, "augment": {"strength": {"uniform": [0, 1]}}}
    corpus = tuner.check_data(space_from_dict(tree | TREE, "small"))
    assert corpus.clips.keys() == {"noise", "reverb"}
    assert f"left out: {tiny_corpus / 'train-0/0.wav'}: it is silent from beginning to end\n" in capsys.readouterr().out


def test_trials_that_differ_in_their_data_look_for_themselves() -> None:
    corpus: Any = SimpleNamespace(digests={"train": "abc"})
    assert tuner._checked(space_from_dict(TREE, "small"), corpus) == {"train": "abc"}
    searched = TREE | {"data": {"train": {"choice": ["train.csv", "few.csv"]}}}
    assert tuner._checked(space_from_dict(searched, "small"), corpus) == {}


def test_a_study_does_not_go_on_with_other_data(folder: Path) -> None:
    corpus: Any = SimpleNamespace(digest="abc")
    tuner._note_data(folder, corpus, resume=False)
    tuner._note_data(folder, corpus, resume=True)
    with pytest.raises(ValueError, match=r"data hash xyz now, abc then"):
        tuner._note_data(folder, SimpleNamespace(digest="xyz"), resume=True)  # type: ignore[arg-type]
