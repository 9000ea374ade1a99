"""The segments of an index, built side by side as Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray
from ray.exceptions import RayTaskError

from model.errors import UserError
from pipeline.index_kinds import task_bytes
from pipeline.index_record import Segment
from pipeline.index_segments import SegmentRequest, build_segment
from pipeline.storage import Storage


def _memory(request: SegmentRequest) -> int:
    return task_bytes(request.parameters, request.source.width, request.vectors)


def _refuse_if_too_large(largest: SegmentRequest) -> None:
    """Ray would wait for a node that has the memory."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((int(node.get("memory", 0)) for node in nodes if node.get("CPU")), default=0)
    if (needed := _memory(largest)) > most:
        raise UserError(
            f"a segment of {largest.vectors:,} vectors takes {needed >> 20:,} MiB of memory to "
            f"build, and the largest node of the cluster has {most >> 20:,} MiB; use a larger one"
        )


def build_side_by_side(
    requests: Sequence[SegmentRequest], at_once: int, storage: Storage
) -> Iterator[tuple[SegmentRequest, Segment | None]]:
    """Builds the segments on the cluster that is connected; gives each as it is done.

    Raises:
        UserError, OSError: see `build_segment`; or no node has the memory that one takes.
        RayError: the cluster failed.
    """
    _refuse_if_too_large(max(requests, key=_memory))
    build = ray.remote(build_segment)
    waiting = list(reversed(requests))
    running: dict[ray.ObjectRef, SegmentRequest] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            request = waiting.pop()
            task = build.options(num_cpus=1, memory=_memory(request)).remote(request, storage)
            running[task] = request
        (done,), _ = ray.wait(list(running), num_returns=1)
        try:
            segment = ray.get(done)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | OSError):
                raise error.cause from error
            raise
        yield running.pop(done), segment
