"""`tessera index`: a nearest-neighbour index of OUTPUT, kept fresh from its commits."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from jobs.index_choice import Asked, Choice, choose_index, choose_source, is_whole
from jobs.index_outcome import Estimate, Indexed, estimate_of
from jobs.terminal import BrokenRunError
from model.errors import UserError
from pipeline.commits import committed_shards, read_commits
from pipeline.index_models import make_model, read_queries
from pipeline.index_plan import IndexPlan, plan_index
from pipeline.index_recall import measure_recall, search_again
from pipeline.index_record import (
    INDEX_SCHEMA_VERSION,
    IndexRecord,
    Kind,
    Model,
    Segment,
    caption_of,
    read_record,
    record_url,
)
from pipeline.index_sample import OutputChangedError, PlannedShard
from pipeline.index_segments import SegmentRequest, build_segment
from pipeline.index_stock import check_index, find_orphans
from pipeline.lease import Lease, LeaseLostError, held, refuse_if_lost
from pipeline.one_vector import VectorChoice
from pipeline.read import open_output
from pipeline.storage import Storage, explained, join, redact, shared

logger = logging.getLogger(__name__)

LOOKS = 10  # at an OUTPUT that changes while it is indexed


@dataclass(frozen=True)
class Work:
    """What one look at OUTPUT and INDEX has found to do."""

    index: str
    output: str
    version: str | None
    choice: Choice
    plan: IndexPlan
    shards: tuple[PlannedShard, ...]

    @property
    def is_done(self) -> bool:
        """Whether the record says all that there is."""
        choice, before = self.choice, self.choice.goes_on
        return (
            before is not None
            and not self.plan.groups
            and self.plan.kept == before.segments
            and choice.feature_chosen == before.feature_chosen
            and choice.kind_chosen == before.kind_chosen
        )


def build_index(
    output: str,
    index: str,
    feature: str | None = None,
    vector: VectorChoice | None = None,
    kind: Kind | None = None,
    storage_options: Mapping[str, Any] | None = None,
    tell: Callable[[Estimate], None] = lambda estimate: None,
) -> Indexed:
    """Brings INDEX up to date with the commits of OUTPUT: builds it, or what has changed.

    Args:
        feature, vector, kind: None: as INDEX has them; of a new one the first feature, `thumbnail`
            and by the number of vectors.
        tell: is called with what is to be done before it is.

    Raises:
        UserError: the request cannot be met; INDEX is as it was.
        BrokenRunError: the cluster failed, or another run has taken INDEX over.
    """
    began = time.perf_counter()
    storage = Storage(storage_options or {})
    output, index = shared(output).rstrip("/"), shared(index).rstrip("/")
    asked = Asked(feature, vector, kind)
    check_index(output, index, storage)
    check_output(output, index, storage)
    with held(index, secrets.token_hex(8), storage) as lease, lost_lease_explained():
        for _ in range(LOOKS):
            try:
                work = look(output, index, asked, storage)
                done = bring_up_to_date(work, lease, storage, tell)
            except OutputChangedError as error:
                logger.warning("shard %s of OUTPUT has changed meanwhile; looking again", error)
                continue
            return replace(done, seconds=round(time.perf_counter() - began, 3))
    raise UserError(
        f"{redact(output)}: changes faster than it can be indexed; run this again when no run is on"
    )


def check_output(output: str, index: str, storage: Storage) -> None:
    """Says no before INDEX is touched.

    Raises:
        UserError: OUTPUT is none; or nothing is committed there, and INDEX holds nothing of it.
    """
    opened = open_output(output, storage)
    if read_record(index, storage) is not None:
        return
    with explained("list", opened.folder):
        if not committed_shards(opened.folder, storage):
            raise UserError(f"{redact(output)}: no shard is committed; there is nothing to index")


def look(output: str, index: str, asked: Asked, storage: Storage) -> Work:
    """Reads the commits and the record, and finds what there is to do."""
    opened = open_output(output, storage)
    record = read_record(index, storage)
    source = choose_source(asked, record, opened)
    with explained("read", opened.folder):
        names = sorted(committed_shards(opened.folder, storage))
        try:
            shards = tuple(map(PlannedShard.of, read_commits(opened.folder, names, storage)))
        except FileNotFoundError as error:
            raise OutputChangedError(str(error)) from error
    with explained("list", index):
        files = storage.list_files(index)
    vectors = sum(shard.pictures for shard in shards)
    choice = choose_index(asked, record, source, opened.version, vectors, files)
    before = choice.goes_on
    if before is not None:
        whole = tuple(s for s in before.segments if is_whole(s, files))
        for segment in set(before.segments) - set(whole):
            logger.warning("segment %s: files are missing; built again", segment.name[:12])
        before = before.model_copy(update={"segments": whole})
    plan = plan_index(before, shards, choice.parameters, source.width)
    return Work(index, output, opened.version, choice, plan, shards)


def bring_up_to_date(
    work: Work, lease: Lease, storage: Storage, tell: Callable[[Estimate], None]
) -> Indexed:
    """Does what was found to do, and puts the record.

    Raises:
        OutputChangedError: OUTPUT is no longer as it was looked at; what was made is found again.
    """
    plan = work.plan
    estimate = estimate_of(work.choice, plan, sum(shard.pictures for shard in work.shards))
    tell(estimate)
    record = work.choice.goes_on
    if not work.is_done:
        with explained("write to", work.index):
            record = make_record(work, storage)
            lease.assure()
            storage.publish_bytes(record_url(work.index), record.dump())
    assert record is not None, "what is done has a record"
    with explained("write to", work.index):
        if orphans := find_orphans(work.index, record, storage):
            # They may be a successor's by now.
            refuse_if_lost(work.index, lease.number, lease.run, storage)
            storage.remove_objects(*(join(work.index, path) for path in orphans))
    return Indexed(
        record, estimate, plan.added, plan.changed, plan.removed, work.is_done, seconds=0.0
    )


def make_record(work: Work, storage: Storage) -> IndexRecord:
    """Makes all that the record is to name; segments of which more has died are searched again."""
    source, choice = work.choice.source, work.choice
    before = choice.goes_on
    model = (
        make_model(work.index, source, choice.parameters, work.shards, storage)
        if before is None
        else before.model
    )
    queries = read_queries(work.index, model, storage)
    kept = [
        search_again(work.index, segment, choice.parameters, queries, storage)
        for segment in work.plan.kept
    ]
    segments = (*kept, *build_segments(work, model, storage))
    dataset = source.output.dataset
    return IndexRecord(
        schema_version=INDEX_SCHEMA_VERSION,
        output=redact(work.output),
        version=work.version,
        fingerprint=dataset.fingerprint,
        feature=source.feature,
        feature_chosen=choice.feature_chosen,
        vector=source.choice,
        width=source.width,
        caption=caption_of(source.output.carried),
        kind_chosen=choice.kind_chosen,
        parameters=choice.parameters,
        model=model,
        segments=segments,
        recall=measure_recall(work.index, segments, storage),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def build_segments(work: Work, model: Model, storage: Storage) -> list[Segment]:
    """The new segments, in order: one in this process, several as tasks of Ray."""
    source = work.choice.source
    caption = caption_of(source.output.carried)
    requests = [
        SegmentRequest(work.index, source, caption, work.choice.parameters, model, group)
        for group in work.plan.groups
    ]
    if len(requests) > 1:
        return build_on_ray(requests, storage)
    built = [build_segment(request, storage) for request in requests]
    return [_unchanged(segment) for segment in built]


def build_on_ray(requests: Sequence[SegmentRequest], storage: Storage) -> list[Segment]:
    import ray

    from jobs.cluster import broken_runs_explained, connect
    from pipeline.cpus import usable_cpus
    from pipeline.index_flow import build_side_by_side

    with redirect_stdout(sys.stderr):  # Ray prints what workers say; stdout is for the result
        started_here = connect()
        cpus = int(ray.cluster_resources().get("CPU", 1))
        at_once = usable_cpus() if started_here else cpus
        built: dict[str, Segment] = {}
        try:
            with broken_runs_explained():
                for request, segment in build_side_by_side(requests, at_once, storage):
                    built[request.name] = _unchanged(segment)
                    print(
                        f"segment {len(built)} of {len(requests)}: "
                        f"{built[request.name].vectors:,} vectors",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:
            ray.shutdown()
    return [built[request.name] for request in requests]


def _unchanged(segment: Segment | None) -> Segment:
    if segment is None:
        raise OutputChangedError("of a segment")
    return segment


@contextmanager
def lost_lease_explained() -> Iterator[None]:
    try:
        yield
    except LeaseLostError as error:
        raise BrokenRunError(f"the run stops: {error}; that one goes on") from error
