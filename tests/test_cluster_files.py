import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from raysv.search.autoscaling import VARIABLE, node_groups
from raysv.search.commands import CLUSTER_VARIABLE, serve
from raysv.search.mlflow_store import default_tracking_uri
from raysv.search.study import SPACE_FILE, find_study

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.suffix in (".yaml", ".sbatch"))
CLOUDS = [ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp")]
LAUNCHED = [ROOT / "cluster" / "local.yaml", *CLOUDS]
BUILT_FROM = ("raysv", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
KUBERAY, SLURM = ROOT / "cluster" / "kuberay.yaml", ROOT / "cluster" / "slurm.sbatch"


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def name_of(file: Path) -> str:
    return file.stem


def test_every_file_is_looked_at_here() -> None:
    assert sorted([*LAUNCHED, KUBERAY, SLURM]) == FILES


@pytest.mark.parametrize("file", LAUNCHED, ids=name_of)
def test_a_cluster_file_is_what_rays_launcher_takes(file: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize("file", CLOUDS, ids=name_of)
def test_in_a_cloud_the_head_stays_and_gpu_nodes_come_from_none_as_spot_instances(file: Path) -> None:
    config = prepare_config(yaml.safe_load(file.read_text()))
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    assert ["spot" in str(node["node_config"]).lower() for node in (head, gpu)] == [False, True]


@pytest.mark.parametrize("file", LAUNCHED, ids=name_of)
def test_no_checkout_lies_where_it_would_hide_the_installed_package(file: Path) -> None:
    mounts = yaml.safe_load(file.read_text())["file_mounts"]
    assert {Path(target).parts[1] for target in mounts} == {"raysv-source", "search_spaces", ".ray"}


@pytest.mark.parametrize("file", LAUNCHED, ids=name_of)
def test_what_is_installed_has_the_versions_of_the_readme(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    (install,) = [command for command in config["setup_commands"] if "pip install -q -c" in command]
    assert "~/raysv-venv/bin/pip install -q -c ~/raysv-source/constraints.txt ~/raysv-source" in install
    for part in BUILT_FROM:
        assert config["file_mounts"][f"~/raysv-source/{part}"] == part


PYTHON3 = """#!/bin/sh
echo venv >> ~/log
mkdir -p ~/raysv-venv/bin
cp ~/tools/pip.sh ~/raysv-venv/bin/python && chmod +x ~/raysv-venv/bin/python
sleep 0.1
cp ~/tools/pip.sh ~/raysv-venv/bin/pip && chmod +x ~/raysv-venv/bin/pip
"""
PIP = """#!/bin/sh
echo install >> ~/log
mkdir ~/raysv-source/build || exit 1
sleep 0.1
test ! -e ~/broken || exit 1
echo installed >> ~/log
"""


class Home:
    """One home of three machines of `cluster/local.yaml`, where a stand-in for pip keeps a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for file, text in (("tools/python3", PYTHON3), ("tools/pip.sh", PIP), ("raysv-source/raysv/tune.py", "")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        (folder / "tools" / "python3").chmod(0o755)
        (folder / ".bashrc").write_text("# mine\n")

    def set_up(self) -> list[int]:
        """What the launcher does, on all machines at once; their exit statuses."""
        commands = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())["setup_commands"]
        path = f"{self.folder / 'tools'}:{os.environ['PATH']}"
        machines = [
            subprocess.Popen(
                ["bash", "-c", " && ".join(f"({command})" for command in commands)],
                env={"HOME": str(self.folder), "PATH": path, "HOSTNAME": f"machine{number}"},
            )
            for number in range(3)
        ]
        return [machine.wait(timeout=60) for machine in machines]

    def log(self) -> list[str]:
        """What was done since this was last asked."""
        lines = (self.folder / "log").read_text().split()
        (self.folder / "log").write_text("")
        return lines


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_machines_that_share_a_home_set_it_up_once(home: Home) -> None:
    assert home.set_up() == [0, 0, 0]
    assert home.log() == ["venv", "install", "installed"]
    assert (home.folder / ".bashrc").read_text() == f"# mine\n. {home.folder}/.raysv-env\n"
    assert "RAY_AUTH_MODE=token" in (home.folder / ".raysv-env").read_text()
    assert not list(home.folder.glob(".raysv-env.*"))


def test_a_home_is_set_up_again_when_the_source_has_changed_and_not_before(home: Home) -> None:
    home.set_up()
    home.log()
    assert home.set_up() == [0, 0, 0]
    assert home.log() == []
    (home.folder / "raysv-source" / "raysv" / "tune.py").write_text("changed")
    assert home.set_up() == [0, 0, 0]
    assert home.log() == ["install", "installed"]


def test_what_could_not_be_installed_is_tried_again(home: Home) -> None:
    (home.folder / "broken").touch()
    assert home.set_up() == [1, 1, 1]
    assert home.log() == ["venv", "install", "install", "install"]
    (home.folder / "broken").unlink()
    assert home.set_up() == [0, 0, 0]
    assert home.log() == ["install", "installed"]


def test_the_image_is_built_from_what_is_installed_elsewhere() -> None:
    copied = re.findall(r"^COPY --chown=ray (.*) \S+$", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(" ".join(copied).split()) == {*BUILT_FROM, "search_spaces"}


@pytest.mark.parametrize("file", LAUNCHED, ids=name_of)
def test_a_study_is_told_how_its_cluster_is_called_at_home(file: Path) -> None:
    assert f"{CLUSTER_VARIABLE}=cluster/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", CLOUDS, ids=name_of)
def test_in_a_cloud_mlflows_store_outlives_the_head_and_is_served_from_where_a_study_writes_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = yaml.safe_load(file.read_text())["setup_commands"]
    (writes,) = [command for command in setup if "> ~/.raysv-env" in command]
    told = subprocess.run(
        ["bash", "-c", f"{writes} && . ~/.raysv-env && env"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    environment = dict(line.split("=", 1) for line in told.stdout.splitlines())
    for name in ("MLFLOW_TRACKING_URI", CLUSTER_VARIABLE):
        monkeypatch.setenv(name, environment[name])
    uri = default_tracking_uri(tmp_path)
    assert Path(uri.removeprefix("sqlite:///")).parent == Path("/shared/mlflow")
    assert any("cd /shared &&" in command and "sudo chown $USER results mlflow" in command for command in setup)
    assert serve(uri) in file.read_text()


@pytest.mark.parametrize("file", LAUNCHED, ids=name_of)
def test_only_who_has_the_token_reaches_a_launched_ray_and_its_pages_are_on_loopback(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


def parts_of(tree: Any, key: str) -> Iterator[Any]:
    """All that stands under a key, at any depth."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if name == key:
            yield value
        yield from parts_of(value, key)


def test_the_kuberay_job_is_what_rays_autoscaler_takes_and_what_the_study_is_told_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = yaml.safe_load(KUBERAY.read_text())
    cluster = {"metadata": {"name": "x", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    (told,) = [entry["value"] for entries in parts_of(job, "env") for entry in entries if entry["name"] == VARIABLE]
    monkeypatch.setenv(VARIABLE, told)
    (group,) = node_groups(on_head=False)
    gpu = config["available_node_types"]["gpu"]
    assert group.most == gpu["max_workers"] == config["max_workers"]
    assert group.resources == {kind: gpu["resources"][kind] for kind in ("CPU", "GPU")}


def test_the_kuberay_job_has_rays_version_a_token_and_mlflow_on_loopback() -> None:
    spec = yaml.safe_load(KUBERAY.read_text())["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    (server,) = [part for parts in parts_of(spec, "containers") for part in parts if part["name"] == "mlflow"]
    assert "mlflow server --host 127.0.0.1 --port 5000" in server["command"][-1]
    assert f"FROM rayproject/ray:{pinned('ray')}-" in (ROOT / "cluster" / "Dockerfile").read_text()


def test_a_slurm_job_has_whole_nodes_with_all_their_memory_and_may_be_requeued() -> None:
    head, _, _ = SLURM.read_text().partition("\nset -euo pipefail")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", head, re.MULTILINE))
    assert {"exclusive", "requeue"} <= set(options)
    assert (options["mem"], options["ntasks-per-node"], options["open-mode"]) == ("0", "1", "append")


TOOLS = {  # of Slurm and Ray, as far as cluster/slurm.sbatch sees them: what each is asked goes into log/
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >> log/srun; shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
            SLURM_NODEID=$node RAY_TMPDIR=${RAY_TMPDIR/disk/disk$node} "$@" & tasks+=($!)
        done
        for task in "${tasks[@]}"; do wait "$task" || status=$?; done
        exit ${status:-0}
    """,
    "scontrol": """
        [ "$1 $2 $3" = "show hostnames nodes" ]
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo "node$node"; done
    """,
    "getent": """
        [ "$1" = ahosts ]
        for kind in STREAM DGRAM RAW; do echo "10.0.0.${2#node} $kind $2"; done
    """,
    "ip": """
        [ "$1 $2 $3" = "-o route get" ]
        case $4 in
          *."$SLURM_NODEID") echo "local $4 dev lo table local src $4 uid 0 \\\\    cache <local>" ;;
          *) echo "$4 ${GATEWAY:+via 10.1.0.1} dev eth$SLURM_NODEID src 10.0.0.$SLURM_NODEID uid 0 \\\\    cache" ;;
        esac
    """,
    "ray": """
        printf '%s\\n' "$@" > "log/ray$SLURM_NODEID"
        env > "log/environment$SLURM_NODEID"
        touch "$RAY_TMPDIR/session"
        trap 'sleep 0.3; mkdir -p "$RAY_TMPDIR/session_logs"; exit 1' TERM
        if [ "$HANGS" ]; then sleep 60 & wait; fi
        while [ "$1" != -- ]; do shift; done
        if [ "$SLURM_NODEID" = 0 ]; then shift; "$@"; fi
    """,
    "python": f"""
        if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
        printf '%s\\n' "$@" > log/door
        env > log/environment
        exit ${{DOOR_STATUS:-0}}
    """,
}


class Job:
    """A job of `cluster/slurm.sbatch` on nodes that are processes here, with stand-ins for Slurm and Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("venv/bin", "log"):
            (folder / part).mkdir(parents=True)
        for name, text in TOOLS.items():
            tool = folder / "venv" / "bin" / name
            tool.write_text(f"#!/bin/bash\nset -e\n{textwrap.dedent(text)}")
            tool.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "USER": "me",
            "VENV": "venv",
            "LOCAL": str(folder / "disk"),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_NODELIST": "nodes",
            "SLURM_CPUS_ON_NODE": "8",
        }

    def run(self, *arguments: str, **environment: str) -> int:
        """Run it to its end; its exit status."""
        return subprocess.run(
            ["bash", str(SLURM), *arguments], cwd=self.folder, env=self.environment | environment, timeout=60
        ).returncode

    def end_early(self) -> None:
        """Run it until Ray is up, end it as Slurm does, each process of each node, and wait for all of them."""
        running = subprocess.Popen(
            ["bash", str(SLURM)],
            cwd=self.folder,
            env=self.environment | {"HANGS": "1"},
            stdout=subprocess.PIPE,  # which is at its end when all processes are
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("disk?/*/session"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGTERM)
        running.communicate(timeout=60)

    def log(self, name: str) -> list[str]:
        return (self.folder / "log" / name).read_text().splitlines()

    def environment_of(self, who: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.log(f"environment{who}") if "=" in line)

    def begin_study(self, folder: str) -> None:
        (self.folder / folder).mkdir(parents=True)
        (self.folder / folder / SPACE_FILE).touch()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_slurm_job_starts_ray_on_all_its_nodes_and_the_study_on_the_first(job: Job) -> None:
    assert job.run("space.yaml", "--set", "data.root=/my corpora") == 0
    assert set(job.log("srun")) == {"--nodes=3", "--ntasks-per-node=1"}
    address = "node0:22345"
    for node in range(3):
        asked = job.log(f"ray{node}")
        assert asked[: asked.index("--")] == [
            *("symmetric-run", "--address", address, "--min-nodes", "3", "--num-cpus", "8")
        ]
    assert job.log("door") == [
        *("-m", "raysv.tune", "space.yaml", "--set", "data.root=/my corpora", "--name", "slurm-12345")
    ]
    environment = job.environment_of("")
    assert environment["RAY_ADDRESS"] == address
    assert environment["RAYSV_CACHE"] == f"{job.folder}/disk/raysv-cache-me"
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64


def test_a_slurm_job_trains_one_configuration_and_ends_as_it_does(job: Job) -> None:
    assert job.run("best_config.yaml", DOOR="raysv.train", DOOR_STATUS="3") == 3
    assert job.log("door") == ["-m", "raysv.train", "best_config.yaml", "--name", "slurm-12345"]


def test_a_slurm_job_has_the_token_that_it_is_given(job: Job) -> None:
    job.run("space.yaml", RAY_AUTH_TOKEN="mine")
    assert {job.environment_of(node)["RAY_AUTH_TOKEN"] for node in "012"} == {"mine"}


@pytest.mark.parametrize(
    ("arguments", "study"),
    [
        ("", "results/slurm-12345"),
        ("--name mine", "results/mine"),
        ("--results elsewhere", "elsewhere/slurm-12345"),
        ("--results=elsewhere --name=mine", "elsewhere/mine"),
    ],
)
def test_a_requeued_slurm_job_goes_on_with_its_study(job: Job, arguments: str, study: str) -> None:
    job.run("space.yaml", *arguments.split(), SLURM_RESTART_COUNT="1")
    assert "--resume" not in job.log("door")  # it was broken off before it had begun one
    job.begin_study(study)
    job.run("space.yaml", *arguments.split(), SLURM_RESTART_COUNT="1")
    assert job.log("door") == ["-m", "raysv.tune", "--resume", study]
    assert find_study(Path("results"), str(job.folder / study)) == job.folder / study


def test_a_slurm_job_that_is_not_requeued_leaves_it_to_raysv_to_refuse_a_name_that_is_taken(job: Job) -> None:
    job.begin_study("results/mine")
    job.run("space.yaml", "--name", "mine")
    assert "--resume" not in job.log("door")


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_slurm_job_that_resumes_a_study_does_so_again_when_it_is_requeued(job: Job, restarts: str) -> None:
    job.begin_study("results/mine")
    job.run("--resume", "mine", SLURM_RESTART_COUNT=restarts)
    assert job.log("door") == ["-m", "raysv.tune", "--resume", "mine"]


INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("gateway", ["", "yes"])
def test_the_nodes_of_a_slurm_job_meet_on_the_interface_by_which_each_reaches_another(job: Job, gateway: str) -> None:
    assert job.run("space.yaml", GATEWAY=gateway) == 0
    for node in range(3):
        environment = job.environment_of(str(node))
        assert [environment[name] for name in INTERFACES] == [f"eth{node}"] * 2


def test_a_slurm_job_keeps_the_interface_that_is_set_and_one_node_needs_none(job: Job) -> None:
    assert job.run("space.yaml", NCCL_SOCKET_IFNAME="ib0") == 0
    assert [job.environment_of("1")[name] for name in INTERFACES] == ["eth1", "ib0"]
    (job.folder / "venv" / "bin" / "ip").unlink()
    (job.folder / "venv" / "bin" / "getent").unlink()
    assert job.run("space.yaml", GLOO_SOCKET_IFNAME="bond0") == 0
    assert [job.environment_of("1")[name] for name in INTERFACES] == ["bond0"] * 2
    assert job.run("space.yaml", SLURM_JOB_NUM_NODES="1") == 0
    assert not set(INTERFACES) & set(job.environment_of("0"))


def test_a_slurm_job_says_how_to_name_the_interface_that_it_does_not_find(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "venv" / "bin" / "getent").write_text("#!/bin/sh\nexit 2\n")
    assert job.run("space.yaml") != 0
    assert "Set GLOO_SOCKET_IFNAME to the interface" in capfd.readouterr().err
    assert not (job.folder / "log" / "door").exists()


@pytest.mark.parametrize("status", ["0", "2"])
def test_a_slurm_job_leaves_nothing_of_rays_on_its_nodes(job: Job, status: str) -> None:
    assert job.run("space.yaml", DOOR_STATUS=status) == int(status)
    assert [[*disk.iterdir()] for disk in job.folder.glob("disk?")] == [[]] * 3


def test_a_slurm_job_that_is_ended_early_waits_for_ray_and_leaves_nothing_of_it(job: Job) -> None:
    job.end_early()
    assert [[*disk.iterdir()] for disk in job.folder.glob("disk?")] == [[]] * 3


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_says_for_whom_it_is_what_to_edit_and_how_to_see_the_pages(file: Path) -> None:
    text = file.read_text()
    opening = text[: text.index("\n\n")]
    assert opening.removeprefix("#!/bin/bash\n").startswith("# For ")
    assert "EDIT" in opening
    assert "http://127.0.0.1:5000" in opening
    assert ":8265" in opening
    assert 1 <= text.count("# EDIT") <= 12


PLACEHOLDERS = (  # what stands for something of the user's, or is theirs to choose
    r"\b(192\.168|10\.0\.0)\.\d",
    r"\b(ami|sg|fs)-0\b",
    r"\bmy-",
    r"\bus-west",
    r"^cluster_name: ",
    r"\bssh_user: me$",
    r"/id_ed25519",
    r"\beth0\b",
    r"\bREGISTRY\b",
    r"/shared/cnceleb",
    r"\bclaimName: ",
    r"\bRAYSV_CLUSTER=",
    r"\bcount: \d",
    r"\b(max_workers|maxReplicas|nvidia\.com/gpu|GPU): \d",
    r"\b(VolumeSize|diskSizeGb|emptyDir): (\d|$)",
    r"\bInstanceType: g|\bmachineType: g",
    r"^#SBATCH --(nodes|gpus-per-node|time)=",
    r"^(VENV|LOCAL)=",
)


def settings(file: Path) -> Iterator[tuple[str, str]]:
    """What a cluster file sets, as `key: value`, each with the line on which that begins."""
    lines = file.read_text().splitlines()
    if file == SLURM:
        yield from ((line.partition(" # ")[0], line) for line in lines if re.match(r"#SBATCH|[^#]", line))
    else:
        for setting, number in scalars(yaml.compose(file.read_text())):
            yield setting, lines[number]


def scalars(node: yaml.Node, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, value in node.value:
            yield from scalars(value, name.value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from scalars(value, key)
    else:
        yield f"{key}: {node.value or ''}", node.start_mark.line


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_line_with_a_placeholder_is_marked(file: Path) -> None:
    unmarked = [setting for setting, line in settings(file) if "# EDIT" not in line]
    assert [setting for setting in unmarked if any(re.search(one, setting) for one in PLACEHOLDERS)] == []


def test_a_placeholder_that_no_file_has_any_more_is_not_looked_for() -> None:
    there = [setting for file in FILES for setting, _ in settings(file)]
    assert [one for one in PLACEHOLDERS if not any(re.search(one, setting) for setting in there)] == []
