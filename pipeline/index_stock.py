"""What lies below INDEX: whether it is one, and what of it no record names."""

from __future__ import annotations

from model.errors import UserError
from pipeline.commits import RUNS
from pipeline.index_record import (
    MODELS,
    RECORD,
    SEGMENTS,
    IndexRecord,
    read_record,
)
from pipeline.storage import TEMPORARY, Storage, explained, join, redact


def check_index(output: str, index: str, storage: Storage) -> None:
    """Says no before anything is made there.

    Raises:
        UserError: INDEX is of another OUTPUT, or something else.
    """
    record = read_record(index, storage)
    if record is not None:
        if record.output != redact(output):
            raise UserError(
                f"{redact(index)}: is an index of {record.output}, not of {redact(output)}; "
                "give another INDEX"
            )
        return
    with explained("list", index):
        for file in storage.iter_files(index):
            if file.partition("/")[0] not in (SEGMENTS, MODELS, RUNS) and not is_temporary(file):
                raise UserError(
                    f"{redact(index)}: holds files (such as {file}) but no {RECORD}; "
                    "give a new or empty INDEX"
                )


def is_temporary(file: str) -> bool:
    return TEMPORARY.search(file) is not None


def find_orphans(index: str, record: IndexRecord, storage: Storage) -> list[str]:
    """Paths below INDEX of what no record names: left by runs that died, or of segments that were
    replaced."""
    own = record.objects
    orphans = [
        path
        for folder in (SEGMENTS, MODELS)
        for name in storage.iter_files(join(index, folder))
        if (path := f"{folder}/{name}") not in own
    ]
    orphans += [name for name in storage.iter_files(index, depth=1) if is_temporary(name)]
    return sorted(orphans)
