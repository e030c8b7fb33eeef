"""Nodes of Ray as real processes on this machine, and what it takes to end these."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """End a process that a test started, and all below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in (*below, process):
        try:
            os.kill(each.pid, number)
        except ProcessLookupError:
            continue
    process.communicate()
    psutil.wait_procs(below, timeout=30)


class Cluster:
    """A head and other nodes of Ray on this machine, with one CPU each."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.variables = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self.address}  # a loopback of the test's own
        self.nodes: list[subprocess.Popen[str]] = []
        head = ["--head", f"--port={port}", f"--dashboard-port={free_port()}", f"--temp-dir={folder}"]
        try:
            self._start([*head, "--include-dashboard=true"], {})
            self._await(1)
        except BaseException:
            self.end()
            raise

    def add(self, **variables: str) -> None:
        """Another node, with some variables of its environment set otherwise."""
        self._start([f"--address={self.address}"], variables)
        self._await(len(self.nodes))

    def end(self) -> None:
        for node in reversed(self.nodes):
            end(node)

    def _start(self, options: list[str], variables: dict[str, str]) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--block", "--disable-usage-stats"]
        node = subprocess.Popen(
            command,
            env=os.environ | self.variables | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.nodes.append(node)

    def _await(self, nodes: int) -> None:
        program = (
            "import ray, sys\n"
            "ray.init(sys.argv[1], log_to_driver=False, logging_level='error')\n"
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        deadline, found = time.monotonic() + 90, ""
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [sys.executable, "-c", program, self.address],
                env=os.environ | self.variables,
                capture_output=True,
                text=True,
            )
            found = asked.stdout.strip()
            if found == str(nodes):
                return
            time.sleep(1)
        raise AssertionError(f"{found or 'no'} nodes instead of {nodes}: {asked.stderr[-2000:]}")
