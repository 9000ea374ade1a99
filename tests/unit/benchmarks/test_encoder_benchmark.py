"""The encoder's benchmark on a small network: its figures, and that one failure ends nothing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from benchmarks.contenders import (
    OURS,
    OURS_FP8,
    THEIRS,
    THEIRS_COMPILED,
    Contender,
    build,
    random_pixels,
)
from benchmarks.encoder import Accuracy, Settings, measure_accuracy, run, verdicts
from benchmarks.timing import Speed, find_device, numbers, products, take_turns
from model.attention import Choice, sdpa
from model.config import ViTConfig
from model.intern_vit import InternViT
from model.work import V1_5, tile_flop
from tests.checkpoints import KINDS, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONTENDERS = (THEIRS, THEIRS_COMPILED, OURS)


def small_settings(config: ViTConfig) -> Settings:
    small = replace(Settings.of(CPU), config=config, batches=(1, 2), rounds=2, squares=(64,))
    return replace(small, chunk_tiles=3)


def test_work_of_a_tile_of_the_6b() -> None:
    assert tile_flop(V1_5) == pytest.approx(11.95e12, rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_work_of_a_tile_is_what_torch_counts(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        InternViT(config, config.num_layers, sdpa)(torch.empty(1, 3, 56, 56))
    assert tile_flop(config) == counter.get_total_flops()


def test_the_whole_program_on_a_small_network() -> None:
    config = tiny_config()
    (speeds, errors, chunks, ceiling, kernels), notes = run(small_settings(config), profiled=True)

    assert [row[:2] for row in speeds.rows] == [(name, n) for name in CONTENDERS for n in (1, 2)]
    for _, batch, milliseconds, _, tiles_per_second, tera, share, memory in speeds.rows:
        assert 0 < milliseconds < 60_000
        assert tiles_per_second == pytest.approx(1000 * batch / milliseconds, rel=0.002)
        assert tera == pytest.approx(tiles_per_second * tile_flop(config) / 1e12, rel=0.002)
        assert math.isfinite(share)
        assert memory is None
    assert [row[0] for row in errors.rows] == list(CONTENDERS)
    for _, relative_error, cls_cosine, patch_cosine in errors.rows:
        assert 1e-4 < relative_error < 0.02  # bfloat16, and not float32 itself
        assert 0.999 <= cls_cosine <= 1.000001
        assert 0.999 <= patch_cosine <= 1.000001
    ((name, tiles_per_second, seconds),) = chunks.rows
    assert name == OURS
    assert tiles_per_second == pytest.approx(3 / seconds, rel=0.002)
    # qkv, proj, fc1, fc2 of 4 tiles of 17 tokens, and the square
    shapes = ["68 x 80 x 240", "68 x 80 x 80", "68 x 80 x 320", "68 x 320 x 80", "64 x 64 x 64"]
    assert [row[:2] for row in ceiling.rows] == [("bfloat16", shape) for shape in shapes]
    assert all(min(before, after) > 0 for _, _, before, after in ceiling.rows)
    assert "one pass of 2 tiles" in kernels.title
    assert 50 < sum(row[3] for row in kernels.rows) <= 100.1
    calls = {row[0]: row[1] for row in kernels.rows}
    # proj, fc1 and fc2 of three blocks, and the patch embedding; qkv has no bias
    assert calls["aten::addmm"] == 10
    text = "\n".join(notes)
    assert f"{OURS_FP8} is left out: dtype: fp8 needs a CUDA device" in text
    assert "attention of ours: sdpa (the only one here)" in text
    assert not re.search("^(met|MISSED)", text, re.MULTILINE)
    assert text.count("not judged") == 2
    assert text.count("not measured") == 2


def test_contenders_share_their_weights() -> None:
    config = tiny_config(num_layers=2)
    contenders, _ = build(config, CPU, Choice("sdpa"))
    theirs, compiled, ours = (contender.module for contender in contenders)
    D = config.hidden_size
    for model in (theirs, compiled):
        for i, layer in enumerate(model.encoder.layer):
            qkv = ours.encoder.layers[i].attn.qkv.weight
            assert layer.attention.q_proj.weight.data_ptr() == qkv.data_ptr()
            assert layer.attention.v_proj.weight.data_ptr() == qkv[2 * D :].data_ptr()
            assert (
                layer.mlp.fc2.weight.data_ptr() == ours.encoder.layers[i].mlp.fc2.weight.data_ptr()
            )
    assert {contender.weight_bytes for contender in contenders} == {
        2 * sum(parameter.numel() for parameter in ours.parameters())
    }


def test_errors_are_those_of_the_worst_tokens() -> None:
    settings = small_settings(tiny_config(num_layers=2))
    contenders, _ = build(settings.config, CPU, Choice("sdpa"))
    ours = contenders[-1]

    def spoiled(part: tuple[int | slice, ...]) -> Callable[[Tensor], Tensor]:
        def forward(pixels: Tensor) -> Tensor:
            tokens = ours.forward(pixels).clone()
            tokens[part] *= -1
            return tokens

        return forward

    def fail(pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = measure_accuracy(
        [
            *contenders,
            Contender("all", "bfloat16", None, spoiled((slice(None),))),
            Contender("a class token", "bfloat16", None, spoiled((1, 0))),
            Contender("a patch", "bfloat16", None, spoiled((0, 16))),
            Contender("none", "bfloat16", None, fail),
        ],
        settings,
    )
    assert found["none"] == "out of memory"
    every, cls, patch = (found[name] for name in ("all", "a class token", "a patch"))
    assert isinstance(every, Accuracy)
    assert isinstance(cls, Accuracy)
    assert isinstance(patch, Accuracy)
    assert every.relative_error == pytest.approx(2, abs=0.01)
    assert every.cls_cosine < -0.999
    assert every.patch_cosine < -0.999
    assert cls.cls_cosine < -0.999
    assert cls.patch_cosine > 0.999
    assert patch.cls_cosine > 0.999
    assert patch.patch_cosine < -0.999
    assert 0.1 < patch.relative_error < 1


def test_one_that_fails_does_not_end_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def work(
        name: str, failing_call: int = 0, error: Exception | None = None
    ) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            if error is not None and calls.count(name) == failing_call:
                raise error

        return call

    found = take_turns(
        {
            "good": work("good"),
            "large": work("large", 1, torch.OutOfMemoryError("CUDA out of memory")),
            "late": work("late", 5, torch.OutOfMemoryError("CUDA out of memory")),
            "broken": work("broken", 2, RuntimeError("no such kernel")),
        },
        2,
        rounds=3,
        least_tiles=4,
        device=CPU,
    )
    good = found.pop("good")
    assert isinstance(good, Speed)
    assert len(good.seconds) == 3
    assert good.batch == 2
    assert good.tiles_per_second == pytest.approx(2 / sorted(good.seconds)[1])
    assert found == {
        "large": "out of memory",
        "late": "out of memory",
        "broken": "failed: RuntimeError",
    }
    # two to warm up, and three rounds of two passes; in turns
    assert calls.count("good") == 8
    assert calls[-2:] == ["good", "good"]
    assert calls[5:11] == ["broken", "broken", "good", "good", "late", "late"]
    assert "no such kernel" in capsys.readouterr().err


def figures(ours: float, theirs: float, float8: float) -> dict[str, list[Speed | str]]:
    """Speeds of these tiles a second at batch 8; slower, or out of memory, at others."""
    fast = {OURS: ours, THEIRS: theirs, OURS_FP8: float8}
    return {
        name: [Speed(4, 1, (1.0,)), Speed(8, 1, (8 / speed,)), "out of memory"]
        for name, speed in fast.items()
    }


def test_which_aims_are_met() -> None:
    ceiling = {("bfloat16", (1, 1, 1)): 790e12, ("bfloat16", (2, 2, 2)): 700e12}
    ceiling["fp8", (1, 1, 1)] = 1400e12
    good = {OURS_FP8: Accuracy(0.03, 0.9995, 0.9992)}
    told = verdicts(figures(57, 45, 86), good, ceiling, V1_5, CUDA)
    assert [line.partition(":")[0] for line in told] == ["met"] * 4
    assert [float(line.rpartition(" ")[2]) for line in told] == pytest.approx(
        [57 * 11.9447 / 790, 57 / 45, 86 / 57, 0.9992], rel=1e-3
    )
    bad = {OURS_FP8: Accuracy(0.03, 0.9995, 0.9985)}
    told = verdicts(figures(55, 45, 82), bad, ceiling, V1_5, CUDA)
    assert [line.partition(":")[0] for line in told] == ["MISSED"] * 4
    for config, device in ((replace(V1_5, num_layers=2), CUDA), (V1_5, CPU)):
        told = verdicts(figures(57, 45, 86), good, ceiling, config, device)
        assert all(line.startswith("not judged") for line in told)
    told = verdicts({OURS: ["out of memory"]}, {OURS_FP8: "out of memory"}, ceiling, V1_5, CUDA)
    assert all(line.startswith("not measured") for line in told)


def test_pixels_are_the_same_each_time() -> None:
    pixels = random_pixels(tiny_config(), 2, CPU)
    assert pixels.shape == (2, 3, 56, 56)
    assert pixels.dtype == torch.bfloat16
    assert torch.equal(pixels, random_pixels(tiny_config(), 2, CPU))


def test_products_are_counted_whole() -> None:
    (found,) = products([(2, 3, 4)], rounds=1, calls=1, device=CPU).items()
    assert found[0] == ("bfloat16", (2, 3, 4))
    assert found[1] > 0


def test_numbers_and_devices_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers("8,16") == (8, 16)
    for wrong in ("", "8,", "a", "0", "4,-1"):
        with pytest.raises(ValueError):
            numbers(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == CPU
    with pytest.raises(ArgumentTypeError, match="finds no CUDA device"):
        find_device("cuda")
    with pytest.raises(ArgumentTypeError, match="'gpu'; choose auto, cuda or cpu"):
        find_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cpu") == CPU


def test_torch_is_enough() -> None:
    """A GPU machine may have neither Ray nor what reads data."""
    absent = ["ray", "pyarrow", "webdataset", "simplejpeg", "fsspec", "s3fs", "pydantic", "psutil"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import benchmarks.encoder, benchmarks.tensor_parallel\n"
        "print(any(name.split('.')[0] in ('pipeline', 'jobs') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=record.REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_a_machine_without_git_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    about = record.machine()
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["no-such-package"] is None
    assert about["commit"] == "unknown: not in a git repository"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.machine()["commit"] == about["commit"]

    gpu = {"name": "NVIDIA H200", "count": 1, "memory_gib": 139.8, "driver": "580.1"}
    about["gpu"] = gpu | {"cuda": "13.0", "cudnn": 91002}
    text = record.write_result("x", "nvidia-h200", about, [], ["a note"], tmp_path)
    assert "- 1 x NVIDIA H200, 139.8 GiB; driver 580.1, CUDA 13.0, cuDNN 91002\n" in text
    assert "no-such-package" not in text
    (written,) = tmp_path.glob("*-x-nvidia-h200.json")
    assert json.loads(written.read_text())["gpu"]["name"] == "NVIDIA H200"
    about["gpu"] = None
    assert "CUDA" not in record.write_result("x", "cpu", about, [], [], tmp_path)
