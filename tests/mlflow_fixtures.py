"""A driver's MLflow callback without a driver: what Tune would call, and what MLflow then holds.

Plain functions, so that fixtures and Ray's workers may call them.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cluster_fixtures import free_port
from mlflow import MlflowClient
from mlflow.entities import Run

from raysv.search.cards import StudyCard
from raysv.search.results import METRIC, TIME
from raysv.search.tracking import MLflowTracking

EPOCHS = 3
RESOURCES = {"workers": 2, "cpus_per_worker": 1}
BASE = {"loss": {"margin": 0.2, "scale": 30.0}, "augment": {"kinds": ["noise", "reverb"]}, "training": {"seed": 0}}
mlflow_warnings = pytest.mark.filterwarnings(  # MLflow 3.17 with SQLAlchemy 2.1
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


def new_driver(uri: str, **card: Any) -> MLflowTracking:
    """The callback as a driver has it that knows nothing of an earlier life."""
    options: dict[str, Any] = {
        "base": BASE,
        "resources": RESOURCES,
        "space": "loss: {margin: {uniform: [0.1, 0.5]}}\n",
        "searched": ["loss.margin"],
        "tags": {"raysv.revision": "abc123"},
        "description": "Which margin?",
    }
    callback = MLflowTracking(StudyCard(uri, "study", epochs=EPOCHS, **(options | card)))
    callback = pickle.loads(pickle.dumps(callback))  # Tune keeps it in its snapshot
    callback.setup(stop=None)
    return callback


def trial(number: int = 0, error_file: Path | None = None, **values: Any) -> Any:
    """What of a Tune trial the callback looks at."""
    config = values or {"loss.margin": 0.25}
    return SimpleNamespace(
        trial_id=f"id{number}", experiment_tag=f"{number + 1}_x", config=config, last_result={}, error_file=error_file
    )


def tell(callback: MLflowTracking, hook: str, subject: Any, **info: Any) -> None:
    getattr(callback, hook)(iteration=0, trials=[subject], trial=subject, **info)


def report(callback: MLflowTracking, subject: Any, epoch: int, eer: float, **more: Any) -> None:
    subject.last_result = {TIME: epoch, METRIC: eer, "training_iteration": 7, "pid": 123, "done": False, **more}
    tell(callback, "on_trial_result", subject, result=subject.last_result)


def run_trial(callback: MLflowTracking, subject: Any, eers: list[float], **more: Any) -> None:
    tell(callback, "on_trial_start", subject)
    for epoch, eer in enumerate(eers, 1):
        report(callback, subject, epoch, eer, **more)
    tell(callback, "on_trial_complete", subject)


def write_checkpoint(folder: Path, eers: list[float]) -> str:
    """A checkpoint as far as tracking looks into it, after `len(eers)` epochs."""
    folder.mkdir()
    lines = [json.dumps({TIME: epoch, METRIC: eer, "loss/total": 2 * eer}) for epoch, eer in enumerate(eers, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "checkpoint.yaml").write_text("epoch: 1\nthreshold: 0.3\ncomputed: cpu, float32\nconfig: {}\n")
    (folder / "encoder.pt").write_text(str(eers[-1]))
    (folder / "training_state.pt").write_text("large")
    (folder / "det.csv").write_text("p_miss,p_fa\n0.0,1.0\n0.1,0.2\n1.0,0.0\n")
    return str(folder)


def runs(uri: str, kind: str = "trial") -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raysv")
    found = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    return [run for run in found if run.data.tags["raysv.kind"] == kind]


def curve(uri: str, run: Run, metric: str = METRIC) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


class Server:
    """MLflow's own server, in front of a database of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, text=True, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.5)
        raise AssertionError((self._folder / "server.log").read_text())

    def send(self, number: int) -> None:
        """A signal to the server and all below it."""
        for process in (self.process, *psutil.Process(self.process.pid).children(recursive=True)):
            os.kill(process.pid, number)
