"""`reindex` without Ray: its plan, what it prunes, and whom it leads where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs.reindex as reindex_module
from jobs.config import ExtractConfig
from jobs.extract import Job, Summary, extract
from jobs.reindex import Reindexed, Wishes, by_source, prune, reindex
from jobs.reindex_plan import ClassPlan, Rates, ReindexPlan, show_plan
from jobs.status import read_status
from jobs.terminal import BrokenRunError
from jobs.verify import verify
from model.errors import UserError
from pipeline import lease as lease_module
from pipeline.commits import Failure, read_commits
from pipeline.comparison import Totals
from pipeline.lease import LeaseLostError, held, lease_url
from pipeline.records import Shard
from pipeline.replaced import mark_of
from tests.builders import files_below, samples, write_tar
from tests.outputs import edit_commit, extract_plainly
from tests.stages import STORAGE

OPTIONS: dict[str, Any] = {
    "tiling": "dynamic",
    "max_tiles": 4,
    "features": ("cls", "mean"),
    "carry": ("txt", "json:url", "json:none"),
    "dtype": "float32",
}  # those of tests/unit/jobs/conftest.py


def config_of(root: Path, **changes: Any) -> ExtractConfig:
    return ExtractConfig(
        **{**OPTIONS, **changes},
        input=(str(root / "in"),),
        output=str(root / "out"),
        model=str(root / "ckpt"),
    )


def run(root: Path, wishes: Wishes = Wishes(), **changes: Any) -> Reindexed:  # noqa: B008 frozen
    told: list[ReindexPlan] = []
    done = reindex(config_of(root, **changes), wishes, told.append)
    assert told == [done.plan]
    return done


def counts(plan: ReindexPlan) -> dict[str, int]:
    return {name: sums.shards for name, sums in plan.classes.items() if sums.shards}


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[list[Shard]]:
    """Instead of Ray: what was to be computed."""
    asked: list[list[Shard]] = []

    def run_job(job: Job, pending: Sequence[Shard], local_cluster: bool) -> Summary:
        asked.append(list(pending))
        return Summary(len(job.request.shards), 0, len(pending), 1, 8, {}, (), 1.0, reused=6)

    monkeypatch.setattr(reindex_module, "run_job", run_job)
    return asked


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_job(job: Job, pending: Sequence[Shard], local_cluster: bool) -> Summary:
        failure = Failure(shard=pending[0].name, reason="full disk")
        return Summary(len(job.request.shards), 0, 0, 0, 0, {}, (failure,), 1.0)

    monkeypatch.setattr(reindex_module, "run_job", run_job)


def test_nothing_to_do(copy: Path) -> None:
    before = files_below(copy)
    done = run(copy)
    assert done.exit_status == 0
    assert counts(done.plan) == {"unchanged": 2}
    assert done.to_json()["computed_tiles"] == done.to_json()["reused_tiles"] == 0
    assert files_below(copy) == before


def test_a_dry_run_tells_and_touches_nothing(copy: Path) -> None:
    status = read_status(str(copy / "out"), {})
    write_tar(copy / "in/c.tar", samples(4, seed=7))
    write_tar(copy / "in/a/b.tar", samples(3, seed=2))
    before = files_below(copy)
    done = run(copy, Wishes(dry_run=True))
    assert files_below(copy) == before
    assert done.exit_status == 0
    plan = json.loads(json.dumps(done.to_json()))["plan"]
    assert counts(done.plan) == {"new": 1, "changed": 1, "unchanged": 1}
    assert (plan["version"], plan["switches"]) == (None, False)
    classes = plan["classes"]
    assert (classes["changed"]["pictures"], classes["unchanged"]["pictures"]) == (5, 8)
    assert classes["changed"]["tiles"] + classes["unchanged"]["tiles"] == status.tiles
    # by the 13 pictures of the bytes that were committed
    committed = [json.loads((copy / f"out/commits/{n}.json").read_text()) for n in ("a", "a/b")]
    num_bytes = sum(commit["source"]["size"] for commit in committed)
    expected = round(13 * (copy / "in/c.tar").stat().st_size / num_bytes)
    assert classes["new"]["pictures"] == expected
    assert classes["new"]["device_hours"] is not None


def test_an_output_of_nothing_is_all_new(copy: Path) -> None:
    shutil.rmtree(copy / "out")
    done = run(copy, Wishes(dry_run=True))
    unknown = ClassPlan(shards=2, pictures=None, tiles=None, device_hours=None)
    assert done.plan.classes["new"] == unknown
    assert not (copy / "out").exists()


def test_rejects_are_retried_when_asked(copy: Path, no_ray: list[list[Shard]]) -> None:
    assert counts(run(copy, Wishes(rejects=True)).plan) == {"retry": 1, "unchanged": 1}
    ((shard,),) = no_ray
    assert shard.name == "a"
    (commit,) = read_commits(str(copy / "out"), ["a"], STORAGE)
    assert shard.before == mark_of(commit)


def test_what_is_taken_over_is_reported(copy: Path, no_ray: list[list[Shard]]) -> None:
    write_tar(copy / "in/c.tar", samples(1))
    done = run(copy)
    document = done.to_json()
    assert [shard.name for shard in no_ray[0]] == ["c"]
    assert (document["tiles"], document["reused_tiles"], document["computed_tiles"]) == (8, 6, 2)


def test_vanished_shards_are_kept(copy: Path) -> None:
    (copy / "in/a.tar").unlink()
    before = files_below(copy)
    done = run(copy)
    assert (counts(done.plan), done.pruned) == ({"unchanged": 1, "vanished": 1}, ())
    assert files_below(copy) == before


def test_vanished_shards_are_pruned_commit_first(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "in/a.tar").unlink()
    removed: list[str] = []
    real = type(STORAGE).remove_objects

    def watch(self: Any, *urls: str) -> None:
        removed.extend(url.partition("/out/")[2] for url in urls)
        real(self, *urls)

    monkeypatch.setattr(type(STORAGE), "remove_objects", watch)
    done = run(copy, Wishes(prune=True))
    assert done.pruned == ("a",)
    assert removed == [
        "commits/a.json",
        "embeddings/a.parquet",
        "rejects/a.parquet",
    ]
    assert set(files_below(copy / "out")) == {
        *("dataset.json", "commits/a/b.json", "embeddings/a/b.parquet"),
    }


def test_what_is_still_beside_the_others_is_not_pruned(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A listing may be behind, and INPUT given too narrow."""
    config = config_of(copy).model_copy(update={"input": (f"{copy}/in/{{a/b,a/c}}.tar",)})
    before = files_below(copy / "out")
    with pytest.raises(UserError):  # one of the two is not there, but may be named
        reindex(config.model_copy(update={"input": ("nowhere/*",)}), Wishes(), lambda plan: None)
    (copy / "in/a/c.tar").write_bytes((copy / "in/a/b.tar").read_bytes())
    extract_plainly([copy / "in"], copy / "out", copy / "ckpt", **OPTIONS)
    before = files_below(copy / "out")
    (copy / "in/a/c.tar").unlink()
    config = config.model_copy(update={"input": (f"{copy}/in/a*.tar",)})  # `a` alone
    done = reindex(config, Wishes(prune=True), lambda plan: None)
    assert (done.pruned, done.kept) == (("a/c",), ("a/b",))
    assert before.keys() - files_below(copy / "out").keys() == {
        *("commits/a/c.json", "embeddings/a/c.parquet"),
    }
    assert "shard a/b is not in INPUT, but its tar is still there: not pruned" in caplog.messages


