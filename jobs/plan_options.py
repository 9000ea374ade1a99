"""What users type for `plan`: the options of the job that is planned, and a few of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from jobs.config import ExtractOptions, Names, validate
from jobs.secrets import warn_of_command_line, warn_of_readable_file
from jobs.yaml_file import read_yaml
from model.errors import UserError

FLEET = re.compile(r"(?:(\d{1,6})x)?([A-Za-z][\w.-]*)")
CPU = "cpu"


class PlanOptions(ExtractOptions):
    """Options of `plan`. Those of `extract` mean the same; what decides no figure is taken and
    left alone, so that one --config file serves both."""

    model: str | None = Field(  # type: ignore[assignment]
        None,
        description="Folder or hub id of an InternViT checkpoint; none: the published 6B's shape.",
    )
    sample_shards: int = Field(
        20, ge=1, description="Shards that are read, headers of pictures only."
    )
    sample_pictures: int = Field(
        200, ge=1, description="Pictures of those that are decoded and tiled, to measure the speed."
    )
    seed: int = Field(0, description="Of the choice of shards and pictures.")
    devices: Path | None = Field(None, description="YAML table of devices, instead of the own one.")
    prices: Path | None = Field(None, description="YAML table of prices, instead of the own one.")
    fleet: Names = Field(
        (),
        description="Such as 8xH100 or cpu (a local run here); several, comma-separated, are "
        "planned side by side, and the first is the one chosen. None: cpu where this machine holds "
        "the model and has no GPU, else 8xH100.",
    )
    benchmark: Path | None = Field(
        None, description="Result of `python -m benchmarks.encoder` (JSON): its device's rate."
    )


class PlanConfig(PlanOptions):
    """A whole plan. `output` may stand in a --config file; it tells nothing here."""

    input: Names = Field((), description="Shards, folders, globs, brace ranges or @lists.")
    output: str | None = Field(None, description="Folder or URL of the output.")
    from_output: str | None = Field(None, description="OUTPUT whose commits give the rates.")


@dataclass(frozen=True)
class Fleet:
    """So many devices of a kind; `cpu` is a run on this machine."""

    count: int
    device: str

    @property
    def is_cpu(self) -> bool:
        return self.device.lower() == CPU

    def __str__(self) -> str:
        return CPU if self.is_cpu else f"{self.count}x{self.device}"


def parse_fleet(text: str) -> Fleet:
    """`8xH100`, `L4` (one) or `cpu`. Raises UserError for anything else."""
    found = FLEET.fullmatch(text)
    if found is None or found[1] == "0":
        raise UserError(f"fleet: expected such as 8xH100 or cpu, got {text!r}")
    count, device = int(found[1] or 1), found[2]
    if device.lower() == CPU and count != 1:
        raise UserError("fleet: cpu is this machine alone; for more of them count their cores")
    return Fleet(count, device)


def load_plan_config(file: Path | None, given: Mapping[str, Any]) -> PlanConfig:
    """Merges a config file with what the command line gives; the command line wins.

    Raises:
        UserError: an unknown key or a bad value, or neither INPUT nor an OUTPUT to go by.
    """
    warn_of_command_line(given)
    from_file: dict[str, Any] = {}
    if file is not None:
        from_file = read_yaml(file)
        warn_of_readable_file(file, from_file)
    config = validate(PlanConfig, given, from_file, file)
    if not config.input and config.from_output is None:
        raise UserError("plan: missing INPUT; give shards, or an OUTPUT with --from")
    return config
