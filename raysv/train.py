"""One configuration in, one trained encoder out.

    python -m raysv.train results/STUDY/best_config.yaml
    python -m raysv.train results/STUDY                            # the same: a study's best configuration
    python -m raysv.train 0123456789abcdef0123456789abcdef         # the configuration of an MLflow run
    python -m raysv.train best_config.yaml --epochs 100 --set resources.workers=8

Trains through the same code as a trial of a study, and ends with the test lists. The encoder is in
results/RUN/checkpoint, ready for raysv.verify.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from raysv.config import parse_settings, read_yaml, with_values
from raysv.search.mlflow_store import check, config_of_run, default_tracking_uri
from raysv.search.space import Space, space_from_dict
from raysv.search.study import BEST_FILE, Study, find_study, open_study
from raysv.search.tuner import check_data, run_study
from raysv.search.wording import python, shown


def main(arguments: list[str] | None = None) -> int:
    """Train one configuration; 0 when it was trained to its end, 1 when it failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "raysv.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a configuration (YAML), a study, or the id of an MLflow run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set any key otherwise")
    parser.add_argument("--epochs", type=int, help="train longer, or shorter, than the trial did")
    parser.add_argument("--name", help="of the run (default: the source's name and the time)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies and runs are kept")
    parser.add_argument("--skip-bad-audio", action="store_true", help="leave out recordings that cannot be used")
    chosen = parser.parse_args(arguments)
    try:
        return _train(chosen)
    except (ValueError, OSError) as error:
        print(f"raysv.train: {error}", file=sys.stderr)
        return 2


def _train(chosen: argparse.Namespace) -> int:
    uri = default_tracking_uri(Path.cwd())
    check(uri)
    settings = parse_settings(chosen.set)
    if chosen.epochs is not None:
        settings["training.epochs"] = chosen.epochs
    if chosen.skip_bad_audio:
        settings["data.skip_bad_audio"] = True
    space = _read_source(chosen.source, chosen.results, uri, settings)
    print("Reading and checking the data ...", flush=True)
    corpus = check_data(space, tests=True)
    folder = open_study(space, chosen.results, chosen.name or _free_name(chosen.results, space.name))
    print(f"Training {chosen.source} for {space.epochs} epochs")
    print(f"Data     {space.tree['data']['root']}: {corpus}\nResults  {folder}\nMLflow   {uri}", flush=True)
    return _conclude(run_study(space, folder, corpus, uri, resume=False, tests=True), folder)


def _read_source(source: str, results: Path, uri: str, settings: dict[str, Any]) -> Space:
    """A space of one point: nothing is open in it, and it is tried once, to the end."""
    if re.fullmatch(r"[0-9a-f]{32}", source):
        tree, name = config_of_run(source, uri), f"run-{source[:8]}"
    elif Path(source).is_file():
        file = Path(source).absolute()
        tree, name = read_yaml(file), file.parent.name if file.name == BEST_FILE else file.stem
    else:
        study = find_study(results, source)
        if not (study / BEST_FILE).is_file():
            raise ValueError(f"Study {study.name} has no {BEST_FILE} yet: none of its trials has come to its end.")
        tree, name = read_yaml(study / BEST_FILE), study.name
    once = {"search": {"trials": 1, "early_stopping": "none"}}
    space = space_from_dict(with_values(tree, settings) | once, f"train-{name}")
    if space.ranges:
        raise ValueError(f"{source} leaves {', '.join(space.ranges)} open. Search it with raysv.tune, or --set them.")
    return space


def _free_name(results: Path, name: str) -> str:
    """The name, with a number where runs of that name were made before."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if not (results / free).exists())


def _conclude(study: Study, folder: Path) -> int:
    """Put the encoder where it is easily found; print what it is worth and what to do with it."""
    run = study.best
    if run is None:
        reasons = [trial.reason for trial in study.trials if trial.reason]
        print(f"Training failed: {', '.join(reasons) or 'it was broken off'}", file=sys.stderr)
        return 1
    checkpoint = folder / "checkpoint"
    shutil.copytree(run.checkpoint, checkpoint, dirs_exist_ok=True)
    lists = [key.removesuffix("/eer") for key in run.metrics if key.endswith("/eer")]
    width = max(map(len, lists))
    print()
    for name in lists:
        rates = {
            key.rpartition("_")[2]: value for key, value in run.metrics.items() if key.startswith(f"{name}/min_dcf")
        }
        costs = "   ".join(f"minDCF({prior}) {cost:.3f}" for prior, cost in rates.items())
        print(f"{name.ljust(width)}   EER {100 * run.metrics[f'{name}/eer']:5.2f} %   {costs}")
    print(f"\nEncoder  {checkpoint}\n\nNext:\n  {python()} -m raysv.verify {shown(checkpoint)} a.wav b.wav")
    return 0


if __name__ == "__main__":
    sys.exit(main())
