"""Attention kernels by name: softmax(q kᵀ / √d) v over all tokens, no mask, no dropout.

Shapes: q, k, v and the result are [B, N, H, d]: tiles, tokens, heads, head size. That is the
order a fused qkv projection gives and flash-attn takes. q, k and v may be strided views.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.errors import UserError

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

WARM_UP_CALLS, TIMED_CALLS = 3, 7
# flash-attn 2, 3 and 4 refuse larger heads; InternViT's have 64 (300M) or 128 (6B).
FLASH_MAX_HEAD_SIZE = 256


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own: picks its flash, memory-efficient or plain kernel by device and dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own held to cuDNN's kernel; RuntimeError where that does not run."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


@cache  # an operator is registered once a process
def _flash_attention(module: str) -> Attention:
    """`flash_attn_func` of a flash-attn package as one operator.

    An operator, because torch.compile cannot look into flash-attn 4 and early builds of 3.
    """
    # FlashAttention 2 returns the tensor, 3 did return (out, lse) and since August 2025 the
    # tensor, 4 returns (out, lse): flash_attn/cute/interface.py, hopper/flash_attn_interface.py.
    flash: Callable[..., Tensor | tuple[Tensor, ...]] = import_module(module).flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).contiguous()

    operator = torch.library.custom_op(
        f"tessera::{module.replace('.', '_')}", attention, mutates_args=()
    )
    operator.register_fake(lambda q, k, v: q.new_empty(q.shape))
    return operator


@dataclass(frozen=True)
class Kernel:
    """How to get a kernel's callable, and what it asks for."""

    load: Callable[[], Attention]
    module: str | None = None  # that must be installed
    half_on_cuda: bool = True  # runs on CUDA alone, in bfloat16 and float16 alone

    def lacks(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Why it cannot run, or None. Imports nothing."""
        half = dtype in (torch.bfloat16, torch.float16)
        if self.half_on_cuda and not (device.type == "cuda" and half):
            return "needs a CUDA device and bfloat16 or float16"
        if self.module and head_size > FLASH_MAX_HEAD_SIZE:
            return f"takes heads up to {FLASH_MAX_HEAD_SIZE}, and these have {head_size}"
        if self.module and not _is_installed(self.module):
            return "is not installed"
        return None


def _flash(module: str) -> Kernel:
    return Kernel(partial(_flash_attention, module), module)


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(lambda: sdpa, half_on_cuda=False),
    "cudnn": Kernel(lambda: cudnn),
    # Not `flash_attn`: flash-attn-4 alone brings a package of that name too.
    "flash-attn": _flash("flash_attn.flash_attn_interface"),  # 2, from Ampere on
    "flash-attn-3": _flash("flash_attn_interface"),  # Hopper
    "flash-attn-4": _flash("flash_attn.cute"),  # Hopper and Blackwell
}
NAMES: tuple[str, ...] = ("auto", *KERNELS)


@dataclass(frozen=True)
class Choice:
    """The kernel that was resolved, and milliseconds a call where kernels were measured."""

    name: str
    milliseconds: dict[str, float] = field(default_factory=dict)


def available(
    device: torch.device, dtype: torch.dtype, head_size: int = FLASH_MAX_HEAD_SIZE
) -> tuple[str, ...]:
    """Names of the kernels that are installed and right for the device, dtype and head size.

    Whether a kernel has code for this very GPU shows only when it is called.
    """
    return tuple(
        name for name, kernel in KERNELS.items() if not kernel.lacks(device, dtype, head_size)
    )


def kernel(name: str) -> Attention:
    """The callable of a resolved name.

    Raises UserError where the package is installed, but cannot be imported.
    """
    try:
        return KERNELS[name].load()
    except (ImportError, OSError) as error:
        raise UserError(f"attention: {name} is installed, but does not load: {error}") from error


def resolve(
    name: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Choice:
    """The kernel that `name` stands for on this machine.

    `auto` is the fastest of the available ones, each timed on random q, k, v of `shape`
    [B, N, H, d]; with one available nothing is timed. Raises UserError for a name that is not
    known or not available, and where `auto` finds no kernel that runs.
    """
    names = available(device, dtype, shape[-1])
    if name == "auto":
        return Choice(names[0]) if len(names) == 1 else _fastest(names, device, dtype, shape)
    if name not in KERNELS:
        raise UserError(f"attention: {name!r}; choose one of {list(NAMES)}")
    lack = KERNELS[name].lacks(device, dtype, shape[-1])
    if lack:
        raise UserError(
            f"attention: {name} {lack} (asked for on {device.type} in {_short(dtype)}); "
            f"available here: {['auto', *names]}"
        )
    return Choice(name)


@torch.inference_mode()
def _fastest(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
) -> Choice:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    milliseconds: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name in names:
        # A package may raise anything (flash-attn 4's compiler: a bare Exception's children),
        # and one that was not asked for by name must not end the job.
        try:
            milliseconds[name] = _milliseconds(kernel(name), q, k, v)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            logger.warning("attention: %s is left out: %s", name, errors[name], exc_info=True)
    if not milliseconds:
        raise UserError(f"attention: no kernel runs on {device} in {_short(dtype)}: {errors}")
    chosen = min(milliseconds, key=milliseconds.__getitem__)
    timings = ", ".join(f"{name} {took:.3f} ms" for name, took in milliseconds.items())
    logger.info("attention: %s is the fastest at %s: %s", chosen, list(shape), timings)
    return Choice(chosen, milliseconds)


def _milliseconds(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Median time of a call."""
    for _ in range(WARM_UP_CALLS):
        attention(q, k, v)
    if q.device.type == "cuda":
        return _milliseconds_on_cuda(attention, q, k, v)
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        attention(q, k, v)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _milliseconds_on_cuda(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    with torch.cuda.device(q.device):
        marks = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(TIMED_CALLS + 1)
        ]
        marks[0].record()
        for mark in marks[1:]:
            attention(q, k, v)
            mark.record()
        torch.cuda.synchronize()
        return median(float(start.elapsed_time(end)) for start, end in pairwise(marks))


def _is_installed(module: str) -> bool:
    """Whether Python finds the module (`a` or `a.b`), without importing any of it."""
    package, _, inner = module.partition(".")
    spec = find_spec(package)
    if spec is None or not inner:
        return spec is not None
    return PathFinder.find_spec(module, spec.submodule_search_locations) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
