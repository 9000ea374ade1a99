"""The command on a small INPUT: whole documents, and what users mistype. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import plan as planning
from jobs.plan_document import Plan
from jobs.plan_options import Fleet, load_plan_config, parse_fleet
from jobs.show_plan import show_plan
from model.errors import UserError
from pipeline.chunks import TileSettings, tile_group
from pipeline.records import Shard
from pipeline.samples import ReadSettings, read_groups
from pipeline.tiling import Tiling
from tests.builders import run_cli, samples, tar_bytes, write_tar
from tests.outputs import edit_commit, extract_plainly
from tests.planning import write_input
from tests.s3 import S3Server
from tests.stages import STORAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("plan") / "in")


def planned(*inputs: object, **options: Any) -> Plan:
    given = {"input": tuple(map(str, inputs)), "sample_pictures": 10, **options}
    return planning.plan(load_plan_config(None, given), frozenset(options))


def truth(folder: Path, tiling: Tiling) -> int:
    settings = TileSettings(tiling, (), 60.0, 32)
    return sum(
        len(chunk.tiles)
        for path in folder.glob("*.tar")
        for group in read_groups(Shard(str(path), "s"), ReadSettings(STORAGE, ("jpg",)))
        for chunk in tile_group(group, settings)
    )


def test_all_shards_read_give_the_very_tiles(folder: Path) -> None:
    found = planned(folder, tiling="dynamic", max_tiles=4)
    tiles = truth(folder, Tiling("dynamic", 448, 448, max_tiles=4))
    assert found.chosen.tiles == tiles
    assert found.tiles.low == found.tiles.high == tiles
    assert found.chosen.pictures == 120
    assert sum(int(n) * p for n, p in found.chosen.tile_counts.items()) == tiles
    assert found.sample.of_shards == 12
    assert found.chosen.read_bytes == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert found.network.basis == "published shape"
    assert "no --model" in found.notes[-1] or any("no --model" in note for note in found.notes)
    assert found.fleet.name == "8xH100"
    assert {rate.basis for rate in found.rates} == {"measured", "assumed"}


def test_a_sample_stands_for_all(folder: Path) -> None:
    found = planned(folder, tiling="dynamic", max_tiles=4, sample_shards=10, seed=1)
    tiles = truth(folder, Tiling("dynamic", 448, 448, max_tiles=4))
    assert found.sample.shards == 10
    assert found.tiles.low is not None
    assert found.tiles.high is not None
    assert found.tiles.low <= tiles <= found.tiles.high
    assert found.chosen.tiles == pytest.approx(tiles, rel=0.1)
    assert found.rejects.value == 0
    assert found.rejects.high == pytest.approx(120 * 3 / 100, rel=0.05)


def test_comparisons_are_side_by_side(folder: Path) -> None:
    found = planned(folder, tiling="dynamic", fleet=("8xH100", "4xL4"), max_tiles=6)
    by_title = {table.title: table.options for table in found.comparisons}
    assert [o.label for o in by_title["max_tiles"]] == ["1", "6", "12", "24"]
    assert by_title["max_tiles"][0].tiles == 120
    tiles = [o.tiles or 0 for o in by_title["max_upscale"]]
    assert tiles == sorted(tiles, reverse=True)
    ranks = by_title["tensor_parallel on 8xH100"]
    hours = [option.device_hours or 0 for option in ranks]
    assert hours == sorted(hours)
    fleets = [option.label for option in by_title["fleet"]]
    assert fleets[:2] == ["8xH100", "4xL4"]
    assert "8xH200" in fleets
    for options in by_title.values():
        (chosen,) = [option for option in options if option.chosen]
        assert chosen.wall_seconds == pytest.approx(found.chosen.wall_seconds)


def test_what_a_device_cannot_do_is_a_line_of_the_table(folder: Path) -> None:
    found = planned(folder, fleet=("4xL4",))
    ranks = {o.label: o for t in found.comparisons for o in t.options if "L4" in t.title}
    assert ranks["8"].wall_seconds is None
    assert "no node with that many devices" in ranks["8"].note


def test_center_crop_is_one_tile_a_picture(folder: Path) -> None:
    found = planned(folder)
    assert found.chosen.tiles == found.chosen.pictures == 120
    (table,) = [table for table in found.comparisons if table.title == "max_upscale"]
    assert table.options[0].label == "center-crop"


def test_people_see_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(planned(folder, tiling="dynamic", sample_shards=10))
    shown = capsys.readouterr().out
    for words in ("10 of 12 shards", "assumed", "8xH100 *", "its published shape", "is the limit"):
        assert words in shown


def test_prices_and_devices_of_ones_own(folder: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "currency: EUR\ndate: 2026-11\nsource: s\ndevices: {H100: {per_hour: 3600, cores: 1}}\n"
        "storage: {source: s, per_1000_gets: 0, per_1000_puts: 0, per_gb_month: 1}\n"
    )
    found = planned(folder, prices=str(prices))
    assert found.price.currency == "EUR"
    assert found.price.devices == pytest.approx(8 * found.chosen.wall_seconds)
    assert found.fleet.cores == 8
    unpriced = planned(folder, prices=str(prices), fleet=("2xL4",))
    assert unpriced.price.devices is None
    assert any("does not tell the cores of L4 machines" in note for note in unpriced.notes)
    assert not any("cores of" in note for note in found.notes)


def test_shards_that_are_not_there(folder: Path) -> None:
    found = planned(f"{folder}/{{00000..00013}}.tar")
    assert (found.sample.missing, found.sample.of_shards) == (2, 12)


def test_s3(s3: S3Server) -> None:
    members = {f"d/{n}.tar": tar_bytes(samples(5, seed=n)) for n in range(3)}
    url = s3.make_bucket("plan", members)
    found = planned(f"{url}/d", storage_options=s3.options)
    assert found.chosen.pictures == 15
    assert found.chosen.read_bytes == sum(map(len, members.values()))
    assert s3.secret not in found.model_dump_json()


@pytest.fixture
def run(copy: Path) -> Path:
    """A small OUTPUT whose commits say that a CPU computed it, 20 ms a tile."""

    def by_cpu(commit: dict[str, Any]) -> None:
        how = {"device": "cpu", "tensor_parallel": 1, "attention": "sdpa", "batch_tiles": 4}
        commit["computed"] = [how]
        commit["seconds"]["embed"] = 0.02 * commit["tiles"]

    for shard in ("a", "a/b"):
        edit_commit(copy, shard, by_cpu)
    return copy


def test_rates_of_a_run(run: Path) -> None:
    found = planned(from_output=str(run / "out"), model=str(run / "ckpt"))
    (encoder,) = [rate for rate in found.rates if rate.name == "encoder alone"]
    assert encoder.value == pytest.approx(50)
    files = sorted((run / "out/embeddings").rglob("*.parquet"))
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    assert found.chosen.tiles == rows
    assert found.chosen.rejects == 1
    assert found.chosen.pictures == 12
    assert found.settings["max_tiles"] == 4
    assert found.fleet.name == "cpu"
    assert found.chosen.output_bytes == pytest.approx(
        sum(file.stat().st_size for file in files), rel=0.3
    )
    assert {rate.basis for rate in found.rates} == {"run"}


def test_rates_of_a_run_for_another_input(run: Path, folder: Path) -> None:
    found = planned(folder, from_output=str(run / "out"), model=str(run / "ckpt"))
    assert found.sample.of_shards == 12
    commits = [json.loads(p.read_text()) for p in (run / "out/commits").rglob("*.json")]
    a_byte = sum(c["tiles"] for c in commits) / sum(c["source"]["size"] for c in commits)
    assert found.chosen.tiles == pytest.approx(a_byte * found.chosen.read_bytes)


def test_rates_of_a_run_on_a_gpu(copy: Path) -> None:
    def by_gpu(commit: dict[str, Any]) -> None:
        how = {"device": "NVIDIA H200", "tensor_parallel": 2, "attention": "x", "batch_tiles": 4}
        commit["computed"] = [how]
        commit["seconds"]["embed"] = 0.01 * commit["tiles"]

    for shard in ("a", "a/b"):
        edit_commit(copy, shard, by_gpu)
    options = {"from_output": str(copy / "out"), "model": str(copy / "ckpt")}
    found = planned(**options, fleet=("8xH200",), tensor_parallel=2)
    (rate,) = [rate for rate in found.rates if rate.name == "encoder"]
    assert (rate.basis, rate.value) == ("run", pytest.approx(50))  # 100 a replica of two


def test_tiles_that_were_taken_over_tell_nothing_of_the_speed(run: Path) -> None:
    def taken_over(commit: dict[str, Any]) -> None:
        computed = 4 if commit["shard"] == "a" else 0
        commit["reused"] = commit["tiles"] - computed
        commit["seconds"] |= {"embed": 0.02 * computed, "tile": 0.01 * computed}

    for shard in ("a", "a/b"):
        edit_commit(run, shard, taken_over)
    found = planned(from_output=str(run / "out"), model=str(run / "ckpt"))
    values = {rate.name: rate.value for rate in found.rates}
    assert values["encoder alone"] == pytest.approx(50)
    assert values["tiling"] == pytest.approx(100)
    edit_commit(run, "a", lambda commit: commit.update(reused=commit["tiles"]))
    with pytest.raises(UserError, match="no tile was computed there"):
        planned(from_output=str(run / "out"), model=str(run / "ckpt"))


def test_the_ranks_that_computed_most_tell_the_rate(copy: Path) -> None:
    tiles = {}

    def by_gpu(commit: dict[str, Any]) -> None:
        ranks = {"a": 2, "a/b": 1}[commit["shard"]]
        how = {"device": "NVIDIA H200", "tensor_parallel": ranks, "attention": "x"}
        commit["computed"] = [{**how, "batch_tiles": 4}]
        commit["seconds"]["embed"] = {2: 0.01, 1: 0.025}[ranks] * commit["tiles"]
        tiles[ranks] = commit["tiles"]

    for shard in ("a", "a/b"):
        edit_commit(copy, shard, by_gpu)
    assert tiles[2] > tiles[1]
    options = {"from_output": str(copy / "out"), "model": str(copy / "ckpt")}
    found = planned(**options, fleet=("8xH200",), tensor_parallel=2)
    (rate,) = [rate for rate in found.rates if rate.name == "encoder"]
    assert (rate.basis, rate.value) == ("run", pytest.approx(50))
    assert f"{tiles[2]:,} tiles on NVIDIA H200" in rate.source


def test_a_plan_goes_by_the_version_that_is_read(run: Path) -> None:
    folder = run / "out/versions/0123456789ab"
    options: dict[str, Any] = {"tiling": "dynamic", "max_tiles": 2, "dtype": "bfloat16"}
    commits = extract_plainly([run / "in"], folder, run / "ckpt", **options)
    current = {"version": "0123456789ab", "fingerprint": "f", "switched_at": "2026-01-01T00:00Z"}
    (run / "out/current.json").write_text(json.dumps(current))
    found = planned(from_output=str(run / "out"), model=str(run / "ckpt"))
    assert found.settings["max_tiles"] == 2
    assert found.chosen.tiles == sum(commit.tiles for commit in commits)


def test_a_share_that_few_pictures_show_is_no_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shard was read, but some of the pictures alone were decoded."""
    for shard in range(2):
        members = samples(20, seed=shard, prefix=f"{shard}-")
        for bad in range(0, 20, 2):  # headers are whole
            name, image = members[bad * 3]
            members[bad * 3] = (name, image[: len(image) * 2 // 3])
        write_tar(tmp_path / f"{shard}.tar", members)
    found = planned(tmp_path, tiling="dynamic", max_tiles=4, max_reject_rate=1.0)
    share = found.chosen.pictures / 40
    assert 0 < share < 1
    assert found.sample.decoded_pictures == 10
    for interval in (found.pictures, found.tiles, found.rejects):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.value < interval.high
    margin = 1.959964 * (share * (1 - share) / 10) ** 0.5
    assert found.pictures.low == pytest.approx(40 * (share - margin))
    assert sum(found.chosen.tile_counts.values()) == pytest.approx(found.chosen.pictures)
    show_plan(found)
    assert "counted" not in capsys.readouterr().out


def test_a_run_is_not_contradicted(made: Path) -> None:
    with pytest.raises(UserError, match="max_tiles is 4 there, 9 asked"):
        planned(from_output=str(made / "out"), model=str(made / "ckpt"), max_tiles=9)


@pytest.mark.parametrize(
    ("text", "fleet"),
    [("8xH100", Fleet(8, "H100")), ("L4", Fleet(1, "L4")), ("cpu", Fleet(1, "cpu"))],
)
def test_fleets(text: str, fleet: Fleet) -> None:
    assert parse_fleet(text) == fleet


@pytest.mark.parametrize("text", ["", "8x", "0xH100", "4xcpu", "8*H100"])
def test_what_is_no_fleet(text: str) -> None:
    with pytest.raises(UserError, match="fleet: "):
        parse_fleet(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fleet": ("8xB300",)}, "no device 'B300'"),
        ({"fleet": ("cpu",)}, "give --model"),
        ({"fleet": ("cpu",), "tensor_parallel": 2}, "knows one rank"),
        ({"model": "./no-such-model"}, "no such folder"),
        ({"image_key": ("gif",)}, "no picture in the 12 shards of the sample"),
        ({"dtype": "float32"}, "no peak for it"),
        ({"benchmark": "none.json"}, "none.json: cannot be read"),
        ({"layer": 45}, "the checkpoint has 45 blocks"),
    ],
)
def test_requests_that_cannot_be_met(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as told:
        planned(folder, **options)
    assert "\n" not in str(told.value)


def test_the_command(folder: Path) -> None:
    done = run_cli("plan", folder, "--sample-pictures", 5, "--fleet", "8xL4,2xH200", "--json")
    assert done.returncode == 0, done.stderr
    document = Plan.model_validate_json(done.stdout)
    assert document.fleet.name == "8xL4"
    assert "read 12 of 12 shards" in done.stderr
    assert set(document.chosen.model_dump()) == {
        "pictures", "tiles", "rejects", "read_bytes", "output_bytes", "requests", "device_hours",
        "wall_seconds", "tiles_per_second", "tile_counts",
    }  # fmt: skip


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, says in (
        (("plan",), "plan: missing INPUT"),
        (("plan", tmp_path / "none"), "not found"),
        (("plan", tmp_path / "a.tar"), "none of the 1 shards of INPUT is there"),
    ):
        done = run_cli(*arguments)
        assert done.returncode == 2
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
