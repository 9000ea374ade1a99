"""Computes some pictures again with transformers' own model and compares what OUTPUT stores.

The pictures come from the source, are tiled by this project's tiling (it has its own tests against
InternVL's) and go through a network, a naming of weights and a preparation of pixels that share
nothing with the encoder's. The reference computes in float32. What is allowed, for each tile:

| dtype    | embedding_dtype | |
|---|---|---|
| float32  | float32 | relative error ≤ 1e-4: another order of sums |
| float32  | float16 | relative error ≤ 2e-3: float16 rounds each value by up to 5e-4 of it |
| bfloat16, float16 | any | cosine ≥ 0.999: the whole network computes with 8 or 11 bits |
| fp8      | any     | cosine ≥ 0.99: its linear layers compute with 4 bits |

The relative error is |stored - reference| / |reference|, in the 2-norm.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from jobs.config import TilingOptions, tiling_of
from model.checkpoint import Checkpoint, open_checkpoint, weights_digest
from model.errors import UserError
from model.reference import load_reference, reference_embeddings
from pipeline.audit_parts import PartError, fetch_part, row_groups, run_starts
from pipeline.commits import Commit, Dataset
from pipeline.embedding import feature_values
from pipeline.pictures import PictureError, picture_size
from pipeline.records import Shard, embedding_schema
from pipeline.samples import ReadSettings, read_groups
from pipeline.storage import Storage, redact
from pipeline.tiling import Tiling, cut_tiles, plan_tiles

RELATIVE_ERROR = {"float32": 1e-4, "float16": 2e-3}  # by embedding_dtype
COSINE = {"bfloat16": 0.999, "float16": 0.999, "fp8": 0.99}  # by dtype

Features = Mapping[str, npt.NDArray[np.floating[Any]]]  # each [n, D]


@dataclass(frozen=True)
class StoredPicture:
    """The rows of one picture, a tile each, as they lie in a part of OUTPUT."""

    path: str
    sample_index: int
    rows: pa.Table

    def __str__(self) -> str:
        return f"{self.path}: sample {self.sample_index} ({self.rows['key'][0].as_py()})"


@dataclass
class Agreement:
    """How near the stored values came to the reference, over all tiles and features."""

    pictures: int = 0
    tiles: int = 0
    relative_error: float = 0.0
    cosine: float = 1.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.pictures} pictures, {self.tiles} tiles: relative error up to "
            f"{self.relative_error:.1e}, cosine from {self.cosine:.6f}; "
            f"{len(self.problems)} beyond what is allowed"
        )


def matching_checkpoint(dataset: Dataset, model: str | None) -> Checkpoint:
    """The checkpoint that made OUTPUT, from where dataset.json says or from `model`.

    Raises:
        UserError: it cannot be opened, or its weights are others.
    """
    source, revision = (dataset.model, dataset.revision) if model is None else (model, None)
    checkpoint = open_checkpoint(source, revision)
    if (found := weights_digest(checkpoint)) != dataset.weights_digest:
        raise UserError(
            f"{source}: its weights ({found[:12]}) are not those that made the output "
            f"({dataset.weights_digest[:12]}); give the checkpoint that did with --model"
        )
    return checkpoint


def recompute_pictures(
    commits: Sequence[Commit],
    dataset: Dataset,
    checkpoint: Checkpoint,
    output: str,
    sources: Mapping[str, Shard],
    storage: Storage,
    number: int,
    seed: int,
) -> Agreement:
    """Compares `number` pictures, drawn over all of `commits`, or all where there are fewer.

    `sources` says where a shard's source is, if not where its commit has it. Raises OSError where
    OUTPUT cannot be read; a source that cannot is a problem of the agreement.
    """
    agreement = Agreement()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reference(checkpoint, "float32", device)
    for commit, ranks in _choose(commits, number, seed):
        source = sources.get(commit.shard, Shard(commit.source.url, commit.shard))
        stored = _stored_pictures(commit, ranks, dataset, output, storage)
        data = _source_pictures(source, {p.sample_index for p in stored}, dataset, storage)
        for picture in stored:
            try:
                tiles = _cut_again(picture, data.get(picture.sample_index), dataset, source)
            except (PictureError, PartError) as error:
                agreement.problems.append(f"{picture}: cannot be computed again: {error}")
                continue
            layer = dataset.settings["layer"]
            names = tuple(dataset.features)
            reference = reference_embeddings(model, checkpoint, tiles, names, layer)
            _compare(picture, reference, dataset, agreement)
    return agreement


def _choose(commits: Sequence[Commit], number: int, seed: int) -> list[tuple[Commit, set[int]]]:
    """Which pictures, as ranks among the embedded ones of their shard."""
    embedded = [commit.samples - commit.rejects for commit in commits]
    total = sum(embedded)
    drawn = np.random.default_rng(seed).choice(total, min(number, total), replace=False)
    ends = np.cumsum(embedded)
    chosen: dict[int, set[int]] = {}
    for at in sorted(drawn.tolist()):
        shard = int(np.searchsorted(ends, at, side="right"))
        chosen.setdefault(shard, set()).add(at - int(ends[shard]) + embedded[shard])
    return [(commits[shard], ranks) for shard, ranks in chosen.items()]


def _stored_pictures(
    commit: Commit, ranks: Set[int], dataset: Dataset, output: str, storage: Storage
) -> list[StoredPicture]:
    schema = embedding_schema(
        dataset.features, dataset.settings["embedding_dtype"], tuple(dataset.settings["carry"])
    )
    pieces: dict[int, tuple[str, list[pa.Table]]] = {}  # by sample_index
    rank, last = -1, -1
    for part in commit.parts:
        with fetch_part(part, output, part.bytes, storage) as local:
            for table in row_groups(local, schema, part.rows):
                index = table["sample_index"].to_numpy()
                ends = [*run_starts(index).tolist(), len(index)]
                for start, end in itertools.pairwise(ends):
                    rank += int(index[start]) != last  # a picture may go on in the next row group
                    last = int(index[start])
                    if rank in ranks:
                        rows = table.slice(start, end - start)
                        pieces.setdefault(last, (part.path, []))[1].append(rows)
    return [
        StoredPicture(path, sample, pa.concat_tables(tables))
        for sample, (path, tables) in pieces.items()
    ]


def _source_pictures(
    source: Shard, wanted: Set[int], dataset: Dataset, storage: Storage
) -> dict[int, bytes]:
    """Encoded pictures by sample_index, as far as the source still has them."""
    found: dict[int, bytes] = {}
    settings = ReadSettings(storage, tuple(dataset.settings["image_key"]), accept_truncated=True)
    for group in read_groups(source, settings):
        for row in group.samples.to_pylist():
            if row["sample_index"] in wanted:
                found[row["sample_index"]] = row["data"]
        if len(found) == len(wanted):
            break
    return found


def _cut_again(
    picture: StoredPicture, data: bytes | None, dataset: Dataset, source: Shard
) -> npt.NDArray[np.uint8]:
    """The picture's tiles uint8 [n, S, S, 3] from its encoded bytes.

    Raises:
        PictureError: it cannot be decoded.
        PartError: the source has it no longer, or it is cut into other tiles than were stored.
    """
    if data is None:
        raise PartError(f"not found in the source {redact(source.url)}")
    if hashlib.sha256(data).digest() != picture.rows["image_sha256"][0].as_py():
        raise PartError(f"the source {redact(source.url)} has another picture there")
    tiling = recorded_tiling(dataset)
    plan = plan_tiles(*picture_size(data), tiling)
    boxes = np.asarray(plan.boxes, np.float32)  # [n, 4]
    if not np.array_equal(boxes, feature_values(picture.rows["tile_box"], 4)):
        raise PartError("the stored tile_box are not those of its tiling")
    side = tiling.tile_size
    tiles = np.empty((plan.tile_count, side, side, 3), dtype=np.uint8)
    cut_tiles(data, tiling, plan, tiles)
    return tiles


def recorded_tiling(dataset: Dataset) -> Tiling:
    """The tiling that dataset.json records; it has no sizes that do not matter."""
    settings = dataset.settings
    recorded = {name: settings[name] for name in TilingOptions.model_fields if name in settings}
    size = settings["tile_size"]
    return tiling_of(TilingOptions(**recorded), size, settings.get("resize_to", size))


def _compare(
    picture: StoredPicture, reference: Features, dataset: Dataset, agreement: Agreement
) -> None:
    agreement.pictures += 1
    agreement.tiles += picture.rows.num_rows
    lowest = COSINE.get(dataset.settings["dtype"])
    limit = RELATIVE_ERROR[dataset.settings["embedding_dtype"]]
    for name, width in dataset.features.items():
        stored = feature_values(picture.rows[name], width).astype(np.float64)
        wanted = reference[name].astype(np.float64)
        norms = np.linalg.norm(wanted, axis=1)
        error = np.linalg.norm(stored - wanted, axis=1) / norms  # [n]
        with np.errstate(invalid="ignore"):
            cosine = (stored * wanted).sum(axis=1) / (np.linalg.norm(stored, axis=1) * norms)
        agreement.relative_error = max(agreement.relative_error, float(error.max()))
        agreement.cosine = min(agreement.cosine, float(cosine.min()))
        # Written so that a NaN, as a stored vector of zeros gives, is too far away too.
        near = error <= limit if lowest is None else cosine >= lowest
        if not near.all():
            tile = int(np.argmin(near))
            allowed = f"relative error ≤ {limit:g}" if lowest is None else f"cosine ≥ {lowest:g}"
            agreement.problems.append(
                f"{picture}: {name} of tile {tile} is not what transformers' model gives: "
                f"relative error {error[tile]:.1e}, cosine {cosine[tile]:.6f}, allowed {allowed}"
            )