def test_what_is_still_there_is_not_pruned_when_input_is_a_narrower_folder(copy: Path) -> None:
    """Names are then relative to another folder: where a tar is, its commit says."""
    write_tar(copy / "in/b?/c.tar", samples(2, seed=5))
    (copy / "in/a/b.tar").unlink()
    committed = [*read_commits(str(copy / "out"), ["a", "a/b"], STORAGE)]
    shard = Shard(f"{copy}/in/b?/c.tar", "c")
    with held(str(copy / "out"), "run", STORAGE) as lease:
        pruned, kept = prune(str(copy / "out"), [shard], ["a", "a/b"], lease, STORAGE)
    assert (pruned, kept) == (("a/b",), ("a",))
    assert [*read_commits(str(copy / "out"), ["a"], STORAGE)] == committed[:1]


def test_a_tar_whose_address_lost_its_signature_is_not_pruned(copy: Path) -> None:
    """A commit keeps no query, and without it nobody can tell that the tar is gone."""
    url = "https://h.invalid/a.tar"
    edit_commit(copy, "a", lambda commit: commit["source"].update(url=url))
    others = [Shard("https://h.invalid/c.tar?sig=1", "c")]
    (found,) = by_source(str(copy / "out"), ["a"], others, STORAGE)
    assert found == ([], ["a"])
    twice = [Shard(f"{url}?sig=1", "x/a")]  # committed as `x/a` too: `a` is the double
    ((gone, there),) = by_source(str(copy / "out"), ["a"], twice, STORAGE)
    assert ([commit.shard for commit in gone], there) == (["a"], [])


