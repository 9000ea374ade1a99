"""Linear layers whose product is in float8: e4m3 weights and activations, one scale a row.

Shapes: x [..., K], weight [O, K] with a scale [O, 1], result [..., O]. A row of weight is an output
channel, a row of x a token. Scales are float32, results bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.errors import UserError

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0  # torch.finfo(FLOAT8).max
# Rows smaller than this lose digits, rows of zeros stay zeros, and no scale is 0 or subnormal.
MIN_SCALE = 1e-12
# torch's rowwise scaled product: compute capability 8.9 (Ada) or newer, K and O multiples of 16,
# any number of rows (aten/src/ATen/native/cuda/ScaledBlas.cpp, RowwiseScaledMM.cu).
MIN_CAPABILITY = (8, 9)
MULTIPLE = 16


def require_float8(device: torch.device) -> None:
    """Raises UserError where the device has no float8 product."""
    needs = "dtype: fp8 needs a CUDA device of compute capability 8.9 or newer"
    if device.type != "cuda":
        raise UserError(f"{needs}, not {device.type}; choose bfloat16")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{needs}; {name} has {capability[0]}.{capability[1]}; choose bfloat16")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [..., K] as float8 [..., K] and scales [..., 1], float32, with x ≈ float8 · scale.

    scale = max(amax |row| / 448, 1e-12) and float8 = x / scale, to nearest, ties to even. For
    finite x all values are finite; a row with inf or NaN makes its products NaN.
    """
    scale = (x.abs().amax(-1, keepdim=True).float() / FLOAT8_MAX).clamp(min=MIN_SCALE)
    # |x / scale| is 448 but for its rounding, and what is under 464 rounds to 448.
    return (x.float() / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """y = x Wᵀ + b, with x quantised row by row as it comes.

    On CUDA one call of torch's scaled product; elsewhere the same numbers in float32, for tests.
    """

    weight: Tensor  # [O, K], float8
    scale: Tensor  # [O, 1], float32
    bias: Tensor | None  # [O], bfloat16

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Raises UserError where K or O is no multiple of 16."""
        super().__init__()
        if any(size % MULTIPLE for size in weight.shape):
            raise UserError(
                f"dtype: fp8 needs layers whose sizes are multiples of {MULTIPLE}, "
                f"and one is {list(weight.shape)}; choose bfloat16"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Float8Linear:
        """Quantises a weight [O, K] of any float dtype; the bias [O] is kept as bfloat16."""
        return cls(*quantize_rows(weight), None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., O], bfloat16."""
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        product = _scaled_product if x.is_cuda else _reference_product
        y = product(rows, scale, self.weight, self.scale, self.bias)
        return y.reshape(*x.shape[:-1], self.weight.shape[0])


def _scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    # Fast accumulation: Hopper's tensor cores then add up without promoting to float32 in
    # between; 1.1 to 1.2 times as fast, and torchao's choice for forward passes (pytorch/ao#2377).
    return torch._scaled_mm(
        x,
        weight.t(),  # column-major, as it must be
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _reference_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    y = (x.float() * x_scale) @ (weight.float() * weight_scale).t()
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)
