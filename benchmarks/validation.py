"""What judging an epoch costs once its recordings are embedded: seconds and memory, beside other toolkits.

    python benchmarks/validation.py --wespeaker ../wespeaker

Two lists of the field's shapes, over made-up embeddings of 192 dimensions: 196 enrolments crossed with 17,777 tests,
as CN-Celeb.E has, and 580,000 scattered pairs of 5,000 recordings, about as many pairs as VoxCeleb1-E has. Of each it
prints how long cosines, EER with both minDCFs, AS-Norm and the interval of the EER take, and how far memory rises
meanwhile; then what others need for the same scores: the error rates of a wespeaker checkout, scikit-learn's cosine
pair by pair as its `bin/score.py` takes them, and SpeechBrain's error rates, whose time and memory grow with the
square of the list. These last two are measured on a few pairs; what is extrapolated says so. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import machine, medians, table
from peers import use_wespeaker
from sklearn.metrics.pairwise import cosine_similarity

from raysv.verification.metrics import ErrorRates, bootstrap_eer, error_rates
from raysv.verification.scoring import as_norm, cosine_scores

DIM = 192
COHORT = 2793  # speakers, as CN-Celeb has for training
ONE_BY_ONE = 4000  # pairs scored one by one
SQUARED = 2000  # pairs for which SpeechBrain's minDCF has memory


class PairList(NamedTuple):
    """Embeddings, the rows of each pair, and the speaker of each row."""

    embeddings: torch.Tensor
    enrolment: np.ndarray
    test: np.ndarray
    speakers: np.ndarray

    @property
    def same_speaker(self) -> np.ndarray:
        """`(pairs,)` bool."""
        return self.speakers[self.enrolment] == self.speakers[self.test]


def crossed(generator: np.random.Generator) -> PairList:
    """Every enrolment with every test."""
    speakers = np.concatenate([np.arange(196), generator.integers(196, size=17_777)])
    enrolment, test = np.repeat(np.arange(196), 17_777), np.tile(196 + np.arange(17_777), 196)
    return PairList(embed(speakers, generator), enrolment, test, speakers)


def scattered(generator: np.random.Generator) -> PairList:
    """Pairs of recordings drawn anyhow, every other of one speaker."""
    speakers = np.repeat(np.arange(1250), 4)
    enrolment, other = generator.integers(5000, size=(2, 580_000))
    own = enrolment // 4 * 4 + (enrolment + generator.integers(1, 4, size=580_000)) % 4
    return PairList(embed(speakers, generator), enrolment, np.where(np.arange(580_000) % 2, own, other), speakers)


def embed(speakers: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
    """Voices apart by about as much as recordings of one: an EER of some percent."""
    voices = generator.normal(size=(speakers.max() + 1, DIM)).astype(np.float32)
    return torch.from_numpy(voices[speakers] + 2.5 * generator.normal(size=(len(speakers), DIM)).astype(np.float32))


def memory(field: str) -> float:
    """MB of this process, by the name that Linux has for it: VmRSS for now, VmHWM for the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1000 for line in lines if line.startswith(f"{field}:"))


