"""Which kernel a name stands for, and what reaches flash-attn's functions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from model import attention as kernels
from model.attention import KERNELS, NAMES, Choice, Kernel, available, kernel, resolve
from model.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (2, 17, 5, 16)
FLASH = {
    "flash-attn": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}
# flash-attn-4 has no flash_attn/__init__.py of its own: it adds to flash-attn's folder, or is alone
FILES = {
    "flash-attn": ["flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"],
    "flash-attn-3": ["flash_attn_interface.py"],
    "flash-attn-4": ["flash_attn/cute/__init__.py"],
}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in float32, as the formula says it."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def random_qkv(
    shape: tuple[int, int, int, int] = SHAPE,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views into one tensor, as a fused projection gives them."""
    B, N, H, d = shape
    qkv = torch.randn(B, N, 3 * H * d, generator=torch.Generator().manual_seed(4))
    q, k, v = (x.view(B, N, H, d) for x in qkv.to(device, dtype).chunk(3, dim=-1))
    assert not q.is_contiguous()
    return q, k, v


@pytest.fixture(autouse=True)
def _no_operator_from_another_test() -> Iterator[None]:
    kernels._flash_attention.cache_clear()
    yield
    kernels._flash_attention.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, and no flash-attn imported from anywhere."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(packages: Path, name: str) -> None:
    """The files by which a package is found; to import them is an error."""
    for file in FILES[name]:
        (packages / file).parent.mkdir(parents=True, exist_ok=True)
        (packages / file).write_text("raise ImportError('undefined symbol: _ZN3c10')")


@pytest.fixture
def fake_flash(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Tensor, ...]]]:
    """All three packages as modules that keep what they were given: tensor, tensor, tuple."""
    calls: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in FLASH}

    def module(name: str) -> ModuleType:
        def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, None]:
            calls[name].append((q, k, v))
            out = plain_attention(q, k, v).to(q.dtype)
            return (out, None) if name == "flash-attn-4" else out

        fake = ModuleType(FLASH[name])
        fake.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
        return fake

    for name in FLASH:
        monkeypatch.setitem(sys.modules, FLASH[name], module(name))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_softmax_attention(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(dtype=dtype)
    out, expected = kernel("sdpa")(q, k, v), plain_attention(q, k, v)
    assert out.shape == SHAPE
    assert out.dtype == dtype
    error = torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected)
    assert error <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_cudnn_allows_torch_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed.append(torch.nn.attention._cur_sdpa_kernel_backends())
        return q

    monkeypatch.setattr(kernels, "sdpa", look)
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    kernel("cudnn")(*random_qkv())
    assert allowed == [[SDPBackend.CUDNN_ATTENTION]]
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before
    assert len(before) > 1


@pytest.mark.parametrize("name", FLASH)
def test_flash_functions_get_q_k_v_as_they_are(
    name: str, fake_flash: dict[str, list[tuple[Tensor, ...]]]
) -> None:
    q, k, v = random_qkv(dtype=torch.bfloat16)
    out = kernel(name)(q, k, v)
    assert {other: len(calls) for other, calls in fake_flash.items()} == {
        other: int(other == name) for other in FLASH
    }
    for given, kept in zip((q, k, v), fake_flash[name][0], strict=True):
        assert kept.data_ptr() == given.data_ptr()  # not copied, not made contiguous
        assert kept.stride() == given.stride()
        assert kept.shape == SHAPE
    assert out.shape == SHAPE
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()  # as a compiled graph takes it to be
    torch.testing.assert_close(out, plain_attention(q, k, v).bfloat16(), rtol=0, atol=0)


def test_a_tuple_of_an_early_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flash_attn_interface")
    fake.flash_attn_func = lambda q, k, v: (q + 1, k)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    q, k, v = random_qkv()
    torch.testing.assert_close(kernel("flash-attn-3")(q, k, v), q + 1, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLASH)
def test_flash_kernels_are_one_node_of_a_compiled_graph(
    name: str, fake_flash: dict[str, list[tuple[Tensor, ...]]]
) -> None:
    attention = kernel(name)
    assert kernel(name) is attention
    q, k, v = random_qkv()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * attention(q, k, v)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), 2 * plain_attention(q, k, v))
    assert len(fake_flash[name]) == 1


def test_nothing_but_sdpa_on_a_cpu(packages: Path) -> None:
    for name in FLASH:
        install(packages, name)
    assert available(CPU, torch.bfloat16) == ("sdpa",)
    assert resolve("auto", CPU, torch.float32, SHAPE) == Choice("sdpa", {})
    assert resolve("sdpa", CPU, torch.float32, SHAPE) == Choice("sdpa", {})


