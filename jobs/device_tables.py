"""The tables of devices and of prices: read, checked, and replaceable by files of the user's."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jobs.yaml_file import read_yaml
from model.errors import UserError

T = TypeVar("T", bound=BaseModel)
NO_FLOAT32 = (
    "dtype float32: the table of devices has no peak for it; plan with bfloat16, or for cpu"
)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Entry):
    """Part of a device's peak that the network reaches: assumed, so a range."""

    low: float = Field(gt=0, le=1)
    middle: float = Field(gt=0, le=1)
    high: float = Field(gt=0, le=1)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Share:
        if not self.low <= self.middle <= self.high:
            raise ValueError("expected low <= middle <= high")
        return self


class StartSeconds(_Entry):
    value: float = Field(ge=0)
    source: str = Field(min_length=1)


class Link(_Entry):
    """Between the devices of a node: bytes each way as a ring reaches them."""

    name: str
    gb_per_second: float = Field(gt=0)
    step_microseconds: float = Field(ge=0)


class Measured(_Entry):
    """Tiles a second of one device in a group of `ranks`, with a network of so much work a tile."""

    tiles_per_second: float = Field(gt=0)
    tflop_per_tile: float = Field(gt=0)
    ranks: int = Field(default=1, ge=1)
    source: str = Field(min_length=1)
    basis: Literal["benchmark", "run"] = "benchmark"


class Device(_Entry):
    """`match`: parts of the name that torch gives the device; all of them must be in it."""

    name: str = Field(min_length=1)
    match: tuple[str, ...] = Field(min_length=1)
    memory_gb: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    fp8_tflops: float | None = Field(gt=0)
    link: Link
    per_node: int = Field(ge=1)
    source: str = Field(min_length=1)
    measured: Measured | None = None


class DeviceTable(_Entry):
    share_of_peak: Share
    start_seconds: StartSeconds
    devices: tuple[Device, ...] = Field(min_length=1)

    def find(self, name: str) -> Device:
        """Raises UserError for a name that is not in the table."""
        for device in self.devices:
            if device.name.lower() == name.lower():
                return device
        known = ", ".join(device.name for device in self.devices)
        raise UserError(f"fleet: no device {name!r} in the table; it has {known}, and there is cpu")

    def called(self, full_name: str) -> Device | None:
        """The device that torch calls so, by the longest match: an L40S is no L4."""
        found = [
            device
            for device in self.devices
            if all(part.lower() in full_name.lower() for part in device.match)
        ]
        return max(found, key=lambda device: sum(map(len, device.match)), default=None)


class DevicePrice(_Entry):
    """`cores`: CPUs that Ray is given for each device of the instance."""

    per_hour: float = Field(ge=0)
    instance: str | None = None
    cores: float | None = Field(None, gt=0)


class StoragePrice(_Entry):
    source: str
    per_1000_gets: float = Field(ge=0)
    per_1000_puts: float = Field(ge=0)
    per_gb_month: float = Field(ge=0)


class PriceTable(_Entry):
    currency: str
    date: str
    source: str
    devices: dict[str, DevicePrice]
    storage: StoragePrice


def load_devices(file: Path | None) -> DeviceTable:
    """Raises UserError, one line, for a file that is no table of devices."""
    return _load(DeviceTable, file, "devices.yaml")


def load_prices(file: Path | None) -> PriceTable:
    """Raises UserError, one line, for a file that is no table of prices."""
    return _load(PriceTable, file, "prices.yaml")


def _load(kind: type[T], file: Path | None, shipped: str) -> T:
    if file is not None:
        return _parse(kind, file, str(file))
    with as_file(files("jobs.tables").joinpath(shipped)) as path:
        return _parse(kind, path, shipped)


def _parse(kind: type[T], path: Path, shown: str) -> T:
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{shown}: {where}: {first['msg']}") from error
