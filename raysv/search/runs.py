"""A study's runs in MLflow: one for each trial, below the one of the study."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from raysv.config import dump_yaml, flatten, with_values
from raysv.learning.checkpoint import SCORES, TRAINING_STATE, describe_checkpoint
from raysv.learning.keeping import epoch_folder
from raysv.search.cards import TRIAL_KIND, StudyCard, TrialCard
from raysv.search.figures import det_figure, read_det
from raysv.search.mlflow_store import CONFIG_FILE, KIND, STUDY, STUDY_ID, TRIAL, connect, experiment_id, search_runs
from raysv.search.results import METRIC, NOTICE, TIME, metrics_by_epoch
from raysv.search.standings import BEST, OUTCOME, Ended, Standings
from raysv.search.study import SPACE_FILE, started
from raysv.search.wording import markdown, show_value

ERROR, BEST_TRIAL = "raysv.error", "raysv.best_trial"  # tags
CHECKPOINT, COMPUTED = "raysv.checkpoint", "raysv.computed"  # the best one's folder; device and format
WRITTEN = "raysv.written"  # the last thing that is told of a trial: all of it is there
NOTICED = "raysv.notice"  # what a trial met with and mended
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "error": "FAILED"}  # KILLED would show the same cross as FAILED
NOT_UPLOADED = (TRAINING_STATE, SCORES)  # large, and only needed to go on training where the checkpoint lies
MOST_PARAMS = 100  # that one call may log
SEED = "training.seed"  # a confirming run has another than its study
PARAM_DIGITS = 6  # the artifact `config.yaml` has every digit
RANKED = 5  # trials in the study's description


@dataclass
class _Known:
    """What MLflow is known to hold of a trial.

    Attributes:
        curve: EER by epoch.
        checkpoints: EER and folder of each that was told of.
    """

    run_id: str
    params: set[str]
    curve: dict[int, float] = field(default_factory=dict)
    checkpoints: list[tuple[float, str]] = field(default_factory=list)


class StudyRuns:
    """A study's runs in MLflow. Everything may be done twice, with `recover` in between where it failed, and leaves
    MLflow as if done once.
    """

    def __init__(self, card: StudyCard) -> None:
        self._card = card
        self._tags: dict[str, str] = {}
        self._trials: dict[str, _Known] = {}
        self._standings: Standings | None = None  # None: to be looked up
        self._summary: dict[str, float] = {}
        self._hours_before, self._since = 0.0, time.monotonic()

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self._card.tracking_uri)

    def recover(self) -> None:
        """Rely on nothing remembered: an entry failed, of which only the reply may be lost, or somebody removed a run.

        Raises: whatever MLflow's client does when there is no answer.
        """
        self._trials, self._standings, self._summary = {}, None, {}
        self._client.search_experiments(max_results=1)

    def open(self) -> None:
        """Find the study's run or make it; its tags are those of this driver."""
        self._experiment = experiment_id(self._card.tracking_uri, self._card.experiment)
        self._tags = self._card.tags | (started(self._card.folder).get("tags", {}) if self._card.folder else {})
        parent = self._find({KIND: "study"}) or self._create(
            self._card.name, {KIND: "study", "mlflow.note.content": self._card.description}
        )
        self._parent: str = parent.info.run_id
        self._hours_before, self._since = parent.data.metrics.get("hours", 0.0), time.monotonic()
        self._client.log_batch(self._parent, tags=_run_tags(self._tags))
        self._client.update_run(self._parent, status="RUNNING")
        self._client.log_text(self._parent, self._card.space, SPACE_FILE)

    def start(self, card: TrialCard) -> None:
        """The run of a trial that starts, or starts again: its configuration, and no outcome yet."""
        known = self._known(card)
        self._look_up().ended.pop(card.trial_id, None)
        tree, values = self._resolved(card)
        params = [Param(key, show_value(values[key], PARAM_DIGITS)) for key in values if key not in known.params]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(known.run_id, params=params[first : first + MOST_PARAMS])
        known.params |= {param.key for param in params}
        header = f"{card.name} ({card.trial_id}) of {self._card.name}"
        self._client.log_text(known.run_id, dump_yaml(tree | {"resources": self._card.resources}, header), CONFIG_FILE)
        own = {OUTCOME: "running", ERROR: "", WRITTEN: ""}
        own |= {"raysv.seed": str(values[SEED])} if SEED in values else {}
        self._client.log_batch(known.run_id, tags=_run_tags(self._tags | own))
        self._client.update_run(known.run_id, status="RUNNING")

    def _resolved(self, card: TrialCard) -> tuple[dict[str, Any], dict[str, Any]]:
        """A trial's full tree, and the same by dotted keys with what it comes to."""
        tree = with_values(self._card.base, card.values)
        return tree, flatten(tree) | (self._card.resolve(tree) if self._card.resolve else {})

    def add_result(self, card: TrialCard, result: Mapping[str, Any]) -> None:
        """The metrics of an epoch, and of epochs before it that were trained while no driver listened."""
        known, epochs, now = self._known(card), metrics_by_epoch(result), int(1000 * time.time())
        # an epoch that was trained again, on another machine, may have come to another value
        new = (step for step, told in epochs.items() if known.curve.get(step) != told.get(METRIC, math.inf))
        for step in sorted(new):
            metrics = [Metric(key, value, now, step) for key, value in epochs[step].items()]
            self._client.log_batch(known.run_id, metrics=metrics)
            known.curve[step] = epochs[step].get(METRIC, math.inf)
        if result.get(NOTICE):
            self._client.set_tag(known.run_id, NOTICED, result[NOTICE])
        folder = str(result.get("checkpoint_path") or "")
        if folder and METRIC in result:
            before = (eer for step, eer in known.curve.items() if step < result[TIME])
            if result[METRIC] < min(before, default=math.inf):  # of equals the first is best, as for `keep_checkpoint`
                self._client.set_tag(known.run_id, CHECKPOINT, folder)
            known.checkpoints.append((float(result[METRIC]), folder))

    def finish(self, card: TrialCard, end: str, reason: str) -> None:
        """How a trial ended, and why if it went wrong."""
        known = self._known(card)
        self._client.log_batch(known.run_id, tags=_run_tags({OUTCOME: end, ERROR: reason[:5000]}))
        self._client.set_terminated(known.run_id, STATUS[end])
        last = known.curve[max(known.curve)] if known.curve else math.inf
        _, values = self._resolved(card)
        searched = {key: show_value(values[key], PARAM_DIGITS) for key in self._card.searched if key in values}
        name = card.name.split()[0]
        self._look_up().ended[card.trial_id] = Ended(known.run_id, card.trial_id, name, end, last, searched)

    def upload(self, card: TrialCard, report: Path | None = None) -> None:
        """The files of a trial that ended: best checkpoint, DET curve, and the report of an error.

        An entry of its own: a server may refuse large files, and the trial ended all the same.
        """
        known = self._known(card)
        if report and report.is_file():
            self._client.log_artifact(known.run_id, str(report))
        if best := _best_kept(known):
            self._client.set_tag(known.run_id, CHECKPOINT, str(best))
            self._client.set_tag(known.run_id, COMPUTED, describe_checkpoint(best)[1]["computed"])
            self._upload(known.run_id, best, card.name)
        self._client.set_tag(known.run_id, WRITTEN, "true")

    def summarise(self) -> None:
        """How the search stands, on the study's run: counts and the best EER over time, a table of the best trials."""
        if self._card.kind != TRIAL_KIND:
            return
        standings = self._look_up()
        counts, ranked = standings.counts(), standings.ranked(RANKED)
        values = {f"trials_{end}": float(count) for end, count in counts.items()}
        tags = {"mlflow.note.content": self._note(ranked)}
        if ranked:
            values["best_eer"] = ranked[0].eer
            tags[BEST_TRIAL] = ranked[0].trial_id
        if values == self._summary:
            return
        now, step = int(1000 * time.time()), sum(counts.values())
        hours = self._hours_before + (time.monotonic() - self._since) / 3600
        metrics = [Metric(key, value, now, step) for key, value in (values | {"hours": hours}).items()]
        self._client.log_batch(self._parent, metrics=metrics, tags=_run_tags(tags))
        best = {trial.run_id for trial in ranked[:1]}
        for run_id in standings.marked - best:
            self._client.delete_tag(run_id, BEST)
        for run_id in best - standings.marked:
            self._client.set_tag(run_id, BEST, "true")
        standings.marked, self._summary = best, values

    def close(self, trial_ids: Iterable[str]) -> None:
        """The end of a driver: trials it leaves unfinished are KILLED, those that Tune has forgotten are removed.

        A driver that was killed may have made a trial that Tune had not noted yet: another took its place.
        """
        ours, unfinished = set(trial_ids), False
        for run in self._search({KIND: self._card.kind}):
            if run.data.tags[TRIAL] not in ours:  # Tune forgot it in a kill; MLflow keeps it in its trash
                self._client.delete_run(run.info.run_id)
            elif run.data.tags.get(OUTCOME) == "running":
                unfinished = True
                self._client.set_terminated(run.info.run_id, "KILLED")
        self._client.set_terminated(self._parent, "KILLED" if unfinished else "FINISHED")

    def _known(self, card: TrialCard) -> _Known:
        """A trial's run, found by the trial's id or made, and what it holds."""
        if card.trial_id not in self._trials:
            run_ids = self._look_up().run_ids
            if card.trial_id in run_ids:
                run = self._client.get_run(run_ids[card.trial_id])
                curve = self._client.get_metric_history(run.info.run_id, METRIC)
            else:
                tags = {KIND: self._card.kind, TRIAL: card.trial_id}
                run = self._create(card.name, {"mlflow.parentRunId": self._parent, OUTCOME: "running"} | tags)
                curve, run_ids[card.trial_id] = [], run.info.run_id
            best = run.data.tags.get(CHECKPOINT)
            self._trials[card.trial_id] = _Known(
                run.info.run_id,
                params=set(run.data.params),
                curve={point.step: point.value for point in curve},
                checkpoints=[(min(point.value for point in curve), best)] if best and curve else [],
            )
        return self._trials[card.trial_id]

    def _look_up(self) -> Standings:
        """This study's trials in MLflow: asked for once, as long as no entry fails."""
        if self._standings is None:
            self._standings = Standings(self._search({KIND: self._card.kind}), self._card.searched)
        return self._standings

    @property
    def _of_study(self) -> dict[str, str]:
        return {STUDY: self._card.name, STUDY_ID: self._card.study_id or self._card.name}

    def _create(self, name: str, tags: dict[str, str]) -> Run:
        return self._client.create_run(self._experiment, tags=self._of_study | tags, run_name=name)

    def _search(self, tags: dict[str, str]) -> list[Run]:
        return search_runs(self._client, self._experiment, self._of_study | tags)

    def _find(self, tags: dict[str, str]) -> Run | None:
        return next(iter(self._search(tags)), None)

    def _upload(self, run_id: str, folder: Path, name: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in NOT_UPLOADED:
                self._client.log_artifact(
                    run_id, str(file), str(Path("best_checkpoint", file.parent.relative_to(folder)))
                )
        if (folder / "det.csv").is_file():
            self._client.log_figure(run_id, det_figure({name: read_det(folder / "det.csv")}), "det.png")

    def _note(self, best: list[Ended]) -> str:
        """What the study searches, and its best trials if there are any."""
        keys = self._card.searched
        rows = [
            [trial.name, f"{100 * trial.eer:.2f}", *(trial.searched.get(key, "") for key in keys)] for trial in best
        ]
        table = markdown(["trial", "EER %", *keys], rows) if rows else ""
        return "\n\n".join(filter(None, (self._card.description, table)))


def _best_kept(known: _Known) -> Path | None:
    """Of a trial's checkpoints that are there, the one of its lowest EER: told of, or beside one that was."""
    told = {Path(folder): eer for eer, folder in known.checkpoints}
    beside = {
        epoch_folder(folder.parent, epoch): eer
        for folder in list(told)[-1:]
        for epoch, eer in sorted(known.curve.items())
    }
    there = {folder: eer for folder, eer in (beside | told).items() if folder.is_dir()}
    return min(there, key=there.__getitem__, default=None)


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(*tag) for tag in tags.items()]
