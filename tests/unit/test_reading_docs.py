"""The code in docs/reading.md runs as it stands, and gives what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.builders import REPOSITORY


def test_the_code_runs(made: Path) -> None:
    text = (REPOSITORY / "docs/reading.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace('"OUTPUT"', repr(str(made / "out"))), names)  # as a reader would
        if "pictures = duckdb" in block:
            assert names["pictures"].fetchall() == [(8,)]  # keys 0000…0007, of both shards
        if "frame" in block:
            assert names["table"].column_names == ["key", "tile_index", "tile_count", "cls"]
            assert len(names["frame"]) == names["table"].num_rows > 12
        if "run.values" in block:
            assert names["values"].shape == (5, 80)
        if "sample.members" in block:
            assert names["image"].startswith(b"\xff\xd8")
        if "tile_boxes" in block:
            assert names["caption"] == "caption 0004"
            assert len(names["tiles"]) == len(names["boxes"])
    # Each worker has a shard, of 7 and of 5 pictures; the last batch is what remains of the second.
    assert names["embeddings"].shape == (1, 80)
    assert names["captions"] == [b"caption 0004"]
