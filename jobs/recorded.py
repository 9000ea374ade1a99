"""What made an OUTPUT, had again from what its dataset.json records."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from jobs.config import TilingOptions, tiling_of
from model.checkpoint import Checkpoint, open_checkpoint, weights_digest
from model.errors import UserError
from pipeline.commits import DATASET, Dataset, refused
from pipeline.storage import join
from pipeline.tiling import Tiling


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


class RecordedSettings(TilingOptions):
    """Of an OUTPUT's settings, those that its vectors are computed again with."""

    model_config = ConfigDict(extra="ignore")

    tile_size: int = Field(gt=0)
    resize_to: int | None = Field(None, gt=0)
    dtype: Literal["bfloat16", "float16", "float32", "fp8"]
    layer: int

    def as_tiling(self) -> Tiling:
        """`dataset.json` has no size that does not matter: `dynamic` has no `resize_to`."""
        return tiling_of(self, self.tile_size, self.resize_to or self.tile_size)


def recorded_settings(dataset: Dataset, output: str) -> RecordedSettings:
    """What `dataset.json` of OUTPUT, or of a version of it, records.

    Raises:
        UserError: a setting is missing, or none that can be.
    """
    try:
        return RecordedSettings.model_validate(dataset.settings)
    except ValidationError as error:
        raise refused(error, join(output, DATASET), "settings") from error
