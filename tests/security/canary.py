"""An object whose pickle, and a source whose import, write a file: proof that code ran."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Canary:
    file: Path

    def __reduce__(self) -> Any:
        return exec, (self.source(),)

    def source(self) -> str:
        return f"open({str(self.file)!r}, 'w').write('executed')"

    def pickled(self) -> bytes:
        return pickle.dumps(self)
