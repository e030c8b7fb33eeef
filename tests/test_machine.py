import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import psutil
import pytest
import torch

from raysv.search import machine
from raysv.search.machine import (
    CODECS,
    FAIL,
    GB,
    MB,
    OK,
    WARN,
    audio,
    folder,
    gpus,
    group,
    installed,
    shared_memory,
    versions,
)

Mount = Callable[..., Path]


def with_versions(**others: str) -> Callable[[str], str]:
    """What is installed, but for some packages."""
    return lambda name: others.get(name) or installed(name)


def test_this_environment_has_what_raysv_asks_for() -> None:
    finding = versions()
    assert finding.verdict == OK, finding.words
    for told in (f"python {sys.version.split()[0]}", f"torch {torch.__version__}", "raysv 0", "ray 2", "optuna 5"):
        assert told in finding.words


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"torch": "2.10.0+cu130", "torchaudio": "2.10.0+cu130"}, "torch is 2.10.0+cu130, needed is <2.12,>=2.11"),
        ({"python": "3.10.12"}, "python is 3.10.12, needed is >=3.11. Take another Python"),
        ({"optuna": "4.5.0"}, "pip install 'optuna<5.1,>=5.0'"),
        (
            {"torch": "2.11.0+cpu", "torchaudio": "2.11.0+cu130"},
            "pip install --force-reinstall --no-deps torch torchaudio",
        ),
        ({"torch": "2.11.0+cpu", "torchaudio": "2.11.0+cu130"}, "torch 2.11.0+cpu and torchaudio 2.11.0+cu130 are not"),
        ({"torch": "2.11.0", "torchaudio": "2.10.0"}, "torch 2.11.0 and torchaudio 2.10.0 are not"),
    ],
)
def test_other_versions_than_raysv_asks_for_fail(others: dict[str, str], told: str) -> None:
    finding = versions(with_versions(**others))
    assert finding.verdict == FAIL
    assert told in finding.words


