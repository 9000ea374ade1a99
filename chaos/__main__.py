"""`python -m chaos --seed N --kills 100`: strikes the main job and proves that nothing is lost."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

from chaos.faults import FAULTS
from chaos.job import Job, make_job
from chaos.nodes import Nodes
from chaos.plan import plan
from chaos.processes import adopt_orphans, descendants, title
from chaos.rounds import Kill, Round
from tests.builders import REPOSITORY
from tests.running import comparable

END_SECONDS = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the kinds, moments and victims")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", action="append", help="part of a fault's name; repeatable")
    arguments = parser.parse_args()
    names = [
        fault.name
        for fault in FAULTS
        if not arguments.only or any(part in fault.name for part in arguments.only)
    ]
    adopt_orphans()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} {line}", flush=True)

    strikes = deque(plan(arguments.seed, arguments.kills, names))
    with tempfile.TemporaryDirectory(prefix="tessera-chaos-") as folder:
        kills, problems = play(Path(folder), strikes, say)
    problems += stragglers()
    for kill in kills:
        print(
            kill.strike.number,
            kill.strike.fault.name,
            kill.victim,
            kill.phase,
            kill.exit_status,
            kill.said,
            f"ended {kill.ended_after:.1f}",
            f"recovered {kill.recovered_after}",
            kill.runs_after,
            kill.problems,
        )
    print(*problems, sep="\n")
    return 1 if problems or any(kill.problems for kill in kills) else 0


def play(folder, strikes, say) -> tuple[list[Kill], list[str]]:
    job = make_job(folder)
    nodes = Nodes()
    kills: list[Kill] = []
    problems: list[str] = []
    references: dict[int, dict[str, bytes]] = {}
    number = 0
    try:
        while strikes:
            ranks = strikes[0].fault.ranks
            number += 1
            output = folder / f"out-{number}"
            undisturbed = ranks not in references
            say(f"round {number}, tensor_parallel {ranks}{', undisturbed' if undisturbed else ''}")
            round = Round(
                replace(job, ranks=ranks), output, nodes, references.get(ranks), say
            )
            round.play(deque() if undisturbed else strikes)
            nodes = round.nodes
            kills += round.kills
            problems += [f"round {number}: {problem}" for problem in round.problems]
            if undisturbed:
                references[ranks] = comparable(output)
    finally:
        nodes.shutdown()
    return kills, problems


def stragglers() -> list[str]:
    """What still runs though everything was ended; it is killed."""
    until = time.monotonic() + END_SECONDS
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        time.sleep(0.2)
    lines = [f"still running: {process.pid} {title(process.pid)[:80]}" for process in left]
    for process in left:
        process.kill()
    return lines


if __name__ == "__main__":
    sys.exit(main())
