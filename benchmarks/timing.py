"""How fast a device is, and how calls of several contenders are timed on it. torch alone."""

from __future__ import annotations

import math
import re
import statistics
import sys
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.float8 import quantize_rows, require_float8

SEED = 0
TERA, GIB = 1e12, 2**30

Product = Literal["bfloat16", "fp8"]
ProductShape = tuple[int, int, int]  # [rows, inner] x [inner, out]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass over `batch` tiles in each round, and bytes that it takes for a while.

    Bytes are None on a CPU.
    """

    batch: int
    activation_bytes: int | None
    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tiles_per_second(self) -> float:
        return self.batch / self.median


def take_turns(
    works: Mapping[str, Callable[[], object]],
    batch: int,
    *,
    rounds: int,
    least_tiles: int,
    device: torch.device,
) -> dict[str, Speed | str]:
    """Times works of `batch` tiles in turns; one that fails gets the reason, the rest go on.

    A sample is as many passes as make `least_tiles`, and at least one. Two passes before the first
    round compile and do not count.
    """
    passes = max(1, least_tiles // batch)

    def warm_up(work: Callable[[], object]) -> Speed:
        work()
        if device.type != "cuda":
            work()
            return Speed(batch, None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return Speed(batch, torch.cuda.max_memory_allocated() - before)

    def sample(work: Callable[[], object], speed: Speed) -> Speed:
        def run() -> None:
            for _ in range(passes):
                work()

        took = seconds_of(run, device) / passes
        return Speed(batch, speed.activation_bytes, (*speed.seconds, took))

    found = {name: attempt(warm_up, work) for name, work in works.items()}
    for _ in range(rounds):
        for name, work in works.items():
            speed = found[name]
            if isinstance(speed, Speed):
                found[name] = attempt(sample, work, speed)
    return found


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def attempt(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    """What `work` gives, or in words why it gives nothing; a traceback goes to stderr."""
    try:
        return work(*args, **kwargs)
    except UserError as error:
        failure = str(error)
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except Exception as error:  # noqa: BLE001 a compiler may raise anything
        traceback.print_exc()
        failure = f"failed: {type(error).__name__}"
    torch.cuda.empty_cache()  # here, where no traceback holds tensors any more
    return failure


@torch.inference_mode()
def products(
    shapes: Iterable[ProductShape], *, rounds: int, calls: int, device: torch.device
) -> dict[tuple[Product, ProductShape], float]:
    """FLOP/s of products of random numbers, called as linear layers call them.

    Medians over `rounds` samples of `calls` calls; float8 with row-wise scales where the device
    has it.
    """
    kinds: Sequence[Product] = ("bfloat16", "fp8")
    if isinstance(attempt(require_float8, device), str):
        kinds = ("bfloat16",)
    found = {}
    for kind in kinds:
        for shape in shapes:
            multiply = _product(kind, shape, device)

            def sample(multiply: Callable[[], Tensor] = multiply) -> None:
                for _ in range(calls):
                    multiply()

            sample()
            took = statistics.median(seconds_of(sample, device) for _ in range(rounds))
            found[kind, shape] = calls * 2 * math.prod(shape) / took
    return found


def _product(kind: Product, shape: ProductShape, device: torch.device) -> Callable[[], Tensor]:
    rows, inner, out = shape
    generator = torch.Generator(device).manual_seed(SEED)
    x, weight = (
        torch.randn(size, inner, generator=generator, device=device, dtype=torch.bfloat16)
        for size in (rows, out)
    )
    if kind == "bfloat16":
        return partial(F.linear, x, weight)
    (x8, x_scale), (weight8, weight_scale) = quantize_rows(x), quantize_rows(weight)
    return partial(
        torch._scaled_mm,
        x8,
        weight8.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def find_device(name: str) -> torch.device:
    """`cuda`, `cpu`, or for `auto` the better one that there is; as a type of argparse's.

    Raises ArgumentTypeError for another name, and for `cuda` where torch finds none.
    """
    found = torch.cuda.is_available()
    if name not in ("auto", "cuda", "cpu"):
        raise ArgumentTypeError(f"{name!r}; choose auto, cuda or cpu")
    if name == "cuda" and not found:
        raise ArgumentTypeError("cuda; torch finds no CUDA device")
    return torch.device("cuda", 0) if found and name != "cpu" else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For a file's name: cpu, nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def numbers(text: str) -> tuple[int, ...]:
    """1,2,4 as it is typed. Raises ValueError, which argparse tells, for anything else."""
    found = tuple(int(number) for number in text.split(","))
    if min(found) < 1:
        raise ValueError(text)
    return found


def short(number: float) -> float:
    """Four digits of it."""
    return float(f"{number:.4g}")


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
