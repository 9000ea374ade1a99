"""`tessera verify`: proves that OUTPUT is whole, from its files alone or against its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from jobs.recorded import matching_checkpoint
from model.errors import UserError
from pipeline.audit import ShardAudit, audit_shard
from pipeline.commits import RUNS, Commit, Dataset, Progress, commit_url, read_dataset
from pipeline.generations import PUBLISHED, owners
from pipeline.layout import Layout, layout_of
from pipeline.shards import list_shards
from pipeline.storage import TEMPORARY, Storage, explained, join
from pipeline.versions import VERSIONS, current, current_version

NUM_SHARDS_AT_ONCE = 4  # each holds a row group in memory, and a part on the local disk
NUM_READS_AT_ONCE = 16


@dataclass(frozen=True)
class Verification:
    """The counts are of what was found. `recomputed` says what was computed again, and how well
    it agreed; OUTPUT is whole if there are no problems. `version` is the one that was looked at,
    None where it was OUTPUT itself."""

    shards: int
    samples: int
    embedded: int
    rejects: int
    tiles: int
    problems: tuple[str, ...]
    recomputed: str | None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems), "whole": not self.problems}


def verify(
    output: str,
    inputs: Sequence[str] = (),
    recompute: int = 0,
    model: str | None = None,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> Verification:
    """Checks every committed shard, as `pipeline.audit` says, and what lies beside them.

    Args:
        inputs: INPUT as for `extract`; reads the source again and compares each sample.
        recompute: pictures to compute again with transformers' own model; `jobs.recompute` has
            the tolerances.
        model: the checkpoint, where it is not what dataset.json names.
        seed: of the choice of those pictures.

    Raises:
        UserError: OUTPUT is none of ours, or a storage or checkpoint cannot be used.
    """
    storage = Storage(storage_options or {})
    version = current_version(output, storage)
    output = current(output, storage)
    dataset = read_dataset(output, storage)
    checkpoint = matching_checkpoint(dataset, model) if recompute else None
    sources = {shard.name: shard for shard in list_shards(inputs, storage)} if inputs else {}
    with explained("read", output):
        sizes = {
            name: size
            for name, size in storage.list_files(output).items()
            if not name.startswith(f"{VERSIONS}/")
        }
        names = committed_names(sizes)
        with ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
            read = list(pool.map(lambda name: read_commit(output, name, storage), names))
        commits = [commit for commit in read if isinstance(commit, Commit)]

        def audit(commit: Commit) -> ShardAudit:
            source = sources.get(commit.shard)
            return audit_shard(commit, dataset, output, sizes, storage, source)

        problems = dataset_problems(dataset, len(names))
        problems += [reason for reason in read if isinstance(reason, str)]
        with ThreadPoolExecutor(NUM_SHARDS_AT_ONCE) as pool:
            audits = list(shown(pool.map(audit, commits), len(commits)))
        problems += [problem for audited in audits for problem in audited.problems]
        problems += leftover_problems(output, sizes, commits, layout_of(dataset), storage)
    if inputs:
        problems += input_problems(sources, names)
    recomputed = None
    if checkpoint is not None:
        from jobs.recompute import recompute_pictures

        sound = [c for c, audited in zip(commits, audits, strict=True) if not audited.problems]
        with explained("read", output):
            agreement = recompute_pictures(
                sound, dataset, checkpoint, output, sources, storage, recompute, seed
            )
        problems += agreement.problems
        recomputed = str(agreement)
    return Verification(
        shards=len(names),
        samples=sum(audited.samples for audited in audits),
        embedded=sum(audited.embedded for audited in audits),
        rejects=sum(audited.rejects for audited in audits),
        tiles=sum(audited.tiles for audited in audits),
        problems=tuple(problems),
        recomputed=recomputed,
        version=version,
    )


def committed_names(files: Iterable[str]) -> list[str]:
    return sorted(
        name.removeprefix("commits/").removesuffix(".json")
        for name in files
        if name.startswith("commits/") and name.endswith(".json")
    )


def read_commit(output: str, name: str, storage: Storage) -> Commit | str:
    """The commit of a shard, or why it is none."""
    data = storage.read(commit_url(output, name))
    where = f"commits/{name}.json"
    try:
        commit = Commit.parse(data, where)
    except UserError as error:
        return str(error)
    return commit if commit.shard == name else f"{where}: it is of another shard, {commit.shard}"


def shown(audits: Iterable[ShardAudit], total: int) -> Iterable[ShardAudit]:
    """Tells on a terminal how far the audit is."""
    console = Console(stderr=True)
    return track(
        audits, "verify", total, console=console, disable=not console.is_terminal, transient=True
    )


def dataset_problems(dataset: Dataset, num_commits: int) -> list[str]:
    """dataset.json's fingerprint is that of its settings, and something was made with them."""
    problems = []
    described = Dataset.describe(
        dataset.model,
        dataset.revision,
        dataset.weights_digest,
        dataset.settings,
        dataset.features,
        dataset.tessera_version,
    )
    if described.fingerprint != dataset.fingerprint:
        problems.append("dataset.json: its fingerprint is not that of its settings")
    if not num_commits:
        problems.append("commits: no shard is committed")
    return problems


def input_problems(sources: Iterable[str], committed: Iterable[str]) -> list[str]:
    """The shards of INPUT and those of OUTPUT are the same."""
    there, here = set(sources), set(committed)
    return [
        *(f"shard {name}: in INPUT, not committed" for name in sorted(there - here)),
        *(f"shard {name}: committed, not in INPUT" for name in sorted(here - there)),
    ]


def leftover_problems(
    output: str,
    files: Iterable[str],
    commits: Sequence[Commit],
    layout: Layout,
    storage: Storage,
) -> list[str]:
    """Files that belong to no committed shard; while a run is not finished, that it is not."""
    files = sorted(files)
    records = [f for f in files if f.startswith(f"{RUNS}/") and f.endswith("/progress.json")]
    problems = []
    if records:
        progress = Progress.parse(storage.read(join(output, records[-1])), records[-1])
        problems.append(
            f"{records[-1]}: the run is not finished, {progress.committed} of {progress.shards} "
            "shards committed; run `extract` again"
        )
        problems += [f"shard {f.shard}: failed, {f.reason}" for f in progress.failures]
    known = {
        published.path
        for commit in commits
        for part in (*commit.parts, *filter(None, [commit.rejects_part]))
        for published in part.objects
    }
    unread = set(committed_names(files)) - {commit.shard for commit in commits}
    for file in files:
        folder = file.partition("/")[0]
        if folder == RUNS or TEMPORARY.search(file):
            if not records:
                problems.append(f"{file}: left by a run that died; run `extract` again")
        elif (
            folder in PUBLISHED
            and file not in known
            and unread.isdisjoint(owner.shard for owner in owners(file, layout.format))
        ):
            problems.append(f"{file}: part without commit")
    return problems
