"""Asks pip-audit about the installed packages, and does not take silence for an answer.

Where pip-audit's source knows no package, it says "No known vulnerabilities found" and ends with 0.
Exit status: 0 every package that comes from an index was looked up and none is vulnerable, or
the source cannot be reached (said so); 1 a vulnerability; 3 with --strict, where not all were
looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys

SOURCES = ("pypi", "osv")
TIMEOUT_SECONDS = 300
# Vulnerabilities that do not concern us, each with its reason; the same stand in SECURITY.md.
ACCEPTED: dict[str, str] = {}


def ask(source: str) -> tuple[list[dict[str, object]], str]:
    """pip-audit's entry for each package, and why there is none."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json",
               "--progress-spinner", "off", "--vulnerability-service", source]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        return [], f"no answer within {TIMEOUT_SECONDS} s"
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines()
        return [], lines[-1][:200] if lines else f"status {done.returncode}, no output"


def report(source: str, entries: list[dict[str, object]], why: str) -> tuple[bool, bool]:
    """Prints what one source said; gives whether it knew every package, and found any fault."""
    known = [entry for entry in entries if "skip_reason" not in entry]
    unknown = [
        str(e["name"]) for e in entries if "editable" not in str(e.get("skip_reason", "editable"))
    ]
    faults = [
        f"{entry['name']} {entry['version']}: {fault['id']}, fixed in {fault['fix_versions']}"
        for entry in known
        for fault in entry["vulns"]  # type: ignore[attr-defined]
        if fault["id"] not in ACCEPTED
    ]
    for fault in faults:
        print(f"VULNERABLE: {fault}")
    if not known:
        reason = why or f"it knows none of {len(entries)} packages"
        print(f"NOT AUDITED by {source}: {reason}")
    else:
        print(f"{source}: {len(known)} packages looked up, {len(faults)} vulnerabilities")
        if unknown:
            print(f"NOT AUDITED by {source}: {len(unknown)} packages: {', '.join(unknown)}")
    return bool(known) and not unknown, bool(faults)


def main() -> int:
    whole = False
    for source in SOURCES:
        knew_all, faulty = report(source, *ask(source))
        if faulty:
            return 1
        if knew_all:
            whole = True
            break
    if not whole:
        print(
            "audit: NOT every dependency was audited; run `make audit` where its data is reachable"
        )
    return 3 if not whole and "--strict" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
