"""What a study survives: real processes, real signals."""

import itertools
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from cluster_fixtures import Cluster, end
from desk_fixtures import EPOCHS, SOURCE, SPACE, Desk, printed_until, trials_of
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_fixtures import Server

from raysv.learning.keeping import newest_intact
from raysv.search.samplers import draw, make_sampler
from raysv.search.snapshots import KINDS
from raysv.search.space import space_from_dict
from raysv.search.study import read_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("survival"))


def runs_of(uri: str, study: str) -> dict[str, Run]:
    """A study's trials in MLflow, by the trial's id."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raysv")
    assert experiment is not None
    query = f"tags.`raysv.study` = '{study}' and tags.`raysv.kind` = 'trial'"
    runs = client.search_runs([experiment.experiment_id], query)
    assert len({run.data.tags["raysv.trial_id"] for run in runs}) == len(runs), "a trial has two runs"
    return {run.data.tags["raysv.trial_id"]: run for run in runs}


def assert_mlflow_agrees(uri: str, folder: Path) -> None:
    """Outcomes, error rates and curves of all trials are those that Tune has."""
    rows, runs, client = trials_of(folder), runs_of(uri, folder.name), MlflowClient(uri)
    assert runs.keys() == {row["trial_id"] for row in rows}
    for row in rows:
        run = runs[row["trial_id"]]
        assert run.data.tags["raysv.outcome"] == row["outcome"]
        assert run.data.metrics["dev/eer"] == pytest.approx(float(row["dev_eer"]))
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "dev/eer")]
        assert steps == list(range(1, int(row["epoch"]) + 1))


def test_a_driver_that_is_killed_ten_times_ends_with_the_trials_asked_for(desk: Desk) -> None:
    wanted, when = 40, random.Random(0)
    folder, uri = desk.folder / "results" / "often", f"sqlite:///{desk.folder / 'mlflow.db'}"
    finished: dict[str, tuple[str, float]] = {}
    command = ["space.yaml", "--name", "often", "--set", f"search.trials={wanted}"]
    # seconds after what it prints, or after its start; two after a trial's end Tune has noted that
    moments = (("", 2, 9), ("  epoch ", 0, 1), (f" of {wanted} trials ended", 2, 4))
    for words, *seconds in itertools.islice(itertools.cycle(moments), 10):
        driver = desk.open("tune.py", *command)
        assert driver.stdout is not None
        if words:
            printed_until(driver, words)
        time.sleep(when.uniform(*seconds))
        assert driver.poll() is None, driver.communicate()[0]
        driver.kill()
        driver.communicate()
        if (folder / "space.yaml").exists():
            command = ["--resume", "often"]
            ended = [trial for trial in read_study(folder).trials if trial.outcome in ("complete", "pruned")]
            finished |= {trial.trial_id: (trial.outcome, trial.eer) for trial in ended}
    words = desk.run("tune.py", *command)
    rows = {row["trial_id"]: (row["outcome"], float(row["dev_eer"])) for row in trials_of(folder)}
    assert len(rows) == len(trials_of(folder)) == wanted, words
    assert {outcome for outcome, _ in rows.values()} <= {"complete", "pruned"}
    assert len({row["loss.margin"] for row in trials_of(folder)}) == wanted, "values are tried twice"
    assert finished and finished.items() <= rows.items()
    assert_mlflow_agrees(uri, folder)


def test_a_study_goes_on_although_tunes_record_of_it_was_torn(desk: Desk) -> None:
    """As by a driver that is killed while it writes it, which takes some thousand kills to hit."""
    folder = desk.folder / "results" / "torn"
    driver = desk.open("tune.py", "space.yaml", "--name", "torn", "--set", "search.trials=6")
    printed_until(driver, "3 of 6 trials ended")
    time.sleep(4)  # by now there is a copy of that
    driver.kill()
    driver.communicate()
    assert list((folder / "tune-spare").glob("*/tuner.pkl"))
    ended = {trial.trial_id: trial.eer for trial in read_study(folder).trials if trial.outcome != "unfinished"}
    for kind in KINDS:
        (file,) = (folder / "tune").glob(kind)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert len(read_study(folder).trials) >= 3  # a report can still be written
    words = desk.run("tune.py", "--resume", "torn")
    assert "was torn when its driver was killed" in words
    rows = trials_of(folder)
    assert len({row["trial_id"] for row in rows}) == len(rows) == 6, words
    assert len({row["loss.margin"] for row in rows}) == 6
    assert {row["outcome"] for row in rows} <= {"complete", "pruned"}
    assert len(ended.items() & {row["trial_id"]: float(row["dev_eer"]) for row in rows}.items()) >= 3
    assert_mlflow_agrees(f"sqlite:///{desk.folder / 'mlflow.db'}", folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    end(running.process)


@pytest.mark.parametrize("outage", ["dies", "stalls"])
def test_an_mlflow_server_that_is_away_for_a_while_misses_nothing(desk: Desk, server: Server, outage: str) -> None:
    options = ["--name", outage, "--set", "search.trials=3", "--set", "search.early_stopping=none"]
    options += ["--set", "search.concurrent_trials=1"]
    # so that a stall outlasts what MLflow waits for an answer, which is two minutes else
    server_is = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    driver = desk.open("tune.py", "space.yaml", *options, **server_is)
    printed_until(driver, f"t000  epoch 1/{EPOCHS}")
    if outage == "dies":
        end(server.process)
    else:
        server.send(signal.SIGSTOP)
    printed_until(driver, f"t001  epoch 1/{EPOCHS}")  # training goes on without it
    if outage == "dies":
        server.start()
    else:
        time.sleep(5)
        server.send(signal.SIGCONT)
    words, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, words
    assert "could not be written" not in words
    assert_mlflow_agrees(server.uri, desk.folder / "results" / outage)


def test_what_an_outage_took_that_outlasts_the_study_is_written_when_it_is_asked_for_again(
    desk: Desk, server: Server
) -> None:
    options = ["--name", "outlasted", "--set", "search.trials=2", "--set", "search.early_stopping=none"]
    driver = desk.open("tune.py", "space.yaml", *options, MLFLOW_TRACKING_URI=server.uri)
    printed_until(driver, f"epoch 1/{EPOCHS}")
    end(server.process)
    words, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, words
    assert "--resume of the study writes" in words
    server.start()
    words = desk.run("tune.py", "--resume", "outlasted")
    assert "MLflow missed the end of 2 of 2 trials" in words and "is complete" in words
    assert_mlflow_agrees(server.uri, desk.folder / "results" / "outlasted")
    assert "MLflow missed" not in desk.run("tune.py", "--resume", "outlasted")


SLOW = """
import os, sys, time
from pathlib import Path

