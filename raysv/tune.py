"""A search space in, a best configuration out.

    python -m raysv.tune search_spaces/demo.yaml
    python -m raysv.tune search_spaces/aam_supcon.yaml --set data.root=/corpora/cnceleb --set search.trials=60
    python -m raysv.tune search_spaces/demo.yaml --resume          # go on with the last study of this space
    python -m raysv.tune my_space.yaml --warm-start STUDY          # begin with what an earlier study has learned
    ray submit cluster/local.yaml raysv/tune.py -- search_spaces/aam_supcon.yaml

A study lands in results/STUDY/: best_config.yaml, trials.csv, confirmation.yaml, optuna.db and the trials' checkpoints.
MLflow's store is mlflow.db in this folder, or wherever MLFLOW_TRACKING_URI points.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from raysv.config import parse_settings
from raysv.corpus.sets import Corpus
from raysv.learning.views import ViewBatches
from raysv.search.catchup import catch_up
from raysv.search.commands import door, fetch, serve, shown
from raysv.search.mlflow_store import check, default_tracking_uri, runs_link
from raysv.search.page import REPORT_FILE
from raysv.search.publishing import publish
from raysv.search.space import Space, per_trial, read_space
from raysv.search.stages import EXPERIMENT
from raysv.search.study import (
    BEST_FILE,
    TRIALS_FILE,
    Study,
    driving,
    find_study,
    load_space,
    note_start,
    open_study,
    read_study,
    started,
)
from raysv.search.tuner import check_data, run_study
from raysv.search.warmstart import earlier_trials

SAMPLERS = {
    "tpe": "Optuna's TPE",
    "gp": "Optuna's Gaussian process",
    "quasirandom": "Sobol's sequence",
    "random": "chance",
    "grid": "every combination",
}
STOPPING = {"asha": "ASHA", "hyperband": "Hyperband", "median": "the median rule"}
DEFAULT_SPACE = Path("search_spaces/demo.yaml")


def main(arguments: list[str] | None = None) -> int:
    """Run a study.

    Returns: 0 when a best configuration was found, 1 when no trial ended well, 2 for bad input, 130 if broken off.
    """
    parser = argparse.ArgumentParser(
        "raysv.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", nargs="?", default=DEFAULT_SPACE, type=Path, help=f"YAML (default: {DEFAULT_SPACE})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set or open any key")
    parser.add_argument(
        "--confirm",
        type=int,
        metavar="K",
        help="configurations to train again from new seeds (0: none; search.confirm)",
    )
    parser.add_argument(
        "--warm-start", action="append", default=[], metavar="STUDY", help="learn from an earlier study's trials"
    )
    parser.add_argument("--name", help="of the study (default: the space's name and the time)")
    parser.add_argument("--resume", nargs="?", const="", metavar="STUDY", help="go on with a study (default: the last)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies are kept")
    parser.add_argument("--workers-per-trial", type=int, metavar="N", help="DDP workers (resources.workers)")
    parser.add_argument("--gpus-per-trial", type=float, metavar="G", help="for all its workers, or a part of one GPU")
    parser.add_argument("--skip-bad-audio", action="store_true", help="leave out recordings that cannot be used")
    parser.add_argument("--dry-run", action="store_true", help="read, check and tell what would be done; start nothing")
    chosen = parser.parse_args(arguments)
    try:
        return _tune(chosen)
    except (ValueError, OSError) as error:
        print(f"raysv.tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped at once. What was computed is kept; --resume goes on with a study that had begun.")
        return 130


def _tune(chosen: argparse.Namespace) -> int:
    resume = chosen.resume is not None
    if resume:
        options = {"--set": chosen.set, "--name": chosen.name, "--skip-bad-audio": chosen.skip_bad_audio}
        options |= {"--confirm": chosen.confirm is not None, "--warm-start": chosen.warm_start}
        options |= {
            "--workers-per-trial": chosen.workers_per_trial is not None,
            "--gpus-per-trial": chosen.gpus_per_trial is not None,
            "--dry-run": chosen.dry_run,
        }
        if given := [option for option, value in options.items() if value]:
            raise ValueError(f"--resume goes on with a study as it was started; {', '.join(given)} does not fit.")
        folder = find_study(chosen.results, chosen.resume or chosen.space.stem)
        space = load_space(folder)
        uri = started(folder)["tracking_uri"]
        study = read_study(folder)
        if not study.unfinished and not study.broken and not study.unconfirmed:
            print(f"Study {folder.name} is complete.")
            with driving(folder):  # what a driver may not have come to that was killed just before its end
                study.write(folder)
                catch_up(study, folder, uri)
                if space.ranges:
                    publish(study, folder, uri)
            return _conclude(study, folder, uri)
    else:
        settings = parse_settings(chosen.set) | per_trial(chosen.workers_per_trial, chosen.gpus_per_trial)
        if chosen.skip_bad_audio:
            settings["data.skip_bad_audio"] = True
        if chosen.confirm is not None:
            settings["search.confirm"] = chosen.confirm
        space = read_space(chosen.space, settings)
        uri = default_tracking_uri(Path.cwd())
    if not chosen.dry_run or uri.startswith("http"):  # a database is made where there is none
        check(uri)
    corpus = check_data(space)
    # broken off before its first trial, it starts anew, with what it was to know
    names = started(folder).get("warm_start", []) if resume and not study.trials else chosen.warm_start
    known = [earlier_trials(space, find_study(chosen.results, name), corpus.digest) for name in names]
    if chosen.dry_run:
        return _rehearse(space, (chosen.results / (chosen.name or f"{space.name}-TIME")).absolute(), uri, corpus)
    if not resume:
        folder = open_study(space, chosen.results, uri, chosen.name)
        note_start(folder, warm_start=[str(find_study(chosen.results, name)) for name in names])
    _introduce(space, folder, uri, corpus)
    for earlier in known:
        print(f"Knows    {earlier}", flush=True)
    trials = [trial for earlier in known for trial in earlier.trials]
    study = run_study(space, folder, corpus, uri, resume=resume, earlier=trials)
    return _conclude(study, folder, uri)


def _introduce(space: Space, folder: Path, uri: str, corpus: Corpus) -> None:
    searched = "\n         ".join(f"{key}: {span}" for key, span in space.ranges.items()) or "nothing, a single run"
    early, sampler = space.search.early_stopping, space.search.sampler
    stopping = "all to the end" if early == "none" else f"stopped early by {STOPPING[early]}"
    print(f"Study    {folder.name}: {space.search.trials} trials of up to {space.epochs} epochs, {stopping}")
    first = len(space.first_points())
    print(f"Proposes {SAMPLERS[sampler]}" + (f", after {first} published setting{'s' * (first > 1)}" if first else ""))
    if space.search.confirm and space.ranges:
        beside, seeds = space.reference(), space.search.confirm_seeds
        print(f"Confirms the best {space.search.confirm}, beside {beside}, from {seeds} new seeds")
    if space.second:
        print(f"Lowers   the EER and {space.second}")
    print(f"Searches {searched}")
    print(f"Data     {space.tree['data']['root']}: {corpus}")
    print(f"Results  {folder}\nMLflow   {uri}", flush=True)


def _rehearse(space: Space, folder: Path, uri: str, corpus: Corpus) -> int:
    """Tell what a study would do and take."""
    _introduce(space, folder, uri, corpus)
    configs = space.corners()
    search, resources = space.search, space.resources
    least = space.epochs if search.early_stopping == "none" else space.grace_epochs
    epochs = _span({search.trials * least, search.trials * space.epochs})
    if space.confirming_runs:
        epochs += f", and at most {space.confirming_runs * space.epochs} to confirm"
    print(f"Epochs   {epochs}; one is {_span({ViewBatches(config, corpus).steps for config in configs})} steps")
    crops = _span({-(-config.batch.size // resources.workers) * config.batch.views for config in configs})
    seconds = _span({config.batch.crop_seconds for config in configs})
    gpus = resources.gpus_per_worker
    device = "a GPU where the cluster has any" if gpus is None else f"{gpus:g} GPU" if gpus else "no GPU"
    workers = f"{resources.workers} worker{'s' if resources.workers > 1 else ''} a trial"
    print(f"Workers  {workers}, each with {resources.cpus_per_worker} CPU, {device}")
    print(f"Batch    {crops} crops of {seconds} s for each worker")
    print("\nNothing was started. Without --dry-run this study begins.")
    return 0


def _span(numbers: Collection[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _conclude(study: Study, folder: Path, uri: str) -> int:
    """Print what was found and what to do next."""
    print(f"\n{study.table()}\n")
    if study.unfinished:
        what = "trials" if study.unsearched else "confirming runs"
        print(f"Broken off with {study.unfinished} {what} to go. Go on with:")
        print(f"  {door('tune')} --resume {shown(folder)}")
        return 130
    if study.best is None:
        print(f"No trial ended well. The reasons are above and in {shown(folder / TRIALS_FILE)}", file=sys.stderr)
        return 1
    if study.front:
        print(f"Front of EER and {study.space.second}: {', '.join(trial.name for trial in study.front)}\n")
    if study.confirmation:
        print(f"Trained again from {len(study.confirmation.seeds)} new seeds:\n\n{study.confirmed_table()}\n")
        print(f"Best: {study.confirmation.verdict()}\n\nNext:")
    else:
        print(f"Best: {study.best.name}, EER {100 * study.best.eer:.2f} % on the dev pairs.\n\nNext:")
    print(f"  {door('train')} {shown(folder / BEST_FILE)}    # train it alone and test it")
    if command := fetch(folder / BEST_FILE):
        print(f"  {command}    # bring it here")
    if (report := folder / REPORT_FILE).is_file():
        print(f"  {fetch(report) or shown(report)}    # what was found, as a page for a browser")
    if uri.startswith("sqlite"):
        print(f"  {serve(uri)}    # then compare the trials at")
    print(f"  {runs_link(uri, EXPERIMENT, folder.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
