"""Attention kernels and float8 products on a CUDA device, against float32."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from model.attention import KERNELS, available, kernel, resolve
from model.float8 import Float8Linear, quantize_rows, require_float8
from tests.unit.model.test_attention import plain_attention, random_qkv
from tests.unit.model.test_float8 import normal, relative_error, with_outliers

pytestmark = pytest.mark.gpu

SHAPE = (2, 1025, 25, 128)  # two tiles of InternViT-6B


@pytest.fixture(autouse=True)
def _cuda() -> None:
    assert torch.cuda.is_available(), "the GPU tests were asked for, and torch finds no CUDA device"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_softmax_attention(name: str, compiled: bool) -> None:
    if name not in available(torch.device("cuda"), torch.bfloat16, SHAPE[-1]):
        pytest.skip(f"{name} is not installed")
    q, k, v = random_qkv(SHAPE, torch.bfloat16, "cuda")
    attention = kernel(name)
    if compiled:
        attention = torch.compile(attention, fullgraph=True)
    with torch.inference_mode():
        out = attention(q, k, v)
    assert out.shape == SHAPE
    assert out.dtype == torch.bfloat16
    assert relative_error(out, plain_attention(q, k, v)) <= 0.01


def test_auto_takes_the_fastest_of_all_that_run() -> None:
    device = torch.device("cuda")
    names = available(device, torch.bfloat16, SHAPE[-1])
    assert {"sdpa", "cudnn"} <= set(names)
    choice = resolve("auto", device, torch.bfloat16, (8, *SHAPE[1:]))
    assert set(choice.milliseconds) <= set(names)
    assert "sdpa" in choice.milliseconds
    assert choice.milliseconds[choice.name] == min(choice.milliseconds.values()) > 0
    assert resolve("auto", device, torch.float32, SHAPE).name == "sdpa"


@pytest.fixture
def _float8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no float8 product")
    require_float8(torch.device("cuda"))


@pytest.mark.usefixtures("_float8")
def test_rows_are_quantised_as_on_the_cpu() -> None:
    x = with_outliers(normal(500, 3200), 100.0).bfloat16()
    values, scale = quantize_rows(x)
    on_gpu, gpu_scale = quantize_rows(x.cuda())
    torch.testing.assert_close(gpu_scale.cpu(), scale, rtol=1e-6, atol=0)
    # A quotient that lies between two values may fall to either side.
    assert (on_gpu.float().cpu() != values.float()).float().mean() <= 1e-4
    assert relative_error(on_gpu.float().cpu() * scale, x) <= 0.028


# The layers of a 6B block, two of them narrowed, and rows of no tile, one, and several.
@pytest.mark.usefixtures("_float8")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(9600, 3200), (3200, 3200), (1600, 3200), (320, 12800)])
def test_the_product_is_the_reference(
    out: int, inner: int, with_bias: bool, compiled: bool
) -> None:
    weight, bias = 0.02 * normal(out, inner, seed=1), normal(out, seed=2)
    layer = Float8Linear.from_weight(weight.bfloat16(), bias if with_bias else None)
    on_gpu = deepcopy(layer).cuda()
    run = torch.compile(on_gpu, fullgraph=True) if compiled else on_gpu
    for rows in (0, 1, 7, 1025):
        x = with_outliers(normal(rows, inner, seed=3), 30.0).bfloat16()
        with torch.inference_mode():
            y, expected = run(x.cuda()), layer(x)
        assert y.shape == expected.shape == (rows, out)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
        if rows:
            assert relative_error(y.cpu(), expected) <= 0.01
