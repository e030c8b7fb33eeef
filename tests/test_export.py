from pathlib import Path
from typing import Any

import pytest

from raysv import export


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the door had written, by an exporter that does no more than that."""
    targets: list[Path] = []

    def write(checkpoint: Path, target: Path) -> float | None:
        target.write_bytes(bytes(1_500_000))
        targets.append(target)
        return 3e-7 if len(targets) == 1 else None

    monkeypatch.setattr(export, "export_onnx", write)
    return targets


def test_the_file_lies_in_the_checkpoint_unless_told_otherwise(
    written: list[Path], tmp_path: Path, capsys: Any
) -> None:
    assert export.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'encoder.onnx'}   1.5 MB\n"
        "Compared with PyTorch: in onnxruntime its embeddings are the same to 3e-07 of their length.\n"
    )
    assert export.main([str(tmp_path), str(tmp_path / "speaker.onnx")]) == 0
    assert capsys.readouterr().out.endswith("Not compared with PyTorch: onnxruntime is not installed.\n")
    assert written == [tmp_path / "encoder.onnx", tmp_path / "speaker.onnx"]


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, capsys: Any) -> None:
    assert export.main([str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"raysv.export: {tmp_path} is no checkpoint") and told.err.count("\n") == 1
