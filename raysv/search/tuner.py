"""A search space in, a study out: Optuna proposes, what lags behind is stopped early, MLflow keeps everything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from raysv.config import Config
from raysv.corpus.loading import load_corpus
from raysv.corpus.sets import Corpus
from raysv.learning.checkpoint import versions
from raysv.learning.scratch import sweep
from raysv.learning.views import ViewBatches
from raysv.search import cluster
from raysv.search.autoscaling import NodeGroup
from raysv.search.catchup import catch_up
from raysv.search.confirmation import CONFIRMATION_FILE, conclude, write_confirmation
from raysv.search.nodes import code, prepare_nodes
from raysv.search.progress import Decoding
from raysv.search.publishing import publish
from raysv.search.snapshots import mend
from raysv.search.space import Space
from raysv.search.stages import (
    JOURNAL_FILE,
    OPTUNA_FILE,
    TRIALS_FOLDER,
    confirmation_stage,
    run_stage,
    search_stage,
)
from raysv.search.stopping import read_journal
from raysv.search.study import CONFIRM_FOLDER, TUNE_FOLDER, Study, driving, note_start, read_study, started
from raysv.search.trial import Job

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow keeps the results; no TensorBoard files beside it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that diverged reports no second objective
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
MANY_TRIALS = 1000  # from which on Tune's bookkeeping, which grows with them, must not be written as often as ever


def tune_settings(trials: int) -> dict[str, str]:
    """Environment of a driver. Killed, it has lost a second of bookkeeping, not ten; of very many trials, a twentieth
    of the time goes into it, which is Tune's own rule."""
    return TUNE_SETTINGS | {"TUNE_GLOBAL_CHECKPOINT_S": "1" if trials < MANY_TRIALS else "auto"}


def check_data(space: Space, tests: bool = False) -> Corpus:
    """Read, check and decode all that any trial of a space will need, before a cluster is asked for anything.

    Returns: the corpus that the most disturbed trials see.
    Raises: ValueError when data are not as they must be, or a batch cannot be formed.
    """
    loaded: dict[str, Corpus] = {}
    print("Reading and checking the data ...", flush=True)
    for config in _most_disturbed_first(space):
        key = _data_key(config)
        if key not in loaded:
            loaded[key] = load_corpus(config.data, config.augment, tests=tests, progress=Decoding())
        ViewBatches(config, loaded[key])
    corpus = next(iter(loaded.values()))
    for path, why in corpus.left_out.items():
        print(f"left out: {path}: {why}")
    return corpus


def _most_disturbed_first(space: Space) -> list[Config]:
    return sorted(space.corners(), key=lambda corner: corner.augment.strength, reverse=True)


def _data_key(config: Config) -> str:
    """What the corpus that a trial sees follows from."""
    return repr((config.data, config.augment.kinds))


def run_study(
    space: Space,
    folder: Path,
    corpus: Corpus,
    tracking_uri: str,
    *,
    resume: bool,
    tests: bool = False,
    earlier: Sequence[FrozenTrial] = (),
) -> Study:
    """Search a space, or go on searching it.

    Args:
        folder: of the study, made by `open_study`; on a cluster, on storage that every node reaches.
        corpus: what `check_data` found.
        tracking_uri: MLflow's store or server.
        tests: whether trials end with the test lists, as a single run does and a search must not.
        earlier: trials of other studies that a new search learns from, see `earlier_trials`.

    Raises: ValueError when the cluster has no room for a trial, a study cannot go on as it was left, or another driver
        runs it.
    """
    code()  # as it is now; processes that start later compare theirs
    with driving(folder):
        return _drive(space, folder, corpus, tracking_uri, resume, tests, earlier)


def _drive(
    space: Space,
    folder: Path,
    corpus: Corpus,
    tracking_uri: str,
    resume: bool,
    tests: bool,
    earlier: Sequence[FrozenTrial],
) -> Study:
    os.environ.update(tune_settings(space.search.trials))
    for record in (TUNE_FOLDER, CONFIRM_FOLDER) if resume else ():
        if told := mend(folder / record):
            print(told, flush=True)
    resume = resume and bool(read_study(folder).trials)  # broken off before its first trial, it starts anew
    _note_data(folder, corpus, resume)
    if resume:
        _check_records(folder)
    try:
        with cluster.connected() as (place, to_come):
            allotment = _allot(space, folder, resume, to_come)
            print(f"Ray      {place}: {allotment.describe(space.resources)}", flush=True)
            if allotment.now < allotment.concurrent_trials:
                print(f"         there is room for {allotment.now} now; the autoscaler is asked for more", flush=True)
            _prepare_nodes(space, corpus, tests)
            _note_tags(folder, _provenance(space, corpus) | {"raysv.resources": allotment.describe(space.resources)})
            confirms = _run_stages(space, folder, corpus, tracking_uri, allotment, resume, tests, earlier)
    finally:
        sweep()  # of a trial that was stopped in the middle of a checkpoint
    if confirms:
        _conclude(folder, corpus)
    study = read_study(folder)
    study.write(folder)
    catch_up(study, folder, tracking_uri)
    if space.ranges:
        publish(study, folder, tracking_uri)
    return study


