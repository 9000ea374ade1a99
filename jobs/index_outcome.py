"""What a run of `tessera index` is to do and what it takes, and what it has done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.index_choice import Choice
from pipeline.cpus import usable_cpus
from pipeline.index_kinds import task_bytes, training_bytes, vector_bytes
from pipeline.index_plan import IndexPlan
from pipeline.index_record import IndexRecord, Kind


@dataclass(frozen=True)
class Estimate:
    """What a run is to do and what it takes, told before it starts.

    Memory: `training_bytes` in this process, `task_bytes` in each of `tasks_at_once` tasks (of the
    largest segment to build; so many on this machine, on a cluster one a CPU). `index_bytes` on
    storage, which a search maps.
    """

    kind: Kind
    vectors: int
    width: int
    vectors_to_read: int
    segments: int
    segments_to_build: int
    training_bytes: int
    task_bytes: int
    tasks_at_once: int
    index_bytes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Indexed:
    """What was done; `added`, `changed` and `removed` are shards, by name."""

    record: IndexRecord
    estimate: Estimate
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    was_up_to_date: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        record = self.record.model_dump(mode="json", include=SHOWN)
        return {
            **record,
            "vectors": self.record.live_vectors,
            "segments": len(self.record.segments),
            "added": list(self.added),
            "changed": list(self.changed),
            "removed": list(self.removed),
            "was_up_to_date": self.was_up_to_date,
            "seconds": self.seconds,
            "estimate": asdict(self.estimate),
        }


SHOWN = {"output", "version", "fingerprint", "feature", "vector", "width", "parameters", "recall"}


def estimate_of(choice: Choice, plan: IndexPlan, vectors: int) -> Estimate:
    """What it takes to make the index so, and with `vectors` vectors."""
    parameters, width = choice.parameters, choice.source.width
    groups = [sum(shard.pictures for shard in group) for group in plan.groups]
    held_vectors = sum(segment.vectors for segment in plan.kept)
    trains = choice.goes_on is None
    return Estimate(
        kind=parameters.kind,
        vectors=vectors,
        width=width,
        vectors_to_read=sum(groups),
        segments=len(plan.kept) + len(groups),
        segments_to_build=len(groups),
        training_bytes=training_bytes(parameters, width) if trains else 0,
        task_bytes=task_bytes(parameters, width, max(groups)) if groups else 0,
        tasks_at_once=min(len(groups), usable_cpus()) if len(groups) > 1 else len(groups),
        index_bytes=vector_bytes(parameters, width) * (held_vectors + sum(groups)),
        reasons=choice.reasons,
    )
