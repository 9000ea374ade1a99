"""What users type: every option once, for the command line and for `--config` alike."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from jobs.secrets import warn_of_command_line, warn_of_readable_file
from jobs.yaml_file import read_yaml
from model.errors import UserError
from model.feature_shapes import TOKEN_FEATURES
from pipeline.commits import Format
from pipeline.faults import QUOTED_URL, redact
from pipeline.records import TILE_FIELDS
from pipeline.tiling import Tiling

M = TypeVar("M", bound=BaseModel)


def _split(value: object) -> object:
    """Lists are comma-separated on the command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _none(value: object) -> object:
    return None if value == "none" else value


def _json_object(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object: {error}") from error


def _replicas(value: object) -> object:
    """`4`, `2:8` or `all`."""
    if value == "all":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, str):
        low, colon, high = value.partition(":")
        if low.isdigit() and (not colon or high.isdigit()):
            return (int(low), int(high if colon else low))
        raise ValueError("expected a number, min:max, or all")
    return value


def _auto(value: object) -> object:
    return None if value == "auto" else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Feature = Literal["cls", "mean", "tokens", "tokens-2x2"]


class TilingOptions(BaseModel):
    """How a picture becomes tiles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tiling: Literal["center-crop", "dynamic"] = Field(
        "center-crop",
        description="center-crop: the model card's CLIPImageProcessor; "
        "dynamic: InternVL 1.5's 1 to max_tiles tiles.",
    )
    max_tiles: int = Field(12, ge=1, le=64, description="Most tiles of a picture (dynamic).")
    thumbnail: bool = Field(
        True, description="Add the whole picture as a tile when there is more than one (dynamic)."
    )
    max_upscale: Annotated[float | None, BeforeValidator(_none)] = Field(
        None,
        gt=0,
        description="Rule out grids that enlarge a picture more than this many times linearly; "
        "none: the reference rule.",
    )
    resize: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: Pillow bicubic, the reference; fast: torch, at most 2 of 255 off.",
    )


class ExtractOptions(TilingOptions):
    """Options of `extract`; names and defaults are promised to users."""

    model: str = Field(description="Folder or hub id of an InternViT checkpoint.")
    revision: str | None = Field(None, description="Hub commit; recorded resolved.")
    features: Annotated[tuple[Feature, ...], BeforeValidator(_split)] = Field(
        ("cls",),
        min_length=1,
        description="Any of cls (class token), mean (mean of the patch tokens), tokens (all of "
        "them), tokens-2x2 (InternVL's pixel shuffle of the patch tokens).",
    )
    layer: int = Field(-1, description="Block whose output is taken; -1 is the last.")
    format: Format = Field(
        "parquet",
        description="Of the embedding shards: parquet; webdataset, tars of arrays, the one for "
        "tokens; npy, arrays and tables as autofaiss and clip-retrieval take them.",
    )
    embedding_dtype: Literal["float16", "float32"] = Field(
        "float16", description="Of the written values."
    )
    dtype: Literal["bfloat16", "float16", "float32", "fp8"] = Field(
        "bfloat16",
        description="Of the computation; fp8: float8 linear layers, on GPUs that have them.",
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4"] = (
        Field("auto", description="Attention kernel; auto: the fastest that is installed.")
    )
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that share one model, up to its number of heads."
    )
    replicas: Annotated[tuple[int, int] | None, BeforeValidator(_replicas)] = Field(
        None,
        description="Number of models, or min:max for a pool that grows; all: as many as the "
        "cluster's GPUs hold (on CPU: 1).",
    )
    batch_tiles: Annotated[int | None, BeforeValidator(_auto)] = Field(
        None, ge=1, description="Tiles in one forward pass, or auto."
    )
    image_key: Names = Field(
        ("jpg", "jpeg", "png", "webp", "bmp", "tif", "avif"),
        min_length=1,
        description="Extensions of the image member, in order of preference.",
    )
    carry: Names = Field((), description="Members to carry along, such as txt,json:url.")
    accept_truncated: bool = Field(
        False, description="Commit the whole samples of a tar that is cut short."
    )
    target_part_bytes: ByteSize = Field(
        ByteSize(512 << 20), gt=0, description="Size of an output above which it is cut."
    )
    deadline_seconds: float = Field(
        60.0,
        gt=0,
        description="Seconds for one storage request, and of processor time for one picture.",
    )
    max_reject_rate: float = Field(
        0.25, ge=0, le=1, description="Share of rejects above which a shard is not committed."
    )
    storage_options: Annotated[dict[str, Any], BeforeValidator(_json_object)] = Field(
        default_factory=dict,
        repr=False,
        description="Passed to fsspec, as a JSON object.",
    )

    @field_validator("image_key", "carry")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Extensions as samples have them; a JSON member's field keeps its case."""
        parts = [name.partition(":") for name in value]
        return tuple(ext.lower().removeprefix(".") + colon + rest for ext, colon, rest in parts)

    @field_validator("features", "image_key", "carry")
    @classmethod
    def _no_doubles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"expected each name once, got {','.join(value)}")
        return value

    @field_validator("carry")
    @classmethod
    def _no_collision(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        taken = {field.name for field in TILE_FIELDS} | {*get_args(Feature)}
        for name in value:
            if name in taken:
                raise ValueError(f"expected members other than the output's column {name!r}")
        return value

    @model_validator(mode="after")
    def _tokens_in_tars(self) -> ExtractOptions:
        tokens = [name for name in self.features if name in TOKEN_FEATURES]
        if tokens and self.format != "webdataset":
            raise ValueError(
                f"features: {', '.join(tokens)} need format webdataset, got {self.format}"
            )
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ExtractOptions:
        if self.replicas is not None and not 1 <= self.replicas[0] <= self.replicas[1]:
            raise ValueError("replicas: expected 1 <= min <= max")
        return self


class ExtractConfig(ExtractOptions):
    """A whole job: `input` and `output` may stand in a config file too."""

    input: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        min_length=1, description="Shards, folders, globs, brace ranges or @lists."
    )
    output: str = Field(min_length=1, description="Folder or URL of the output.")


