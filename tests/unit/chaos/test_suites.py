"""Counts of injected faults come from pytest's own report."""

from __future__ import annotations

import pytest

from benchmarks.record import RESULTS
from chaos.suites import CASES, NAMED, REJECT, Case, counted, fuzz_rows, holds, outcomes
from tests.hostile.archives import ARCHIVES

REPORT = b"""<testsuites><testsuite>
<testcase classname="tests.a" name="t[x]"/>
<testcase classname="tests.a" name="t[y]"><failure message="no"/></testcase>
<testcase classname="tests.a" name="t[z]"><error message="no"/></testcase>
<testcase classname="tests.a" name="t[s]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_skipped_tests_inject_nothing() -> None:
    assert outcomes(REPORT) == [
        ("tests.a.t[x]", True),
        ("tests.a.t[y]", False),
        ("tests.a.t[z]", False),
    ]


def test_a_case_is_counted_and_its_failures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.suites.CASES", CASES[:2])
    names = ["storage_faults.T[moto-500-x]", "storage_faults.T[moto-503-x]"]
    tests = [(names[0], True), (names[1], False), ("storage_faults.T[moto-reset-before]", True)]
    rows = counted(tests)
    assert [(row.injected, row.happened) for row in rows] == [
        (2, "1 times not as promised"),
        (1, "each time as promised"),
    ]
    with pytest.raises(ValueError, match="no test injects: reset before the answer"):
        counted(tests[:2])


def test_a_row_says_of_an_archive_what_its_own_test_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [case.fault for case in CASES for kind in ARCHIVES if not holds(case, kind)] == []
    kinds = r"hostile\.test_archives.*\[(no-end|only-zeros|duplicate-member|json-bomb)\]"
    for promised, untrue in (
        (NAMED, "only-zeros, duplicate-member, json-bomb"),
        (REJECT, "only-zeros, json-bomb, no-end"),
    ):
        monkeypatch.setattr("chaos.suites.CASES", (Case("odd", kinds, promised, "input"),))
        with pytest.raises(ValueError, match=f"odd: not what is promised: {untrue}"):
            counted([])


def test_fuzzing_is_counted_from_its_newest_result() -> None:
    rows = fuzz_rows(RESULTS)
    assert [row.fault.split()[0] for row in rows] == ["pictures", "archives"]
    assert rows[0].injected >= 10_000
