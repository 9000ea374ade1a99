"""The page of `tessera browse` over the demo's pictures, one of them asked for as the demo does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.browser import browser
from jobs.demo import DEMO_MODEL, make_shards
from jobs.demo_search import STEM, find_itself
from model.random_checkpoint import write_random_checkpoint
from tests.browsing import browsing
from tests.outputs import extract_plainly

ANSWERED = (
    "document.querySelector('#heading').innerText == 'Nearest to your picture' && "
    "[...document.querySelectorAll('.frame')].every((f) => f.querySelector('img')) && "
    "[...document.images].every((i) => i.complete && i.naturalWidth)"
)
# name, scheme, width of the window, and how much of the page is shown
PICTURES = (("browse", "light", 1180, 1040), ("browse-phone", "dark", 390, 874))


async def photograph_browse(work: Path, folder: Path) -> None:
    """Makes the demo's output in `work`, without Ray, and takes pictures of its page."""
    shards = make_shards(work / "shards")
    write_random_checkpoint(work / "checkpoint", DEMO_MODEL, seed=0)
    extract_plainly(
        [work / "shards"], work / "output", work / "checkpoint",
        tiling="dynamic", max_tiles=6, max_upscale=2.0,
        carry=("txt",), image_key=("jpg", "png", "webp"),
    )  # fmt: skip
    (picture,) = (p.data for p in shards["as-shipped"] if p.key == STEM)
    found = find_itself(work, work / "output", picture)
    assert found.is_itself, found
    with browsing(str(found.index)) as site:
        async with browser() as page:
            for name, scheme, width, height in PICTURES:
                await page.prefer(scheme)
                await page.open("about:blank", width, 900)  # a reload would keep the answer before
                await page.open(site.url, width, 900)
                await page.wait_for("document.querySelectorAll('.card').length > 0")
                await page.choose_file("#file", found.image)
                await page.wait_for(ANSWERED)
                assert await page.width() == width, name
                await page.photograph(folder / f"{name}.png", most=height)
