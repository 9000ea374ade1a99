"""The report of a small output: its values, and that it loads and runs nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from jobs.report import read_report, write_report
from jobs.report_html import POLICY, page
from model.errors import UserError
from pipeline.commits import Progress
from tests.builders import picture, sample, samples, write_checkpoint, write_tar
from tests.outputs import edit_commit, extract_plainly
from tests.stages import STORAGE

EVIL = "<script>alert(1)</script>"
MEMBERS = 3
CUT, NO_PICTURE, EVIL_KEY = 2, 3, 4  # sample_index in shard `a`


class Seen(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/a.tar (8 samples, three are rejects) and in/b.tar (5), out/ as two replicas made it."""
    folder = tmp_path_factory.mktemp("reported")
    members = samples(8, seed=1)
    cut_name, image = members[CUT * MEMBERS]
    members[CUT * MEMBERS] = (cut_name, image[: len(image) * 3 // 4])
    members[NO_PICTURE * MEMBERS] = (members[NO_PICTURE * MEMBERS][0], b"no picture")
    members[EVIL_KEY * MEMBERS : (EVIL_KEY + 1) * MEMBERS] = sample(f"{EVIL}\x1b", picture(60, 50))
    members[EVIL_KEY * MEMBERS] = (f"{EVIL}\x1b.<b>", picture(60, 50))  # no extension of a picture
    write_tar(folder / "in/a.tar", members)
    write_tar(folder / "in/b.tar", samples(5, seed=2))
    extract_plainly(
        [folder / "in"],
        folder / "out",
        write_checkpoint(folder / "ckpt"),
        tiling="dynamic",
        max_tiles=4,
        max_reject_rate=1.0,
    )
    for shard, minute, name, rate in (("a", 0, "r-1", 10), ("b", 1, "r-2", 20)):
        tiles = json.loads((folder / f"out/commits/{shard}.json").read_text())["tiles"]
        by = [{"node": "10.0.0.7", "replica": name, "tiles": tiles, "seconds": tiles / rate}]
        when = f"2026-11-24T12:0{minute}:00+00:00"
        edit_commit(folder, shard, lambda c, b=by, w=when: c.update(replicas=b, committed_at=w))
    return folder


@pytest.fixture(scope="module")
def shown(root: Path) -> Iterator[Seen]:
    write_report(str(root / "out"), root / "report.html")
    return Seen((root / "report.html").read_text())


def commits(root: Path) -> list[dict[str, object]]:
    return [json.loads((root / f"out/commits/{shard}.json").read_text()) for shard in "ab"]


def test_the_page_loads_and_runs_nothing(shown: Seen) -> None:
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & {*shown.tags}
    assert ("content", POLICY) in shown.attributes
    assert POLICY.startswith("default-src 'none';")
    for name, value in shown.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "srcset", "action", "style"):
            assert "//" not in value or value.startswith("data:image/jpeg;base64,"), value
    assert ("name", "viewport") in shown.attributes


def test_what_strangers_wrote_is_text_and_nothing_else(root: Path, shown: Seen) -> None:
    raw = (root / "report.html").read_text()
    assert "<script" not in raw
    assert "\x1b" not in raw
    assert f"{EVIL}\\x1b" in shown.text  # the key, as it is, with its control character told
    assert "it has <b>, json, txt" in shown.text  # the message


def test_the_figures_are_those_of_the_commits(root: Path, shown: Seen) -> None:
    one, two = commits(root)
    tiles = one["tiles"] + two["tiles"]  # type: ignore[operator]
    text = shown.text
    for value in ("2\nshards committed", "10\npictures", f"{tiles}\ntiles", "3\nrejects (23.1 %)"):
        assert value in text, value
    # all tiles in the minute between the two commits
    assert f"{tiles / 60:,.1f}\ntiles/s while shards came" in text
    assert "1:00\ntime in which shards came" in text
    assert re.search(r"10\.0\.0\.7 r-1\s+10\.0", text)
    assert re.search(r"10\.0\.0\.7 r-2\s+20\.0", text)
    for code in ("decode/truncated", "decode/unidentified", "read/no-image"):
        assert re.search(rf"{code}\s+1 \(7\.7 %\)", text), code
    tips = [value for name, value in shown.attributes if name == "data-tip"]
    counts: dict[str, int] = {}
    for commit in (one, two):
        for count, pictures in commit["tile_counts"].items():  # type: ignore[attr-defined]
            counts[count] = counts.get(count, 0) + pictures
    assert len(counts) > 1
    for count, pictures in counts.items():
        share = f"{100 * pictures / 10:.1f} %"
        assert f"{count} tiles: {pictures} pictures, {share}" in tips
    sizes = [tip for tip in tips if "pixels: " in tip]
    assert sum(int(tip.split("pixels: ")[1].split()[0]) for tip in sizes) == 10
    assert "10 pictures, the first row group of 2 of 2 parts" in text


def test_a_reject_that_can_be_decoded_in_part_is_shown(shown: Seen) -> None:
    pictures = [value for name, value in shown.attributes if name == "src"]
    assert len(pictures) == 1  # the one that was cut; the others are no picture
    data = base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as small:
        assert small.format == "JPEG"
        assert max(small.size) <= 160
    assert "cannot be decoded" in shown.text
    assert "no picture is there" in shown.text


def test_a_source_that_changed_or_is_gone_is_told_and_not_shown(root: Path, tmp_path: Path) -> None:
    where = {"a": str(tmp_path / "a.tar")}
    missing = read_report(str(root / "out"), None, where, STORAGE)
    assert [e.picture for e in missing.examples.all()] == [None] * 3
    assert all("its shard cannot be read" in e.note for e in missing.examples.all())
    write_tar(tmp_path / "a.tar", samples(9, seed=4))
    changed = read_report(str(root / "out"), None, where, STORAGE)
    assert {e.note for e in changed.examples.all()} == {"its shard has changed since"}
    write_report(str(root / "out"), tmp_path / "r.html", inputs=(str(root / "in"),))
    assert "data:image/jpeg" in (tmp_path / "r.html").read_text()


def test_plan_and_actual_stand_side_by_side(root: Path, tmp_path: Path) -> None:
    chosen = {
        "pictures": 20, "tiles": 100, "rejects": 2, "read_bytes": 1e6, "output_bytes": 1e6,
        "requests": 9, "device_hours": 0.01, "wall_seconds": 100, "tiles_per_second": 2.0,
        "tile_counts": {"1": 15, "5": 5},
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "chosen": chosen}))
    write_report(str(root / "out"), tmp_path / "r.html", tmp_path / "plan.json")
    tiles = sum(commit["tiles"] for commit in commits(root))  # type: ignore[misc]
    shown = Seen((tmp_path / "r.html").read_text())
    # 10 of 20 pictures are done, so half of the plan's totals is due
    cells = ["tiles", "100", "50", str(tiles), f"{100 * (tiles / 50 - 1):+.1f} %"]
    assert "\n".join(cells) in shown.text
    assert "wall time\n1:40\n0:50\n1:00\n+20.0 %" in shown.text
    rate = tiles / 60
    assert f"tiles/s\n2\n{rate:.3g}\n{100 * (rate / 2 - 1):+.1f} %" in shown.text
    tips = [value for name, value in shown.attributes if name == "data-tip"]
    assert any(tip.startswith("1 tiles: ") and "planned 75.0 %" in tip for tip in tips)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"{}", r"plan.json: chosen: Field required; expected the document of `tessera plan"),
        (b'{"chosen": {"pictures": -1}}', r"plan.json: chosen\.pictures: "),
        (b"no json", r"plan.json: the document: Invalid JSON"),
        (None, r"plan.json: cannot be read: No such file"),
    ],
)
def test_what_is_no_plan_is_refused(
    document: bytes | None, said: str, root: Path, tmp_path: Path
) -> None:
    if document is not None:
        (tmp_path / "plan.json").write_bytes(document)
    with pytest.raises(UserError, match=said):
        write_report(str(root / "out"), tmp_path / "r.html", tmp_path / "plan.json")
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_goes_on_or_has_not_begun_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset.json").write_bytes((root / "out/dataset.json").read_bytes())
    record = Progress(
        started_at="2026-11-24T12:00:00+00:00", updated_at="2026-11-24T12:00:10+00:00",
        ended=True, shards=3, committed=0, failures=({"shard": "c", "reason": f"no {EVIL}"},),
        tiles=0, rejects=0, tiles_per_second=0,
    )  # fmt: skip
    STORAGE.publish_bytes(str(tmp_path / "out/_runs/r/progress.json"), record.dump())
    write_report(str(tmp_path / "out"), tmp_path / "r.html")
    shown = Seen((tmp_path / "r.html").read_text())
    assert "Nothing is committed yet." in shown.text
    assert "ended 2026-11-24T12:00:10+00:00 with shards left" in shown.text
    assert f"no {EVIL}" in shown.text


def test_commits_of_an_earlier_version_are_told_as_such(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "out", tmp_path / "out")

    def older(commit: dict[str, object]) -> None:
        for name in ("tile_counts", "reject_codes", "replicas"):
            commit.pop(name)

    edit_commit(tmp_path, "a", older)
    report = read_report(str(tmp_path / "out"), None, {}, STORAGE)
    assert (report.figures.shards, report.figures.untold) == (2, 1)
    shown = Seen(page(report))
    assert "3 are in commits of an earlier version without codes" in shown.text
    assert "1 shards of an earlier version do not tell" in shown.text


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json there"):
        write_report(str(tmp_path), tmp_path / "r.html")