def test_what_is_missing_or_broken_fails_and_the_others_are_looked_at_all_the_same() -> None:
    def version_of(name: str) -> str:
        if name == "torchaudio":
            raise OSError("libcudart.so.12: cannot open shared object file")
        if name == "mlflow":
            raise PackageNotFoundError(name)
        return {"ray": "2.9.0"}.get(name) or installed(name)

    finding = versions(version_of)
    assert finding.verdict == FAIL
    for told in ("mlflow cannot be used: PackageNotFoundError", "torchaudio cannot be used: libcudart", "ray is 2.9.0"):
        assert told in finding.words
    assert "not of one build" not in finding.words


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")
@pytest.mark.parametrize(
    ("devices", "visible", "verdict", "told"),
    [
        ((), None, OK, "none: trials train on CPUs"),
        (("nvidiactl",), None, OK, "none: trials train on CPUs"),
        (("nvidia0", "nvidia1", "nvidiactl"), None, FAIL, "2, but PyTorch sees none"),
        (("nvidia0",), "0", FAIL, "1, but PyTorch sees none"),
        (("nvidia0",), "", WARN, "1, hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_pytorch_does_not_see_are_a_fault_unless_they_are_hidden(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: tuple[str, ...],
    visible: str | None,
    verdict: str,
    told: str,
) -> None:
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    )
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = gpus(tmp_path)
    assert finding.verdict == verdict
    assert told in finding.words
    assert ("driver 535.104.05" in finding.words) == (verdict == FAIL)


def test_gpus_are_named_with_driver_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "card", lambda index: f"card {index}")
    finding = gpus(tmp_path)
    assert finding.verdict == OK
    assert finding.words.startswith(f"card 0, card 1; driver unknown, PyTorch {torch.__version__} for CUDA ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_gpus_compute_and_join_a_group() -> None:
    finding = gpus()
    assert finding.verdict == OK and torch.cuda.get_device_name(0) in finding.words
    finding = group()
    assert finding.verdict == OK and finding.words.startswith("nccl"), finding.words


def test_two_processes_sum_a_tensor_up() -> None:
    finding = group()
    assert finding.verdict == OK, finding.words
    assert "summed a tensor up" in finding.words


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL takes another variable")
def test_an_interface_that_is_not_there_keeps_the_processes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = group()
    assert finding.verdict == FAIL
    assert "Unable to find address for: nosuch0" in finding.words
    assert "set GLOO_SOCKET_IFNAME, now nosuch0," in finding.words


def test_processes_that_do_not_answer_are_given_up_and_ended() -> None:
    before = {process.pid for process in psutil.Process().children()}
    finding = group(seconds=0.01)
    assert finding.verdict == FAIL
    assert "no answer in 0.01 s" in finding.words
    assert {process.pid for process in psutil.Process().children()} <= before


def test_the_formats_that_corpora_consist_of_come_back_as_they_were() -> None:
    finding = audio()
    assert finding.verdict == OK, finding.words
    assert "WAV, FLAC" in finding.words


@pytest.mark.parametrize(("lacking", "verdict"), [("MP3", OK), ("FLAC", FAIL)])
def test_a_format_that_libsndfile_lacks_is_told_and_a_fault_if_corpora_consist_of_it(
    lacking: str, verdict: str
) -> None:
    finding = audio(CODECS | {lacking: (lacking, "NONSENSE")})
    assert finding.verdict == verdict
    assert f"but not {lacking}" in finding.words
    assert ("pip install --force-reinstall --no-deps soundfile" in finding.words) == (verdict == FAIL)


def test_shared_memory_is_too_small_for_batches_or_for_ray_beside_them_or_large_enough(mount: Mount) -> None:
    place = mount("size=64m")  # Docker's usual one
    assert shared_memory(10 * MB, 20 * MB, place).verdict == OK
    assert shared_memory(10 * MB, 300 * MB, place).verdict == WARN
    finding = shared_memory(230 * MB, 300 * MB, place)
    assert finding.verdict == FAIL
    assert "67 MB free" in finding.words and "--shm-size" in finding.words and "data.loader_workers" in finding.words


@pytest.mark.parametrize(("limit", "verdict"), [(256, FAIL), (2048, WARN), (8192, OK)])
def test_few_open_files_are_told_by_how_few(limit: int, verdict: str) -> None:
    lines = ("import resource", f"resource.setrlimit(resource.RLIMIT_NOFILE, (200, {limit}))")
    code = "\n".join((*lines, "from raysv.search.machine import open_files", "print(open_files())"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"verdict='{verdict}'" in done.stdout, done.stderr
    assert f"200 for a process, {limit} at most" in done.stdout
    assert ("ulimit -n 8192" in done.stdout) == (verdict != OK)


def test_a_folder_that_can_be_written_to_stays_as_it_was(tmp_path: Path) -> None:
    finding = folder(tmp_path / "new" / "results", "Name another")
    assert finding.verdict == OK, finding.words
    assert str(tmp_path / "new" / "results") in finding.words
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_or_nearly_so_fails(mount: Mount) -> None:
    full = folder(mount("size=64k") / "results", "Name another")
    assert full.verdict == FAIL
    assert "cannot be written to: No space left on device. Name another, or mend that." in full.words
    small = folder(mount("size=50m"), "Name another")
    assert small.verdict == FAIL
    assert small.words.startswith("52 MB free") and "Name another, or make room." in small.words


def test_a_folder_without_room_for_all_that_may_come_is_a_warning(mount: Mount) -> None:
    place = mount("size=2g")
    assert folder(place, "Name another", wanted=1.5 * GB).verdict == OK
    finding = folder(place, "Name another", wanted=40 * GB)
    assert finding.verdict == WARN
    assert "checkpoints may take 40.0 GB. Name another, or make room." in finding.words


def test_a_folder_that_may_not_be_written_to_fails(mount: Mount) -> None:
    finding = folder(mount("ro"), "Name another")
    assert finding.verdict == FAIL
    assert "cannot be written to: Read-only file system" in finding.words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in folder(tmp_path, "Name another").words


def test_a_file_in_place_of_a_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    finding = folder(tmp_path / "results", "Name another")
    assert finding.verdict == FAIL
    assert "Not a directory" in finding.words
