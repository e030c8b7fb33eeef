import pytest
import torch

from raysv.precision import at_least_float32, compute_dtype


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [
        (True, True, torch.bfloat16),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_auto_precision_is_half_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, expected: torch.dtype
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert compute_dtype("auto", cpu) == expected
    assert (compute_dtype("fp32", cpu), compute_dtype("bf16", cpu)) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_nothing_is_computed_in_less_than_float32_or_in_less_than_it_came_in(
    given: torch.dtype, expected: torch.dtype
) -> None:
    values = torch.tensor([1.0, 1.5], dtype=given)
    assert at_least_float32(values).dtype == expected
    assert at_least_float32(values).tolist() == [1.0, 1.5]
