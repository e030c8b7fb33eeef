"""A study in, one page a person can read out.

    python -m raysv.report results/STUDY                  # writes results/STUDY/report.html
    python -m raysv.report STUDY --output page.html

Reads what the study left in its folder, finished or not; nothing is trained, and MLflow is not asked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raysv.search.page import REPORT_FILE, make_report
from raysv.search.study import find_study, read_study


def main(arguments: list[str] | None = None) -> int:
    """Write the page; the exit status is 0, or 2 when there is nothing to write."""
    parser = argparse.ArgumentParser(
        "raysv.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="its folder, its name, or that of its space")
    parser.add_argument("--output", type=Path, help=f"the page (default: {REPORT_FILE} in the study's folder)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where studies are kept")
    chosen = parser.parse_args(arguments)
    try:
        folder = find_study(chosen.results, chosen.study)
        target = chosen.output or folder / REPORT_FILE
        target.write_text(make_report(read_study(folder), folder).page, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"raysv.report: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
