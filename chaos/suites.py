"""`python -m chaos.suites`: runs the test suites of storage faults, hostile input, ranks and runs.

It writes down how often each fault was injected and what came of it, for docs/reliability.md.

One test injects one fault; it passes where what is promised came true. Ceph's server is tried
besides moto where it is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.record import REPOSITORY, RESULTS
from chaos.results import FaultRow, write_rows
from tests.hostile.archives import ARCHIVES

TESTS = (
    "tests/integration/test_storage_faults.py",
    "tests/integration/test_job_faults.py",
    "tests/integration/test_hostile_archives.py",
    "tests/integration/test_hostile_pictures.py",
    "tests/integration/test_resume.py",
    "tests/integration/test_reindex_kills.py",
    "tests/integration/test_tensor_parallel.py",
    "tests/hostile",
    "tests/unit/pipeline/test_lease.py",
    "tests/unit/model/test_ranks.py",
    "tests/unit/pipeline/test_replica.py",
)
FUZZ = "*-hostile-input-cpu.json"

AGAIN = "tried again: at most 6 requests, growing pauses with jitter, a deadline for each"
ON = "read on at the byte where it broke; 6 attempts without a whole answer fail the shard"
NAMED = "the shard is not committed, named with the reason and the byte; the others go on"
REJECT = "a reject with a stable code; accounts balance, the job goes on"


@dataclass(frozen=True)
class Case:
    """A kind of fault, and the tests (a pattern of their ids) that inject it."""

    fault: str
    tests: str
    promised: str
    suite: str


def _storage(fault: str, tests: str, promised: str) -> Case:
    return Case(fault, rf"storage_faults.*({tests})", promised, "storage")


def _archive(fault: str, kinds: str, promised: str) -> Case:
    return Case(fault, rf"hostile\.test_archives.*\[({kinds})\]", promised, "input")


CASES = (
    _storage("500, 503 SlowDown", r"-(500|503)\b", AGAIN),
    _storage("reset before the answer", "reset-before", AGAIN),
    _storage("stall before the answer", "stall-before", AGAIN),
    _storage("reset, early end or stall in mid-body", "-(reset|fin|stall)-mid", ON),
    _storage("slow body", "slow_body", ON),
    _storage(
        "wrong Content-Length",
        "(longer|shorter)-length",
        "never short data for whole: asked for again, or the missing bytes alone",
    ),
    _storage(
        "404 after a list",
        "listed_object_that_is_gone",
        "the shard fails at once with the reason; the next run tries it again",
    ),
    _storage(
        "stale listing",
        "TestListings",
        "no output is removed before its commit was looked up by name; a shard that the listing of "
        "INPUT lacks waits for the next run",
    ),
    _storage(
        "a listing reset, ended early, stalled or of a wrong length",
        "broken_listing",
        "the page is asked for again; never part of a listing for the whole",
    ),
    _storage(
        "flipped byte, reading",
        "flipped_byte|other_bytes|uploaded_in_parts",
        "caught by the store's ETag or checksum where it gives one: read again, or the shard fails",
    ),
    _storage(
        "flipped byte, writing",
        "flip-upload",
        "refused by the store or shown by the ETag: sent again",
    ),
    _storage(
        "lost acknowledgement",
        "lost-ack|answer_is_lost",
        "sent again; a multipart upload that was completed is recognised",
    ),
    _storage(
        "object replaced while it is read", "replaced", "the shard fails, the next run reads it"
    ),
    _storage(
        "expired or refused credentials",
        "TestCredentials",
        "looked up again once; then the run stops with one line, as every shard would fail",
    ),
    Case(
        "real jobs over S3 with all of these",
        "test_job_faults",
        "what passes leaves no trace in a byte of OUTPUT; what lasts is named shard by shard, and "
        "the next run makes it good",
        "storage",
    ),
    Case(
        "two runs on one OUTPUT: at once, beside a living one, after a killed one",
        r"test_lease.*(at_once|renews|succeeded|expires|died_on|another_process)|two_at_once",
        "one works, the other says who does and exits 2",
        "lease",
    ),
    Case(
        "a holder that was paused, and succeeded meanwhile",
        "test_lease.*(paused_holder|stopped_process)",
        "it stops before it commits anything more",
        "lease",
    ),
    Case(
        "lost answer, or a store that ignores the condition",
        "test_lease.*(lost_answer|decides_nothing)",
        "the lost answer costs nothing; the other is said, and settled by the last writer",
        "lease",
    ),
    Case(
        "SIGKILL or SIGSTOP of a rank, in and between two calls",
        "test_ranks.*(end_as_one|stops_between)",
        "all ranks of the replica end",
        "ranks",
    ),
    Case(
        "SIGKILL of a rank and of a replica, SIGSTOP of a rank, in a job (tensor_parallel 2)",
        "test_tensor_parallel.*(killed_rank|stopped_rank)",
        "the replica starts again and repeats its chunk; no byte of the output differs",
        "ranks",
    ),
    Case(
        "a replica whose weights differ from the driver's",
        "test_replica.*other_weights",
        "it refuses to start, and says which weights it found",
        "ranks",
    ),
    Case(
        "Ctrl-C (SIGINT to the process group), SIGTERM",
        "test_resume.*stopped_job",
        "complete shards are committed, exit 130 (143), no process left; the same command goes on",
        "runs",
    ),
    Case(
        "Ctrl-C, SIGTERM, while Ray starts",
        "test_resume.*while_ray_starts",
        "exit 130 (143), nothing is committed, the lease given back, no process left",
        "runs",
    ),
    Case(
        "Ctrl-C twice, while a commit does not come to its end",
        "test_resume.*ctrl_c_twice",
        "it ends at once with exit 130, nothing more is committed, no process left",
        "runs",
    ),
    Case(
        "SIGKILL of a driver with a Ray of its own, of `extract` and of `reindex`",
        "test_resume.*kills_of_a_driver|test_reindex_kills",
        "the same command does the rest: no byte differs, no committed shard is computed again",
        "runs",
    ),
    Case(
        "a finished job run again",
        "test_resume.*finished_job",
        "it does nothing and exits 0",
        "runs",
    ),
    _archive("cut at every kind of place", "cut-.*|no-end|empty-file", NAMED),
    _archive(
        "no members: an end mark alone, zeros alone",
        "empty-tar|only-zeros",
        "committed, as what it is: an empty archive",
    ),
    _archive(
        "header corrupt, blocks zeroed, data behind the end",
        "flipped.*|garbage.*|zeroed-header|two-archives",
        NAMED,
    ),
    _archive(
        "sizes that lie",
        "size-(too|beyond|2-to|negative|no-number).*|pax-size-.*|global-(size|name)|.*claims.*"
        "|.*negative",
        NAMED,
    ),
    _archive(
        "a size that takes exactly the next members in",
        "size-that-takes.*",
        "cannot be told: the shard is committed, without the members that were taken in",
    ),
    _archive(
        "long names, PAX and GNU headers, chains of them",
        "gnu-.*|pax-(name|size|attributes|long-name|digits|short.*|length.*|no-.*|in-.*|chain|before.*)"
        "|long-name.*|global-chain|git-archive",
        "bounded memory and time (64 KiB a header, 4 KiB a name, 16 before a member); beyond it, "
        "or where one is malformed, the shard fails",
    ),
    _archive("sparse members", "sparse-.*", NAMED),
    _archive(
        "`../`, absolute paths, NUL, control characters, links, devices",
        "parent-folder|absolute-path|nul.*|control.*|empty-name|no-key|links|devices|unknown-type"
        "|unicode-names|latin-1-names",
        "names are keys and never paths; what is no regular file is passed over",
    ),
    _archive(
        "duplicate members, split samples, thousands of members, captions of MiB, data zeroed or "
        "empty, a tar in a tar",
        "duplicate.*|split.*|thousands.*|long-caption|zeroed-data|empty-picture|tar-(of|as)-.*",
        REJECT,
    ),
    _archive(
        "a key that comes again, samples in another order, JSON bombs",
        "key-comes.*|out-of.*|json-.*",
        "committed in the tar's order; of JSON that cannot be taken, null",
    ),
    _archive("compressed tar, no tar at all", "gzip|bzip2|xz|zstd|picture|html", NAMED),
    Case(
        "1e5 tiny members; a member of 2 GB; samples above the limits",
        r"hostile\.test_archives.*(thousand_tiny|two_gigabytes|kept_of|limit|size_of_a_group)",
        "bounded memory",
        "input",
    ),
    Case(
        "odd pictures: bombs, 1 by 65535, 16-bit, CMYK, animated, ICC, loops, wrong extension",
        r"hostile\.test_pictures",
        "embedded as the reference does, or a reject with a stable code, in bounded time",
        "input",
    ),
    Case(
        "a decoder that crashes, hangs or runs out of memory",
        r"hostile\.test_isolation|end_their_worker",
        "that picture is a reject (`decode/crashed`, `deadline`, `memory`); the rest is embedded",
        "input",
    ),
    Case(
        "a real job over all hostile archives; workers killed from outside",
        "test_hostile_archives|killed_from_outside",
        "good shards are committed, bad ones named; a killed worker changes no byte",
        "input",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.suites", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    rows = counted(run_tests()) + fuzz_rows(RESULTS)
    for suite in sorted({row.suite for row in rows}):
        write_rows([row for row in rows if row.suite == suite], suite, options.results)
    failed = [row for row in rows if "not as promised" in row.happened]
    for row in rows:
        print(f"{row.injected:6d}  {row.fault}: {row.happened}")
    return 1 if failed else 0


def run_tests() -> list[tuple[str, bool]]:
    """The id of each test that ran, and whether it passed."""
    with_ceph = all(shutil.which(program) for program in ("radosgw", "ceph-mon", "ceph-osd"))
    chosen = "not gpu" if with_ceph else "not gpu and not ceph"
    with tempfile.TemporaryDirectory(prefix="tessera-suites-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", chosen, f"--junitxml={report}", *TESTS]
        subprocess.run(command, cwd=REPOSITORY, check=False, stdout=sys.stderr)
        return outcomes(report.read_bytes())


def outcomes(report: bytes) -> list[tuple[str, bool]]:
    """From pytest's own report; skipped tests are left out."""
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            found.append((f"{case.get('classname')}.{case.get('name')}", passed))
    return found


