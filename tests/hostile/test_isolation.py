"""Pictures decoded apart: the same tiles and errors, and a crash or a hang is a reject."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import isolation
from pipeline.chunks import Chunk
from pipeline.isolation import IsolatedDecoder, IsolationError
from pipeline.pictures import PictureError
from pipeline.stages import EXIT_SHORT, MOST_DEATHS
from pipeline.tiling import Tiling, cut_tiles, picture_size, plan_tiles
from tests.builders import REPOSITORY, picture, write_tar
from tests.data.make_tiling_pictures import FOLDER
from tests.hostile.fragile import faulty
from tests.hostile.stages import CountedAttempts, balance, run_stages

IMAGE = picture(90, 60)


@pytest.fixture(autouse=True)
def _priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setpriority", lambda *_: None)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedDecoder]:
    monkeypatch.setattr(isolation, "CHILD", "tests.hostile.fragile")
    decoder = IsolatedDecoder(Tiling("dynamic", 28, 28, max_tiles=4), 0.5)
    yield decoder
    decoder.close()


def fate(decoder: IsolatedDecoder, data: bytes) -> str:
    """The reject that `data` becomes, as `stage/code: message`."""
    plan = plan_tiles(90, 60, Tiling("dynamic", 28, 28, max_tiles=4))
    with pytest.raises(PictureError) as caught:  # noqa: PT012 - either step may find it
        assert decoder.picture_size(data) == (90, 60)
        decoder.cut_tiles(data, plan, np.empty((plan.tile_count, 28, 28, 3), np.uint8))
    return f"{caught.value.stage}/{caught.value.code}: {caught.value.message}"


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_tiles_and_errors_are_those_of_this_process(resize: str) -> None:
    tiling = Tiling("dynamic", 56, 56, max_tiles=6, resize=resize)  # type: ignore[arg-type]
    decoder = IsolatedDecoder(tiling, 60.0)
    files = sorted(p for p in FOLDER.iterdir() if p.suffix not in (".json", ".py"))
    assert len(files) > 15
    try:
        for file in files:
            data = file.read_bytes()
            plan = plan_tiles(*picture_size(data), tiling)
            here, there = np.zeros((2, plan.tile_count, 56, 56, 3), np.uint8)
            cut_tiles(data, tiling, plan, here)
            assert decoder.picture_size(data) == picture_size(data)
            decoder.cut_tiles(data, plan, there)
            np.testing.assert_array_equal(here, there, err_msg=file.name)
        with pytest.raises(PictureError) as there_caught:
            decoder.picture_size(b"no picture")
        with pytest.raises(PictureError) as here_caught:
            picture_size(b"no picture")
        assert there_caught.value.args == here_caught.value.args
    finally:
        decoder.close()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("open-segv", "decode/crashed: its decoder's process died 3 times (SIGSEGV)"),
        ("load-segv", "decode/crashed: its decoder's process died 3 times (SIGSEGV)"),
        ("load-abort", "decode/crashed: its decoder's process died 3 times (SIGABRT)"),
        ("open-hang", "decode/deadline: hung in the decoder for 3 s"),
        ("load-hang", "decode/deadline: hung in the decoder for 3 s"),
        ("load-memory", "decode/memory: the decoder asked for more memory than 6144 MiB"),
    ],
)
def test_a_fault_of_the_decoder_is_a_reject(
    fragile: IsolatedDecoder, fault: str, says: str
) -> None:
    assert fate(fragile, faulty(IMAGE, fault)) == says
    assert fragile.picture_size(IMAGE) == (90, 60)  # the next picture has a child again


def test_time_without_a_core_is_not_the_pictures(
    fragile: IsolatedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = iter([7.0, 7.0, 7.5, 7.5])  # one for the child's start, the others for the picture
    monkeypatch.setattr(isolation, "seconds_without_core", lambda pid: next(waited))
    fragile._start()
    began = time.monotonic()
    assert fate(fragile, faulty(IMAGE, "open-hang")).startswith("decode/deadline")
    assert time.monotonic() - began > 3.5
    assert list(waited) == []


def test_a_child_that_somebody_else_kills_costs_no_picture(
    fragile: IsolatedDecoder, tmp_path: Path
) -> None:
    data = faulty(IMAGE, f"open-kill-once:{tmp_path / 'flag'}")
    assert fragile.picture_size(data) == (90, 60)
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_half_an_answer_is_none(kept: int) -> None:
    """A child that is killed while its tiles are on their way has not answered."""
    sink = io.BytesIO()
    isolation.send(sink, {"a": 1}, bytes(1000))
    head = len(sink.getvalue()) - 1000
    found = isolation.receive(io.BytesIO(sink.getvalue()[: head + kept]))
    assert found == (({"a": 1}, bytes(1000)) if kept == 1000 else None)


def test_memory_is_limited_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 100 megapixels, where 100 MiB are allowed."""
    code = (
        "from pipeline import isolation; isolation.MAX_DECODE_BYTES = 100 << 20; isolation.main()"
    )
    start = subprocess.Popen

    def limited(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-P", "-c", code, command[-1]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", limited)
    decoder = IsolatedDecoder(Tiling("center-crop", 28, 28), 60.0)
    try:
        plan = plan_tiles(10_000, 10_000, Tiling("center-crop", 28, 28))
        with pytest.raises(PictureError) as caught:
            decoder.cut_tiles(
                b"P5 10000 10000 255\n" + bytes(100_000_000),
                plan,
                np.empty((1, 28, 28, 3), np.uint8),
            )
        assert caught.value.code == "memory"
    finally:
        decoder.close()