def load_config(file: Path | None, given: Mapping[str, Any]) -> ExtractConfig:
    """Merges a config file with what the command line gives; the command line wins.

    Raises:
        UserError: an unknown key or a bad value; it names the key, where it stands, and what was
            expected.
    """
    warn_of_command_line(given)
    from_file: dict[str, Any] = {}
    if file is not None:
        from_file = read_yaml(file)
        warn_of_readable_file(file, from_file)
    return validate(ExtractConfig, given, from_file, file)


def validate(
    model: type[M],
    given: Mapping[str, Any],
    from_file: Mapping[str, Any] = MappingProxyType({}),
    file: Path | None = None,
) -> M:
    """Checks what was given on the command line and in a file.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return model.model_validate({**from_file, **given})
    except ValidationError as error:
        raise UserError(explain(error, file, given)) from error


def tiling_of(options: TilingOptions, tile_size: int, resize_to: int) -> Tiling:
    """The options with the sizes (pixels) that come from a checkpoint's preprocessor."""
    return Tiling(
        mode=options.tiling,
        tile_size=tile_size,
        resize_to=resize_to,
        max_tiles=options.max_tiles,
        thumbnail=options.thumbnail,
        max_upscale=options.max_upscale,
        resize=options.resize,
    )


def explain(error: ValidationError, file: Path | None, given: Mapping[str, Any]) -> str:
    """One line for each thing wrong: where it stands, its key, and what was expected."""
    lines = []
    for detail in error.errors():
        key = str(detail["loc"][0]) if detail["loc"] else ""
        place = "command line" if key in given or file is None else str(file)
        message = detail["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, ExtractConfig.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"unknown key{hint}"
        elif detail["type"] == "missing":
            message = f"missing; give --{key.replace('_', '-')} or set it in a --config file"
            if key in ("input", "output"):
                message = f"missing; give {key.upper()} or set it in a --config file"
        elif key and key != "storage_options":
            message = f"{message.removesuffix('.')}, got {_shown(detail['input'])}"
        lines.append(f"{place}: {key}: {message}" if key else f"{place}: {message}")
    return "; ".join(dict.fromkeys(lines))


def _shown(value: object) -> str:
    """A value as an error may repeat it: short, and without the secret parts of a URL."""
    if isinstance(value, str):
        value = redact(value)
    text = reprlib.repr(value)
    return QUOTED_URL.sub(lambda quoted: redact(quoted[0]), text)


def parse_options(text: str) -> dict[str, Any]:
    """`storage_options` of the small commands.

    Raises:
        UserError: not a JSON object.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"storage_options: expected a JSON object: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError("storage_options: expected a JSON object")
    warn_of_command_line({"storage_options": parsed})
    return parsed