def rise(way: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and by how many MB the process grew for it at its peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is to count again
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is now
    before = memory("VmRSS")
    return way(), memory("VmHWM") - before


def measure(name: str, pairs: PairList, with_wespeaker: bool, repeats: int) -> None:
    """Print what a list costs, ours and theirs."""
    rows, same = (pairs.embeddings, pairs.enrolment, pairs.test), pairs.same_speaker
    cohort = torch.randn(COHORT, DIM, generator=torch.Generator().manual_seed(0))
    sides = pairs.speakers[pairs.enrolment], pairs.speakers[pairs.test]

    def validate() -> tuple[np.ndarray, ErrorRates]:
        scores = cosine_scores(*rows)
        return scores, error_rates(scores, same)

    (scores, rates), peak = rise(validate)
    whole = memory("VmHWM")
    ways: dict[str, Callable[[], Any]] = {
        "validation": validate,
        "of it cosines": lambda: cosine_scores(*rows),
        "of it EER, minDCFs": lambda: error_rates(scores, same),
        "AS-Norm": lambda: as_norm(scores, *rows, cohort),
        "interval": lambda: bootstrap_eer(scores, same, *sides, np.random.default_rng(0)),
    }
    peaks = {"validation": peak} | {way: rise(ways[way])[1] for way in ("AS-Norm", "interval")}
    seconds = medians(ways, repeats)
    print(f"\n{name}: {len(same):,} pairs, EER {100 * rates.eer:.2f} %")
    for way, value in seconds.items():
        print(f"  {way:18} {value:8.3f} s" + (f"   memory rises by {peaks[way]:4.0f} MB" if way in peaks else ""))
    print(f"  the whole process, lists and PyTorch included, peaks at {whole:.0f} MB in validation")
    if with_wespeaker:
        compare_rates(scores, same, repeats)
    compare_cosines(pairs, seconds["of it cosines"])
    compare_squared(scores, same, repeats)


def compare_rates(scores: np.ndarray, same: np.ndarray, repeats: int) -> None:
    """The error rates of the whole list beside wespeaker's."""
    from wespeaker.utils.score_metrics import compute_c_norm, compute_eer, compute_pmiss_pfa_rbst

    def theirs() -> tuple[float, list[float]]:
        misses, alarms = compute_pmiss_pfa_rbst(scores, same)
        rate, _ = compute_eer(misses, alarms, scores)
        return rate, [compute_c_norm(misses, alarms, prior) for prior in (0.01, 0.05)]

    (rate, costs), peak = rise(theirs)
    print(f"  wespeaker's EER {100 * rate:.2f} %, minDCF {costs[0]:.4f}, {costs[1]:.4f}; memory rises by {peak:.0f} MB")
    ways = {"raysv": lambda: error_rates(scores, same), "wespeaker": theirs}
    print(table("  EER and both minDCFs", medians(ways, repeats), "raysv", unit="s"))


def compare_cosines(pairs: PairList, ours: float) -> None:
    """Cosines one by one, as wespeaker has them, of the first pairs; the whole list extrapolated in proportion."""
    rows = pairs.embeddings.numpy()[:, None]
    some = list(zip(pairs.enrolment[:ONE_BY_ONE], pairs.test[:ONE_BY_ONE], strict=True))
    ways = {"one by one": lambda: [cosine_similarity(rows[one], rows[other])[0][0] for one, other in some]}
    whole = medians(ways, 1)["one by one"] * len(pairs.test) / len(some)
    title = f"  cosines; one by one extrapolated from {len(some):,} pairs"
    print(table(title, {"raysv": ours, "one by one": whole}, "raysv", unit="s"))


def compare_squared(scores: np.ndarray, same: np.ndarray, repeats: int) -> None:
    """EER and minDCF of a few pairs beside SpeechBrain's, where it is installed."""
    if importlib.util.find_spec("speechbrain") is None:
        print("  SpeechBrain is not installed")
        return
    from speechbrain.utils.metric_stats import EER, minDCF

    targets = np.flatnonzero(same)[: SQUARED // 10]
    others = np.flatnonzero(~same)[: SQUARED - len(targets)]
    few = np.concatenate([targets, others])
    sides = torch.from_numpy(scores[targets]), torch.from_numpy(scores[others])
    ways = {
        "raysv": lambda: error_rates(scores[few], same[few], [0.01]),
        "SpeechBrain": lambda: (EER(*sides), minDCF(*sides)),
    }
    print(table(f"  EER and one minDCF of {len(few):,} of the pairs", medians(ways, repeats), "raysv"))


def main() -> None:
    """Measure both lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wespeaker", type=Path, help="a checkout of github.com/wenet-e2e/wespeaker")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    print(machine())
    if chosen.wespeaker:
        use_wespeaker(chosen.wespeaker)
    for name, make in (("crossed", crossed), ("scattered", scattered)):
        measure(name, make(np.random.default_rng(0)), bool(chosen.wespeaker), chosen.repeats)


if __name__ == "__main__":
    main()
