"""What MLflow missed, written from Tune's record: an outage may outlast a study."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities import Run

from raysv.search.cards import CONFIRMING, TRIAL_KIND, TrialCard
from raysv.search.mlflow_store import KIND, STUDY, STUDY_ID, TRIAL, connect, experiment_id, search_runs
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC
from raysv.search.runs import WRITTEN, StudyRuns
from raysv.search.stages import EXPERIMENT, study_card
from raysv.search.standings import OUTCOME
from raysv.search.study import Study, study_id
from raysv.search.wording import first_line

logger = logging.getLogger(__name__)


def catch_up(study: Study, folder: Path, tracking_uri: str) -> None:
    """Write to MLflow the trials whose runs are missing there, or are not written to their end.

    A study that has ended well must not end in this: what goes wrong is told.
    """
    try:
        for kind, records in ((TRIAL_KIND, study.trials), (CONFIRMING, study.confirming)):
            if missed := _missed(kind, records, folder, tracking_uri):
                _write(kind, missed, records, study, folder, tracking_uri)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the file system through
        logger.warning(
            "MLflow may miss trials of the study: %s. Once it answers, --resume of the study writes them.",
            first_line(error),
        )


def _missed(kind: str, records: Sequence[TrialRecord], folder: Path, tracking_uri: str) -> dict[TrialRecord, bool]:
    """The trials whose runs do not tell their end, and whether each has a run with its configuration."""
    tags = {KIND: kind, STUDY: folder.name, STUDY_ID: study_id(folder)}
    runs = search_runs(connect(tracking_uri), experiment_id(tracking_uri, EXPERIMENT), tags)
    there = {run.data.tags[TRIAL]: run for run in runs}
    ended = {record: there.get(record.trial_id) for record in records if record.outcome != "unfinished"}
    return {
        record: run is not None and WRITTEN in run.data.tags for record, run in ended.items() if not _tells(run, record)
    }


def _tells(run: Run | None, record: TrialRecord) -> bool:
    if run is None or run.data.tags.get(OUTCOME) != record.outcome or run.data.tags.get(WRITTEN) != "true":
        return False
    return not record.epoch or run.data.metrics.get(METRIC) == record.eer


def _write(
    kind: str,
    missed: Mapping[TrialRecord, bool],
    records: Sequence[TrialRecord],
    study: Study,
    folder: Path,
    tracking_uri: str,
) -> None:
    print(f"MLflow missed the end of {len(missed)} of {len(records)} trials; they are written now.", flush=True)
    runs = StudyRuns(study_card(kind, study.space, folder, tracking_uri))
    runs.open()
    for record, has_started in missed.items():
        card = TrialCard.named(record.name, record.trial_id, record.values)
        if not has_started:  # otherwise its tags say which code trained it
            runs.start(card)
        if record.epoch:
            runs.add_result(card, record.metrics)
        runs.finish(card, record.outcome, record.reason)
        runs.upload(card)
    runs.close([record.trial_id for record in records])
    runs.summarise()