def test_input_given_otherwise_is_refused(copy: Path) -> None:
    """By `reindex` and by `extract`, before anything is computed."""
    config = config_of(copy).model_copy(update={"input": (f"{copy}/in/a",)})
    before = files_below(copy / "out")
    says = r"/in/a/b\.tar: shard b of INPUT is committed as shard a/b"
    with pytest.raises(UserError, match=says):
        reindex(config, Wishes(dry_run=True), lambda plan: None)
    with pytest.raises(UserError, match=says):
        extract(config)
    assert files_below(copy / "out") == before


def test_readers_are_not_led_to_less_than_they_have(
    copy: Path, no_ray: list[list[Shard]], caplog: pytest.LogCaptureFixture
) -> None:
    """INPUT was narrower than before: a new version of it alone is not what readers want."""
    narrow = config_of(copy, max_tiles=2).model_copy(update={"input": (f"{copy}/in/a.tar",)})
    done = reindex(narrow, Wishes(), lambda plan: None)
    assert (done.switched, done.left_behind, done.exit_status) == (False, 1, 0)
    assert done.to_json()["left_behind"] == 1
    assert not (copy / "out/current.json").exists()
    (message,) = [m for m in caplog.messages if "readers" in m]
    assert "1 shards that readers have now are not in INPUT, and their tars are still" in message
    (copy / "in/a/b.tar").unlink()  # then nothing is lost
    assert reindex(narrow, Wishes(), lambda plan: None).switched


def test_a_lease_that_is_lost_meanwhile_is_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run holds OUTPUT; this one was at work in a version below it."""
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)  # asked at each look
    ended: list[Job] = []

    def run_job(job: Job, pending: Sequence[Shard], local_cluster: bool) -> Summary:
        job.assure()
        STORAGE.publish_bytes(lease_url(str(copy / "out"), 2), b"")
        with pytest.raises(LeaseLostError, match="taken over"):
            job.assure()
        with pytest.raises(LeaseLostError, match="taken over"):
            job.check()
        ended.append(job)
        return Summary(len(job.request.shards), 0, len(pending), 1, 8, {}, (), 1.0)

    monkeypatch.setattr(reindex_module, "run_job", run_job)
    with pytest.raises(BrokenRunError, match=r"the run stops: .* taken over .* that run goes on"):
        run(copy, max_tiles=2)
    assert len(ended) == 1
    assert not (copy / "out/current.json").exists()


def test_names_that_would_come_to_collide_are_refused(copy: Path) -> None:
    """A vanished shard's objects must not be overwritten by the second generation of another."""
    for folder, suffix in (("commits", "json"), ("embeddings", "parquet")):
        source = copy / f"out/{folder}/a.{suffix}"
        shutil.copy(source, copy / f"out/{folder}/a.g00002.{suffix}")
    with pytest.raises(UserError, match=r"names a and a\.g00002 collide"):
        run(copy, Wishes(dry_run=True))


