"""How fast a device embeds: by what was measured on it, else by an assumed share of its peak."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.capacity import TERA, peak_seconds, replica_rate, summing_seconds
from jobs.device_tables import NO_FLOAT32, Device, DeviceTable, Measured, Share
from jobs.plan_document import Basis
from model.config import ViTConfig
from model.errors import UserError
from model.work import tile_flop

SAME_WORK = 0.01  # a rate of a network of other work is scaled; within this it is the same


@dataclass(frozen=True)
class DeviceRate:
    """Tiles a second of one device, as low and high as it may be."""

    low: float
    middle: float
    high: float
    basis: Basis
    source: str


def device_rate(
    device: Device, share: Share, config: ViTConfig, blocks: int, dtype: str, ranks: int
) -> DeviceRate:
    """Of a device in a group of `ranks`.

    A measured rate is taken as it is for the same work and number of ranks; for others it tells
    which share of its peak the device reaches.

    Raises:
        UserError: nothing is known of the device with this `dtype`.
    """

    def rate(reached: float) -> float:
        return replica_rate(config, blocks, device, ranks, dtype, reached) / ranks

    found = device.measured
    if found is None:
        if dtype == "float32":
            raise UserError(NO_FLOAT32)
        source = f"{share.middle:g} of {device.bf16_tflops:g} TFLOP/s"
        if dtype == "fp8":
            source = f"{share.middle:g} of {device.fp8_tflops:g} TFLOP/s of float8"
        source = f"{source} ({share.low:g} to {share.high:g})"
        return DeviceRate(rate(share.low), rate(share.middle), rate(share.high), "assumed", source)
    ratio = tile_flop(config, blocks) / TERA / found.tflop_per_tile
    if abs(ratio - 1) <= SAME_WORK and ranks == found.ranks:
        tiles = found.tiles_per_second
        return DeviceRate(tiles, tiles, tiles, found.basis, found.source)
    tiles = rate(_reached(found, ratio, device, config, blocks, dtype))
    return DeviceRate(tiles, tiles, tiles, "scaled", found.source)


def _reached(
    found: Measured, ratio: float, device: Device, config: ViTConfig, blocks: int, dtype: str
) -> float:
    """The share of its peak: what the sums over the ranks take is no part of the computing."""
    seconds = ratio / (found.tiles_per_second * found.ranks)  # of a tile of a replica
    computing = seconds - summing_seconds(config, blocks, device, found.ranks)
    peak = peak_seconds(config, blocks, device, found.ranks, dtype)
    return peak / max(computing, peak)


def with_measured(table: DeviceTable, device: Device, measured: Measured) -> DeviceTable:
    """The table with what was measured on one of its devices."""
    replaced = device.model_copy(update={"measured": measured})
    entries = tuple(replaced if entry.name == device.name else entry for entry in table.devices)
    return table.model_copy(update={"devices": entries})
