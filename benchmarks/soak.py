"""A study of many short trials while something is broken every few seconds; at its end everything must agree.

    python benchmarks/soak.py [--trials 200] [--seed 0] [--folder FOLDER]

The real doors, Ray and an MLflow server, on voices that raysv makes itself. Every few seconds one of these, by chance:
the process of a trial is killed; a byte of the newest checkpoint is turned over and then the trials' processes killed,
so that somebody has to go on from it; MLflow's server is killed, and comes back seconds later; the driver is killed,
and the study resumed, but only in its first half, so that one driver lives long enough to see whether it grows. A
driver that ends by itself before the study is over is resumed too, and the faults go on until it is. Printed are the
faults, the counts in Tune, MLflow and Optuna, and the driver's memory and open files over its longest life. Exits with
1 where the three do not agree on every trial's end, or the driver grew.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import psutil
import yaml

from raysv.search.mlflow_store import KIND, STUDY, TRIAL, connect, experiment_id, search_runs
from raysv.search.results import METRIC
from raysv.search.stages import EXPERIMENT, OPTUNA_FILE
from raysv.search.study import read_study

NAME, EPOCHS = "soak", 3
SPACE = {
    "batch": {"speakers": 12, "crop_seconds": 0.5},
    "model": {"channels": 16, "embedding_dim": 16},
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "temperature": {"loguniform": [0.03, 0.5]}},
    "training": {"epochs": EPOCHS, "precision": "fp32"},
    "resources": {"gpus_per_worker": 0.0},
}
LIVES = 60  # of the driver, at most
PAUSE = (2.0, 8.0)  # seconds from one fault to the next; a process takes some five to start again
DOWN = (1.0, 8.0)  # seconds for which a server that was killed stays away
GROWTH = 0.1  # of the driver's memory and open files, above which it is said to grow
WEIGHTS = {"trial": 6, "checkpoint": 3, "server": 2, "driver": 1}


class Soak:
    """A study, what it runs beside, and what was done to it."""

    def __init__(self, folder: Path, trials: int, seed: int) -> None:
        self.folder, self.trials, self.chance = folder, trials, random.Random(seed)
        self.faults: collections.Counter[str] = collections.Counter()
        self.lives: list[list[tuple[float, float, int]]] = []  # of drivers: seconds, MB, open files
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        (folder / "soak.yaml").write_text(yaml.safe_dump(SPACE | {"search": {"trials": trials, "confirm": 0}}))
        self.server = self._serve()
        self.back = 0.0  # when a server that was killed is started again
        self.driver = self._drive("soak.yaml", "--name", NAME)

    @property
    def study(self) -> Path:
        """Its folder."""
        return self.folder / "results" / NAME

    def _serve(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def _listening(self) -> bool:
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", self.port)) == 0

    def _keep_server(self) -> None:
        if self.server.poll() is not None and time.monotonic() > self.back:
            self.server = self._serve()

    def _drive(self, *arguments: str) -> subprocess.Popen[bytes]:
        deadline = time.monotonic() + 120
        while not self._listening():  # a study does not begin without its server
            self._keep_server()
            time.sleep(0.2)
            if time.monotonic() > deadline:
                raise SystemExit(f"MLflow's server does not start: {self.folder / 'server.log'}")
        self.lives.append([])
        self.born = time.monotonic()
        environment = os.environ | {"MLFLOW_TRACKING_URI": self.uri, "RAY_ADDRESS": "local"}
        environment |= {"RAYSV_CACHE": str(self.folder / "cache")}
        command = [sys.executable, "-m", "raysv.tune", *arguments]
        with (self.folder / "driver.log").open("a") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def look(self) -> None:
        """Note the driver's memory and open files."""
        process = psutil.Process(self.driver.pid)
        files, memory = process.num_fds(), process.memory_info().rss / 1e6
        self.lives[-1].append((time.monotonic() - self.born, memory, files))

    def disturb(self) -> bool:
        """Break something, and tell whether there was anything to break."""
        below = psutil.Process(self.driver.pid).children(recursive=True)
        training = [process for process in below if "ImplicitFunc" in " ".join(process.cmdline())]
        if not training:
            return False  # the driver is still starting
        kind = self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind == "trial":
            self.chance.choice(training).kill()
        elif kind == "checkpoint":
            states = list(self.study.glob("trials/*/epoch-*/training_state.pt"))
            if not states:
                return False
            newest = max(states, key=lambda file: file.stat().st_mtime)
            content = bytearray(newest.read_bytes())
            content[len(content) // 2] ^= 0xFF
            newest.write_bytes(content)
            for process in training:
                process.kill()
        elif kind == "server":
            if not self._listening():
                return False
            self.back = time.monotonic() + self.chance.uniform(*DOWN)
            _kill(self.server.pid)
            self.server.wait()
        elif len(list(self.study.glob("trials/*"))) > self.trials / 2:
            return False
        else:
            self.driver.kill()
        self.faults[kind] += 1
        return True

    def run(self) -> None:
        """Disturb it until it is over."""
        due = time.monotonic()
        while True:
            if self.driver.poll() is not None:
                if self.over() or len(self.lives) == LIVES:
                    return
                time.sleep(3)  # the workers of a driver that was killed notice, and end
                self.driver = self._drive("--resume", NAME)
            self._keep_server()
            time.sleep(0.5)
            try:
                self.look()
                if time.monotonic() > due and self.disturb():
                    due = time.monotonic() + self.chance.uniform(*PAUSE)
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue  # it ended meanwhile

    def over(self) -> bool:
        """Whether the study has all its trials, and none that died."""
        study = read_study(self.study)
        return not study.unfinished and not study.broken

    def agree(self) -> bool:
        """Print what Tune, MLflow and Optuna hold at the end, and whether they agree."""
        trials = read_study(self.study).trials
        client = connect(self.uri)
        tags = {KIND: "trial", STUDY: NAME}
        runs = search_runs(client, experiment_id(self.uri, EXPERIMENT), tags)
        results = {run.data.tags[TRIAL]: len(client.get_metric_history(run.info.run_id, METRIC)) for run in runs}
        storage = f"sqlite:///{self.study / OPTUNA_FILE}"
        kept = optuna.load_study(study_name=NAME, storage=storage).get_trials(deepcopy=False)
        ends = collections.Counter(trial.outcome for trial in trials)
        in_mlflow = collections.Counter(run.data.tags["raysv.outcome"] for run in runs)
        in_optuna = collections.Counter(trial.state.name for trial in kept)
        print(f"faults          {sum(self.faults.values())}: {dict(self.faults)}")
        print(f"trials in Tune  {len(trials)}: {dict(ends)}")
        print(f"runs in MLflow  {len(runs)}: {dict(in_mlflow)}")
        print(f"results         {sum(trial.epoch for trial in trials)} in Tune, {sum(results.values())} in MLflow")
        print(f"Optuna          {dict(in_optuna)}")
        noticed = sum("raysv.notice" in run.data.tags for run in runs)
        print(f"damage          {self.faults['checkpoint']} checkpoints; {noticed} trials went on from one and said so")
        told = {run.data.tags[TRIAL]: run.data.tags["raysv.outcome"] for run in runs}
        return (
            self.over()
            and len(trials) == self.trials == len(runs)
            and told == {trial.trial_id: trial.outcome for trial in trials}
            and results == {trial.trial_id: trial.epoch for trial in trials}
            and _ends((trial.values, trial.outcome.upper()) for trial in trials)
            == _ends((trial.params, trial.state.name) for trial in kept if trial.state.name != "FAIL")
        )

    def grew(self) -> bool:
        """Print the driver's memory and open files over its longest life, medians of its second and last quarters."""
        life = max(self.lives, key=len)
        quarter = max(len(life) // 4, 1)
        first, last = ([statistics.median(column) for column in zip(*part, strict=True)] for part in
                       (life[quarter : 2 * quarter], life[-quarter:]))  # fmt: skip
        print(
            f"driver          {len(self.lives)} lives; in the longest, from {first[0]:.0f} to {last[0]:.0f} s, "
            f"{first[1]:.0f} to {last[1]:.0f} MB and {first[2]:.0f} to {last[2]:.0f} open files"
        )
        return any(after > (1 + GROWTH) * before for before, after in zip(first[1:], last[1:], strict=True))


def _ends(told: Iterable[tuple[dict[str, Any], str]]) -> list[tuple[str, str]]:
    """How trials ended, by the values they tried."""
    return sorted((repr(sorted(values.items())), end) for values, end in told)


def _kill(pid: int) -> None:
    """A process and all below it."""
    for process in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def main() -> None:
    """Soak a study, and tell whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the faults; their moments depend on the machine too")
    parser.add_argument("--folder", type=Path, help="to keep what came of it (default: a temporary one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raysv-soak-") as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        soak = Soak(folder, chosen.trials, chosen.seed)
        try:
            soak.run()
            agreed = soak.agree()
            grew = soak.grew()
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:.0f} minutes; {'all agree' if agreed else 'NOT in agreement'}{', it GREW' * grew}")
        finally:
            for process in (soak.server, soak.driver):
                if process.poll() is None:
                    _kill(process.pid)
    sys.exit(grew or not agreed)


if __name__ == "__main__":
    main()