def test_a_commit_of_another_shard_stops_it(copy: Path) -> None:
    shutil.copy(copy / "out/commits/a.json", copy / "out/commits/x.json")
    with pytest.raises(UserError, match="it is of another shard, a"):
        run(copy, Wishes(prune=True))


def test_other_settings_make_a_version_and_lead_readers_there_when_it_is_whole(
    copy: Path, no_ray: list[list[Shard]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(copy / "out")
    planned = run(copy, Wishes(dry_run=True), max_tiles=2).plan
    assert files_below(copy / "out") == before
    assert counts(planned) == {"new": 2}
    assert planned.switches
    assert planned.version == planned.fingerprint[:12]
    assert planned.classes["new"].pictures == 13, "as the old version has them"
    assert planned.classes["new"].tiles is None, "they are cut otherwise"
    show_plan(planned, prune=False, on_stderr=False)
    assert "and not before" in capsys.readouterr().out
    done = run(copy, max_tiles=2)
    assert done.switched
    assert [[shard.name for shard in pending] for pending in no_ray] == [["a", "a/b"]]
    folder = copy / "out/versions" / planned.fingerprint[:12]
    assert json.loads((folder / "dataset.json").read_text())["settings"]["max_tiles"] == 2
    after = files_below(copy / "out")
    assert {name: after[name] for name in before} == before
    assert not (folder / "_runs").exists()
    assert not (copy / "out/_runs").exists()
    with pytest.raises(UserError, match=r"use `tessera reindex`"):
        extract(config_of(copy))
    # The first settings again: nothing is to be computed, and readers are led back.
    back = run(copy)
    assert (counts(back.plan), back.plan.switches, back.switched) == ({"unchanged": 2}, True, True)
    assert not (copy / "out/current.json").exists()


def test_a_version_with_failures_gets_no_readers(copy: Path, failing: None) -> None:
    done = run(copy, max_tiles=2)
    assert (done.exit_status, done.switched) == (1, False)
    assert not (copy / "out/current.json").exists()


def test_readers_of_a_version_find_its_shards(copy: Path) -> None:
    """`status` and `verify` follow current.json."""
    done = run(copy, Wishes(dry_run=True), max_tiles=2)
    version = done.plan.fingerprint[:12]
    folder = copy / "out/versions" / version
    extract_plainly([copy / "in"], folder, copy / "ckpt", **{**OPTIONS, "max_tiles": 2})
    (folder / "commits/a.json").unlink()
    (folder / "commits/a.json.tmp-0123abcd").touch()  # as of a run that is building it
    assert verify(str(copy / "out")).version is None
    assert verify(str(copy / "out")).problems == ()
    assert read_status(str(copy / "out"), {}).committed == 2
    for name in ("embeddings/a.parquet", "rejects/a.parquet"):
        (folder / name).unlink()
    (copy / "in/a.tar").unlink()
    assert run(copy, max_tiles=2).switched  # nothing is to be computed: all of INPUT is there
    status, report = read_status(str(copy / "out"), {}), verify(str(copy / "out"))
    assert (status.version, status.committed, status.samples) == (version, 1, 5)
    assert (report.version, report.shards, report.problems) == (version, 1, ())
    assert report.tiles == status.tiles < 13 * 3 + 1


def test_rates_of_what_was_computed_alone() -> None:
    rates = Rates.of([Totals(1, 100, 10, 40, 40, 4.0), Totals(1, 100, 10, 40, 0, 0.0)])
    assert rates == Rates(0.1, 0.4, 0.1)
    assert Rates.of([Totals()]) == Rates(None, None, None)


@pytest.mark.parametrize("max_tiles", [4, 2])
def test_two_at_once(copy: Path, max_tiles: int) -> None:
    """The second is refused, whatever its settings: the lease is that of OUTPUT."""
    with (
        held(str(copy / "out"), "first", STORAGE),
        pytest.raises(UserError, match="another run is at work"),
    ):
        run(copy, max_tiles=max_tiles)
