"""How fast a GPU could be at the very best."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TERA = 1e12


def _tensor_cores(bfloat16: float, fp8: float | None = None) -> Mapping[str, float]:
    peaks = {"bfloat16": bfloat16, "float16": bfloat16}
    return MappingProxyType(peaks if fp8 is None else {**peaks, "fp8": fp8})


# TFLOP/s of dense matrix products, by torch's name of the device. Source: NVIDIA's data sheet of
# each; where that gives the figure "with sparsity", half of it.
PEAKS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": _tensor_cores(989.5, 1979),  # SXM
        "NVIDIA H100 NVL": _tensor_cores(835.5, 1670.5),
        "NVIDIA H100 PCIe": _tensor_cores(756.5, 1513),
        "NVIDIA H200": _tensor_cores(989.5, 1979),
        "NVIDIA B200": _tensor_cores(2250, 4500),
        "NVIDIA A100-SXM4-40GB": _tensor_cores(312),
        "NVIDIA A100-SXM4-80GB": _tensor_cores(312),
        "NVIDIA A100-PCIE-40GB": _tensor_cores(312),
        "NVIDIA A100 80GB PCIe": _tensor_cores(312),
        "NVIDIA L40S": _tensor_cores(362.05, 733),
        "NVIDIA L4": _tensor_cores(121, 242.5),
    }
)


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s that a device cannot exceed in a compute type; None where it is not in the table."""
    tera = PEAKS.get(device, {}).get(dtype)
    return None if tera is None else tera * TERA
