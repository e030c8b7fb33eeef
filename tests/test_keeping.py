import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config

from raysv.learning.keeping import SUMS, keep_checkpoint, latest_checkpoint, newest_intact


def written(folder, eers):
    """What of a checkpoint tells how far it is and how good."""
    folder.mkdir()
    lines = [json.dumps({"epoch": epoch, "dev/eer": eer}) + "\n" for epoch, eer in enumerate(eers, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def kept_after(tmp_path, eers):
    """The names of what is kept after each of the epochs."""
    names = []
    for epoch in range(1, len(eers) + 1):
        place = keep_checkpoint(written(tmp_path / f"new-{epoch}", eers[:epoch]), tmp_path / "kept")
        assert place == latest_checkpoint(tmp_path / "kept") == tmp_path / "kept" / f"epoch-{epoch:04d}"
        names.append(sorted(int(folder.name[-4:]) for folder in (tmp_path / "kept").iterdir()))
    return names


def test_the_last_two_checkpoints_and_that_of_the_lowest_error_rate_are_kept(tmp_path):
    assert kept_after(tmp_path, [0.4, 0.2, 0.3, 0.25, 0.1]) == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5]]


def test_a_checkpoint_of_which_only_a_part_was_copied_does_not_count(tmp_path):
    kept_after(tmp_path, [0.4, 0.3])
    shutil.copytree(tmp_path / "kept" / "epoch-0002", tmp_path / "kept" / "epoch-0003.partial")
    assert latest_checkpoint(tmp_path / "kept").name == "epoch-0002"
    for eers in ([0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]):
        keep_checkpoint(written(tmp_path / f"new-{len(eers)}", eers), tmp_path / "kept")
    assert sorted(folder.name for folder in (tmp_path / "kept").iterdir()) == ["epoch-0003", "epoch-0004"]


def test_a_kept_checkpoint_that_is_kept_again_stays_where_it_is(tmp_path):
    kept_after(tmp_path, [0.4])
    place = tmp_path / "kept" / "epoch-0001"
    assert keep_checkpoint(place, tmp_path / "kept") == place
    assert (place / "metrics.jsonl").is_file()


def test_a_checkpoint_that_another_process_kept_meanwhile_stays(tmp_path):
    """Two processes train one trial for a moment, when one was orphaned by a kill."""
    kept_after(tmp_path, [0.4, 0.3])
    marked = tmp_path / "kept" / "epoch-0002" / "mark"
    marked.touch()
    place = keep_checkpoint(written(tmp_path / "again", [0.4, 0.3]), tmp_path / "kept")
    assert place == marked.parent and marked.exists()
    assert sorted(folder.name for folder in (tmp_path / "kept").iterdir()) == ["epoch-0001", "epoch-0002"]


def test_a_checkpoint_that_cannot_be_moved_into_place_costs_no_other(tmp_path, monkeypatch):
    kept_after(tmp_path, [0.4])
    new = written(tmp_path / "new-2", [0.4, 0.3])

    def refuse(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space left"):
        keep_checkpoint(new, tmp_path / "kept")
    assert latest_checkpoint(tmp_path / "kept").name == "epoch-0001"


def test_before_the_first_epoch_there_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "kept") is None


def test_the_sums_are_those_that_sha256sum_checks(tmp_path):
    place = keep_checkpoint(written(tmp_path / "new", [0.4]), tmp_path / "kept")
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=place, check=True, capture_output=True)


