"""`tessera` as users start it, but for how long ranks may be silent: users have 120 s.

python -m chaos.driver SECONDS extract …
"""

from __future__ import annotations

import sys
from functools import partial

import jobs.extract
from jobs.cli import main
from pipeline.replica import ReplicaSettings

if __name__ == "__main__":
    patience = float(sys.argv.pop(1))
    jobs.extract.ReplicaSettings = partial(ReplicaSettings, hang_seconds=patience)  # type: ignore
    main()
