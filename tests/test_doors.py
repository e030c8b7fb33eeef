"""The doors as a user opens them: as files, from another folder, with real Ray, MLflow and killed processes."""

import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from desk_fixtures import (
    EPOCHS,
    SECRET,
    SOURCE,
    TRIALS,
    Desk,
    kill_when_it_says,
    printed_until,
    processes_of,
    trials_of,
)
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk with späce"))


@pytest.fixture(scope="module")
def study(desk: Desk) -> tuple[Path, str]:
    """A study on the embedded corpus whose driver was killed in the middle and resumed; its folder and last words."""
    kill_when_it_says(desk.open("tune.py", "space.yaml", "--name", "killed"), f"epoch 2/{EPOCHS}")
    words = desk.run("tune.py", "--resume", "killed")
    return desk.folder / "results" / "killed", words


@pytest.mark.slow
def test_a_killed_study_is_resumed_to_exactly_the_trials_asked_for(study: tuple[Path, str]) -> None:
    folder, words = study
    rows = trials_of(folder)
    assert len(rows) == len({row["trial_id"] for row in rows}) == TRIALS
    assert {row["outcome"] for row in rows} <= {"complete", "pruned"}
    assert "goes on" in words
    complete = [row for row in rows if row["outcome"] == "complete"]
    assert all(int(row["epoch"]) == EPOCHS for row in complete)
    assert min(float(row["dev_eer"]) for row in complete) < 0.45


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
def test_mlflow_holds_the_study_its_trials_and_their_curves_without_a_gap(desk: Desk, study: tuple[Path, str]) -> None:
    folder, _ = study
    client = MlflowClient(f"sqlite:///{desk.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raysv")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.data.tags["raysv.kind"] == "study")
    children = {run.data.tags["raysv.trial_id"]: run for run in runs if run.data.tags["raysv.kind"] == "trial"}
    rows = {row["trial_id"]: row for row in trials_of(folder)}
    assert children.keys() == rows.keys()
    for trial_id, run in children.items():
        row = rows[trial_id]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["raysv.outcome"] == row["outcome"]
        assert run.data.metrics["dev/eer"] == pytest.approx(float(row["dev_eer"]))
        assert float(run.data.params["loss.margin"]) == pytest.approx(float(row["loss.margin"]), rel=1e-4)
        assert {"recipe.probability", "training.epochs"} <= run.data.params.keys()
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "dev/eer")]
        assert steps == list(range(1, int(row["epoch"]) + 1))
        assert {"raysv.git", "raysv.data_hash", "raysv.seed"} <= run.data.tags.keys()
        artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "best_checkpoint", "det.png"} <= artifacts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
def test_a_study_confirms_its_best_from_new_seeds_although_it_is_killed_meanwhile(desk: Desk) -> None:
    values = ("trials=3", "early_stopping=none", "confirm_seeds=2")
    options = [part for value in values for part in ("--set", f"search.{value}")]
    options += ["--name", "confirmed", "--confirm", "1"]
    kill_when_it_says(desk.open("tune.py", "space.yaml", *options), f"c000  epoch 2/{EPOCHS}")
    words = desk.run("tune.py", "--resume", "confirmed")
    folder = desk.folder / "results" / "confirmed"
    confirmed = yaml.safe_load((folder / "confirmation.yaml").read_text())
    assert confirmed["seeds"] == [1, 2]
    assert all(len(standing["eers"]) == 2 for standing in confirmed["standings"])
    winner = confirmed["standings"][0]
    assert f"Best: {winner['name']} has the lowest mean EER" in words
    best = yaml.safe_load((folder / "best_config.yaml").read_text())
    assert best["loss"]["margin"] == winner["values"]["loss.margin"]
    assert best["training"]["seed"] == 0
    assert "<svg" in (folder / "report.html").read_text()

    client = MlflowClient(f"sqlite:///{desk.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raysv")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`raysv.study` = 'confirmed'")
    again = [run for run in runs if run.data.tags["raysv.kind"] == "confirmation"]
    assert sorted(run.data.params["training.seed"] for run in again) == sorted("12" * len(confirmed["standings"]))
    assert {run.data.tags["raysv.outcome"] for run in again} == {"complete"}
    (parent,) = [run for run in runs if run.data.tags["raysv.kind"] == "study"]
    assert parent.info.status == "FINISHED"
    assert {"report.html", "best_config.yaml", "confirmation.yaml", "figures"} <= {
        item.path for item in client.list_artifacts(parent.info.run_id)
    }
    assert "is complete" in desk.run("tune.py", "--resume", "confirmed")


