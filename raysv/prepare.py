"""A corpus folder in, lists out, and the `data:` section that reads them.

    python -m raysv.prepare cnceleb /corpora/CN-Celeb_flac
    python -m raysv.prepare voxceleb /corpora/voxceleb1 --pairs veri_test2.txt
    python -m raysv.prepare kaldi /data/train                # wav.scp and utt2spk
    python -m raysv.prepare folder /recordings               # a folder per speaker
    python -m raysv.prepare synthetic voices                 # the embedded corpus, to look at

Speakers for the dev pairs are held out of training where the corpus has no dev part; speakers of test pairs too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from raysv.config import dump_yaml
from raysv.corpus import layouts
from raysv.corpus.checks import refuse_outside
from raysv.corpus.synthetic import write_corpus
from raysv.corpus.utterances import Utterance, lies_below, read_pairs, read_utterances

LAYOUTS = {
    "voxceleb": layouts.voxceleb,
    "cnceleb": layouts.cnceleb,
    "kaldi": layouts.kaldi,
    "folder": layouts.plain,
}


def main(arguments: list[str] | None = None) -> int:
    """Write the lists of a corpus and print what it holds; 2 when that cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        data = _synthetic(options) if options.layout == "synthetic" else _prepare(options)
    except (ValueError, OSError) as error:
        print(f"raysv.prepare: {error}", file=sys.stderr)
        return 2
    print(f"\nFor a search space or a config:\n\n{dump_yaml({'data': data})}")
    return 0


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    folder: Path = options.folder
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}. Name the folder that holds the corpus.")
    names = ["dev", *(path.stem for path in options.pairs)]
    if len(set(names)) < len(names):
        raise ValueError(f"--pairs: lists are known by their file names, which must differ: {', '.join(names)}.")
    test_pairs = {path.stem: read_pairs(path) for path in options.pairs}
    generator = np.random.default_rng(options.seed)
    found = LAYOUTS[options.layout](folder)
    lists = layouts.complete(found, test_pairs, options.dev_speakers, options.min_utterances, generator)
    if options.durations:
        lists = layouts.with_durations(lists)
    output = options.output or folder
    if (output / "train.csv").exists() and not options.overwrite:
        raise ValueError(f"{output} has lists already. Name another --output, or --overwrite them.")
    spoken = [item.path for item in (*lists.train, *lists.dev, *lists.test)]
    if not options.outside_root:
        refuse_outside(spoken, folder, "Name the folder above them, or allow it with --outside-root.")
    data = layouts.write_lists(lists, output, folder)
    if not all(lies_below(path, folder) for path in spoken):
        data["outside_root"] = True
    _describe("train", lists.train)
    _describe("dev", lists.dev, {"dev": lists.dev_pairs})
    _describe("test", lists.test, lists.test_pairs)
    for note in lists.notes:
        print(note)
    if not lists.test_pairs:
        print("No test pairs: name lists with --pairs, which also keeps their speakers out of training.")
    print("Name noise and rooms below, or keep augment.kinds to babble, which other training speakers can provide.")
    return data | {"noise": "", "rir": ""}


def _synthetic(options: argparse.Namespace) -> dict[str, Any]:
    write_corpus(options.folder, options.seed)
    _describe("train", read_utterances(options.folder / "train.csv", options.folder))
    return {"root": str(options.folder.absolute())}


def _describe(part: str, utterances: list[Utterance], pairs: dict[str, Any] | None = None) -> None:
    durations = [item.duration_s for item in utterances if item.duration_s is not None]
    hours = f", {sum(durations) / 3600:.1f} hours" if utterances and len(durations) == len(utterances) else ""
    compared = "".join(f", {len(lines)} pairs ({name})" for name, lines in (pairs or {}).items())
    speakers = len({item.speaker for item in utterances})
    print(f"{part + ':':6} {speakers} speakers, {len(utterances)} utterances{hours}{compared}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "raysv.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("layout", choices=[*LAYOUTS, "synthetic"], help="folder: a folder per speaker; synthetic: write that corpus")
    add("folder", type=Path, help="the corpus; becomes data.root")
    add("--output", type=Path, help="folder for the lists instead of the corpus folder")
    add("--pairs", type=Path, nargs="+", default=[], help="test pair lists; their speakers stay out of training")
    add(
        "--dev-speakers",
        type=int,
        default=20,
        help="to hold out if there is no dev part (20; more are steadier)",
    )
    add("--min-utterances", type=int, default=2, help="of a training speaker, at least (2)")
    add("--seed", type=int, default=0, help="of the choice of dev speakers and pairs (0)")
    add("--overwrite", action="store_true", help="replace lists that were written before")
    add("--outside-root", action="store_true", help="the corpus's lists may name recordings elsewhere")
    add("--durations", action="store_true", help="open every file to note its length")
    return parser


if __name__ == "__main__":
    sys.exit(main())
