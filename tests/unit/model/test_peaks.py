"""The peaks that a replica is compared with."""

from __future__ import annotations

import pytest

from model.peaks import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H200", "float32", None),
        ("NVIDIA H2", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_a_peak_is_told_only_where_it_is_known(device: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(device, dtype) == (None if tera is None else tera * 1e12)


def test_float8_is_about_twice_as_fast_everywhere() -> None:
    with_fp8 = [peaks for peaks in PEAKS.values() if "fp8" in peaks]
    assert len(with_fp8) >= 6
    for peaks in with_fp8:
        assert peaks["fp8"] / peaks["bfloat16"] == pytest.approx(2, rel=0.03)
