"""Hosts that are namespaces of this machine: each with its own network, processes, name and home, and a real sshd."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter", "mount")
NETWORK = "10.213.7"  # of the hosts; the machine itself is .254 there
INTERFACE, BRIDGE = "eth0", "raysv-br"
HOME, SHARED = "/srv", "/mnt"  # where hosts have what is theirs, and what they share
PROBE = "raysv-probe"
RAY = "/tmp/ray"  # where Ray notes which cluster a machine is in
UNKNOWN_HOST = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]


def find(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def must(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _at_home(line: str) -> str:
    """A line of /etc/passwd; root's with the home that it has on a host: the real one may hold this Python."""
    name, *fields = line.split(":")
    return ":".join([name, *fields[:4], HOME, fields[5]]) if name == "root" else line


class Host:
    """One of them, with root as its user."""

    def __init__(self, number: int, folder: Path, shared: Path, key: str) -> None:
        self.shared = shared
        self.name, self.address = f"raysv-host{number}", f"{NETWORK}.{number}"
        self.folder, self.home = folder, folder / "home"
        self.link = f"raysv-l{number}"
        for part in (self.home, folder / "ray"):
            part.mkdir(parents=True)
        (self.home / ".bashrc").write_text(f"export GLOO_SOCKET_IFNAME={INTERFACE}\n")
        must("ip", "netns", "add", self.name)
        must("ip", "link", "add", self.link, "type", "veth", "peer", "name", INTERFACE, "netns", self.name)
        must("ip", "link", "set", self.link, "master", BRIDGE, "up")
        for command in (
            f"addr add {self.address}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            "link set lo up",
            f"route add default via {NETWORK}.254",
        ):
            must("ip", "-n", self.name, *command.split())
        self._start(key)

    def _start(self, key: str) -> None:
        settings = [f"HostKey {SHARED}/{key}", f"AuthorizedKeysFile {SHARED}/{key}.pub", "StrictModes no", "UsePAM no"]
        settings += [f"ListenAddress {self.address}:22", "PermitRootLogin prohibit-password"]
        settings += ["PasswordAuthentication no", "MaxStartups 100", "MaxSessions 100"]
        (self.home / "sshd_config").write_text("\n".join(settings) + "\n")
        users = Path("/etc/passwd").read_text().splitlines(keepends=True)
        (self.home / "passwd").write_text("".join(_at_home(line) for line in users))
        (self.home / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        script = (
            f"hostname {self.name} && mount --bind {self.home} {HOME} && mount --bind {self.shared} {SHARED} && "
            f"mount --bind {HOME}/passwd /etc/passwd && mount --bind {HOME}/hosts /etc/hosts && "
            f"mkdir -p /run/sshd {RAY} && mount --bind {self.folder / 'ray'} {RAY} && "
            f"{find('sshd')} -f {HOME}/sshd_config -E {HOME}/sshd.log && sleep infinity & wait"
        )
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *spaces, "bash", "-c", script], start_new_session=True
        )

    def end(self) -> None:
        """Kill it with all that runs on it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for command in (f"link del {self.link}", f"netns del {self.name}"):
            subprocess.run(["ip", *command.split()], capture_output=True)

    def run(self, command: str, timeout: float = 120) -> str:
        """What a command prints there."""
        done = self._open(command)
        try:
            printed, _ = done.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            done.kill()
            raise
        assert done.returncode == 0, printed
        return printed

    def _open(self, command: str) -> subprocess.Popen[str]:
        (inside,) = must("pgrep", "-P", str(self.process.pid)).split()  # of unshare, the first process of the host
        spaces = ["nsenter", "--target", inside, "--mount", "--pid", "--net", "--uts"]
        return subprocess.Popen(
            [*spaces, "env", f"HOME={HOME}", "bash", "-c", f". ~/.bashrc; cd; {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Hosts:
    """Several, in one network, which this machine is in too."""

    def __init__(self, count: int, folder: Path) -> None:
        self.shared = folder / "shared"
        self.key = self.shared / "key"
        self.shared.mkdir()
        self.all: list[Host] = []
        must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        must("ip", "link", "add", BRIDGE, "type", "bridge")
        try:
            must("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
            must("ip", "link", "set", BRIDGE, "up")
            for number in range(1, count + 1):
                self.all.append(Host(number, folder / f"host{number}", self.shared, self.key.name))
            for host in self.all:
                self._await_ssh(host)
        except BaseException:
            self.end()
            raise

    def _await_ssh(self, host: Host) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                must("ssh", "-i", str(self.key), *UNKNOWN_HOST, f"root@{host.address}", "true")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def end(self) -> None:
        """Kill them all."""
        for host in self.all:
            host.end()
        must("ip", "link", "del", BRIDGE)


def why_not() -> str:
    """Why this machine cannot have hosts; empty where it can."""
    if sys.platform != "linux" or os.geteuid():
        return "hosts in namespaces need root on Linux"
    if missing := [tool for tool in TOOLS if not find(tool)]:
        return f"hosts in namespaces need {', '.join(missing)} (Debian: openssh-server rsync iproute2)"
    try:
        must("unshare", "--mount", "--pid", "--net", "--uts", "--fork", "true")
        must("ip", "link", "add", PROBE, "type", "bridge")
        must("ip", "link", "del", PROBE)
    except OSError as error:
        return f"this machine makes no namespaces or bridges: {error}"
    return ""
