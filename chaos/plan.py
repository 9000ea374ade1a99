"""What is to be struck and when: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.faults import FAULTS, Fault


@dataclass(frozen=True)
class Strike:
    """One kill. `working`: not before a shard has been committed since the last one, so that others
    are in flight; else at any moment, the start of Ray and the loading of the model included.

    `pick` in [0, 1) chooses among several victims.
    """

    number: int
    fault: Fault
    working: bool
    delay_seconds: float
    pick: float


def plan(seed: int, kills: int, names: Sequence[str] | None = None) -> list[Strike]:
    """`kills` strikes: each kind once where there are enough, then by weight; in a random order.

    Strikes of one setup stand together, because a new setup needs a new OUTPUT.
    """
    rng = random.Random(seed)
    faults = [fault for fault in FAULTS if names is None or fault.name in names]
    chosen = faults if kills >= len(faults) else []
    weights = [fault.weight for fault in faults]
    chosen = chosen + rng.choices(faults, weights, k=kills - len(chosen))
    rng.shuffle(chosen)
    chosen.sort(key=lambda fault: fault.ranks)
    return [strike(rng, number, fault) for number, fault in enumerate(chosen, 1)]


def strike(rng: random.Random, number: int, fault: Fault) -> Strike:
    working = rng.random() < 0.7 and not fault.early
    return Strike(
        number=number,
        fault=fault,
        working=working,
        delay_seconds=round(
            rng.uniform(0.0, 1.0) if working else rng.uniform(0.3, 2.0 if fault.early else 8.0), 3
        ),
        pick=rng.random(),
    )
