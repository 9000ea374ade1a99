"""The same seed strikes the same kinds at the same moments; all kinds come."""

from __future__ import annotations

from collections import Counter

from chaos.faults import FAULTS, SHORT
from chaos.plan import plan


def described(seed: int, kills: int) -> list[tuple[object, ...]]:
    return [(s.fault.name, s.working, s.delay_seconds, s.pick) for s in plan(seed, kills)]


def test_a_plan_follows_from_its_seed() -> None:
    assert described(7, 100) == described(7, 100)
    assert described(7, 100) != described(8, 100)


def test_a_hundred_kills_strike_every_kind() -> None:
    strikes = plan(1, 100)
    assert [strike.number for strike in strikes] == list(range(1, 101))
    counts = Counter(strike.fault.name for strike in strikes)
    assert counts.keys() == {fault.name for fault in FAULTS}
    assert min(counts.values()) >= 2


def test_strikes_of_one_setup_stand_together() -> None:
    ranks = [strike.fault.ranks for strike in plan(3, 100)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {1, 2}


def test_the_short_suite_names_real_faults() -> None:
    strikes = plan(1, 5, SHORT)
    assert {strike.fault.name for strike in strikes} == set(SHORT)
