"""A search space in, a best configuration out.

    python -m raysv.tune search_spaces/demo.yaml
    python -m raysv.tune search_spaces/aam_supcon.yaml --set data.root=/corpora/cnceleb --set search.trials=60
    python -m raysv.tune search_spaces/demo.yaml --resume          # go on with the last study of this space
    ray submit cluster/local.yaml raysv/tune.py -- search_spaces/aam_supcon.yaml

A study lands in results/STUDY/: best_config.yaml, trials.csv, optuna.db and the trials' checkpoints. MLflow's store is
mlflow.db in this folder, or wherever MLFLOW_TRACKING_URI points.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from raysv.config import parse_settings
from raysv.corpus.sets import Corpus
from raysv.search.mlflow_store import check, default_tracking_uri, runs_link
from raysv.search.space import Space, read_space
from raysv.search.study import BEST_FILE, TRIALS_FILE, Study, find_study, load_space, open_study, read_study, started
from raysv.search.tuner import EXPERIMENT, check_data, run_study
from raysv.search.wording import python, shown

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
    parser.add_argument("--name", help="of the study (default: the space's name and the time)")
    parser.add_argument("--resume", nargs="?", const="", metavar="STUDY", help="go on with a study (default: the last)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies are kept")
    parser.add_argument("--skip-bad-audio", action="store_true", help="leave out recordings that cannot be used")
    chosen = parser.parse_args(arguments)
    try:
        return _tune(chosen)
    except (ValueError, OSError) as error:
        print(f"raysv.tune: {error}", file=sys.stderr)
        return 2


def _tune(chosen: argparse.Namespace) -> int:
    resume = chosen.resume is not None
    if resume:
        if chosen.set or chosen.skip_bad_audio or chosen.name:
            raise ValueError(
                "--resume goes on with a study as it was started; --set, --name, --skip-bad-audio do not fit."
            )
        folder = find_study(chosen.results, chosen.resume or chosen.space.stem)
        space = load_space(folder)
        uri = started(folder)["tracking_uri"]
        study = read_study(folder)
        if not study.unfinished and not study.broken:
            print(f"Study {folder.name} is complete.")
            study.write(folder)
            return _conclude(study, folder, uri)
    else:
        settings = parse_settings(chosen.set)
        if chosen.skip_bad_audio:
            settings["data.skip_bad_audio"] = True
        space = read_space(chosen.space, settings)
        uri = default_tracking_uri(Path.cwd())
    check(uri)
    corpus = check_data(space)
    if not resume:
        folder = open_study(space, chosen.results, uri, chosen.name)
    _introduce(space, folder, uri, corpus)
    study = run_study(space, folder, corpus, uri, resume=resume)
    return _conclude(study, folder, uri)


def _introduce(space: Space, folder: Path, uri: str, corpus: Corpus) -> None:
    searched = "\n         ".join(f"{key}: {span}" for key, span in space.ranges.items()) or "nothing, a single run"
    stopping = "stopped early by ASHA" if space.search.early_stopping == "asha" else "all to the end"
    print(f"Study    {folder.name}: {space.search.trials} trials of up to {space.epochs} epochs, {stopping}")
    print(f"Searches {searched}")
    print(f"Data     {space.tree['data']['root']}: {corpus}")
    print(f"Results  {folder}\nMLflow   {uri}", flush=True)


def _conclude(study: Study, folder: Path, uri: str) -> int:
    """Print what was found and what to do next."""
    print(f"\n{study.table()}\n")
    if study.unfinished:
        print(f"Broken off with {study.unfinished} trials to go. Go on with:")
        print(f"  {python()} -m raysv.tune --resume {shown(folder)}")
        return 130
    if study.best is None:
        print(f"No trial ended well. The reasons are above and in {shown(folder / TRIALS_FILE)}", file=sys.stderr)
        return 1
    print(f"Best: {study.best.name}, EER {100 * study.best.eer:.2f} % on the dev pairs.\n\nNext:")
    print(f"  {python()} -m raysv.train {shown(folder / BEST_FILE)}    # train it alone and test it")
    if uri.startswith("sqlite"):
        print(f"  {python()} -m mlflow server --backend-store-uri {shlex.quote(uri)}    # then compare the trials at")
    print(f"  {runs_link(uri, EXPERIMENT, folder.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
