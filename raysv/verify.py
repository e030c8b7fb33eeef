"""Is this the same voice? Two recordings, or a whole pair list, with a checkpoint that raysv.train wrote.

    python -m raysv.verify results/RUN/checkpoint a.wav b.wav
    python -m raysv.verify results/RUN/checkpoint /corpora/voxceleb1/test_pairs.txt --scores scores.txt
    python -m raysv.verify results/RUN/checkpoint /corpora/CN-Celeb/test_pairs.txt --enrolments enrolments.txt
    python -m raysv.verify results/RUN/checkpoint /corpora/CN-Celeb/test_pairs.txt --enrolments enrolments.txt \\
        --cohort /corpora/CN-Celeb/train.csv --centre /corpora/CN-Celeb/train.csv
    python -m raysv.verify results/RUN/checkpoint pairs.txt --root /corpora/CN-Celeb

Two recordings give a score and a verdict at the threshold that was set on the dev pairs. A pair list (`1 enrol test`,
`enrol test target|nontarget` or `enrol test 1|0`) gives EER and minDCF, and between what the EER would lie if other
speakers had been recorded: 90 % of draws of the list's speakers, as far as lists and pairs say who they are. A list
to centre on takes the mean of its recordings' embeddings from all others; a cohort normalises the scores with AS-Norm.
Neither may hold a speaker or a recording of the pairs. `python -m raysv.prepare` writes all these lists.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from raysv.config import DataConfig
from raysv.corpus.audio import BadAudio, floating, read_audio
from raysv.corpus.cache import cache_folder
from raysv.corpus.checks import refuse_outside
from raysv.corpus.loading import load_pairs
from raysv.corpus.utterances import Utterance, read_utterances
from raysv.learning.checkpoint import describe_checkpoint, load_encoder
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.evaluation import FEWEST_SPEAKERS, Interval, embed_utterances, evaluate, speaker_means
from raysv.verification.metrics import INTERVAL_LEVEL
from raysv.verification.scoring import centre, cosine_scores


def main(arguments: list[str] | None = None) -> int:
    """Print scores; the exit status is 0 when they could be computed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "raysv.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder that raysv.train wrote")
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="RECORDING|PAIRS", help="two recordings, or a pair list"
    )
    parser.add_argument("--root", type=Path, help="folder that a pair list's paths are relative to (default: its own)")
    parser.add_argument("--outside-root", action="store_true", help="lists may name recordings outside --root")
    parser.add_argument(
        "--utterances", nargs="+", default=[], help="lists, below --root, that say where the pairs' recordings are"
    )
    parser.add_argument(
        "--enrolments", nargs="+", default=[], help="lists, below --root, of enrolments of several recordings"
    )
    where = "(path from here; its recordings below --root)"
    parser.add_argument(
        "--centre", type=Path, help=f"utterance list whose mean is subtracted, for example --cohort's {where}"
    )
    parser.add_argument(
        "--cohort", type=Path, help=f"utterance list for AS-Norm, for example the training list {where}"
    )
    parser.add_argument(
        "--top",
        type=int,
        default=300,
        help="cohort speakers that AS-Norm compares with (all of them where there are fewer; the normalisation is then "
        "not adaptive)",
    )
    parser.add_argument("--scores", type=Path, help="where to write a pair list's scores (default: PAIRS.scores)")
    chosen = parser.parse_args(arguments)
    try:
        if len(chosen.inputs) == 2:
            _verify_recordings(chosen)
        elif len(chosen.inputs) == 1:
            _verify_list(chosen)
        else:
            raise ValueError(f"Name two recordings or one pair list, got {len(chosen.inputs)} files.")
    except (ValueError, OSError) as error:
        print(f"raysv.verify: {error}", file=sys.stderr)
        return 2
    return 0


def _verify_recordings(chosen: argparse.Namespace) -> None:
    for option in ("root", "utterances", "enrolments", "cohort", "centre", "scores"):
        if getattr(chosen, option):
            raise ValueError(
                f"--{option} goes with a pair list: two recordings are compared by their plain cosine, at a threshold "
                "of plain cosines."
            )
    encoder = load_encoder(chosen.checkpoint)
    _, description = describe_checkpoint(chosen.checkpoint)
    waveforms = []
    for path in chosen.inputs:
        try:
            waveforms.append(torch.from_numpy(floating(read_audio(path))))
        except BadAudio as problem:
            raise ValueError(f"{path} cannot be used: {problem}.") from problem
    score = float(cosine_scores(encoder.embed(waveforms), [0], [1])[0])
    threshold = description["threshold"]
    verdict = "same speaker" if score >= threshold else "different speakers"
    print(f"{verdict}   score {score:.3f}, threshold {threshold:.3f} (equal error rate on the dev pairs)")


def _verify_list(chosen: argparse.Namespace) -> None:
    encoder = load_encoder(chosen.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    pairs_file = chosen.inputs[0]
    root = (chosen.root or pairs_file.parent).expanduser().absolute()
    cache = cache_folder(DataConfig())
    lists = {file: read_utterances(file, root) for file in {chosen.centre, chosen.cohort} - {None}}
    if not chosen.outside_root:
        for file, utterances in lists.items():
            refuse_outside(
                (spoken.path for spoken in utterances), root, f"Mend {file} or --root; --outside-root allows it."
            )
    apart = {f"--{option} {file}": lists[file] for option in ("cohort", "centre") if (file := getattr(chosen, option))}
    pairs, listed = load_pairs(
        pairs_file,
        root,
        cache,
        chosen.utterances,
        chosen.enrolments,
        apart=apart,
        outside_root=chosen.outside_root,
    )
    mean, cohort = _populations(encoder, chosen, lists, cache)
    result = evaluate(encoder, pairs, cohort, chosen.top, mean=mean, generator=np.random.default_rng(0))
    target = chosen.scores or pairs_file.with_name(f"{pairs_file.name}.scores")
    with target.open("w", encoding="utf-8") as file:
        columns = (column.tolist() for column in (listed.enrolment, listed.test, listed.same_speaker, result.scores))
        file.writelines(
            f"{listed.names[enrolment]} {listed.names[test]} {score:.6f} {'target' if same_speaker else 'nontarget'}\n"
            for enrolment, test, same_speaker, score in zip(*columns, strict=True)
        )
    costs = "   ".join(f"minDCF({prior:g}) {cost:.4f}" for prior, cost in result.rates.min_dcf.items())
    count = f"{len(listed.test)} pairs of {len(pairs.store)} recordings"
    print(f"EER {100 * result.rates.eer:.2f} % ({_worded(result.interval)})   {costs}   {count}, scores in {target}")


def _populations(
    encoder: SpeakerEncoder, chosen: argparse.Namespace, lists: dict[Path, list[Utterance]], cache: Path
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mean to centre on and the cohort, whichever were asked for; a list that is both is embedded once."""
    embeddings = {file: embed_utterances(encoder, utterances, cache) for file, utterances in lists.items()}
    mean = embeddings[chosen.centre].mean(0) if chosen.centre else None
    if not chosen.cohort:
        return mean, None
    spoken = embeddings[chosen.cohort]
    return mean, speaker_means(spoken if mean is None else centre(spoken, mean), lists[chosen.cohort])


def _worded(interval: Interval | None) -> str:
    if interval is None:
        return f"no interval: fewer than {FEWEST_SPEAKERS} speakers"
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * INTERVAL_LEVEL:g} % interval {low:.1f} to {high:.1f} over {interval.speakers} speakers"


if __name__ == "__main__":
    sys.exit(main())
