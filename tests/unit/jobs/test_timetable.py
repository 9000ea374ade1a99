"""When a run is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from jobs.timetable import Timetable
from model.errors import UserError

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)  # a Tuesday


@pytest.mark.parametrize(
    ("expression", "zone", "expected"),
    [
        ("*/30 * * * *", "UTC", NOON + timedelta(minutes=30)),
        ("0 12 * * *", "UTC", NOON + timedelta(days=1)),
        ("0 0 * * 0", "UTC", datetime(2026, 11, 29, tzinfo=UTC)),  # 0 is Sunday, as cron has it
        ("0 0 * * 7", "UTC", datetime(2026, 11, 29, tzinfo=UTC)),
        ("0 0 1 * 3", "UTC", datetime(2026, 11, 25, tzinfo=UTC)),  # the first, or a Wednesday
        ("0 3 * * *", "Europe/Berlin", datetime(2026, 11, 25, 2, tzinfo=UTC)),
        ("0 3 * * *", "Asia/Kolkata", datetime(2026, 11, 24, 21, 30, tzinfo=UTC)),
    ],
)
def test_the_next_time(expression: str, zone: str, expected: datetime) -> None:
    assert Timetable.parse(expression, zone).after(NOON) == expected


def test_an_hour_that_summer_time_skips_or_doubles_is_due_once_a_day() -> None:
    table = Timetable.parse("30 2 * * *", "Europe/Berlin")
    for first in (datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC)):
        moment, dues = first, []
        while (moment := table.after(moment)) < first + timedelta(days=3):
            dues.append(moment)
        assert len(dues) == 3, dues


@pytest.mark.parametrize(
    ("since", "now", "expected"),
    [
        (0, 29, None),
        (0, 30, 30),
        (0, 30.5, 30),
        (30, 30.5, None),
        (0, 59.9, 30),
        (0, 300, 300),  # ten were missed: one is due
        (0, 301, 300),
    ],
)
def test_what_was_missed_is_due_once(since: float, now: float, expected: float | None) -> None:
    table = Timetable.parse("*/30 * * * *", "UTC")
    found = table.missed(NOON + timedelta(minutes=since), NOON + timedelta(minutes=now))
    assert found == (None if expected is None else NOON + timedelta(minutes=expected))


@pytest.mark.parametrize(
    ("expression", "zone", "said"),
    [
        ("* * * *", "UTC", "five fields"),
        ("* * * * * *", "UTC", "five fields"),
        ("@daily", "UTC", "five fields"),
        ("61 * * * *", "UTC", "bad minute"),
        ("0 0 * * MONDAY", "UTC", "bad day-of-week"),
        ("0 0 30 2 *", "UTC", "day"),
        ("* * * * *", "Mars/Olympus", "no such time zone"),
        ("* * * * *", "../../etc/passwd", "no such time zone"),
    ],
)
def test_mistakes_are_one_line(expression: str, zone: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Timetable.parse(expression, zone)
    assert "\n" not in str(caught.value)
