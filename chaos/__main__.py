"""`python -m chaos --seed N --kills 100`: strikes the main job and shows that nothing is lost."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.record import REPOSITORY, RESULTS, machine
from chaos.faults import FAULTS, SHORT
from chaos.job import make_job
from chaos.nodes import RAY_SETTINGS, Nodes
from chaos.plan import Strike, plan
from chaos.processes import adopt_orphans, descendants, reap_raylets, title
from chaos.results import record
from chaos.rounds import Kill, Round
from chaos.space import can_mount, disk_full, store_full
from tests.running import comparable

END_SECONDS = 120.0  # agents of a head that died give up after a minute
SPILL_BYTES = 48 << 20
PROBE = re.compile(r"[a-z0-9_]{8}")
CACHES = ("ray", "torchinductor_")  # in the temporary folder: sessions and logs, compiled code


def main() -> int:
    arguments = parse()
    wanted = SHORT if arguments.short else [fault.name for fault in FAULTS]
    names = [name for name in wanted if any(part in name for part in arguments.only or [""])]
    about = machine()
    adopt_orphans()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    os.chdir(REPOSITORY)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} {line}", flush=True)

    strikes = plan(arguments.seed, arguments.kills, names) if names else []
    space = not arguments.short and ("space" in arguments.only if arguments.only else True)
    with tempfile.TemporaryDirectory(prefix="tessera-chaos-") as folder:
        os.environ["TMPDIR"] = str(Path(folder) / "tmp")
        Path(os.environ["TMPDIR"]).mkdir()
        kills, problems = play(Path(folder), strikes, space, say)
        problems += stragglers()
        problems += [f"left in TMPDIR: {name}" for name in left_in(Path(folder, "tmp"))]
    minutes = (time.monotonic() - began) / 60
    text = record(about, arguments.seed, minutes, kills, problems, arguments.results, RAY_SETTINGS)
    print(text)
    broken = list(dict.fromkeys(problems + [line for kill in kills for line in kill.problems]))
    if len(kills) < len(strikes):
        broken.append(f"only {len(kills)} of {len(strikes)} strikes found their victims")
    print(f"{len(kills)} faults, seed {arguments.seed}, {minutes:.1f} minutes: ", end="")
    print("every promise was kept" if not broken else f"{len(broken)} promises broken")
    print(*broken, sep="\n")
    return 1 if broken else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the kinds, moments and victims")
    parser.add_argument("--kills", type=int, default=100, help="besides those that take space")
    parser.add_argument("--short", action="store_true", help="as in `make test`: few kinds")
    parser.add_argument(
        "--only", action="append", metavar="WORDS", help="part of a fault's name, or `space`"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    return parser.parse_args()


def play(
    folder: Path, planned: list[Strike], space: bool, say: Callable[[str], None]
) -> tuple[list[Kill], list[str]]:
    """Round after round until all strikes have found their victims; then, without room."""
    job = make_job(folder)
    strikes = deque(planned)
    kills: list[Kill] = []
    problems: list[str] = []
    whole: dict[int, dict[str, bytes]] = {}
    nodes = Nodes()
    number = 0
    try:
        most = 2 * len(planned) + 4  # a strike that never finds its victim ends the suite
        while number < most and (strikes or (space and 1 not in whole)):
            number += 1
            ranks = strikes[0].fault.ranks if strikes else 1
            undisturbed = ranks not in whole
            output = folder / f"out-{number}"
            say(f"round {number}, tensor_parallel {ranks}{', undisturbed' if undisturbed else ''}")
            current = Round(replace(job, ranks=ranks), output, nodes, whole.get(ranks), say)
            current.play(deque() if undisturbed else strikes)
            nodes = current.nodes
            kills += current.kills
            problems += [f"round {number}: {problem}" for problem in current.problems]
            if undisturbed:
                whole[ranks] = comparable(output)
        if space and can_mount():
            kills.append(disk_full(job, folder, nodes, whole[1], say))
    finally:
        nodes.shutdown()
    if space:
        kills.append(store_full(job, folder, whole[1], None, say))
    if space and can_mount():
        kills.append(store_full(job, folder, whole[1], SPILL_BYTES, say))
    if space and not can_mount():
        say("      no full disks: to mount a small one takes root")
    return kills, problems


def left_in(folder: Path) -> list[str]:
    """Names in a temporary folder, but for caches, and for what Python itself leaves there where it
    is killed while it looks whether it can write (`tempfile._get_default_tempdir`)."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(CACHES)
        and not (
            PROBE.fullmatch(path.name) and path.is_file() and path.read_bytes() in (b"", b"blat")
        )
    )


def stragglers() -> list[str]:
    """What still runs though everything was ended; it is killed."""
    until = time.monotonic() + END_SECONDS
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        reap_raylets()
        time.sleep(0.2)
    lines = [f"still running: {process.pid} {title(process.pid)[:80]}" for process in left]
    for process in left:
        process.kill()
    return lines


if __name__ == "__main__":
    sys.exit(main())
