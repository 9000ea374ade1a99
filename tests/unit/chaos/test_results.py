"""What is said of a kind of fault follows from its kills."""

from __future__ import annotations

from chaos.faults import FAULTS
from chaos.plan import Strike
from chaos.results import fault_rows
from chaos.rounds import Kill

DRIVER, READ = FAULTS[0], FAULTS[1]


def kill(fault: object, status: int, recovered: float | None, *problems: str) -> Kill:
    strike = Strike(1, fault, True, 0.1, 0.5)  # type: ignore[arg-type]
    found = Kill(strike, "1 x", "start", 1.0, 0.0, exit_status=status, recovered_after=recovered)
    found.problems.extend(problems)
    return found


def test_rows_say_how_often_and_what_happened() -> None:
    kills = [kill(READ, 0, 2.0), kill(DRIVER, -9, 9.0), kill(READ, -9, 6.0), kill(READ, 0, 1.0)]
    driver, read = fault_rows(kills)
    assert (driver.fault, driver.injected) == ("SIGKILL of the driver", 1)
    assert driver.happened == (
        "each time the run was dead, and OUTPUT was whole when it had been run again; "
        "next commit after 9 s (median), 9 s (most); every byte the same"
    )
    assert (read.fault, read.injected) == ("SIGKILL of a read worker", 3)
    assert read.happened == (
        "2 of 3 times the run went on and ended whole; 1 of 3 times a later fault ended the same "
        "run; next commit after 2 s (median), 6 s (most); every byte the same"
    )


def test_a_broken_promise_shows() -> None:
    (row,) = fault_rows([kill(READ, 1, None, "the run ended with 1")])
    assert "PROMISE BROKEN 1 times" in row.happened
    assert "same" not in row.happened.rpartition(";")[2]
