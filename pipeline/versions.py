"""Which data below OUTPUT readers are to take.

OUTPUT holds shards of one fingerprint. Another model or other settings get a whole OUTPUT of their
own in `versions/<fingerprint>/`, beside the old one, and when every shard of it is committed
`current.json` comes to name it. Without `current.json` OUTPUT itself is what is read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import StringConstraints

from model.errors import UserError
from pipeline.commits import DATASET, Dataset, Record, Time, check_output, committed_shards
from pipeline.storage import Storage, explained, join, redact

CURRENT = "current.json"
VERSIONS = "versions"
NAME_LENGTH = 12

Name = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]


class Current(Record):
    """The version that readers are to take, a folder below `versions`."""

    version: Name
    fingerprint: str
    switched_at: Time


def current(output: str, storage: Storage) -> str:
    """The folder to read: OUTPUT itself, or the version that it names.

    Raises:
        UserError: `current.json` cannot be read, or is none.
    """
    return version_folder(output, current_version(output, storage))


def current_version(output: str, storage: Storage) -> str | None:
    """Its name; None where OUTPUT itself is what is read."""
    url = join(output, CURRENT)
    with explained("read", url):
        if not storage.exists(url):
            return None
        return Current.parse(storage.read(url), url).version


def version_folder(output: str, version: str | None) -> str:
    """Where a version lies; None: OUTPUT itself is it."""
    return output if version is None else join(output, VERSIONS, version)


def version_for(output: str, wanted: Dataset, storage: Storage) -> str | None:
    """The version that holds, or will hold, shards of this fingerprint; None: OUTPUT itself.

    Raises:
        UserError: OUTPUT holds something else than shards.
    """
    url = join(output, DATASET)
    with explained("read", url):
        if storage.exists(url):
            found = Dataset.parse(storage.read(url), url)
            is_used = committed_shards(output, storage) or storage.exists(join(output, CURRENT))
            if found.fingerprint != wanted.fingerprint and is_used:
                return wanted.fingerprint[:NAME_LENGTH]
    check_output(output, wanted, storage)
    return None


def switch(output: str, version: str | None, wanted: Dataset, storage: Storage) -> bool:
    """Makes a whole version the one that is read: one object put, or removed. Whether it was not.

    Raises:
        OSError: the storage failed.
    """
    if current_version(output, storage) == version:
        return False
    url = join(output, CURRENT)
    if version is None:
        storage.remove(url)
    else:
        record = Current(
            version=version,
            fingerprint=wanted.fingerprint,
            switched_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        storage.publish_bytes(url, record.dump())
    return True


def refuse_other_version(output: str, storage: Storage) -> None:
    """`extract` works on the OUTPUT that it is given; whose readers look elsewhere gets no more.

    Raises:
        UserError: another version is current.
    """
    version = current_version(output, storage)
    if version is not None:
        raise UserError(
            f"{redact(output)}: {CURRENT} names version {version} as what is read; use `tessera "
            f"reindex`, or give {redact(version_folder(output, version))} as OUTPUT"
        )
