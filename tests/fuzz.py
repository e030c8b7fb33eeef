"""Feed every parser of ours what a coverage-guided fuzzer makes up, until one neither reads nor refuses it.

    python tests/fuzz.py [--seconds 60] [--parsers manifest space ...]

The parsers are those of `test_untrusted.py`, where hypothesis makes up files; here libFuzzer (through Atheris) keeps
what reaches new branches of raysv and goes on from there. Each parser has a process of its own. One breaks when it
raises anything but a sentence of ours, or takes too long for one file. Exits with 1 where one broke.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["raysv"]):
    from test_untrusted import PARSERS, read_or_refuse

UNIT_SECONDS = 10  # for one file


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """One parser, in this process, which libFuzzer ends."""
    parse, valid = PARSERS[name]
    for part in ("seeds", "work", "found"):
        (folder / part).mkdir()
    (folder / "seeds" / "valid").write_bytes(valid)

    def once(content: bytes) -> None:
        read_or_refuse(parse, folder / "work", content)

    options = [f"-max_total_time={seconds}", f"-max_len={max(4096, 2 * len(valid))}", f"-timeout={UNIT_SECONDS}"]
    options += [f"-artifact_prefix={folder / 'found'}/", "-print_final_stats=1", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, str(folder / "seeds")], once)
    atheris.Fuzz()


def told(log: str) -> str:
    """What libFuzzer says it did: inputs tried, and pieces of code reached by the first of them and by all."""
    tried, reached = re.findall(r"executed_units: *(\d+)", log), re.findall(r" cov: (\d+)", log)
    return f"{tried[-1]:>8} inputs; code reached: {reached[0]} to {reached[-1]}" if tried and reached else "broke off"


def main() -> None:
    """Each parser for so long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--parsers", nargs="+", choices=PARSERS, default=list(PARSERS), metavar="NAME")
    chosen = parser.parse_args()
    broken = 0
    for name in chosen.parsers:
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="raysv-fuzz-"))
        child = os.fork()  # libFuzzer ends its process
        if child == 0:
            with (folder / "log").open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            fuzz(name, chosen.seconds, folder)
        _, status = os.waitpid(child, 0)
        log = (folder / "log").read_text(errors="replace")
        print(f"{name:14} {told(log)} in {time.monotonic() - started:.0f} s", flush=True)
        if status:
            print(f"{log}\n{name} BROKE: what broke it lies in {folder / 'found'}", flush=True)
            broken += 1
        else:
            shutil.rmtree(folder)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
