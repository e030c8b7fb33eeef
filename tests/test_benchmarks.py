"""Benchmarks are not run here, but they must not fall behind the code that they measure."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_all_benchmarks_can_be_imported() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    assert "epoch" in names
    program = f"import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", program], cwd=FOLDER, check=True, timeout=120)
