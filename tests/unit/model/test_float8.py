"""Float8 rows and the layer on them, against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.errors import UserError
from model.float8 import FLOAT8, Float8Linear, quantize_rows, require_float8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: Tensor, factor: float) -> Tensor:
    """Every 37th column times the factor, as a ViT's activations have a few large channels."""
    x = x.clone()
    x[:, ::37] *= factor
    return x


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def test_known_rows() -> None:
    x = torch.tensor(
        [
            [448.0, -224.0, 1.0, 0.0],  # scale 1: e4m3 holds these as they are
            [896.0, 34.0, -38.0, 2.0**-8],  # scale 2: 17 and 19 lie between 16, 18, 20: to even
            [0.0, 0.0, -0.0, 0.0],
            [1e-20, -1e-20, 0.0, 0.0],  # under the least scale: zeros
        ]
    )
    values, scale = quantize_rows(x)
    assert values.dtype == FLOAT8
    assert scale.dtype == torch.float32
    assert scale.shape == (4, 1)
    assert scale.flatten().tolist() == pytest.approx([1.0, 2.0, 1e-12, 1e-12])
    expected = [
        [448.0, -224.0, 1.0, 0.0],
        [448.0, 16.0, -20.0, 2.0**-9],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert values.float().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_of_a_row_is_448_and_the_rest_within_a_sixteenth(dtype: torch.dtype) -> None:
    x = (normal(300, 512) * torch.logspace(-3, 3, 300).unsqueeze(1)).to(dtype)
    values, scale = quantize_rows(x)
    assert (values.float().abs().amax(1) == 448).all()
    back, x = values.float() * scale, x.float()
    # Three bits after the point: half a step is 1/16, or 2^-10 scales where e4m3 is subnormal.
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)
    assert ((back - x).abs() <= bound).all()
    assert relative_error(back, x) == pytest.approx(0.026, abs=0.002)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-12, 1.0, 65504.0, 3.3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_values_are_finite_at_any_size(size: float, dtype: torch.dtype) -> None:
    x = (normal(8, 64).clamp(-1, 1) * size).to(dtype)
    values, scale = quantize_rows(x)
    assert values.float().isfinite().all()
    assert scale.isfinite().all()
    assert (scale >= 1e-12 * (1 - 1e-6)).all()
    assert (values.float() * scale).isfinite().all()


