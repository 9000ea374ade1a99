"""What the members of a webdataset part are called.

A key comes from a stranger's archive. It stays a name only where no extractor can be harmed by it
and readers keep it apart from the others; else its sample is called `_renamed/<sample_index>`, and
its JSON has the key as it was.
"""

from __future__ import annotations

import re

RENAMED = "_renamed"
MOST_COMPONENT_BYTES = 200  # file systems hold 255, and the tile's and feature's names follow
DRIVE = re.compile(r"[A-Za-z]:")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")


def is_plain(key: str) -> bool:
    """Whether a key can be the name of members: relative, and nothing but folders and a name.

    The last component has no dot, as WebDataset's keys do not; no folder has the name that a
    member of another sample may have.
    """
    components = key.split("/")
    return (
        all(0 < len(part.encode()) <= MOST_COMPONENT_BYTES for part in components)
        and not any(part in (".", "..") for part in components)
        and components[0] != RENAMED
        and "." not in components[-1]
        and not any(part.lower().endswith((".json", ".npy")) for part in components)
        and not DRIVE.match(key)
        and not CONTROL.search(key)
    )


class MemberKeys:
    """Names for the samples of one archive, each its own: where a key comes again it is renamed,
    for some readers refuse it and others mix the samples."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def name(self, key: str, sample_index: int) -> str:
        if key in self._seen or not is_plain(key):
            return f"{RENAMED}/{sample_index:08d}"
        self._seen.add(key)
        return key


def extension(tile: int, feature: str, num_features: int) -> str:
    """`0.npy`; where there are several features `0.cls.npy`."""
    return f"{tile}.npy" if num_features == 1 else f"{tile}.{feature}.npy"
