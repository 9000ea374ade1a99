"""`tessera browse` in a real browser, Debian's Chromium: pictures in, neighbours out, by mouse, by
keyboard and on a phone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from benchmarks.browser import Page, browser
from jobs.page_server import MAX_UPLOAD_BYTES
from pipeline.source_pictures import SourcePictures
from tests.browsing import Site, browsing, make_index
from tests.builders import picture, sample, write_checkpoint, write_tar
from tests.outputs import extract_plainly

pytestmark = pytest.mark.browser

T = TypeVar("T")
NUM_SHOWN, GONE = 12, 2  # pictures of shard `a`, and of `gone`, whose tar is removed
EVIL = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
DESKTOP, PHONE, NARROW = 1180, 390, 320
LOADED = (
    "document.querySelectorAll('.card').length > 0 && "
    "[...document.querySelectorAll('.card .frame')].every((f) => f.childElementCount) && "
    "[...document.images].every((i) => i.complete && i.naturalWidth)"
)
FOCUSED = "(document.activeElement.id || document.activeElement.className)"
SHIFT = 8


def image(number: int) -> bytes:
    return picture(120 + 20 * number, 150, seed=number)


@dataclass
class Tab:
    """A page in the browser, driven from tests that are plain functions."""

    page: Page
    runner: asyncio.Runner
    site: Site
    folder: Path

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(what)

    def open(self, width: int = DESKTOP) -> None:
        self.page.events.clear()
        self.do(self.page.open("about:blank", width, 900))
        self.do(self.page.open(self.site.url, width, 900))
        self.do(self.page.wait_for(f"location.href != 'about:blank' && {LOADED}"))

    def value(self, expression: str) -> Any:
        return self.do(self.page.value(expression))

    def wait_for(self, condition: str) -> None:
        self.do(self.page.wait_for(condition))

    def wait_for_answer(self, heading: str) -> None:
        self.wait_for(f"document.querySelector('#heading').innerText == {heading!r} && {LOADED}")

    def press(self, *keys: str, modifiers: int = 0) -> None:
        for key in keys:
            self.do(self.page.press(key, modifiers))

    def shown_keys(self) -> list[str]:
        """Of the pictures that are shown, in order."""
        texts: list[str] = self.value(
            "[...document.querySelectorAll('.card .key')].map((e) => e.innerText)"
        )
        return texts

    def focused(self) -> int:
        """Which card has the focus; -1: none."""
        number: int = self.value(
            "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        )
        return number


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = tmp_path_factory.mktemp("browser")
    members = [m for n in range(NUM_SHOWN - 1) for m in sample(f"k{n}", image(n), f"caption {n}")]
    members += sample("evil", image(NUM_SHOWN - 1), EVIL)
    write_tar(folder / "in/a.tar", members)
    gone = [m for n in range(GONE) for m in sample(f"g{n}", image(40 + n), "a long caption " * 20)]
    write_tar(folder / "in/gone.tar", gone)
    checkpoint = write_checkpoint(folder / "ckpt")
    extract_plainly([folder / "in"], folder / "out", checkpoint, carry=("txt",))
    (folder / "in/gone.tar").unlink()
    (folder / "q.jpg").write_bytes(image(5))
    with (
        browsing(make_index(folder, folder / "index")) as site,
        asyncio.Runner() as runner,
    ):
        context: AbstractAsyncContextManager[Page] = browser()
        page = runner.run(context.__aenter__())
        try:
            for domain in ("Log", "Runtime", "Network", "DOM", "Accessibility"):
                runner.run(page.ask(f"{domain}.enable"))
            yield Tab(page, runner, site, folder)
        finally:
            runner.run(context.__aexit__(None, None, None))


def complaints(tab: Tab) -> list[dict[str, Any]]:
    """Errors of scripts, of the console, and of the page's policy."""
    told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event for event in tab.page.events if event["method"] in told]


def test_the_first_look(tab: Tab) -> None:
    tab.open()
    assert tab.value("document.querySelectorAll('.card').length") == NUM_SHOWN + GONE
    assert tab.value("document.querySelectorAll('.card img').length") == NUM_SHOWN
    gone = tab.value("[...document.querySelectorAll('.gone')].map((e) => e.innerText)")
    assert gone == ["No picture: its shard is not there any more"] * GONE
    assert tab.value("document.querySelector('#heading').innerText") == "Some pictures of the index"
    about = tab.value("document.querySelector('#about').innerText")
    assert about.endswith("/out: 14 pictures; feature cls, vector thumbnail, flat index")


