"""`verify --input` finds where the source is no longer what was embedded."""

from __future__ import annotations

import os
from pathlib import Path

from tests.builders import picture, sample, samples, tar_bytes, write_checkpoint, write_tar
from tests.outputs import (
    MEMBERS,
    check,
    extract_plainly,
)


def replace_source(root: Path, members: list[tuple[str, bytes]], same_time: bool) -> None:
    path = root / "in/a/b.tar"
    before = path.stat()
    path.write_bytes(tar_bytes(members))
    times = before.st_mtime_ns + (0 if same_time else 10**9)
    os.utime(path, ns=(times, times))


def source_check(root: Path) -> tuple[str, ...]:
    return check(root, inputs=(str(root / "in"),)).problems


def test_a_touched_source_is_said_to_have_changed(copy: Path) -> None:
    replace_source(copy, samples(5, seed=2), same_time=False)
    (problem,) = source_check(copy)
    assert problem.startswith("shard a/b: source changed: mtime-")


def test_a_grown_source_is_said_to_have_changed(copy: Path) -> None:
    replace_source(copy, samples(6, seed=2), same_time=True)
    changed, more, differ = source_check(copy)
    assert changed.startswith("shard a/b: source changed: 30720 bytes when committed, now ")
    assert more == "shard a/b: the source has 6 samples, the commit says 5"
    assert differ.endswith("the first is sample 5: '0005' is missing")


def test_another_picture_in_the_source_is_found(copy: Path) -> None:
    members = samples(5, seed=2)
    name, image = members[2 * MEMBERS]
    members[2 * MEMBERS] = (name, image[:-1] + b"\0")  # as many bytes, and the same time
    replace_source(copy, members, same_time=True)
    assert source_check(copy) == (
        "shard a/b: 1 samples differ from the source's, the first is sample 2: "
        "'0002' is another picture in the source",
    )


def test_another_key_in_the_source_is_found(copy: Path) -> None:
    members = [(name.replace("0001.", "000x."), data) for name, data in samples(5, seed=2)]
    replace_source(copy, members, same_time=True)
    assert source_check(copy) == (
        "shard a/b: 1 samples differ from the source's, the first is sample 1: "
        "key '0001', in the source '000x'",
    )


def test_another_order_in_the_source_is_found(copy: Path) -> None:
    members = samples(5, seed=2)
    replace_source(copy, members[MEMBERS:] + members[:MEMBERS], same_time=True)
    (problem,) = source_check(copy)
    assert problem.startswith(
        "shard a/b: 5 samples differ from the source's, the first is sample 0"
    )


def test_a_sample_without_image_in_the_source_is_found(copy: Path) -> None:
    members = [(name.replace("0003.jpg", "0003.xyz"), data) for name, data in samples(5, seed=2)]
    replace_source(copy, members, same_time=True)
    (problem,) = source_check(copy)
    assert problem.endswith("the first is sample 3: '0003' is to be rejected (no-image)")


def test_a_cut_source_is_found(copy: Path) -> None:
    path = copy / "in/a/b.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    problems = source_check(copy)
    assert problems[0].startswith("shard a/b: source changed: ")
    assert problems[1].startswith("shard a/b: the source cannot be read: ")


def test_input_and_output_must_have_the_same_shards(copy: Path) -> None:
    (copy / "in/a/b.tar").rename(copy / "in/c.tar")
    assert source_check(copy) == (
        "shard c: in INPUT, not committed",
        "shard a/b: committed, not in INPUT",
    )


def test_a_sample_that_carries_too_much_is_rejected_at_the_second_reading_too(
    tmp_path: Path,
) -> None:
    members = [*samples(2), *sample("big", picture(50, 50), "x" * (5 << 20))]
    write_tar(tmp_path / "in/s.tar", members)
    checkpoint = write_checkpoint(tmp_path / "model")
    (commit,) = extract_plainly(
        [tmp_path / "in"], tmp_path / "out", checkpoint, carry=("txt",), max_reject_rate=1.0
    )
    assert (commit.samples, commit.rejects) == (3, 1)
    assert source_check(tmp_path) == ()
