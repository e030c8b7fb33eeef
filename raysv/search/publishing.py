"""The end of a study: its page, in its folder and in MLflow."""

from __future__ import annotations

import logging
from pathlib import Path

from mlflow import MlflowClient

from raysv.search.cards import TRIAL_KIND
from raysv.search.confirmation import CONFIRMATION_FILE
from raysv.search.mlflow_store import KIND, STUDY, STUDY_ID, TRIAL, connect, experiment_id, search_runs
from raysv.search.page import REPORT_FILE, Report, make_report
from raysv.search.runs import BEST_TRIAL
from raysv.search.stages import EXPERIMENT
from raysv.search.standings import BEST
from raysv.search.study import BEST_FILE, Study, study_id
from raysv.search.wording import first_line

logger = logging.getLogger(__name__)


def publish(study: Study, folder: Path, tracking_uri: str) -> Path | None:
    """Write a study's page, and lay it with its figures beside the study's run in MLflow.

    A study that has ended well must not end in this: what goes wrong is told.

    Returns: the page; None where there is nothing to show.
    """
    try:
        report = make_report(study, folder)
        page = folder / REPORT_FILE
        page.write_text(report.page, encoding="utf-8")
    except Exception as error:
        logger.warning("The study's page could not be written: %s.", first_line(error))
        return None
    try:
        _upload(study, report, folder, tracking_uri)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the file system through
        logger.warning("The study's page could not be uploaded to MLflow: %s.", first_line(error))
    return page


def _crown(client: MlflowClient, experiment: str, study_tags: dict[str, str], winner: str) -> None:
    """Tag the trial that was confirmed as the best, and no other; no trial of the search need have been it."""
    parents = search_runs(client, experiment, study_tags)
    for parent in parents:
        if BEST_TRIAL in parent.data.tags:
            client.delete_tag(parent.info.run_id, BEST_TRIAL)
    for run in search_runs(client, experiment, study_tags | {KIND: TRIAL_KIND}):
        if run.info.run_name.split()[0] == winner:
            client.set_tag(run.info.run_id, BEST, "true")
            for parent in parents:
                client.set_tag(parent.info.run_id, BEST_TRIAL, run.data.tags[TRIAL])
        elif BEST in run.data.tags:
            client.delete_tag(run.info.run_id, BEST)


def _upload(study: Study, report: Report, folder: Path, tracking_uri: str) -> None:
    client = connect(tracking_uri)
    tags = {KIND: "study", STUDY: folder.name, STUDY_ID: study_id(folder)}
    experiment = experiment_id(tracking_uri, EXPERIMENT)
    if study.confirmation:
        _crown(client, experiment, tags, study.confirmation.winner.name)
    for run in search_runs(client, experiment, tags):
        for name in (REPORT_FILE, BEST_FILE, CONFIRMATION_FILE):
            if (folder / name).is_file():
                client.log_artifact(run.info.run_id, str(folder / name))
        for name, figure in report.figures.items():
            client.log_figure(run.info.run_id, figure, f"figures/{name}.png")