def test_an_intact_checkpoint_is_found_without_a_word(tmp_path):
    kept_after(tmp_path, [0.4, 0.3])
    assert newest_intact(tmp_path / "kept") == (tmp_path / "kept" / "epoch-0002", "")
    assert newest_intact(tmp_path / "nowhere") == (None, "")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: os.truncate(file, 10), "metrics.jsonl differs from its checksum"),
        (lambda file: file.write_bytes(file.read_bytes()[:-2] + b"x\n"), "metrics.jsonl differs from its checksum"),
        (lambda file: file.unlink(), "metrics.jsonl is missing"),
        (lambda file: (file.parent / SUMS).write_bytes(b"\xff"), "metrics.jsonl differs from its checksum"),
        (lambda file: (file.parent / SUMS).write_bytes(b""), "metrics.jsonl differs from its checksum"),
        (lambda file: (file.parent / "encoder.pt").touch(), "encoder.pt differs from its checksum"),
        (lambda file: (file.parent / SUMS).unlink(), "it has no checkpoint.yaml"),
    ],
)
def test_a_damaged_checkpoint_makes_way_for_the_one_before(tmp_path, damage, told):
    kept_after(tmp_path, [0.4, 0.3])
    kept = tmp_path / "kept"
    damage(kept / "epoch-0002" / "metrics.jsonl")
    intact, notice = newest_intact(kept)
    assert intact == latest_checkpoint(kept) == kept / "epoch-0001"
    assert told in notice and "epoch-0002" in notice and notice.endswith("goes on from epoch-0001.")
    again = keep_checkpoint(written(tmp_path / "again", [0.4, 0.3]), kept)
    assert newest_intact(kept) == (again, "")
    assert (kept / "epoch-0002.damaged").is_dir(), "to be looked at"


def test_a_checkpoint_of_an_earlier_revision_has_no_sums_and_counts_if_it_can_be_loaded(tmp_path):
    place = keep_checkpoint(
        write_checkpoint(tmp_path / "new", tiny_config(tmp_path), tiny_encoder()), tmp_path / "kept"
    )
    (place / SUMS).unlink()
    assert newest_intact(tmp_path / "kept") == (place, "")
    os.truncate(place / "training_state.pt", 100)
    assert newest_intact(tmp_path / "kept")[0] is None


def test_a_checkpoint_that_comes_late_removes_none_of_a_later_epoch(tmp_path):
    """Of a process that was cut off while another took its place."""
    kept_after(tmp_path, [0.4, 0.3, 0.2, 0.1])
    (tmp_path / "kept" / "epoch-0005.partial").mkdir()
    keep_checkpoint(written(tmp_path / "late", [0.4, 0.3, 0.2]), tmp_path / "kept")
    assert latest_checkpoint(tmp_path / "kept").name == "epoch-0004"
    assert (tmp_path / "kept" / "epoch-0005.partial").is_dir()


def test_what_cannot_be_read_for_other_reasons_is_not_damaged(tmp_path, monkeypatch):
    """A network storage that is away for a moment must not cost the checkpoints on it."""
    kept_after(tmp_path, [0.4])

    def stale(self, *args, **more):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as away:
        away.setattr(Path, "open", stale)
        with pytest.raises(OSError, match="Stale"):
            newest_intact(tmp_path / "kept")
    assert newest_intact(tmp_path / "kept") == (tmp_path / "kept" / "epoch-0001", "")


def test_where_all_are_damaged_a_run_starts_anew(tmp_path):
    kept_after(tmp_path, [0.4, 0.3])
    for folder in (tmp_path / "kept").iterdir():
        (folder / "metrics.jsonl").write_text("")
    intact, notice = newest_intact(tmp_path / "kept")
    assert intact is None and notice.endswith("starts anew.")


@pytest.fixture
def full_disk(tmp_path):
    """A file system of its own with hardly any room."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_no_checkpoint_that_was_kept(tmp_path, full_disk):
    first = keep_checkpoint(written(tmp_path / "new-1", [0.4]), full_disk / "kept")
    large = written(tmp_path / "new-2", [0.4, 0.3])
    (large / "encoder.pt").write_bytes(os.urandom(2**17))
    with pytest.raises(
        OSError, match=r"The checkpoint of epoch 2 cannot be kept in .*: No space left on device\. The one before is"
    ):
        keep_checkpoint(large, full_disk / "kept")
    assert newest_intact(full_disk / "kept") == (first, "")
    assert [folder.name for folder in first.parent.iterdir()] == [first.name], "nothing half-written stays"