@pytest.mark.slow
def test_a_secret_in_the_environment_is_in_nothing_that_a_study_leaves(desk: Desk, study: tuple[Path, str]) -> None:
    assert SECRET in desk.environment.values()
    assert SECRET not in study[1]
    left = [file for file in desk.folder.rglob("*") if file.is_file()]
    assert {"mlflow.db", "optuna.db", "checkpoint.yaml", "started.yaml", "tuner.pkl"} <= {file.name for file in left}
    assert [file for file in left if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.slow
def test_a_study_learns_from_an_earlier_one(desk: Desk, study: tuple[Path, str]) -> None:
    earlier, _ = study
    words = desk.run("tune.py", "space.yaml", "--name", "later", "--warm-start", "killed", "--set", "search.trials=1")
    assert f"Knows    {len(trials_of(earlier))} trials of killed" in words
    assert len(trials_of(desk.folder / "results" / "later")) == 1


@pytest.mark.slow
def test_the_report_of_a_study_is_a_page(desk: Desk, study: tuple[Path, str]) -> None:
    folder, _ = study
    (folder / "report.html").unlink()
    assert str(folder / "report.html") in desk.run("report.py", "killed")
    assert "Learning curves" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_one_seed_and_one_trial_at_a_time_give_the_same_study_twice(desk: Desk) -> None:
    options = ("--set", "search.concurrent_trials=1", "--set", "search.trials=7", "--set", "training.epochs=2")
    for name in ("once", "twice"):
        desk.run("tune.py", "space.yaml", "--name", name, *options, "--set", "search.seed=5")
    once, twice = (trials_of(desk.folder / "results" / name) for name in ("once", "twice"))
    told = [key for key in once[0] if key not in ("trial_id", "checkpoint")]
    assert [[row[key] for key in told] for row in once] == [[row[key] for key in told] for row in twice]
    assert len({row["loss.margin"] for row in once}) == 7


@pytest.mark.slow
def test_a_study_of_two_objectives_tells_their_front(desk: Desk) -> None:
    options = (
        "--set",
        "search.second_objective=cost",
        "--set",
        "search.early_stopping=none",
        "--set",
        "search.trials=3",
    )
    words = desk.run("tune.py", "space.yaml", "--name", "two", *options, "--set", "training.epochs=1")
    assert "Lowers   the EER and speed/epoch_seconds" in words
    assert "Front of EER and speed/epoch_seconds: t0" in words
    assert "s/epoch" in words and "complete, on the front" in words
    assert "Two objectives" in (desk.folder / "results" / "two" / "report.html").read_text()


@pytest.mark.slow
def test_the_papers_setting_is_the_first_trial(study: tuple[Path, str]) -> None:
    folder, _ = study
    first = next(row for row in trials_of(folder) if row["trial"] == "t000")
    assert float(first["loss.margin"]) == 0.2
    assert float(first["loss.temperature"]) == 0.07


@pytest.mark.slow
def test_the_printed_next_command_trains_the_best_config_and_its_encoder_verifies(
    desk: Desk, study: tuple[Path, str]
) -> None:
    folder, words = study
    command = next(shlex.split(line, comments=True) for line in words.splitlines() if "raysv.train" in line)
    assert shutil.which(command[0], path=os.environ["PATH"]) or Path(command[0]).is_file()
    best = yaml.safe_load((folder / "best_config.yaml").read_text())
    printed = desk.run(
        *command[1:], "--name", "alone", "--set", "resources.workers=2", "--set", "resources.gpus_per_worker=0"
    )
    checkpoint = desk.folder / "results" / "alone" / "checkpoint"
    written = yaml.safe_load((checkpoint / "checkpoint.yaml").read_text())
    assert written["config"] == {section: best[section] for section in written["config"]}
    assert "2 workers" in printed
    assert "test   EER" in printed
    assert "Model    raysv-ecapa version " in printed

    lists = next((desk.folder / "cache").glob("synthetic-*"))
    _, one, other = (lists / "test_pairs.txt").read_text().splitlines()[0].split()
    said = desk.run("verify.py", str(checkpoint), str(lists / one), str(lists / other))
    assert said.startswith(("same speaker", "different speakers"))
    scores = desk.folder / "scores.txt"
    said = desk.run("verify.py", str(checkpoint), str(lists / "test_pairs.txt"), "--scores", str(scores))
    reported = next(line for line in printed.splitlines() if line.startswith("test"))
    assert reported.split("EER")[1].split("%")[0].strip() == said.split("EER")[1].split("%")[0].strip()
    assert len(scores.read_text().splitlines()) == len((lists / "test_pairs.txt").read_text().splitlines())


@pytest.mark.slow
def test_a_study_that_is_interrupted_says_how_to_go_on(desk: Desk) -> None:
    driver = desk.open("tune.py", "space.yaml", "--name", "interrupted", "--set", "search.trials=2")
    printed_until(driver, f"epoch 1/{EPOCHS}")
    driver.send_signal(signal.SIGINT)
    words, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert "--resume" in words
    assert "unfinished" in words


@pytest.mark.slow
def test_a_second_interruption_stops_at_once_and_the_study_goes_on_all_the_same(desk: Desk) -> None:
    driver = desk.open("tune.py", "space.yaml", "--name", "stopped", "--set", "search.trials=2")
    printed_until(driver, f"epoch 1/{EPOCHS}")
    driver.send_signal(signal.SIGINT)
    time.sleep(0.2)
    driver.send_signal(signal.SIGINT)
    words, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, words
    assert "--resume" in words and "Traceback" not in words
    desk.run("tune.py", "--resume", "stopped")
    assert [trial["outcome"] for trial in trials_of(desk.folder / "results" / "stopped")].count("unfinished") == 0


@pytest.mark.slow
def test_a_fault_of_every_trial_stops_the_study_and_names_the_cause(desk: Desk) -> None:
    folder = desk.folder / "results" / "faulty"
    folder.mkdir(parents=True)
    (folder / "trials").touch()  # no checkpoint can be kept below a file
    words = desk.run("tune.py", "space.yaml", "--name", "faulty", "--set", "search.trials=8", status=130)
    assert "Stopping: 3 trials in a row died of the same cause" in words
    assert "The checkpoint of epoch 1 cannot be kept in" in words
    assert [trial["outcome"] for trial in trials_of(folder)].count("error") < 8
    (folder / "trials").unlink()
    desk.run("tune.py", "--resume", "faulty")
    assert {trial["outcome"] for trial in trials_of(folder)} <= {"complete", "pruned"}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RAYSV_DATA"), reason="RAYSV_DATA does not name the pack of real speech")
def test_two_workers_learn_from_real_speech(desk: Desk) -> None:
    small = ["model.channels=16", "training.epochs=2", "search.trials=1", "resources.gpus_per_worker=0"]
    options = [part for setting in small for part in ("--set", setting)]
    words = desk.run("tune.py", str(SOURCE / "search_spaces" / "speechocean.yaml"), "--name", "speech", *options)
    assert "97 speakers and 970 utterances to learn from, 5400 dev pairs" in words
    assert "2 workers a trial" in words
    (trial,) = trials_of(desk.folder / "results" / "speech")
    assert trial["outcome"] == "complete"
    assert float(trial["dev_eer"]) < 0.25


@pytest.mark.slow
def test_a_team_outlives_its_trials_and_a_killed_process_takes_nothing_with_it(desk: Desk) -> None:
    settings = ["resources.workers=2", "resources.gpus_per_worker=0", "search.concurrent_trials=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    driver = desk.open("tune.py", "space.yaml", "--name", "team", *options)
    words = printed_until(driver, f"t000  epoch 1/{EPOCHS}")
    (trial_process,) = processes_of(driver, "ImplicitFunc")
    os.kill(trial_process, signal.SIGKILL)
    teams = []
    for trial in range(TRIALS - 1):
        words += printed_until(driver, f"t{trial:03d}  epoch {1 if trial else EPOCHS}/{EPOCHS}")
        teams.append(processes_of(driver, "RayTrainWorker"))
    assert "t000  goes on" in words
    assert len(teams[0]) == 2
    assert teams[1] == teams[2] == teams[0]
    below = {process.pid for process in psutil.Process(driver.pid).children(recursive=True)}
    rest, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, words + rest
    rows = trials_of(desk.folder / "results" / "team")
    assert len(rows) == TRIALS
    assert {row["outcome"] for row in rows} <= {"complete", "pruned"}
    assert "pruned" in {row["outcome"] for row in rows}
    deadline = time.monotonic() + 30
    while left := {pid for pid in below if psutil.pid_exists(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.slow
def test_a_run_that_was_broken_off_is_resumed(desk: Desk) -> None:
    driver = desk.open(
        "train.py", "space.yaml", "--name", "run", "--set", "loss.margin=0.2", "--set", "loss.temperature=0.1"
    )
    printed_until(driver, f"epoch 1/{EPOCHS}")
    driver.send_signal(signal.SIGINT)
    words, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130
    command = next(shlex.split(line) for line in words.splitlines() if "--resume" in line)
    printed = desk.run("train.py", *command[3:])
    assert f"epoch {EPOCHS}/{EPOCHS}" in printed
    assert "epoch 1/" not in printed
    assert "test   EER" in printed
    assert (desk.folder / "results" / "run" / "checkpoint" / "encoder.pt").is_file()


def test_a_dry_run_tells_what_a_study_would_take_and_starts_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    settings = ["search.trials=9", "search.confirm=2", "search.grace_epochs=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    printed = desk.run("tune.py", "space.yaml", "--dry-run", *options)
    assert f"Epochs   9 to {9 * EPOCHS}, and at most {3 * 3 * EPOCHS} to confirm; one is " in printed
    assert "Workers  1 worker a trial, each with 1 CPU, a GPU where the cluster has any" in printed
    assert "Batch    48 crops of 0.6 s for each worker" in printed
    assert "Nothing was started" in printed
    assert not (desk.folder / "results").exists() and not (desk.folder / "mlflow.db").exists()


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_are_refused(desk: Desk) -> None:
    words = desk.run("tune.py", "space.yaml", "--set", "resources.workers=1000", status=2)
    assert "1000 workers" in words
    assert "Traceback" not in words


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("loss.margn=1", "Did you mean margin?"),
        ("loss.margin=11", "radians"),
        ("data.root=/nowhere", "data.root"),
        ("batch.speakers=500", "batch.speakers"),
        ("batch.utterances_per_speaker=50", "utterances_per_speaker"),
        ("data.noise=", "data.noise"),
        ("augment.kinds=[noize]", "noise, music, babble, reverb"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence_before_ray_starts(desk: Desk, setting: str, told: str) -> None:
    words = desk.run("tune.py", "space.yaml", "--set", setting, status=2)
    assert told in words
    assert "Traceback" not in words
    assert "Ray " not in words
