"""A folder to work in as a user does, with doors as real processes; and what it takes to end these."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

SOURCE = Path(__file__).parent.parent
TRIALS, EPOCHS = 4, 3
SECRET = "this-goes-to-nobody-else"
SPACE = {
    "batch": {"speakers": 12, "crop_seconds": 0.6},
    "model": {"channels": 16, "embedding_dim": 32},
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "temperature": {"loguniform": [0.03, 0.5]}},
    "optimizer": {"learning_rate": 3e-3},
    "training": {"epochs": EPOCHS},
    "search": {"trials": TRIALS, "confirm": 0},
}


class Desk:
    """A folder of its own to work in, with doors copied there as `ray submit` copies them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "RAYSV_CACHE": str(folder / "cache"),
            "RAY_ADDRESS": "local",  # a private instance, whatever else runs on this machine
            "MLFLOW_TRACKING_URI": "",
            "MLFLOW_TRACKING_TOKEN": SECRET,
        }
        for door in ("tune", "train", "verify", "report", "doctor"):
            shutil.copy(SOURCE / "raysv" / f"{door}.py", folder)
        (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))

    def open(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """A door as a process of its own, with some variables of its environment set otherwise."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, status: int = 0, **variables: str) -> str:
        process = self.open(*command, **variables)
        printed, _ = process.communicate(timeout=400)
        assert process.returncode == status, printed
        return printed


def printed_until(process: subprocess.Popen[str], words: str) -> str:
    """What a process prints up to the line that holds some words."""
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    process.stdout.close()
    process.wait()
    raise AssertionError(f"It ended without saying {words!r}:\n{printed}")


def kill_when_it_says(driver: subprocess.Popen[str], words: str) -> None:
    """Kill a driver in the middle of its work."""
    printed_until(driver, words)
    driver.kill()
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()
    time.sleep(5)  # its workers notice, and end


def trials_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))


def processes_of(driver: subprocess.Popen[str], name: str) -> set[int]:
    """The Ray processes below a driver that say they are so."""
    below = psutil.Process(driver.pid).children(recursive=True)
    return {process.pid for process in below if name in " ".join(process.cmdline())}
