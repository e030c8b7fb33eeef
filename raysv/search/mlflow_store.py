"""Where MLflow keeps what it is told: its address, whether it answers, and how raysv's runs are found there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run

from raysv.config import read_yaml
from raysv.search.results import METRIC
from raysv.search.wording import first_line

# tags; the ids make the runs of studies and trials unique
KIND, STUDY, STUDY_ID, TRIAL = "raysv.kind", "raysv.study", "raysv.study_id", "raysv.trial_id"
CONFIG_FILE = "config.yaml"  # artifact of a trial's run: its full configuration
SETTINGS = {  # of MLflow, unless the environment has others: by default it waits minutes for a server that is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
CHECK_SECONDS = 5.0


def default_tracking_uri(folder: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, otherwise an SQLite file in a folder; absolute, as drivers change folders."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    database = _database(uri)
    return f"sqlite:///{database}" if database else uri


def connect(uri: str) -> MlflowClient:
    """A client; cheap, as MLflow keeps the connection. Nothing is asked yet."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table of a new database
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(uri)


def check(uri: str) -> None:
    """Make sure, in seconds rather than minutes, that MLflow can be used before a study starts.

    Raises: ValueError naming the address and what is wrong with it.
    """
    if (told := _without_secrets(uri)) != uri:
        raise ValueError(
            f"MLflow's address holds a password or token ({told}), and addresses are printed and kept with a study. "
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for a server; for a "
            "database use what its client reads, such as PGPASSFILE."
        )
    try:
        if uri.startswith(("http://", "https://")):
            _knock(f"{uri.rstrip('/')}/health")
        elif database := _database(uri):
            database.parent.mkdir(parents=True, exist_ok=True)
            if not database.exists():
                _make(database)
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the file system through
        raise ValueError(
            f"MLflow cannot be used at {uri}: {first_line(error)}. Start the server, correct the address, or "
            "unset MLFLOW_TRACKING_URI to write to an SQLite file beside the study."
        ) from error


def _make(database: Path) -> None:
    """MLflow's tables, all or none: with those that a killed process had made it could not go on."""
    partial = database.with_name(f"{database.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        connect(f"sqlite:///{partial}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(partial, database)
    finally:
        partial.unlink(missing_ok=True)


def _without_secrets(uri: str) -> str:
    """An address with dots for a password, for whoever is named to a server (it may be a token), and for a secret among
    what stands behind `?`."""
    server = uri.startswith(("http://", "https://"))
    hidden = re.sub("(?<=://)[^/?]*@" if server else "(?<=://)([^/?:@]*:)[^/?]*@", "...@", uri)
    return re.sub(r"([?&][^=&]*(?:pass(?:word|wd)?|pwd|token|secret|key)=)[^&]*", r"\1...", hidden, flags=re.IGNORECASE)


def experiment_id(uri: str, name: str) -> str:
    """The id of an experiment, made if there is none. With SQLite its artifacts lie in `mlartifacts` beside the file.

    Raises: ValueError when an experiment of that name was deleted.
    """
    client = connect(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = _database(uri)
        location = str(database.parent / "mlartifacts" / name) if database else None
        created: str = client.create_experiment(name, artifact_location=location)
        return created
    if experiment.lifecycle_stage == "deleted":
        raise ValueError(
            f"The MLflow experiment {name} at {uri} was deleted. Use another name, or bring it back with: "
            f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    existing: str = experiment.experiment_id
    return existing


def search_runs(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Run]:
    """An experiment's runs with all of certain tags, in the order in which they were made."""
    conditions = " and ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items())
    found: list[Run] = []
    page = None
    while page is None or page.token:
        page = client.search_runs(
            [experiment], conditions, order_by=["start_time"], page_token=page.token if page else None
        )
        found += page
    return found


def config_of_run(run_id: str, tracking_uri: str) -> dict[str, Any]:
    """The full configuration tree of a trial, from its MLflow run.

    Raises: ValueError when there is no such run or it holds no configuration.
    """
    check(tracking_uri)
    with TemporaryDirectory() as folder:
        try:
            path = connect(tracking_uri).download_artifacts(run_id, CONFIG_FILE, folder)
        except Exception as error:
            raise ValueError(
                f"No configuration of a run {run_id} in MLflow at {tracking_uri}: {first_line(error)}. "
                "Copy the Run ID from the page of a trial."
            ) from error
        return read_yaml(Path(path))


def runs_link(uri: str, experiment: str, study: str) -> str:
    """The page of MLflow with all trials of a study, best first; where MLflow does not answer, its front page.

    For SQLite it is where `mlflow server --backend-store-uri URI` serves it. MLflow 3 opens an experiment in its mode
    for language models and folds trials away below their study, unless the address says otherwise.
    """
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    try:
        number = experiment_id(uri, experiment)
    except Exception:  # a study that has ended well must not end in this
        return server
    order = quote(f"metrics.`{METRIC}`", safe=".")
    trials = quote(f"tags.`{KIND}` = 'trial' AND tags.`{STUDY}` = '{study}'", safe=".'")
    return (
        f"{server}/#/experiments/{number}/runs?workflowType=machine_learning"
        f"&orderByKey={order}&orderByAsc=true&searchFilter={trials}"
    )


def _database(uri: str) -> Path | None:
    """The absolute path of an SQLite file, none where the address is something else."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _knock(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=CHECK_SECONDS).close()
    except urllib.error.HTTPError:
        return  # somebody answers; whether it is MLflow shows when it is asked something


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"
