"""Odd and mutated pictures through the real stages: embedded or a reject with a known code."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from pipeline import chunks
from pipeline.pictures import MAX_SIDE, decode_exact, decode_fast, picture_size
from pipeline.tiling import Tiling
from tests.builders import write_tar
from tests.data.make_tiling_pictures import encode, scene
from tests.hostile.pictures import ODD, case, inverted_cmyk, pixels, png, sound
from tests.hostile.stages import balance, run_stages

SECONDS = 20.0  # of processor time
CASES = 400
SEED = 4


@pytest.fixture(autouse=True)
def _priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiling lowers the priority of its process, which here is that of the tests."""
    monkeypatch.setattr(os, "setpriority", lambda *_: None)


CROPPED = [(kind, "center-crop") for kind in ODD if kind.startswith(("1x", "65535x", "16-bit"))]


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "dynamic") for kind in ODD), *CROPPED])
def test_an_odd_picture_ends_as_is_said_of_it(kind: str, mode: str, tmp_path: Path) -> None:
    odd, data = ODD[kind], ODD[kind].build()
    path = write_tar(tmp_path / "s.tar", [("0.jpg", data)])
    tiling = Tiling(mode, 28, 32, max_tiles=4)  # type: ignore[arg-type]
    began = time.process_time()
    outcome = balance(run_stages(path, tiling=tiling))
    assert time.process_time() - began < SECONDS
    assert outcome.end.samples == 1
    if odd.code is None:
        assert outcome.embedded == {0: "0"}
        if odd.size is not None:
            assert picture_size(data) == odd.size
    else:
        assert outcome.rejects == {0: ("0", odd.code)}


def test_a_long_thin_picture_cannot_be_resized_for_the_crop(tmp_path: Path) -> None:
    """448 for the short side would take 65535 × 448 columns' worth of rows."""
    path = write_tar(tmp_path / "s.tar", [("0.png", ODD["1x65535"].build())])
    outcome = balance(run_stages(path, tiling=Tiling("center-crop", 448, 448)))
    assert outcome.rejects == {0: ("0", "tile/extreme-aspect")}


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_the_longest_side_is_tiled(resize: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("0.png", png(MAX_SIDE, 1)), ("1.png", png(1, MAX_SIDE))])
    tiling = Tiling("dynamic", 28, 28, max_tiles=4, resize=resize)  # type: ignore[arg-type]
    outcome = balance(run_stages(path, tiling=tiling))
    assert outcome.embedded == {0: "0"}
    assert outcome.rejects == {1: ("1", "tile/extreme-aspect")}  # by way of 28 columns of it


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_cmyk_with_adobes_marker_is_what_pillow_makes_of_it(resize: str) -> None:
    picture = scene(64, 48, 5)
    data = inverted_cmyk(picture)
    assert b"Adobe" in data
    decoded = decode_exact(data).tobytes() if resize == "exact" else decode_fast(data).tobytes()
    assert decoded == pixels(data)
    error = [abs(a - b) for a, b in zip(decoded, picture.tobytes(), strict=True)]
    assert sum(error) / len(error) < 12  # the picture, not its negative


def test_the_name_says_nothing_about_the_format(tmp_path: Path) -> None:
    picture = scene(40, 30, 6)
    formats = ["PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "PPM", "JPEG"]
    members = [(f"{i}.jpg", encode(picture, kind)) for i, kind in enumerate(formats)]
    outcome = balance(run_stages(write_tar(tmp_path / "s.tar", members)))
    assert len(outcome.embedded) == len(formats)


def test_cut_pictures_are_not_filled_up_with_grey() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_sound_pictures_are_all_embedded(tmp_path: Path) -> None:
    members = [(f"{i:02}.jpg", data) for i, data in enumerate(sound().values())]
    assert len(members) > 45
    outcome = balance(run_stages(write_tar(tmp_path / "s.tar", members)))
    assert dict(outcome.rejects.values()) == {}
    for name, data in sound().items():
        assert decode_fast(data).tobytes() == decode_exact(data).tobytes() == pixels(data), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_mutated_pictures_are_embedded_or_rejected(resize: str, tmp_path: Path) -> None:
    tiling = Tiling("dynamic", 28, 28, max_tiles=4, resize=resize)  # type: ignore[arg-type]
    members = [(f"{i:04}.jpg", case(SEED, i)[1]) for i in range(CASES)]
    outcome = balance(run_stages(write_tar(tmp_path / "s.tar", members), tiling=tiling))
    assert outcome.end.samples == CASES
    assert len(outcome.embedded) > CASES / 10
    assert len({code for _, code in outcome.rejects.values()}) >= 4
    for index in list(outcome.embedded)[:50]:
        assert decode_exact(case(SEED, index)[1]).tobytes() == pixels(case(SEED, index)[1])


def test_what_nobody_has_thought_of_costs_its_picture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut_tiles = chunks.cut_tiles

    def broken(data: bytes, *arguments: Any) -> None:
        if data == ODD["1x1"].build():
            raise AttributeError("a bug")
        cut_tiles(data, *arguments)

    monkeypatch.setattr(chunks, "cut_tiles", broken)
    members = [("0.png", ODD["1x1"].build()), ("1.png", ODD["16-bit"].build())]
    (chunk,) = run_stages(write_tar(tmp_path / "s.tar", members))
    (row,) = chunk.rejects.to_pylist()
    assert (row["key"], row["stage"], row["error"]) == ("0", "tile", "unforeseen")
    assert row["message"] == "AttributeError: a bug"
    assert set(chunk.rows["key"].to_pylist()) == {"1"}
    assert "in broken" in caplog.text


def test_cases_are_the_same_for_the_same_seed() -> None:
    assert [case(1, i) for i in range(50)] == [case(1, i) for i in range(50)]
    assert case(1, 0) != case(2, 0)
    assert Image.MAX_IMAGE_PIXELS is not None
