"""What Tune runs at one go: the search, and then the confirmation of what it found."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from optuna.trial import FrozenTrial
from ray.tune.schedulers import TrialScheduler

from raysv.search.cards import CONFIRMING, TRIAL_KIND, StudyCard
from raysv.search.confirmation import SEED, Candidate, points, seeds
from raysv.search.faults import CommonFault
from raysv.search.progress import Progress
from raysv.search.proposals import OptunaProposals
from raysv.search.ranges import Range
from raysv.search.results import METRIC
from raysv.search.samplers import make_sampler
from raysv.search.snapshots import Spare, await_clock, forget_staging, remove_spares
from raysv.search.space import Space
from raysv.search.stopping import make_stopping
from raysv.search.study import CONFIRM_FOLDER, SPACE_FILE, TUNE_FOLDER, started
from raysv.search.tracking import MLflowTracking
from raysv.search.trial import Job, run_trial
from raysv.speech.augmentation import recipe

EXPERIMENT = "raysv"  # of MLflow
OPTUNA_FILE, JOURNAL_FILE, TRIALS_FOLDER = "optuna.db", "stopping.jsonl", "trials"  # below the study's folder


@dataclass(frozen=True)
class Stage:
    """Trials of one kind.

    Attributes:
        tune_folder: where Tune keeps its record, below the study's folder.
        kind: of its runs in MLflow.
        study_name: in Optuna's storage.
        proposals: makes what proposes; it opens Optuna's storage, so not before the stage starts anew.
        fresh: files that a driver may have left which was killed before its first trial.
    """

    tune_folder: str
    kind: str
    trials: int
    study_name: str
    proposals: Callable[[], OptunaProposals]
    stopping: TrialScheduler | None = None
    objectives: int = 1
    fresh: tuple[str, ...] = ()


def search_stage(space: Space, folder: Path, earlier: Sequence[FrozenTrial] = ()) -> Stage:
    """The search: Optuna proposes, and what lags behind is stopped early.

    Args:
        earlier: trials of other studies that the sampler learns from.
    """
    search = space.search
    return Stage(
        TUNE_FOLDER,
        TRIAL_KIND,
        search.trials,
        folder.name,
        functools.partial(
            OptunaProposals,
            space.ranges,
            epochs=space.epochs,
            storage=_storage(folder),
            study_name=folder.name,
            second=space.second,
            points=space.first_points(),
            earlier=earlier,
            sampler=make_sampler(search.sampler, space.ranges, search.seed),
        ),
        make_stopping(
            search.early_stopping,
            folder / JOURNAL_FILE,
            epochs=space.epochs,
            grace_epochs=space.grace_epochs,
            reduction_factor=search.reduction_factor,
        ),
        objectives=2 if space.second else 1,
        fresh=(OPTUNA_FILE, JOURNAL_FILE),
    )


def confirmation_stage(space: Space, folder: Path, chosen: Sequence[Candidate]) -> Stage:
    """The confirmation: the chosen configurations once for each new seed, all of them to the end."""
    again = points(space, chosen)
    ranges = space.ranges | {SEED: Range("choice", tuple(seeds(space)))}
    return Stage(
        CONFIRM_FOLDER,
        CONFIRMING,
        len(again),
        f"{folder.name}, confirmation",
        functools.partial(
            OptunaProposals,
            ranges,
            epochs=space.epochs,
            storage=_storage(folder),
            study_name=f"{folder.name}, confirmation",
            points=again,
            sampler=make_sampler("random", ranges, space.search.seed),
        ),
    )


def run_stage(stage: Stage, job: Job, folder: Path, concurrent: int, tracking_uri: str, *, resume: bool) -> bool:
    """Run a stage to its end, or go on with it.

    Returns: whether it was interrupted: the first Ctrl-C ends a stage in order.
    Raises: KeyboardInterrupt at the second one.
    """
    trainable = ray.tune.with_resources(functools.partial(run_trial, job=job), job.trial_resources)
    if resume:
        await_clock(folder / stage.tune_folder)
        forget_staging(folder / stage.tune_folder)
        tuner = ray.tune.Tuner.restore(str(folder / stage.tune_folder), trainable, resume_errored=True)
    else:
        remove_spares(folder / stage.tune_folder)
        for remains in stage.fresh:
            (folder / remains).unlink(missing_ok=True)
        _forget(folder, stage.study_name)
        tuner = make_tuner(stage, trainable, job.space, folder, concurrent, tracking_uri)
    before = signal.getsignal(signal.SIGINT)
    try:
        tuner.fit()
        return signal.getsignal(signal.SIGINT) is before  # Tune puts its own there, until the first Ctrl-C
    finally:  # left there, the next stage's would hand a second Ctrl-C on to it
        signal.signal(signal.SIGINT, before)


def make_tuner(
    stage: Stage, trainable: Any, space: Space, folder: Path, concurrent: int, tracking_uri: str
) -> ray.tune.Tuner:
    """Tune for a stage that starts."""
    single = stage.trials == 1
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            # with two objectives only the search knows of them; early stopping looks at the EER, and is off then
            metric=None if stage.objectives > 1 else METRIC,
            mode=None if stage.objectives > 1 else "min",
            num_samples=stage.trials,
            max_concurrent_trials=concurrent,
            search_alg=stage.proposals(),
            scheduler=stage.stopping,
            reuse_actors=True,  # the next trial gets a process, or a team of them, that has started already
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=stage.tune_folder,
            storage_path=str(folder),
            failure_config=ray.tune.FailureConfig(max_failures=space.search.retries),
            callbacks=[
                MLflowTracking(study_card(stage.kind, space, folder, tracking_uri)),
                Progress(stage.trials, space.epochs, folder / TRIALS_FOLDER, single=single, kind=stage.kind),
                CommonFault(),
                Spare(folder / stage.tune_folder),
            ],
            verbose=0,
        ),
    )


def _forget(folder: Path, study_name: str) -> None:
    """Remove what a driver proposed that was killed before Tune had noted a trial: it would stand before our points."""
    if (folder / OPTUNA_FILE).is_file():
        with contextlib.suppress(KeyError):
            optuna.delete_study(study_name=study_name, storage=_storage(folder))


def _storage(folder: Path) -> str:
    return f"sqlite:///{folder / OPTUNA_FILE}"


def study_card(kind: str, space: Space, folder: Path, tracking_uri: str) -> StudyCard:
    """What MLflow is to know of a study and of its runs of a kind."""
    searched = "\n".join(f"- `{key}`: {span}" for key, span in space.ranges.items()) or "Nothing: a single run."
    count = f"{space.search.trials} trials" if space.search.trials > 1 else "1 trial"
    return StudyCard(
        tracking_uri,
        name=folder.name,
        experiment=EXPERIMENT,
        kind=kind,
        base=space.tree,
        resources=dataclasses.asdict(space.resources),
        space=(folder / SPACE_FILE).read_text(encoding="utf-8"),
        searched=list(space.ranges),
        epochs=space.epochs,
        study_id=started(folder).get("id", ""),
        folder=folder,
        resolve=_resolved,
        description=f"{count} of {space.epochs} epochs, searching\n\n{searched}",
    )


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """What a trial's dial of augmentation comes to."""
    return {f"recipe.{name}": value for name, value in vars(recipe(tree["augment"]["strength"])).items()}


def _trial_id(trial: Any) -> str:
    """Folders of trials are named by their id alone: a resumed trial must find its own again."""
    return str(trial.trial_id)
