"""Tables of devices and prices: those that ship, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.device_tables import load_devices, load_prices
from model.errors import UserError
from model.peaks import PEAKS

DEVICES = """
share_of_peak: {low: 0.4, middle: 0.5, high: 0.6, source: mine}
start_seconds: {value: 10, source: mine}
devices:
  - name: X1
    match: [Acme, X1]
    memory_gb: 32
    bf16_tflops: 100
    fp8_tflops: null
    link: {name: none, gb_per_second: 1, step_microseconds: 1}
    per_node: 2
    source: mine
"""


def test_every_device_that_ships_has_a_source_and_a_price() -> None:
    devices, prices = load_devices(None), load_prices(None)
    assert {"H100", "H200", "L40S", "L4"} <= {device.name for device in devices.devices}
    assert all(device.source.startswith("https://") for device in devices.devices)
    assert {device.name for device in devices.devices} <= prices.devices.keys()
    assert "assumed" in devices.share_of_peak.source


@pytest.mark.parametrize(
    ("torch_says", "name"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_devices_by_the_name_that_torch_gives(torch_says: str, name: str) -> None:
    found = load_devices(None).called(torch_says)
    assert found is not None
    assert found.name == name
    assert load_devices(None).called("Tesla T4") is None


def test_a_plan_and_the_metrics_reckon_with_the_same_peaks() -> None:
    """The metrics know boards apart that a plan does not: it reckons with the fastest."""
    table = load_devices(None)
    for device in table.devices:
        boards = [peaks for name, peaks in PEAKS.items() if table.called(name) == device]
        assert boards
        for dtype, told in (("bfloat16", device.bf16_tflops), ("fp8", device.fp8_tflops)):
            known = [peaks[dtype] for peaks in boards if dtype in peaks]
            assert (told or 0.0) == pytest.approx(max(known, default=0.0), rel=0.005)


def test_a_users_table_takes_the_place_of_the_own(tmp_path: Path) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text(DEVICES)
    table = load_devices(file)
    assert table.find("x1").bf16_tflops == 100
    with pytest.raises(UserError, match="no device 'H100' in the table; it has X1"):
        table.find("H100")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("middle: 0.5", "middle: 0.7"), "share_of_peak: Value error, expected low <= middle"),
        (("bf16_tflops: 100", "bf16_tflops: fast"), r"devices\.0\.bf16_tflops"),
        (("per_node: 2", "per_node: 2\n    colour: red"), r"devices\.0\.colour: Extra inputs"),
        (("memory_gb: 32\n", ""), "devices.0.memory_gb|not YAML"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text(DEVICES.replace(*change))
    with pytest.raises(UserError, match=says) as told:
        load_devices(file)
    assert str(told.value).startswith(str(file))
    assert "\n" not in str(told.value)


def test_prices_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(
        "currency: EUR\ndate: 2026-11\nsource: our hoster\n"
        "devices: {cpu: {per_hour: 0.1}}\n"
        "storage: {source: s, per_1000_gets: 0, per_1000_puts: 0, per_gb_month: 0.01}\n"
    )
    assert load_prices(file).devices["cpu"].per_hour == 0.1
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_prices(tmp_path / "none.yaml")
