"""The first thing a user does: Ray's launcher over real ssh, on hosts that are namespaces of this machine."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from desk_fixtures import SOURCE, SPACE
from host_fixtures import HOME, SHARED, Hosts

CHECKOUT = ("raysv", "search_spaces", "cluster", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
EDITS = {
    "head_ip: 192.168.0.10 ": "head_ip: {0} ",
    "worker_ips: [192.168.0.11, 192.168.0.12]": "worker_ips: [{1}]",
    "ssh_user: me": "ssh_user: root",
    "ssh_private_key: ~/.ssh/id_ed25519": "ssh_private_key: {key}",
}


class Launcher:
    """A checkout whose `cluster/local.yaml` is edited where it says so, and a home for who calls Ray's launcher."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.checkout = folder / "checkout"
        self.environment = os.environ | {"HOME": str(folder / "home"), "COLUMNS": "200"}
        self.checkout.mkdir()
        for part in CHECKOUT:
            copy = shutil.copytree if (SOURCE / part).is_dir() else shutil.copy
            copy(SOURCE / part, self.checkout / part)
        file = self.checkout / "cluster" / "local.yaml"
        text = file.read_text()
        for before, after in EDITS.items():
            assert before in text
            text = text.replace(before, after.format(*(host.address for host in hosts.all), key=hosts.key))
        file.write_text(text)
        small = SPACE | {"search": {"trials": 2, "confirm": 0}, "training": {"epochs": 2}}
        (self.checkout / "search_spaces" / "small.yaml").write_text(yaml.safe_dump(small))
        self.run("ray get-auth-token --generate")

    def run(self, command: str, timeout: float = 400) -> str:
        """A command of the launcher, as it is printed or documented."""
        path = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        done = subprocess.run(
            shlex.split(command),
            cwd=self.checkout,
            env=self.environment | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def launcher(tmp_path: Path, hosts: Hosts) -> Launcher:
    """Hosts with an environment that has PyTorch already: the setup of cluster/local.yaml need not fetch 6 GB."""
    (hosts.shared / "results").mkdir()
    packages = sysconfig.get_path("purelib")
    for host in hosts.all:
        with (host.home / ".bashrc").open("a") as file:
            file.write("export PIP_NO_BUILD_ISOLATION=0 PIP_NO_INDEX=1\n")
        (host.home / "results").symlink_to(f"{SHARED}/results")
        host.run(f"{sys.executable} -m venv --without-pip ~/raysv-venv")
        environment = host.home / "raysv-venv"
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "installed.pth").write_text(f"{packages}\n")
        for script in ("pip", "ray", "mlflow"):
            installed = Path(sys.executable).with_name(script)
            (environment / "bin" / script).write_text(
                f'#!/bin/sh\nexec {HOME}/raysv-venv/bin/python {installed} "$@"\n'
            )
            (environment / "bin" / script).chmod(0o755)
    return Launcher(tmp_path, hosts)


def line_with(words: str, printed: str) -> str:
    """The command in the line that holds some words, without what is said about it."""
    (line,) = [line for line in printed.splitlines() if words in line]
    return re.sub(r"\s+#.*", "", line).strip()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_study_is_submitted_to_a_cluster_and_its_best_configuration_fetched_and_trained(
    launcher: Launcher, hosts: Hosts
) -> None:
    launcher.run("ray up -y --no-config-cache cluster/local.yaml")
    try:
        # a worker on each host, as each has all CPUs of this machine
        placed = f"--workers-per-trial 2 --gpus-per-trial 0 --set resources.cpus_per_worker={os.cpu_count()}"
        study = f"search_spaces/small.yaml --name launched {placed}"
        printed = launcher.run(f"ray submit cluster/local.yaml raysv/tune.py -- {study}")
        assert "1 other(s) look at their code and data" in printed
        assert f"1 trial at a time, 2 workers a trial with {os.cpu_count()} CPU and no GPU each (gloo)" in printed
        launcher.run(line_with("ray rsync-down cluster/local.yaml /srv/results/launched/best_config.yaml", printed))
        best = yaml.safe_load((launcher.checkout / "best_config.yaml").read_text())
        assert 0 <= best["loss"]["margin"] <= 0.5
        train = line_with("ray submit cluster/local.yaml raysv/train.py", printed)
        trained = launcher.run(f"{train} {placed} --name best")
        launcher.run(line_with("ray rsync-down", trained))
        assert (launcher.checkout / "checkpoint" / "checkpoint.yaml").is_file()
    finally:
        launcher.run("ray down -y cluster/local.yaml")
    deadline = time.monotonic() + 120  # the other machines' Ray ends when it misses the head
    while running := [host.name for host in hosts.all if "raylet" in host.run("ps -eo comm")]:
        assert time.monotonic() < deadline, running
        time.sleep(2)