def _run_stages(
    space: Space,
    folder: Path,
    corpus: Corpus,
    tracking_uri: str,
    allotment: cluster.Allotment,
    resume: bool,
    tests: bool,
    earlier: Sequence[FrozenTrial],
) -> bool:
    """The search, and then the runs that confirm what it found; returns whether it came to these."""
    kept, checked = str(folder / TRIALS_FOLDER), _checked(space, corpus)
    job = Job(space, allotment.gpus_per_worker, kept, checked, allotment.room, allotment.head, code(), tests)
    if not resume:
        _forget_confirmation(folder)
    study = read_study(folder)
    interrupted = False
    if not resume or study.unsearched or study.broken:
        stage = search_stage(space, folder, earlier)
        interrupted = run_stage(stage, job, folder, allotment.concurrent_trials, tracking_uri, resume=resume)
        study = read_study(folder)
    if not study.unconfirmed or interrupted:
        return False
    print(f"\n{study.table()}\n\n{_announce(study)}", flush=True)
    note_start(folder, candidates=[vars(candidate) for candidate in study.candidates])
    stage = confirmation_stage(space, folder, study.candidates)
    again = resume and bool(study.confirming)
    run_stage(stage, job, folder, allotment.concurrent_trials, tracking_uri, resume=again)
    return True


def _prepare_nodes(space: Space, corpus: Corpus, tests: bool) -> None:
    others = len(cluster.alive()) - 1
    if others:
        print(f"Nodes    {others} other(s) look at their code and data ...", flush=True)
        different = {_data_key(config): config for config in reversed(_most_disturbed_first(space))}
        prepare_nodes(list(different.values()), _checked(space, corpus), tests=tests)


def _forget_confirmation(folder: Path) -> None:
    """A search that starts anew, in the folder of one whose record was lost, has other winners."""
    note_start(folder, candidates=[], inconclusive="")
    (folder / CONFIRMATION_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / CONFIRM_FOLDER, ignore_errors=True)


def _announce(study: Study) -> str:
    names = ", ".join(candidate.name for candidate in study.candidates)
    count = study.space.search.confirm_seeds
    return f"Confirming {names} from {count} new seeds, to the end of {study.space.epochs} epochs each"


def _conclude(folder: Path, corpus: Corpus) -> None:
    """What the confirming runs came to, once all have ended."""
    study = read_study(folder)
    if study.unfinished:
        return
    try:
        confirmation = conclude(study.space, study.candidates, study.confirming, corpus.dev, len(study.trials))
        write_confirmation(confirmation, folder)
    except (OSError, ValueError) as error:
        note_start(folder, inconclusive=str(error))
        print(f"{error} The best trial of the search counts.", flush=True)


def _note_data(folder: Path, corpus: Corpus, resume: bool) -> None:
    """Refuse to go on with other data than the study started with: its trials could not be compared."""
    before = started(folder).get("data_hash") if resume else None
    if before and before != corpus.digest:
        raise ValueError(
            f"Training list, dev pairs or their recordings are not those that study {folder.name} started with (data "
            f"hash {corpus.digest} now, {before} then). Bring those back, or start a new study."
        )
    note_start(folder, data_hash=corpus.digest)


def _check_records(folder: Path) -> None:
    """Refuse to go on without the records of the search: Tune would swallow what is wrong and fail with less to say."""
    if not (folder / OPTUNA_FILE).is_file():
        raise ValueError(
            f"No file {folder / OPTUNA_FILE}, in which Optuna keeps what the study has tried. Bring it back, or start "
            "a new study."
        )
    read_journal(folder / JOURNAL_FILE)


def _note_tags(folder: Path, tags: dict[str, str]) -> None:
    """Keep what this driver's trials follow from, and say so where an earlier driver ran other code."""
    now = tags["raysv.git"]
    before = started(folder).get("tags", {}).get("raysv.git", now)
    if before != now:
        print(f"Code     {now} from now on; so far the study ran {before}. MLflow's tags follow.", flush=True)
    note_start(folder, tags=tags)


def _checked(space: Space, corpus: Corpus) -> dict[str, str]:
    """The digests by which trials open the corpus; none where they differ in their data, and each has to look."""
    return {} if any(key.startswith("data.") for key in space.ranges) else corpus.digests


def _allot(space: Space, folder: Path, resume: bool, to_come: Sequence[NodeGroup] = ()) -> cluster.Allotment:
    """What trials get; a study keeps the number of trials at a time that it was started with."""
    most = min(max(space.search.trials, space.confirming_runs), space.search.concurrent_trials or sys.maxsize)
    before = started(folder).get("concurrent_trials") if resume else None
    allotment = cluster.allot(space.resources, before or most, to_come)
    if before and allotment.concurrent_trials < before:
        raise ValueError(
            f"The study runs {before} trials at a time, but this cluster has room for {allotment.concurrent_trials}. "
            "Resume it where there is room."
        )
    note_start(folder, concurrent_trials=allotment.concurrent_trials)
    return allotment


def _provenance(space: Space, corpus: Corpus) -> dict[str, str]:
    """What a run follows from beside its configuration."""
    return {f"raysv.version.{name}": text for name, text in versions().items()} | {
        "raysv.git": git_revision(),
        "raysv.data_hash": corpus.digest,
        "raysv.left_out": str(len(corpus.left_out)),
        "raysv.seed": str(space.tree["training"]["seed"]),
        "raysv.speakers": str(len(corpus.train.speakers)),
    }


def git_revision() -> str:
    """The commit of the source that runs, with `+changes` where it differs from it; `unknown` outside a checkout."""
    source = Path(__file__).parent
    try:
        _git(source, "ls-files", "--error-unmatch", __file__)  # an environment may lie inside another checkout
        revision = _git(source, "rev-parse", "HEAD")
        return revision[:12] + ("+changes" if _git(source, "status", "--porcelain", "--", str(source.parent)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
