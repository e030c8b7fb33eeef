"""One configuration in, one trained encoder out.

    python -m raysv.train results/STUDY/best_config.yaml
    python -m raysv.train results/STUDY                            # the same: a study's best configuration
    python -m raysv.train 0123456789abcdef0123456789abcdef         # the configuration of an MLflow run
    python -m raysv.train best_config.yaml --epochs 100 --gpus-per-trial 8
    python -m raysv.train --resume results/RUN                     # go on with a run that was broken off

Trains through the same code as a trial of a study, and ends with the test lists. The encoder is in
results/RUN/checkpoint, ready for raysv.verify, and in MLflow the newest version of the model raysv-ecapa. The alias
`best` goes to it unless an earlier one of the same data has an EER on the dev pairs that is as low.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from raysv.config import parse_settings, read_yaml, with_values
from raysv.search.commands import door, fetch, python, shown
from raysv.search.mlflow_store import check, config_of_run, default_tracking_uri
from raysv.search.registering import MODEL, check_name, register
from raysv.search.space import Space, per_trial, space_from_dict
from raysv.search.study import BEST_FILE, Study, find_study, load_space, note_start, open_study, read_study, started
from raysv.search.tuner import check_data, run_study
from raysv.verification.metrics import INTERVAL_LEVEL


def main(arguments: list[str] | None = None) -> int:
    """Train one configuration.

    Returns: 0 when it was trained to its end, 1 when it failed, 2 for bad input, 130 if broken off.
    """
    parser = argparse.ArgumentParser(
        "raysv.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="a configuration (YAML), a study, or the id of an MLflow run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set any key otherwise")
    parser.add_argument("--epochs", type=int, help="train longer, or shorter, than the trial did")
    parser.add_argument("--name", help="of the run (default: train-SOURCE, numbered)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was broken off")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies and runs are kept")
    parser.add_argument("--workers-per-trial", type=int, metavar="N", help="DDP workers (resources.workers)")
    parser.add_argument("--gpus-per-trial", type=float, metavar="G", help="for all its workers, or a part of one GPU")
    parser.add_argument("--skip-bad-audio", action="store_true", help="leave out recordings that cannot be used")
    parser.add_argument("--register", metavar="NAME", help=f"of the model in MLflow's registry (default: {MODEL})")
    parser.add_argument("--no-register", dest="register", action="store_const", const="", help="register nothing")
    chosen = parser.parse_args(arguments)
    try:
        return _train(chosen)
    except (ValueError, OSError) as error:
        print(f"raysv.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped at once. What was computed is kept; --resume goes on with a run that had begun.")
        return 130


def _train(chosen: argparse.Namespace) -> int:
    if (chosen.source is None) == (chosen.resume is None):
        raise ValueError("Name what to train, or a run to --resume.")
    if chosen.register:
        check_name(chosen.register)
    if chosen.resume:
        placed = chosen.workers_per_trial is not None or chosen.gpus_per_trial is not None
        if chosen.set or chosen.epochs or chosen.name or chosen.skip_bad_audio or placed:
            raise ValueError("--resume goes on with a run as it was started; no other option fits but --register.")
        folder = find_study(chosen.results, chosen.resume)
        space, uri = load_space(folder), started(folder)["tracking_uri"]
        if space.ranges:
            raise ValueError(f"{folder.name} is a search. Go on with it: raysv.tune --resume {shown(folder)}")
        check(uri)
        corpus = check_data(space, tests=True)
    else:
        uri = default_tracking_uri(Path.cwd())
        check(uri)
        space = _read_source(chosen, uri)
        corpus = check_data(space, tests=True)
        folder = open_study(space, chosen.results, uri, chosen.name or _free_name(chosen.results, space.name))
        note_start(folder, register=MODEL if chosen.register is None else chosen.register)
    print(f"Training {folder.name} for {space.epochs} epochs")
    print(f"Data     {space.tree['data']['root']}: {corpus}\nResults  {folder}\nMLflow   {uri}", flush=True)
    study = run_study(space, folder, corpus, uri, resume=bool(chosen.resume), tests=True)
    model = started(folder).get("register", MODEL) if chosen.register is None else chosen.register
    return _conclude(study, folder, uri, model)


def _read_source(chosen: argparse.Namespace, uri: str) -> Space:
    """A space of one point: nothing is open in it, and it is tried once, to the end."""
    source = chosen.source
    settings = parse_settings(chosen.set) | per_trial(chosen.workers_per_trial, chosen.gpus_per_trial)
    if chosen.epochs is not None:
        settings["training.epochs"] = chosen.epochs
    if chosen.skip_bad_audio:
        settings["data.skip_bad_audio"] = True
    if re.fullmatch(r"[0-9a-f]{32}", source):
        tree, name = config_of_run(source, uri), f"run-{source[:8]}"
    elif Path(source).suffix in (".yaml", ".yml"):
        file = Path(source).absolute()
        tree, name = read_yaml(file), file.parent.name if file.name == BEST_FILE else file.stem
    else:
        folder = find_study(chosen.results, source)
        tree, name = read_study(folder).best_config(), folder.name
    once = {"search": {"trials": 1, "early_stopping": "none", "confirm": 0}}
    space = space_from_dict(with_values(tree, settings) | once, f"train-{name}")
    if space.ranges:
        raise ValueError(f"{source} leaves {', '.join(space.ranges)} open. Search it with raysv.tune, or --set them.")
    return space


def _free_name(results: Path, name: str) -> str:
    """The name, with a number where runs of that name were made before."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if not (results / free).exists())


def _conclude(study: Study, folder: Path, uri: str, model: str) -> int:
    """Put the encoder where it is easily found; print what it is worth and what to do with it."""
    run = study.best
    if study.unfinished:
        print(f"Broken off. Go on with:\n  {door('train')} --resume {shown(folder)}")
        return 130
    if run is None:
        print(f"Training failed: {', '.join(trial.reason for trial in study.trials)}", file=sys.stderr)
        return 1
    checkpoint = folder / "checkpoint"
    shutil.copytree(run.checkpoint, checkpoint, dirs_exist_ok=True)
    lists = [key.removesuffix("/eer") for key in run.metrics if key.endswith("/eer")]
    width = max(map(len, lists))
    print()
    for name in lists:
        print(f"{name.ljust(width)}   {_worded(run.metrics, name)}")
    print(f"\nEncoder  {checkpoint}", flush=True)
    if model:
        print(f"Model    {register(checkpoint, folder, run.trial_id, uri, model)}")
    print("\nNext:")
    if command := fetch(checkpoint):
        print(f"  {command}    # bring it here")
        print(f"  python -m raysv.verify {checkpoint.name} a.wav b.wav")
    else:
        print(f"  {python()} -m raysv.verify {shown(checkpoint)} a.wav b.wav")
    return 0


def _worded(metrics: Mapping[str, float], name: str) -> str:
    """What a list's metrics come to; dev pairs, which the encoder was watched on, have no interval."""
    parts = [f"EER {100 * metrics[f'{name}/eer']:5.2f} %"]
    start = f"{name}/min_dcf_"
    parts += [f"minDCF({key.removeprefix(start)}) {cost:.3f}" for key, cost in metrics.items() if key.startswith(start)]
    if f"{name}/eer_low" in metrics:
        low, high = (100 * metrics[f"{name}/eer_{end}"] for end in ("low", "high"))
        parts.append(f"{100 * INTERVAL_LEVEL:g} % interval of the EER {low:.1f} to {high:.1f} %")
    elif name != "dev":
        parts.append("no interval: too few speakers")
    return "   ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
