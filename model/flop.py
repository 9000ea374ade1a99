"""How much there is to compute for a tile, and how fast a GPU could be at the very best."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from model.config import ViTConfig

TERA = 1e12


def block_flop(config: ViTConfig, num_heads: int, num_columns: int) -> int:
    """Multiplications and additions of one block and tile, with some of its heads and MLP columns.

    Linear layers 2 N (4 D h + 2 D m) and attention's two products 4 N² h, for N tokens, hidden size
    D, h = heads · head size, m columns. Norms, softmax and GELU are not counted.
    """
    N, D, h = config.num_tokens, config.hidden_size, num_heads * config.head_dim
    return 2 * N * (4 * D * h + 2 * D * num_columns) + 4 * N * N * h


def tile_flop(config: ViTConfig, num_blocks: int | None = None) -> int:
    """FLOP of one tile through the patch embedding and `num_blocks` blocks (None: all)."""
    patches = 2 * config.num_patches * 3 * config.patch_size**2 * config.hidden_size
    block = block_flop(config, config.num_heads, config.intermediate_size)
    return patches + (config.num_layers if num_blocks is None else num_blocks) * block


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
