"""A cron expression in a time zone: when a run is due."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from model.errors import UserError

MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Timetable:
    """Five fields, as Debian's cron reads them: 0 and 7 are Sunday, and a day is due when either
    its date or its weekday is, where both are given."""

    expression: str
    zone: ZoneInfo

    @staticmethod
    def parse(expression: str, zone: str) -> Timetable:
        """Raises: UserError: no cron expression, one that is never due, or no time zone."""
        try:
            table = Timetable(expression, ZoneInfo(zone))
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise UserError(
                f"--timezone {zone}: no such time zone (as UTC, Europe/Berlin)"
            ) from error
        if len(expression.split()) != 5:
            raise UserError(
                f"--cron {expression!r}: expected five fields: minute, hour, day, month, weekday"
            )
        try:
            table.after(datetime.now(UTC))
        except CronSimError as error:
            fault = str(error)
            raise UserError(f"--cron {expression!r}: {fault[:1].lower()}{fault[1:]}") from error
        except StopIteration as error:
            raise UserError(f"--cron {expression!r}: no day is ever due") from error
        return table

    def after(self, moment: datetime) -> datetime:
        """The first time that is due behind `moment`."""
        return next(CronSim(self.expression, moment.astimezone(self.zone))).astimezone(UTC)

    def missed(self, since: datetime, now: datetime) -> datetime | None:
        """The last time that was due behind `since`, and no later than `now`: however many were
        due between the two, they count as one."""
        last = next(CronSim(self.expression, (now + MINUTE).astimezone(self.zone), reverse=True))
        due = last.astimezone(UTC)
        if due > now:  # the minute that has not begun yet
            due = next(CronSim(self.expression, last, reverse=True)).astimezone(UTC)
        return due if due > since else None