@pytest.mark.parametrize(
    ("installed", "names"),
    [
        ([], ()),
        (["flash-attn"], ("flash-attn",)),
        (["flash-attn-3"], ("flash-attn-3",)),
        (["flash-attn-4"], ("flash-attn-4",)),
        (["flash-attn-4", "flash-attn"], ("flash-attn", "flash-attn-4")),
    ],
)
def test_what_is_installed_is_found_and_not_imported(
    installed: list[str], names: tuple[str, ...], packages: Path
) -> None:
    for name in installed:
        install(packages, name)
    for dtype in (torch.bfloat16, torch.float16):
        assert available(CUDA, dtype) == ("sdpa", "cudnn", *names)
        assert available(CUDA, dtype, head_size=264) == ("sdpa", "cudnn")
    assert available(CUDA, torch.float32) == ("sdpa",)
    assert not {"flash_attn", *FLASH.values()} & set(sys.modules)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_size", "says"),
    [
        ("flash-attn-9", CPU, torch.float32, 16, f"'flash-attn-9'; choose one of {list(NAMES)}"),
        ("", CUDA, torch.bfloat16, 16, f"''; choose one of {list(NAMES)}"),
        (
            "flash-attn-3",
            CUDA,
            torch.bfloat16,
            16,
            "flash-attn-3 is not installed (asked for on cuda in bfloat16); "
            "available here: ['auto', 'sdpa', 'cudnn', 'flash-attn']",
        ),
        (
            "flash-attn",
            CUDA,
            torch.float32,
            16,
            "flash-attn needs a CUDA device and bfloat16 or float16 (asked for on cuda in "
            "float32); available here: ['auto', 'sdpa']",
        ),
        ("flash-attn", CUDA, torch.bfloat16, 264, "takes heads up to 256, and these have 264"),
        ("cudnn", CPU, torch.bfloat16, 16, "cudnn needs a CUDA device"),
    ],
)
def test_what_cannot_be_had_is_a_user_error(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, says: str, packages: Path
) -> None:
    install(packages, "flash-attn")
    with pytest.raises(UserError) as caught:
        resolve(name, device, dtype, (1, 5, 2, head_size))
    assert str(caught.value).startswith("attention: ")
    assert says in str(caught.value)


def test_an_installed_package_that_does_not_load_is_a_user_error(packages: Path) -> None:
    install(packages, "flash-attn")
    assert resolve("flash-attn", CUDA, torch.bfloat16, SHAPE).name == "flash-attn"
    with pytest.raises(UserError, match="is installed, but does not load: undefined symbol"):
        kernel("flash-attn")


class Clock:
    """A perf_counter that stands still but for `work`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> Kernel:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert q.shape == k.shape == v.shape == SHAPE
            assert not torch.equal(q, k)
            self.now += seconds
            return q

        return Kernel(lambda: attention, half_on_cuda=False)


def raises(error: Exception) -> Kernel:
    def load() -> kernels.Attention:
        raise error

    return Kernel(load, half_on_cuda=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kernels, "time", clock)
    for name in list(KERNELS):
        monkeypatch.delitem(KERNELS, name)
    return clock


def test_auto_takes_the_fastest_and_says_so(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("slow", 0.003), ("fast", 0.001), ("middling", 0.002)):
        monkeypatch.setitem(KERNELS, name, clock.work(seconds))
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, "model.attention"):
        choice = resolve("auto", CPU, torch.float32, SHAPE)
    assert choice.name == "fast"
    assert choice.milliseconds == pytest.approx({"slow": 3.0, "fast": 1.0, "middling": 2.0})
    assert caplog.messages == [
        "attention: fast is the fastest at [2, 17, 5, 16]: "
        "slow 3.000 ms, fast 1.000 ms, middling 2.000 ms"
    ]
    assert torch.equal(torch.random.get_rng_state(), state)


class CompilerError(Exception):
    """Like flash-attn 4's compiler's: no RuntimeError."""


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no kernel image"), ImportError("no cutlass"), CompilerError("sm_86")],
)
def test_auto_leaves_out_what_fails_and_says_so(
    error: Exception,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(KERNELS, "broken", raises(error))
    monkeypatch.setitem(KERNELS, "sound", clock.work(0.004))
    with caplog.at_level(logging.WARNING, "model.attention"):
        choice = resolve("auto", CPU, torch.float32, SHAPE)
    assert choice.name == "sound"
    assert choice.milliseconds == pytest.approx({"sound": 4.0})
    (message,) = caplog.messages
    assert message.startswith("attention: broken is left out: ")
    assert str(error) in message


def test_auto_with_nothing_that_runs_is_a_user_error(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "broken", raises(RuntimeError("no kernel image")))
    monkeypatch.setitem(KERNELS, "worse", raises(OSError("no such library")))
    with pytest.raises(UserError) as caught:
        resolve("auto", CPU, torch.bfloat16, SHAPE)
    assert "attention: no kernel runs on cpu in bfloat16" in str(caught.value)
    assert "no kernel image" in str(caught.value)
    assert "no such library" in str(caught.value)


def test_cuda_calls_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events is one call, and no event is read before the device is done."""
    calls, done = 0, False

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.after = calls

        def elapsed_time(self, end: Event) -> float:
            assert done
            assert end.after == self.after + 1
            return 100.0 if end.after == 7 else 0.5 * end.after  # the last one stumbles

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return q

    def synchronize() -> None:
        nonlocal done
        done = True

    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(Event=Event, device=nullcontext, synchronize=synchronize)
    )
    q = torch.empty(1, device="meta")
    assert kernels._milliseconds_on_cuda(attention, q, q, q) == 2.0  # of 0.5, 1, … 3, 100
    assert calls == 7
