"""One MLflow run per trial below one per study, written by Tune's driver alone."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from ray.tune import Callback

from raysv.config import flatten, read_yaml, with_values
from raysv.search.figures import det_figure, read_det
from raysv.search.results import METRIC, TIME, outcome, trial_name

logger = logging.getLogger(__name__)

KIND, STUDY, TRIAL = "raysv.kind", "raysv.study", "raysv.trial_id"  # tags; the trial's id makes its run unique
OUTCOME, ERROR, BEST, CHECKPOINT = "raysv.outcome", "raysv.error", "raysv.best", "raysv.checkpoint"
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "error": "FAILED"}  # KILLED would show the same cross as FAILED
CONFIG_FILE = "config.yaml"
NOT_UPLOADED = ("training_state.pt",)  # large, and only needed to go on training where the checkpoint lies
BOOKKEEPING = {  # Tune's own numbers in a result; time_total_s is kept
    *("training_iteration", "iterations_since_restore", "time_this_iter_s", "time_since_restore"),
    *("timesteps_total", "episodes_total", "timesteps_since_restore", "timestamp", "pid", TIME),
}
SETTINGS = {  # of MLflow, unless the environment has others: by default it waits minutes for a server that is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
CHECK_SECONDS = 5.0
MOST_PARAMS = 100  # that one call may log
RETRY_SECONDS = 30.0  # between attempts while MLflow does not answer
ATTEMPTS = 3  # at an entry that MLflow refuses although it answers
RANKED = 5  # trials in the study's description


def default_tracking_uri(folder: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, otherwise an SQLite file in a folder; absolute, as drivers change folders."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    database = _database(uri)
    return f"sqlite:///{database}" if database else uri


def check(uri: str) -> None:
    """Make sure, in seconds rather than minutes, that MLflow can be used before a study starts.

    Raises: ValueError naming the address and what is wrong with it.
    """
    try:
        if uri.startswith(("http://", "https://")):
            _knock(f"{uri.rstrip('/')}/health")
        elif database := _database(uri):
            database.parent.mkdir(parents=True, exist_ok=True)
        _client(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the file system through
        raise ValueError(
            f"MLflow cannot be used at {uri}: {_first_line(error)}. Start the server, correct the address, or "
            "unset MLFLOW_TRACKING_URI to write to an SQLite file beside the study."
        ) from error


def experiment_id(uri: str, name: str) -> str:
    """The id of an experiment, made if there is none. With SQLite its artifacts lie in `mlartifacts` beside the file.

    Raises: ValueError when an experiment of that name was deleted.
    """
    client = _client(uri)
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


def runs_link(uri: str, experiment_id: str) -> str:
    """The page of MLflow with all trials of an experiment, best first.

    For SQLite it is where `mlflow server --backend-store-uri URI` serves it. MLflow 3 opens an experiment in its mode
    for language models and folds trials away below their study, unless the address says otherwise.
    """
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    order = quote(f"metrics.`{METRIC}`", safe=".")
    trials = quote(f"tags.`{KIND}` = 'trial'", safe=".'")
    return (
        f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&orderByKey={order}&orderByAsc=true&searchFilter={trials}"
    )


def config_of_run(run_id: str, tracking_uri: str) -> dict[str, Any]:
    """The full configuration tree of a trial, from its MLflow run.

    Raises: ValueError when there is no such run or it holds no configuration.
    """
    check(tracking_uri)
    with TemporaryDirectory() as folder:
        try:
            path = _client(tracking_uri).download_artifacts(run_id, CONFIG_FILE, folder)
        except Exception as error:
            raise ValueError(
                f"No configuration of a run {run_id} in MLflow at {tracking_uri}: {_first_line(error)}. "
                "Copy the Run ID from the page of a trial."
            ) from error
        return read_yaml(Path(path))


@dataclass(frozen=True)
class StudyCard:
    """What MLflow is to know of a study; plain data.

    Attributes:
        tracking_uri: absolute if it names a file.
        name: names the study's run, and makes it unique within the experiment.
        base: the full configuration tree; a trial's values replace some of its leaves.
        searched: the dotted keys of these leaves.
        epochs: of a trial that is not stopped early.
        tags: of the study and of every trial: revision, data, versions.
        description: Markdown, what is searched.
        resolve: what a trial's full tree comes to beside its own values, to be logged with them.
    """

    tracking_uri: str
    name: str
    base: dict[str, Any]
    searched: list[str]
    epochs: int
    tags: dict[str, str] = field(default_factory=dict)
    description: str = ""
    experiment: str = "raysv"
    resolve: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class MLflowTracking(Callback):
    """Tune's hooks: what happened, put in order into MLflow.

    MLflow is the record: whatever a restored study has to know of its earlier life it looks up there, by the trials'
    ids. Results are written as they come; while MLflow does not answer they wait, and the study goes on.
    """

    def __init__(self, card: StudyCard) -> None:
        self._card = card
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"_card": self._card}  # a client has locks, which do not travel in Tune's snapshots

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._card = state["_card"]
        self._open()

    def _open(self) -> None:
        self._runs = StudyRuns(self._card)
        self._outbox = Outbox(self._runs.ping)

    def setup(self, *args: Any, **info: Any) -> None:
        """Find or make the study's run.

        Raises: ValueError when MLflow cannot be used, before any trial has started.
        """
        check(self._card.tracking_uri)
        self._runs.open()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A run for a trial, or the one it had before it was interrupted."""
        self._outbox.put(partial(self._runs.start, TrialCard.of(trial)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The metrics of an epoch."""
        self._outbox.put(partial(self._runs.add_result, TrialCard.of(trial), dict(result)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The outcome of a trial that returned or was stopped."""
        end, reason = outcome(trial.last_result or {}, self._card.epochs)
        self._outbox.put(partial(self._runs.finish, TrialCard.of(trial), end, reason))
        self._outbox.put(self._runs.summarise)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """What a trial died of."""
        report = Path(trial.error_file) if trial.error_file else None
        self._outbox.put(partial(self._runs.finish, TrialCard.of(trial), "error", _reason(report), report))
        self._outbox.put(self._runs.summarise)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Close what is still open, and say so if something could not be written."""
        self._outbox.put(partial(self._runs.close, [trial.trial_id for trial in trials]))
        self._outbox.empty()


@dataclass(frozen=True)
class TrialCard:
    """A trial of Tune as plain data: `values` are what it tries, by dotted key."""

    trial_id: str
    name: str
    values: dict[str, Any]

    @classmethod
    def of(cls, trial: Any) -> TrialCard:
        """Named by its number, from 0, and what it tries, short: MLflow's column of names is narrow."""
        shown = [f"{key}{_short(value)}" for key, value in _abbreviate(trial.config).items()]
        return cls(trial.trial_id, " ".join([trial_name(trial), *shown]), dict(trial.config))


class Outbox:
    """Entries for MLflow, made in the order in which they came; nothing they raise gets out.

    An entry that fails stays first and is tried again with a later one, so entries must bear being made twice. Only one
    that fails again and again while MLflow answers is given up: then the entry is at fault.

    Args:
        ping: raises when MLflow does not answer.
    """

    def __init__(self, ping: Callable[[], object]) -> None:
        self._ping = ping
        self._waiting: deque[Callable[[], object]] = deque()
        self._attempts = 0
        self._resume_at = -math.inf
        self._lost = 0
        self._told: set[str] = set()

    def put(self, entry: Callable[[], object]) -> None:
        """Make an entry now, or as soon as it goes."""
        self._waiting.append(entry)
        if time.monotonic() >= self._resume_at:
            self._work()

    def empty(self) -> None:
        """Make a last effort for all that waits, and say what could not be written."""
        for pause in (0.0, 1.0, 3.0):
            time.sleep(pause if self._waiting else 0.0)
            self._work()
        lost = self._lost + len(self._waiting)
        if lost:
            logger.warning(
                "%d entries could not be written to MLflow. Tune's own results and the checkpoints are complete.", lost
            )

    def _work(self) -> None:
        while self._waiting:
            try:
                self._waiting[0]()
            except Exception as error:  # whatever is wrong with MLflow, a study of days must not end by it
                if self._keep(error):
                    return
                self._lost += 1
            self._waiting.popleft()
            self._attempts = 0

    def _keep(self, error: Exception) -> bool:
        """Whether an entry that failed is worth another attempt, later."""
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("MLflow: %s: %s. The study goes on.", kind, _first_line(error)[:200])
        try:
            self._ping()
        except Exception:  # no answer: the entry need not be at fault
            self._attempts = 0
        else:
            self._attempts += 1
        self._resume_at = time.monotonic() + RETRY_SECONDS
        return self._attempts < ATTEMPTS


@dataclass
class _Known:
    """What MLflow is known to hold of a trial.

    Attributes:
        steps: epochs with metrics.
        checkpoints: EER by folder.
    """

    run_id: str
    params: set[str]
    steps: set[int] = field(default_factory=set)
    checkpoints: dict[str, float] = field(default_factory=dict)


class StudyRuns:
    """A study's runs in MLflow. Everything may be done twice and leaves MLflow as if done once."""

    def __init__(self, card: StudyCard) -> None:
        self._card = card
        self._trials: dict[str, _Known] = {}
        self._summary: tuple[Any, ...] = ()
        self._hours_before, self._since = 0.0, time.monotonic()

    @property
    def _client(self) -> MlflowClient:
        return _client(self._card.tracking_uri)  # cheap: MLflow keeps the connection

    def ping(self) -> None:
        """Ask MLflow for anything."""
        self._client.search_experiments(max_results=1)

    def open(self) -> None:
        """Find the study's run or make it."""
        self._experiment = experiment_id(self._card.tracking_uri, self._card.experiment)
        tags = self._card.tags | {"mlflow.note.content": self._card.description}
        parent = self._find({KIND: "study"}) or self._create(self._card.name, {KIND: "study"} | tags)
        self._parent: str = parent.info.run_id
        self._hours_before, self._since = parent.data.metrics.get("hours", 0.0), time.monotonic()
        self._client.update_run(self._parent, status="RUNNING")

    def start(self, card: TrialCard) -> None:
        """The run of a trial that starts, or starts again: its configuration, and no outcome yet."""
        known = self._known(card)
        tree = with_values(self._card.base, card.values)
        values = flatten(tree) | (self._card.resolve(tree) if self._card.resolve else {})
        params = [Param(key, _exact(value)) for key, value in values.items() if key not in known.params]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(known.run_id, params=params[first : first + MOST_PARAMS])
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        self._client.log_text(
            known.run_id, f"# {card.name} ({card.trial_id}) of {self._card.name}\n{text}", CONFIG_FILE
        )
        self._client.log_batch(known.run_id, tags=[RunTag(OUTCOME, "running"), RunTag(ERROR, "")])
        self._client.update_run(known.run_id, status="RUNNING")

    def add_result(self, card: TrialCard, result: Mapping[str, Any]) -> None:
        """The metrics of an epoch, and of epochs before it that were trained while no driver listened."""
        known = self._known(card)
        folder = str(result.get("checkpoint_path") or "")
        lines = {int(line[TIME]): line for line in (*_history(folder), result) if TIME in line}
        now = int(1000 * time.time())
        for step in sorted(lines.keys() - known.steps):
            metrics = [Metric(key, value, now, step) for key, value in _numbers(lines[step]).items()]
            try:
                self._client.log_batch(known.run_id, metrics=metrics)
            except Exception:
                del self._trials[card.trial_id]  # only the reply may be lost: look it up before trying again
                raise
            known.steps.add(step)
        if folder and METRIC in result:
            if result[METRIC] <= min(known.checkpoints.values(), default=math.inf):
                self._client.set_tag(known.run_id, CHECKPOINT, folder)
            known.checkpoints[folder] = float(result[METRIC])

    def finish(self, card: TrialCard, end: str, reason: str, report: Path | None = None) -> None:
        """The end of a trial: outcome, best checkpoint, DET curve, and the report of an error."""
        known = self._known(card)
        if report and report.is_file():
            self._client.log_artifact(known.run_id, str(report))
        folders = {eer: Path(folder) for folder, eer in known.checkpoints.items() if Path(folder).is_dir()}
        if folders:
            self._upload(known.run_id, folders[min(folders)], card.name)
        self._client.log_batch(known.run_id, tags=[RunTag(OUTCOME, end), RunTag(ERROR, reason[:5000])])
        self._client.set_terminated(known.run_id, STATUS[end])

    def summarise(self) -> None:
        """How the study stands, on its own run: counts and the best EER over time, and a table of the best trials."""
        trials = self._search({KIND: "trial"})
        ends = Counter(run.data.tags.get(OUTCOME) for run in trials)
        ranked = sorted(
            (run for run in trials if run.data.tags.get(OUTCOME) == "complete" and METRIC in run.data.metrics),
            key=lambda run: run.data.metrics[METRIC],
        )
        values = {f"trials_{end}": float(ends[end]) for end in STATUS}
        if ranked:
            values["best_eer"] = ranked[0].data.metrics[METRIC]
        if tuple(values.items()) == self._summary:
            return
        now, step = int(1000 * time.time()), sum(ends[end] for end in STATUS)
        hours = self._hours_before + (time.monotonic() - self._since) / 3600
        metrics = [Metric(key, value, now, step) for key, value in (*values.items(), ("hours", hours))]
        note = "\n\n".join(filter(None, (self._card.description, _table(ranked[:RANKED], self._card.searched))))
        tags = {"mlflow.note.content": note}
        if ranked:
            tags["raysv.best_trial"] = ranked[0].data.tags[TRIAL]
        self._client.log_batch(self._parent, metrics=metrics, tags=[RunTag(*tag) for tag in tags.items()])
        for run in trials:
            if BEST in run.data.tags and run not in ranked[:1]:
                self._client.delete_tag(run.info.run_id, BEST)
        if ranked:
            self._client.set_tag(ranked[0].info.run_id, BEST, "true")
        self._summary = tuple(values.items())

    def close(self, trial_ids: Iterable[str]) -> None:
        """The end of a driver: trials it leaves unfinished are KILLED, those that Tune has forgotten are errors."""
        ours, unfinished = set(trial_ids), False
        for run in self._search({KIND: "trial", OUTCOME: "running"}):
            if run.data.tags[TRIAL] in ours:
                unfinished = True
                self._client.set_terminated(run.info.run_id, "KILLED")
            else:
                reason = "The driver died before Tune had noted this trial; another took its place."
                self._client.log_batch(run.info.run_id, tags=[RunTag(OUTCOME, "error"), RunTag(ERROR, reason)])
                self._client.set_terminated(run.info.run_id, "FAILED")
        self.summarise()
        self._client.set_terminated(self._parent, "KILLED" if unfinished else "FINISHED")

    def _known(self, card: TrialCard) -> _Known:
        """A trial's run, found by the trial's id or made, and what it holds."""
        if card.trial_id not in self._trials:
            tags = {KIND: "trial", TRIAL: card.trial_id}
            run = self._find(tags) or self._create(
                card.name, {"mlflow.parentRunId": self._parent, OUTCOME: "running"} | tags | self._card.tags
            )
            curve = self._client.get_metric_history(run.info.run_id, METRIC)
            best = run.data.tags.get(CHECKPOINT)
            self._trials[card.trial_id] = _Known(
                run.info.run_id,
                params=set(run.data.params),
                steps={point.step for point in curve},
                checkpoints={best: min(point.value for point in curve)} if best and curve else {},
            )
        return self._trials[card.trial_id]

    def _create(self, name: str, tags: dict[str, str]) -> Run:
        return self._client.create_run(self._experiment, tags={STUDY: self._card.name} | tags, run_name=name)

    def _find(self, tags: dict[str, str]) -> Run | None:
        return next(iter(self._search(tags)), None)

    def _search(self, tags: dict[str, str]) -> list[Run]:
        """This study's runs with certain tags, in the order in which they were made."""
        conditions = [f"tags.`{key}` = {_quoted(value)}" for key, value in ({STUDY: self._card.name} | tags).items()]
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs(
                [self._experiment], " and ".join(conditions), order_by=["start_time"], page_token=token or None
            )
            found += page
            token = page.token or None
        return found

    def _upload(self, run_id: str, folder: Path, name: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in NOT_UPLOADED:
                self._client.log_artifact(
                    run_id, str(file), str(Path("best_checkpoint", file.parent.relative_to(folder)))
                )
        if (folder / "det.csv").is_file():
            self._client.log_figure(run_id, det_figure({name: read_det(folder / "det.csv")}), "det.png")


def _client(uri: str) -> MlflowClient:
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table of a new database
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(uri)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def _database(uri: str) -> Path | None:
    """The absolute path of an SQLite file, none where the address is something else."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _knock(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=CHECK_SECONDS).close()
    except urllib.error.HTTPError:
        return  # somebody answers; whether it is MLflow shows when it is asked something


def _history(folder: str) -> list[dict[str, Any]]:
    """The metrics of all epochs up to a checkpoint, as far as it lies within reach."""
    file = Path(folder, "metrics.jsonl")
    if not folder or not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a result, without the numbers that Tune keeps its books with."""
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, Real) and not isinstance(value, bool) and key not in BOOKKEEPING
    }


def _reason(report: Path | None) -> str:
    """The exception that a traceback ends with."""
    lines = report.read_text(encoding="utf-8", errors="replace").splitlines() if report and report.is_file() else []
    told = [line.strip() for line in lines if line.strip()]
    exceptions = [line for line in told if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (exceptions or told or ["The trial ended without a report of its error."])[-1]


def _abbreviate(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"loss.margin": 0.2, "loss.scale": 30, "augment.strength": 1}` as `{"m": 0.2, "sc": 30, "st": 1}`."""
    leaves = [key.rpartition(".")[2] for key in values]
    names = leaves if len(set(leaves)) == len(leaves) else list(values)

    def shortest(name: str) -> str:
        prefixes = (name[:length] for length in range(1, len(name)))
        return next((prefix for prefix in prefixes if sum(other.startswith(prefix) for other in names) == 1), name)

    return {shortest(name): value for name, value in zip(names, values.values(), strict=True)}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    """As a parameter in MLflow; the artifact `config.yaml` has every digit."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(runs: Sequence[Run], searched: Sequence[str]) -> str:
    """The best trials in Markdown, empty if there are none."""
    if not runs:
        return ""
    rows = [["trial", "EER %", *searched], ["---"] * (2 + len(searched))]
    for run in runs:
        eer = f"{100 * run.data.metrics[METRIC]:.2f}"
        rows.append([run.info.run_name.split()[0], eer, *(run.data.params.get(key, "") for key in searched)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