def slowly(call):
    def later(*arguments, **options):
        time.sleep(0.25)
        return call(*arguments, **options)
    return later

for name in ("fsync", "replace", "rename", "mkdir"):
    setattr(os, name, slowly(getattr(os, name)))
(Path(__file__).parent / f"{os.getpid()}.slow").write_text(" ".join(sys.orig_argv))
"""


def test_a_disk_that_is_slow_to_write_costs_time_and_nothing_else(desk: Desk, tmp_path: Path) -> None:
    """Every process waits a quarter of a second where Python syncs, renames or makes folders; C code does not wait."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    options = ["--name", "slow", "--set", "search.trials=3", "--set", "resources.workers=2"]
    options += ["--set", "resources.gpus_per_worker=0"]
    driver = desk.open("tune.py", "space.yaml", *options, PYTHONPATH=str(tmp_path))
    words, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, words
    assert len(list(tmp_path.glob("*.slow"))) >= 4  # the driver, Tune's process and two workers at least
    rows = trials_of(desk.folder / "results" / "slow")
    assert {row["outcome"] for row in rows} <= {"complete", "pruned"}
    assert len(rows) == 3
    assert_mlflow_agrees(f"sqlite:///{desk.folder / 'mlflow.db'}", desk.folder / "results" / "slow")