def test_memory_that_torch_cannot_have_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` resizes in torch, whose shortage of memory is a RuntimeError."""
    code = "from pipeline import isolation; isolation.MAX_DECODE_BYTES = 20 << 20; isolation.main()"
    start = subprocess.Popen

    def limited(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-P", "-c", code, command[-1]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", limited)
    tiling = Tiling("dynamic", 4480, 4480, max_tiles=2, resize="fast")
    plan = plan_tiles(90, 60, tiling)
    decoder = IsolatedDecoder(tiling, 60.0)
    try:
        with pytest.raises(PictureError) as caught:
            decoder.cut_tiles(IMAGE, plan, np.empty((plan.tile_count, 4480, 4480, 3), np.uint8))
        assert (caught.value.stage, caught.value.code) == ("decode", "memory")
    finally:
        decoder.close()


def chunks_of(path: Path, **options: object) -> list[Chunk]:
    return run_stages(path, **options)  # type: ignore[arg-type]


def test_a_group_begun_before_gives_the_same_chunks(tmp_path: Path) -> None:
    members = [(f"{i:02}.jpg", picture(40 + 9 * i, 70, i)) for i in range(12)]
    members[4] = ("04.jpg", members[4][1][:300])
    members[7] = ("07.jpg", b"no picture")
    path = write_tar(tmp_path / "s.tar", members)
    first, second = CountedAttempts(0), CountedAttempts(1)
    direct, apart = chunks_of(path, attempts=first), chunks_of(path, attempts=second)
    assert first.finished == second.finished == ["s 000000"]
    assert len(direct) == len(apart) > 3
    for one, other in zip(direct, apart, strict=True):
        assert one.rows.equals(other.rows)
        assert one.rejects.equals(other.rejects)
        np.testing.assert_array_equal(one.tiles, other.tiles)
    assert set(balance(apart).rejects) == {4, 7}


def test_crashes_move_no_other_picture_into_another_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "CHILD", "tests.hostile.fragile")
    members = [(f"{i:02}.jpg", picture(40 + 9 * i, 70, i)) for i in range(12)]
    sound = chunks_of(write_tar(tmp_path / "a.tar", members))
    members[5] = ("05.jpg", faulty(members[5][1], "load-segv"))
    apart = chunks_of(write_tar(tmp_path / "b.tar", members), attempts=CountedAttempts(1))
    assert balance(apart).rejects == {5: ("05", "decode/crashed")}
    placed = [
        sorted({*c.rows["sample_index"].to_pylist(), *c.rejects["sample_index"].to_pylist()})
        for c in apart
    ]
    assert placed == [sorted(set(c.rows["sample_index"].to_pylist())) for c in sound]


def test_a_hang_in_one_call_ends_the_process(tmp_path: Path) -> None:
    """In a process of its own, as it does not survive."""
    code = (
        "import sys; from tests.hostile import fragile, stages; fragile.install();"
        "from pathlib import Path; stages.run_stages(Path(sys.argv[1]), deadline_seconds=0.5)"
    )
    path = write_tar(tmp_path / "s.tar", [("0.jpg", faulty(IMAGE, "load-hang"))])
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert run.returncode == 1
    assert "Timeout (0:00:03)!" in run.stderr
    assert "in cut_tiles" in run.stderr


def test_a_child_that_does_not_start_blames_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "CHILD", "no.such.module")
    decoder = IsolatedDecoder(Tiling("center-crop", 28, 28), 1.0)
    with pytest.raises(IsolationError, match="does not start: status 1"):
        decoder.picture_size(IMAGE)
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    path = write_tar(tmp_path / "s.tar", [("0.jpg", IMAGE)])
    with pytest.raises(SystemExit):
        run_stages(path, attempts=CountedAttempts(MOST_DEATHS - 1))
    assert ended == [EXIT_SHORT]
    (chunk,) = run_stages(path, attempts=CountedAttempts(MOST_DEATHS))  # it does not go on for ever
    assert chunk.head.failure == "10 workers died over its group 0; run the job again"
    assert chunk.head.last_chunk
    assert chunk.head.end is not None
    assert (chunk.rows.num_rows, chunk.rejects.num_rows, len(chunk.tiles)) == (0, 0, 0)


def test_no_child_is_left(fragile: IsolatedDecoder) -> None:
    fragile.picture_size(IMAGE)
    child = fragile._child
    assert child is not None
    fragile.close()
    assert child.returncode == -signal.SIGKILL
    assert not [t for t in threading.enumerate() if t.name == "watch-decoder"]
