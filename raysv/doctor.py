"""This machine in, what would keep a study from running on it out; in seconds, and nothing is started.

    python -m raysv.doctor
    python -m raysv.doctor my_space.yaml --set data.root=/corpora/cnceleb     # its lists and recordings as well
    ray submit cluster/local.yaml raysv/doctor.py                             # on a cluster's head node

A line for each check: ok, warn, or FAIL with what to do about it. Run it where the study is to be started: the MLflow
address, RAY_ADDRESS and the folders are those of this shell. Nothing stays behind, but for the embedded corpus where a
SPACE asks for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raysv.config import parse_settings
from raysv.search.machine import FAIL
from raysv.search.readiness import examine


def main(arguments: list[str] | None = None) -> int:
    """Check this machine.

    Returns: 0 when nothing fails, 1 when something does, 2 for bad input.
    """
    parser = argparse.ArgumentParser(
        "raysv.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", nargs="?", type=Path, help="YAML of the study that is to run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set or open any key of SPACE")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies are to be kept")
    chosen = parser.parse_args(arguments)
    failed = False
    try:
        if chosen.set and not chosen.space:
            raise ValueError("--set sets keys of a SPACE. Name one, for example search_spaces/demo.yaml.")
        for name, finding in examine(chosen.space, parse_settings(chosen.set), chosen.results):
            print(f"{name:<13}  {finding.verdict:<4}  {finding.words}", flush=True)
            failed |= finding.verdict == FAIL
    except (ValueError, OSError) as error:
        print(f"raysv.doctor: {error}", file=sys.stderr)
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