@pytest.fixture
def read_only_pack(tmp_path: Path) -> Iterator[Path]:
    """The pack of real speech where nobody, root included, can write."""
    pack, place = os.environ.get("RAYSV_DATA"), tmp_path / "a pack"
    if not pack:
        pytest.skip("RAYSV_DATA does not name the pack of real speech")
    place.mkdir()
    if subprocess.run(["mount", "--bind", pack, place], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # a process may still linger


def test_data_on_a_read_only_file_system_are_trained_on(desk: Desk, read_only_pack: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        (read_only_pack / "x").touch()
    small = ["model.channels=16", "training.epochs=2", "search.trials=1", "search.confirm=0", "resources.workers=1"]
    small += ["resources.gpus_per_worker=0", f"data.root={read_only_pack}"]
    options = [part for setting in small for part in ("--set", setting)]
    desk.run("tune.py", str(SOURCE / "search_spaces" / "speechocean.yaml"), "--name", "read-only", *options)
    (trial,) = trials_of(desk.folder / "results" / "read-only")
    assert trial["outcome"] == "complete"


def test_a_trial_that_runs_out_of_memory_is_an_error_with_its_batch_and_the_study_goes_on(desk: Desk) -> None:
    tree = SPACE | {"batch": {"speakers": 12, "crop_seconds": 10.0, "views": {"choice": [1, 2, 400]}}, "loss": {}}
    tree["search"] = {"trials": 3, "confirm": 0, "sampler": "grid", "early_stopping": "none", "concurrent_trials": 1}
    tree["search"]["retries"] = 0  # a process that died of it would be followed by one that has no limit
    seed = next(seed for seed in range(100) if tried(tree, seed) == [1, 400, 2])
    tree["search"]["seed"] = seed
    (desk.folder / "large.yaml").write_text(yaml.safe_dump(tree))
    driver = desk.open("tune.py", "large.yaml", "--name", "memory")
    words = printed_until(driver, f"epoch 1/{EPOCHS}")
    below = psutil.Process(driver.pid).children(recursive=True)
    (training,) = [process for process in below if "ImplicitFunc" in " ".join(process.cmdline())]
    room = training.memory_info().vms + 3 * 2**30  # other batches take far less; the waveforms of this one 6 GB
    training.rlimit(psutil.RLIMIT_AS, (room, room))
    rest, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, words + rest
    rows = sorted(trials_of(desk.folder / "results" / "memory"), key=lambda row: row["trial"])
    assert [(row["outcome"], row["reason"]) for row in rows[::2]] == [("complete", "")] * 2
    assert rows[1]["outcome"] == "error"
    batch = "12 speakers × 2 utterances × 400 views of 10 s on 1 worker"
    assert f"Out of memory with a batch of {batch}" in rows[1]["reason"]
    assert "GB at most" in rows[1]["reason"]


def tried(tree: dict[str, Any], seed: int) -> list[Any]:
    """The order in which a grid of a seed tries the choices of the only range."""
    ranges = space_from_dict(tree, "").ranges
    study, seen = optuna.create_study(sampler=make_sampler("grid", ranges, seed)), set[tuple[Any, ...]]()
    ((key, _),) = ranges.items()
    return [draw(study, ranges, seen).params[key] for _ in range(tree["search"]["trials"])]


def test_a_trial_that_diverges_is_an_error_with_the_reason_and_the_study_goes_on(desk: Desk) -> None:
    rates = {"learning_rate": {"choice": [1e30, 0.001, 0.003]}, "warmup_epochs": 0}
    tree: dict[str, Any] = SPACE | {"loss": {}, "optimizer": rates}
    tree["search"] = {"trials": 3, "confirm": 0, "sampler": "grid", "early_stopping": "none", "concurrent_trials": 1}
    tree["search"]["seed"] = next(seed for seed in range(100) if tried(tree, seed) == [0.003, 1e30, 0.001])
    (desk.folder / "wild.yaml").write_text(yaml.safe_dump(tree))
    desk.run("tune.py", "wild.yaml", "--name", "diverged")
    rows = sorted(trials_of(desk.folder / "results" / "diverged"), key=lambda row: row["trial"])
    assert [row["outcome"] for row in rows] == ["complete", "error", "complete"]
    assert "Lower optimizer.learning_rate" in rows[1]["reason"]
    storage = f"sqlite:///{desk.folder / 'results' / 'diverged' / 'optuna.db'}"
    (study,) = optuna.get_all_study_summaries(storage)
    learned = optuna.load_study(study_name=study.study_name, storage=storage).trials[1]
    assert (learned.state.name, learned.value) == ("COMPLETE", 0.5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Puts a file system of a few MB in the place of a folder."""
    mounted: list[Path] = []

    def put(place: Path, size: str) -> None:
        place.mkdir(exist_ok=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True
        ).returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(place)

    yield put
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_costs_a_trial_no_checkpoint_and_the_other_trials_nothing(desk: Desk, small_disk: Any) -> None:
    options = ["--name", "full", "--set", "search.trials=3", "--set", "search.early_stopping=none"]
    options += ["--set", "search.concurrent_trials=1", "--set", "search.retries=0", "--set", "training.epochs=12"]
    folder = desk.folder / "results" / "full"
    driver = desk.open("tune.py", "space.yaml", *options)
    words = printed_until(driver, "Ray      this machine alone")
    small_disk(folder / "trials", "16m")
    words += printed_until(driver, "t000  epoch 1/12")
    rest = folder / "trials" / "rest"
    with pytest.raises(OSError, match="No space left"), rest.open("wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(4096)))
    words += printed_until(driver, "t000  failed: ")
    rest.unlink()
    (last,) = [line for line in words.splitlines() if "t000  failed: " in line]
    assert "cannot be kept" in last and "No space left on device. The one before is intact" in last
    rest_of_words, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, words + rest_of_words
    assert sorted(row["outcome"] for row in trials_of(folder)) == ["complete", "complete", "error"]
    (broken,) = [row["trial_id"] for row in trials_of(folder) if row["outcome"] == "error"]
    left, damage = newest_intact(folder / "trials" / broken)
    assert left and not damage
    words = desk.run("tune.py", "--resume", "full")
    assert "t000  goes on" in words and "starts anew" not in words
    assert [row["outcome"] for row in trials_of(folder)] == ["complete"] * 3


def test_a_trial_whose_node_dies_goes_on_on_another(desk: Desk, cluster: Cluster) -> None:
    cluster.add()
    options = ["--name", "node", "--set", "search.trials=3", "--set", "search.early_stopping=none"]
    driver = desk.open("tune.py", "space.yaml", *options, "--set", "training.epochs=12", **cluster.variables)
    words = ""
    while not all(f"{name}  epoch 1/12" in words for name in ("t000", "t001")):
        words += printed_until(driver, "  epoch ")
    assert "2 trials at a time" in words
    end(cluster.nodes.pop())
    rest, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, words + rest
    (moved,) = re.findall(r"(t\d+)  goes on", rest)
    assert f"{moved}  starts" in words and f"{moved}  epoch 12/12" in rest
    assert "starts anew" not in rest
    rows = trials_of(desk.folder / "results" / "node")
    assert [row["outcome"] for row in rows] == ["complete"] * 3
    assert_mlflow_agrees(f"sqlite:///{desk.folder / 'mlflow.db'}", desk.folder / "results" / "node")


SHARED = ("plasma*", "torch_*", "sem.*", "psm_*")  # what Ray, PyTorch and Python name shared memory


@pytest.fixture
def temporary() -> Iterator[Path]:
    """An empty folder for temporary files; its path is short, for Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def in_shared_memory() -> set[Path]:
    return {path for pattern in SHARED for path in Path("/dev/shm").glob(pattern)}


@pytest.mark.parametrize("end", ["by itself", "interrupted", "interrupted twice", "killed"])
def test_a_study_leaves_no_process_and_nothing_in_temporary_folders(desk: Desk, temporary: Path, end: str) -> None:
    before = in_shared_memory()
    options = ["--name", f"tidy {end}", "--set", "search.trials=2", "--set", "resources.workers=2"]
    options += ["--set", "resources.gpus_per_worker=0"]
    driver = desk.open("tune.py", "space.yaml", *options, TMPDIR=str(temporary))
    printed_until(driver, f"epoch 1/{EPOCHS}")
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) > 5
    assert list(temporary.glob("*/session_*"))
    if end.startswith("interrupted"):
        driver.send_signal(signal.SIGINT)
    if end == "interrupted twice":
        time.sleep(0.5)
        driver.send_signal(signal.SIGINT)
    if end == "killed":
        driver.kill()
    driver.communicate(timeout=300)
    # the agents of a Ray whose driver was killed notice after a minute
    _, alive = psutil.wait_procs(below, timeout=90 if end == "killed" else 20)
    assert [" ".join(process.cmdline()) for process in alive] == []
    if end == "killed":  # who could not tidy up any more leaves that to whoever comes next
        desk.run("tune.py", "--resume", f"tidy {end}", TMPDIR=str(temporary))
    assert list(temporary.iterdir()) == []
    assert in_shared_memory() - before == set()
