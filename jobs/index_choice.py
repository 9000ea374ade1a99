"""What an index is to be: by what is asked, what there is already, and how much OUTPUT holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError
from pipeline.index_kinds import FEWEST_TRAINED, choose, kind_for
from pipeline.index_record import IndexRecord, IvfPq, Kind, Model, Parameters, Segment
from pipeline.index_sample import VectorSource
from pipeline.one_vector import VectorChoice
from pipeline.read import Output, check_choice
from pipeline.storage import redact

OUTGROWN = 2  # lists are made for so many times fewer vectors (or more) than would be now


@dataclass(frozen=True)
class Asked:
    """What the user gave; None: as the index is, or by default."""

    feature: str | None = None
    vector: VectorChoice | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Choice:
    """What the index is to be. `reasons` why it is another than `before`; none: it goes on.
    `feature_chosen`, `kind_chosen`: by the user, now or before."""

    source: VectorSource
    parameters: Parameters
    feature_chosen: bool
    kind_chosen: bool
    before: IndexRecord | None
    reasons: tuple[str, ...]

    @property
    def goes_on(self) -> IndexRecord | None:
        return None if self.reasons else self.before


def choose_source(asked: Asked, record: IndexRecord | None, output: Output) -> VectorSource:
    """Which vectors are indexed.

    Raises:
        UserError: OUTPUT has none such.
    """
    there = [name for name in output.dataset.features if not name.startswith("tokens")]
    default = next(iter(there), None)
    if record is not None and (record.feature_chosen or record.feature in there):
        default = record.feature
    feature = asked.feature or default
    if feature not in there:
        has = f"it has {', '.join(there)}" if there else "it has none with one vector a tile"
        raise UserError(f"{redact(output.folder)}: no feature {feature} to index; {has}")
    vector = asked.vector or (record.vector if record is not None else "thumbnail")
    check_choice(output, vector)
    return VectorSource(output, feature, vector)


def choose_index(
    asked: Asked,
    record: IndexRecord | None,
    source: VectorSource,
    version: str | None,
    vectors: int,
    files: Mapping[str, int],
) -> Choice:
    """What the index is to be.

    Args:
        vectors: how many it is to hold; files: those of INDEX, in bytes.
    """
    if record is None:
        kind = asked.kind or kind_for(vectors)
        parameters = choose(kind, vectors, source.width)
        return Choice(
            source, parameters, asked.feature is not None, asked.kind is not None, None, ()
        )
    feature_chosen = asked.feature is not None or record.feature_chosen
    chosen = asked.kind is not None or record.kind_chosen
    kind = asked.kind or (record.kind if chosen else kind_for(vectors, record.kind))
    is_trainable = vectors >= FEWEST_TRAINED or kind != record.kind
    fresh = choose(kind, vectors, source.width) if is_trainable else record.parameters
    reasons = _reasons(record, source, version, fresh)
    if not reasons and not is_whole(record.model, files):
        reasons = ["files of its model are missing"]
    parameters = fresh if reasons else record.parameters
    return Choice(source, parameters, feature_chosen, chosen, record, tuple(reasons))


def _reasons(
    record: IndexRecord, source: VectorSource, version: str | None, fresh: Parameters
) -> list[str]:
    """Why the index that there is cannot go on."""
    dataset = source.output.dataset
    found = []
    if (record.version, record.fingerprint) != (version, dataset.fingerprint):
        found.append(
            f"OUTPUT is of another fingerprint now ({dataset.fingerprint[:12]}, was "
            f"{record.fingerprint[:12]})"
        )
    if record.feature != source.feature:
        found.append(f"feature {source.feature} asked, it holds {record.feature}")
    if record.vector != source.choice:
        found.append(f"vector {source.choice} asked, it holds {record.vector}")
    old = record.parameters
    if fresh.kind != old.kind:
        found.append(f"kind {fresh.kind}, it is {old.kind}")
    elif isinstance(old, IvfPq) and isinstance(fresh, IvfPq):
        more, fewer = max(old.lists, fresh.lists), min(old.lists, fresh.lists)
        if more >= OUTGROWN * fewer:
            found.append(f"{fresh.lists} lists fit its vectors now, it has {old.lists}")
    return found


def is_whole(part: Segment | Model, files: Mapping[str, int]) -> bool:
    """Whether its files are there, by size, and the small record beside them."""
    return part.json_path in files and all(files.get(f.path) == f.bytes for f in part.files)
