"""In which floating-point format things are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What autocast computes in: bfloat16 where asked for, or where `auto` meets hardware that multiplies it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # where it is emulated, it is slower
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`, as checkpoints say it."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The other way round, of what `compute_dtype` returns."""
    return {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}[name]


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are that already: for what the 8 bits of bfloat16 would spoil."""
    return values if values.dtype == torch.float64 else values.float()
