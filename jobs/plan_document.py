"""What `plan` finds out, as one JSON document. Seconds, bytes and tiles are plain numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
# measured: here, now; benchmark: by a result file; run: in the commits of an OUTPUT; scaled: one of
# those times the work of another network; assumed: from a table.
Basis = Literal["measured", "benchmark", "run", "scaled", "assumed"]


class PlanRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(PlanRecord):
    """A total over INPUT and its 95 % interval; null where one shard tells nothing of it."""

    value: float
    low: float | None
    high: float | None


class SampleNote(PlanRecord):
    """What was looked at. `missing`: shards of INPUT that the listing does not have; `broken`: of
    those read, which would not be committed, and why."""

    shards: int
    of_shards: int
    bytes: int
    of_bytes: int
    pictures: int
    decoded_pictures: int
    seed: int
    missing: int
    broken: dict[str, str]


class Rate(PlanRecord):
    """A figure that the plan rests on, and where it comes from."""

    name: str
    value: float
    unit: str
    basis: Basis
    source: str


class Limit(PlanRecord):
    """How many tiles a second one part of the job can do at most; the least of them counts."""

    name: Literal["encoder", "tiling", "driver", "storage"]
    tiles_per_second: float
    detail: str


class Option(PlanRecord):
    """One line of a comparison. Numbers are null where it cannot be had; `note` says why."""

    label: str
    chosen: bool = False
    tiles: float | None = None
    device_hours: float | None = None
    price: float | None = None
    wall_seconds: float | None = None
    bottleneck: str | None = None
    note: str = ""


class Comparison(PlanRecord):
    title: str
    options: tuple[Option, ...]


class Fleet(PlanRecord):
    """Where it runs. `cores` are those of all machines, null where no price table tells them."""

    name: str
    device: str
    count: int
    replicas: int
    tensor_parallel: int
    cores: float | None


class Capacity(PlanRecord):
    """What the fleet needs beside its devices. Memory is that of one node's object store."""

    cores_per_device: float | None
    cores_needed: float
    object_store_bytes: float
    chunk_bytes: float
    read_bytes_per_second: float
    requests: dict[str, float]
    output_objects: float


class Price(PlanRecord):
    """`devices` is null where the table of prices has none for this device."""

    currency: str
    date: str
    devices: float | None
    requests: float
    storage_per_month: float


class Chosen(PlanRecord):
    """Totals over INPUT for the fleet that was asked for; `report --plan` reads these."""

    pictures: float
    tiles: float
    rejects: float
    read_bytes: float
    output_bytes: float
    requests: float
    device_hours: float
    wall_seconds: float
    tiles_per_second: float
    tile_counts: dict[str, float]


class Network(PlanRecord):
    """The network that is reckoned with. `basis` says where its shape comes from."""

    name: str
    basis: Literal["checkpoint", "published shape", "run"]
    tflop_per_tile: float
    parameters: int
    blocks: int
    tile_size: int


class Plan(PlanRecord):
    """`settings` are the options that decide tiles and bytes, as `extract` would have them."""

    schema_version: int = SCHEMA_VERSION
    tessera_version: str
    input: tuple[str, ...]
    settings: dict[str, str | int | float | bool | None]
    network: Network
    sample: SampleNote
    pictures: Interval
    tiles: Interval
    rejects: Interval
    wall_seconds: Interval
    rates: tuple[Rate, ...]
    fleet: Fleet
    limits: tuple[Limit, ...]
    bottleneck: str
    advice: tuple[str, ...]
    capacity: Capacity
    price: Price
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    chosen: Chosen
