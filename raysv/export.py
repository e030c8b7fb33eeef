"""A checkpoint in, one ONNX file out: the encoder with its features, for programs without PyTorch.

    python -m raysv.export results/RUN/checkpoint                  # writes results/RUN/checkpoint/encoder.onnx
    python -m raysv.export results/RUN/checkpoint speaker.onnx

Input `waveforms`, (n, samples) float32 in [-1, 1) at 16 kHz; output `embeddings`, (n, dim). The file's metadata tell
threshold, error rate, and which checkpoint it was. Needs the extra `onnx`; where onnxruntime is there, what the file
computes is compared with PyTorch before it takes its place.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raysv.learning.exporting import export_onnx


def main(arguments: list[str] | None = None) -> int:
    """Write the file; the exit status is 0, or 2 when it could not be written."""
    parser = argparse.ArgumentParser(
        "raysv.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder that raysv.train wrote")
    parser.add_argument("file", type=Path, nargs="?", help="what to write (default: encoder.onnx in the checkpoint)")
    chosen = parser.parse_args(arguments)
    target = chosen.file or chosen.checkpoint / "encoder.onnx"
    try:
        distance = export_onnx(chosen.checkpoint, target)
    except (ValueError, OSError) as error:
        print(f"raysv.export: {error}", file=sys.stderr)
        return 2
    print(f"{target}   {target.stat().st_size / 1e6:.1f} MB")
    if distance is None:
        print("Not compared with PyTorch: onnxruntime is not installed.")
    else:
        print(f"Compared with PyTorch: in onnxruntime its embeddings are the same to {distance:.0e} of their length.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