def test_any_leading_shape_is_rows() -> None:
    x = normal(2, 3, 32)
    values, scale = quantize_rows(x)
    flat, flat_scale = quantize_rows(x.reshape(6, 32))
    assert torch.equal(values.float(), flat.float().reshape(2, 3, 32))
    assert torch.equal(scale, flat_scale.reshape(2, 3, 1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen(broken: float) -> None:
    layer = Float8Linear.from_weight(normal(32, 64), None)
    x = normal(3, 64)
    x[1, 5] = broken
    y = layer(x.bfloat16())
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


# Two factors of 2.6 % each make 3.7 % (bfloat16 has 0.24 % here). Large channels hardly change
# that, because e4m3 has 15 binades of normal numbers and a row needs few of them.
@pytest.mark.parametrize("factor", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("sizes", [(64, 256, 512), (41, 800, 3200)])
def test_error_against_float32(sizes: tuple[int, int, int], factor: float) -> None:
    M, out, inner = sizes
    x = with_outliers(normal(M, inner, seed=1), factor).bfloat16()
    weight, bias = 0.02 * normal(out, inner, seed=2), 0.1 * normal(out, seed=3)
    y = Float8Linear.from_weight(weight, bias)(x)
    expected = F.linear(x.float(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert 0.034 <= relative_error(y, expected) <= 0.038  # less would not be float8


def test_a_large_row_does_not_blur_a_small_one() -> None:
    x, weight = normal(4, 256, seed=1), normal(64, 256, seed=2)
    x[0] *= 1e4
    weight[:32] *= 1e-4
    y, expected = Float8Linear.from_weight(weight, None)(x.bfloat16()), x @ weight.t()
    for rows in (slice(0, 1), slice(1, 4)):
        for columns in (slice(0, 32), slice(32, 64)):
            assert relative_error(y[rows, columns], expected[rows, columns]) <= 0.045


def test_zeros_give_the_bias() -> None:
    bias = normal(32, seed=3)
    layer = Float8Linear.from_weight(normal(32, 64), bias)
    assert torch.equal(layer(torch.zeros(5, 64).bfloat16()), bias.bfloat16().expand(5, -1))
    layer = Float8Linear.from_weight(torch.zeros(32, 64), bias)
    assert torch.equal(layer(normal(5, 64).bfloat16()), bias.bfloat16().expand(5, -1))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (7, 64), (2, 1025, 64), (0, 64), (2, 0, 64)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    layer = Float8Linear.from_weight(normal(32, 64), None)
    x = normal(*shape, seed=1).bfloat16()
    y = layer(x)
    assert y.shape == (*shape[:-1], 32)
    rows = [layer(row) for row in x.reshape(-1, 64)[:3]]
    if rows:
        torch.testing.assert_close(y.reshape(-1, 32)[:3], torch.stack(rows), rtol=1e-2, atol=1e-2)


def test_parts_of_the_input_add_up() -> None:
    """A split over the input dimension: each part has its own scales."""
    x, weight, bias = normal(9, 128, seed=1), normal(32, 128, seed=2), normal(32, seed=3)
    parts = [
        Float8Linear.from_weight(weight[:, span], bias if span.start == 0 else None)(
            x[:, span].bfloat16()
        )
        for span in (slice(0, 48), slice(48, 128))
    ]
    assert relative_error(parts[0].float() + parts[1].float(), F.linear(x, weight, bias)) <= 0.045


def test_the_layer_holds_a_byte_a_weight() -> None:
    layer = Float8Linear.from_weight(normal(32, 64).bfloat16(), normal(32))
    assert {name: (t.dtype, t.nbytes) for name, t in layer.state_dict().items()} == {
        "weight": (torch.float8_e4m3fn, 32 * 64),
        "scale": (torch.float32, 32 * 4),
        "bias": (torch.bfloat16, 32 * 2),
    }
    assert list(layer.parameters()) == []
    assert list(Float8Linear.from_weight(normal(32, 64), None).state_dict()) == ["weight", "scale"]


def test_one_graph() -> None:
    model = nn.Sequential(
        Float8Linear.from_weight(normal(32, 64), normal(32)),
        nn.GELU(),
        Float8Linear.from_weight(normal(16, 32), None),
    )
    x = normal(2, 5, 64).bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("rows", [0, 1, 7, 1025])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_on_cuda_is_one_that_torch_allows(rows: int, with_bias: bool) -> None:
    """torch's own checks of shapes, strides and dtypes, on tensors without data."""
    with FakeTensorMode():
        layer = Float8Linear.from_weight(
            torch.empty(48, 64, device="cuda"),
            torch.empty(48, device="cuda") if with_bias else None,
        )
        y = layer(torch.empty(1, rows, 64, device="cuda", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((1, rows, 48), torch.bfloat16, "cuda")


@pytest.mark.parametrize(("out", "inner"), [(32, 72), (40, 64), (1, 16)])
def test_sizes_that_float8_does_not_take(out: int, inner: int) -> None:
    with pytest.raises(UserError) as caught:
        Float8Linear.from_weight(normal(out, inner), None)
    assert f"multiples of 16, and one is [{out}, {inner}]" in str(caught.value)


def test_devices_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.9 or newer, not cpu"):
        require_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"8\.9 or newer; NVIDIA A100 has 8\.0; choose bfloat16"):
        require_float8(torch.device("cuda"))
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        require_float8(torch.device("cuda"))