def test_nothing_is_loaded_from_elsewhere_and_nothing_complains(tab: Tab) -> None:
    tab.open()
    asked = [
        event["params"]["request"]["url"]
        for event in tab.page.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > NUM_SHOWN
    ours = (tab.site.url, "blob:http://127.0.0.1", "data:,", "about:blank")
    assert [url for url in asked if not url.startswith(ours)] == []
    # the browser itself notes answers of 404, those of the pictures that are gone
    told = [json.dumps(event) for event in complaints(tab)]
    assert [text for text in told if "404 (Not Found)" not in text] == []


def test_what_strangers_wrote_stays_text(tab: Tab) -> None:
    tab.open()
    captions = tab.value("[...document.querySelectorAll('.caption')].map((e) => e.textContent)")
    assert EVIL in captions
    assert tab.value("document.querySelectorAll('main script, main img[src=x]').length") == 0
    assert tab.value("document.title") == "tessera browse"


def test_a_picture_is_chosen(tab: Tab) -> None:
    tab.open()
    tab.do(tab.page.choose_file("#file", tab.folder / "q.jpg"))
    tab.wait_for_answer("Nearest to your picture")
    assert tab.shown_keys()[0] == "k5"
    assert tab.value("document.querySelector('.distance').innerText") == "distance 0.0000"
    assert tab.value("document.querySelector('#asked img').naturalWidth") == 320
    assert tab.value(FOCUSED) == "heading"
    assert tab.value("document.querySelector('#status').innerText") == "14 pictures"


def test_a_picture_is_dropped(tab: Tab) -> None:
    tab.open()
    tab.do(tab.page.drop_file("#drop", tab.folder / "q.jpg"))
    tab.wait_for_answer("Nearest to your picture")
    assert tab.shown_keys()[0] == "k5"
    assert tab.value("document.querySelector('#drop').className") == "drop"


def test_a_picture_is_pasted(tab: Tab) -> None:
    tab.open()
    data = list((tab.folder / "q.jpg").read_bytes())
    tab.value(
        f"(() => {{ const data = new DataTransfer();"
        f"data.items.add(new File([new Uint8Array({data})], 'q.jpg', {{type: 'image/jpeg'}}));"
        "document.body.dispatchEvent("
        "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})); })()"
    )
    tab.wait_for_answer("Nearest to your picture")
    assert tab.shown_keys()[0] == "k5"


def test_a_neighbour_is_clicked_and_back_again(tab: Tab) -> None:
    tab.open()
    tab.do(tab.page.choose_file("#file", tab.folder / "q.jpg"))
    tab.wait_for_answer("Nearest to your picture")
    before = tab.shown_keys()
    tab.value("document.querySelectorAll('.card')[1].click()")
    tab.wait_for_answer(f"Nearest to {before[1]}")
    assert before[1] not in tab.shown_keys()
    assert len(tab.shown_keys()) == NUM_SHOWN + GONE - 1
    assert before[1] in tab.value("document.querySelector('#asked').innerText")
    tab.value("history.back()")
    tab.wait_for_answer("Nearest to your picture")
    assert tab.shown_keys() == before
    tab.value("history.forward()")
    tab.wait_for_answer(f"Nearest to {before[1]}")


def test_pictures_that_are_not_seen_any_more_keep_no_question_waiting(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thumbnails that never come take all of a browser's connections; the click is answered, and
    after a question without an answer they are asked for once more."""
    go = threading.Event()
    picture_of = SourcePictures.picture

    def held(pictures: SourcePictures, *place: Any) -> bytes:
        assert go.wait(300)
        return picture_of(pictures, *place)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(SourcePictures, "picture", held)
            tab.do(tab.page.ask("Network.setCacheDisabled", cacheDisabled=True))
            tab.do(tab.page.open("about:blank", DESKTOP, 900))
            tab.do(tab.page.open(tab.site.url, DESKTOP, 900))
            tab.wait_for("document.querySelectorAll('.card').length > 10")
            third = tab.value("document.querySelectorAll('.card .key')[2].innerText")
            tab.value("document.querySelectorAll('.card')[2].click()")
            heading = "document.querySelector('#heading').innerText"
            tab.wait_for(f"{heading} == 'Nearest to {third}'")
            tab.value("document.querySelector('#key').value = 'nobody'")
            tab.value("document.querySelector('#by-key').requestSubmit()")
            tab.wait_for("!document.querySelector('#problem').hidden")
            assert tab.value("document.querySelectorAll('.frame img, .gone').length") == 0
    finally:
        go.set()
        tab.do(tab.page.ask("Network.setCacheDisabled", cacheDisabled=False))
    tab.wait_for_answer(f"Nearest to {third}")
    assert tab.value("document.querySelectorAll('.card img').length") >= NUM_SHOWN - 1


def test_what_is_looked_for_is_told_without_marks(tab: Tab) -> None:
    tab.open()
    told = tab.value(
        "(() => { document.querySelector('#key').value = 'k\\u202e7';"
        "document.querySelector('#by-key').requestSubmit();"
        "return document.querySelector('#status').innerText; })()"
    )
    assert told == "Looking for what is nearest …"
    tab.wait_for("!document.querySelector('#problem').hidden")
    problem = tab.value("document.querySelector('#problem').innerText")
    assert problem.endswith("no picture with key k\\u202e7")


def test_a_key_is_typed(tab: Tab) -> None:
    tab.open()
    tab.value("document.querySelector('#key').focus()")
    tab.do(tab.page.ask("Input.insertText", text="k7"))
    tab.press("Enter")
    tab.wait_for_answer("Nearest to k7")
    tab.value("document.querySelector('#key').select()")
    tab.do(tab.page.ask("Input.insertText", text="nobody"))
    tab.press("Enter")
    tab.wait_for("!document.querySelector('#problem').hidden")
    problem = tab.value("document.querySelector('#problem').innerText")
    assert problem.endswith("no picture with key nobody")
    assert len(tab.shown_keys()) == NUM_SHOWN + GONE - 1  # what was there is there still


def test_by_keyboard_alone(tab: Tab) -> None:
    tab.open()
    tab.value("document.body.focus()")
    order = []
    for _ in range(6):
        tab.press("Tab")
        order.append(tab.value(FOCUSED))
    assert order == ["file", "key", "shard", "button", "others", "card"]
    columns = tab.value(
        "(getComputedStyle(document.querySelector('.grid')).gridTemplateColumns).split(' ').length"
    )
    assert columns == 6
    places = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "End", "Home"):
        tab.press(key)
        places.append(tab.focused())
    assert places == [1, 7, 6, 0, 0, NUM_SHOWN + GONE - 1, 0]
    tab.press("ArrowRight", "ArrowRight")
    third = tab.value("document.activeElement.querySelector('.key').innerText")
    tab.press("Enter")
    tab.wait_for_answer(f"Nearest to {third}")
    assert tab.value(FOCUSED) == "heading"
    tab.press("ArrowDown")
    assert tab.focused() == 0
    tab.press("Tab", modifiers=SHIFT)
    assert tab.value(FOCUSED) == "others"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.value(outline) == "solid"


def test_everything_has_a_name(tab: Tab) -> None:
    """What a screen reader has: the browser's own tree of roles and names."""
    tab.open()
    tab.value("document.querySelector('#key').value = 'k3'")
    tab.value("document.querySelector('#by-key').requestSubmit()")
    tab.wait_for_answer("Nearest to k3")
    nodes = tab.do(tab.page.ask("Accessibility.getFullAXTree"))["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node["name"].get("value", ""))
    assert named["textbox"] == ["Key", "Shard (optional)"]
    assert "Nearest to k3" in named["heading"]
    assert {"Find", "Show some"} <= set(named["button"])
    assert "" not in [*named["button"], *named["image"], *named["list"]]
    assert "caption 5, k5, shard a, distance " in " ".join(named["button"])
    assert named["status"], "a live region tells how it goes on"
    assert len(named["listitem"]) == NUM_SHOWN + GONE - 1


@pytest.mark.parametrize("width", [DESKTOP, PHONE, NARROW])
def test_nothing_is_wider_than_the_window(tab: Tab, width: int) -> None:
    tab.open(width)
    tab.do(tab.page.choose_file("#file", tab.folder / "q.jpg"))
    tab.wait_for_answer("Nearest to your picture")
    assert tab.do(tab.page.width()) == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    columns = "getComputedStyle(document.querySelector('.grid')).gridTemplateColumns"
    assert len(tab.value(columns).split()) == (6 if width == DESKTOP else 2)
    if width != DESKTOP:  # a finger's size
        heights = "[...document.querySelectorAll('.button')].map((e) => e.offsetHeight)"
        assert min(tab.value(heights)) >= 40


def test_dark_and_light(tab: Tab) -> None:
    tab.open()
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        tab.do(tab.page.prefer(scheme))
        seen[scheme] = tab.value(paper)
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


def test_a_bad_picture_and_one_too_large(tab: Tab) -> None:
    tab.open()
    bad = tab.folder / "bad.jpg"
    bad.write_bytes(b"<html>")
    tab.do(tab.page.choose_file("#file", bad))
    tab.wait_for("!document.querySelector('#problem').hidden")
    problem = "document.querySelector('#problem').innerText"
    assert tab.value(problem).startswith("the picture: decode: unidentified: 6 bytes")
    with bad.open("wb") as large:
        large.truncate(MAX_UPLOAD_BYTES + 1)
    tab.do(tab.page.choose_file("#file", bad))
    tab.wait_for(f"{problem}.includes('more than 32 MiB')")
    tab.do(tab.page.choose_file("#file", tab.folder / "q.jpg"))
    tab.wait_for_answer("Nearest to your picture")
    assert tab.value("document.querySelector('#problem').hidden") is True


def test_reload_shows_the_same(tab: Tab) -> None:
    tab.open()
    tab.value("document.querySelector('#key').value = 'k3'")
    tab.value("document.querySelector('#by-key').requestSubmit()")
    tab.wait_for_answer("Nearest to k3")
    before = tab.shown_keys()
    tab.value("window.before = true")
    tab.do(tab.page.ask("Page.reload"))
    tab.wait_for("window.before !== true && document.readyState == 'complete'")
    tab.wait_for_answer("Nearest to k3")
    assert tab.shown_keys() == before
