"""The same tar under another name: INPUT given otherwise than before would double its rows.

A shard's name is its path below INPUT's folder, so a folder further up, a list whose common folder
is another, or a single shard give the same tar another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from model.errors import UserError
from pipeline.commits import read_commits
from pipeline.records import Shard
from pipeline.storage import Storage, redact

LOOKED_AT = 16  # commits; who gives INPUT otherwise renames all of its shards


def respelled(shard: Shard, committed: str) -> UserError:
    """What to say of a shard of INPUT whose tar is committed under another name."""
    url = redact(shard.url)
    folder = url.removesuffix(f"{committed}.tar")
    return UserError(
        f"{url}: shard {shard.name} of INPUT is committed as shard {committed}, and its rows would "
        f"be there twice; give INPUT so that it has that name (the folder {folder}, or a pattern "
        "or list with that folder before its first wildcard), or give another OUTPUT"
    )


def refuse_respelled(
    output: str, pending: Sequence[Shard], others: set[str], storage: Storage
) -> None:
    """Looks at a few commits that may be of a pending shard's tar, going by their names.

    Args:
        others: what is committed, and is not in INPUT.

    Raises:
        UserError: one of them is.
    """
    found = dict(islice(_of_one_path(pending, others), LOOKED_AT))
    for commit in read_commits(output, list(found), storage):
        shard = found[commit.shard]
        if commit.source.url == redact(shard.url):
            raise respelled(shard, commit.shard)


def _of_one_path(pending: Sequence[Shard], others: set[str]) -> Iterator[tuple[str, Shard]]:
    """Pairs of which one name ends with the other: both are ends of their tar's path."""
    by_name = {shard.name: shard for shard in pending}
    for shard in pending:
        yield from ((end, shard) for end in _ends(shard.name) if end in others)
    for other in others:
        yield from ((other, by_name[end]) for end in _ends(other) if end in by_name)


def _ends(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))]