def counted(tests: Sequence[tuple[str, bool]]) -> list[FaultRow]:
    """A row for each case.

    Raises:
        ValueError: no test injects it any more, or an archive's row promises what is not so.
    """
    rows = []
    for case in CASES:
        if untrue := [kind for kind in ARCHIVES if not holds(case, kind)]:
            raise ValueError(f"{case.fault}: not what is promised: {', '.join(untrue)}")
        results = Counter(passed for name, passed in tests if re.search(case.tests, name))
        if not results:
            raise ValueError(f"no test injects: {case.fault} ({case.tests})")
        happened = "each time as promised"
        if results[False]:
            happened = f"{results[False]} times not as promised"
        rows.append(FaultRow(case.fault, results.total(), happened, case.promised, case.suite))
    return rows


def holds(case: Case, kind: str) -> bool:
    """Whether a row says of this kind of archive what the archive's own test does."""
    archive = ARCHIVES[kind]
    if not re.search(case.tests, f"tests.hostile.test_archives.test_an_archive[{kind}]"):
        return True
    if case.promised == NAMED:
        return archive.failure is not None
    return case.promised != REJECT or bool(archive.rejects)


def fuzz_rows(folder: Path) -> list[FaultRow]:
    """From the newest result of `make fuzz`."""
    files = sorted(folder.glob(FUZZ))
    if not files:
        return []
    tables = json.loads(files[-1].read_text())["tables"]
    worst = {row[0]: row[1:] for row in next(t for t in tables if t["title"] == "Worst")["rows"]}
    return [
        FaultRow(
            f"{kind} mutated by bytes (`make fuzz`)",
            worst["cases"][column],
            f"{worst['workers that ended'][column]} workers ended; slowest shard "
            f"{worst['slowest shard, s'][column]:.1f} s, largest "
            f"{worst['largest shard, MiB'][column]} MiB above the worker",
            promised,
            "input",
        )
        for column, (kind, promised) in enumerate(
            (("pictures", f"embedded, or {REJECT}"), ("archives", f"accounts balance, or {NAMED}"))
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
