"""Debian's Chromium without a window, over its own debugging protocol: pages at a chosen width,
with headers of our own, photographed once they show what they should."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

START_SECONDS = 120
LOOK_SECONDS = 0.25
GONE = re.compile("navigated or closed|context was destroyed|Cannot find context")
COLOURS = 128  # of a palette: a third of the size, and nobody sees it on a page


class ContextGoneError(Exception):
    """The page went to another address while it was asked."""


class Page:
    """One tab. `events` are those that it has told of, of domains that were enabled."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json()
            if "method" in answer:
                self.events.append(answer)
            elif answer.get("id") == number:
                if GONE.search(str(answer.get("error", ""))):
                    raise ContextGoneError(method)
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    async def open(
        self, url: str, width: int, height: int, headers: Mapping[str, str] | None = None
    ) -> None:
        await self.ask("Page.enable")
        await self.ask("Network.enable")
        await self.ask("Network.setExtraHTTPHeaders", headers=dict(headers or {}))
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        await self.ask("Page.navigate", url=url)

    async def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        for _ in range(int(seconds / LOOK_SECONDS)):
            with suppress(ContextGoneError):
                if await self.value(condition) is True:
                    return
            await asyncio.sleep(LOOK_SECONDS)
        raise AssertionError(f"never {condition}: {await self.value('document.body.innerText')}")

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression, as JSON has it; of a promise, what comes of it."""
        found = await self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return found["result"].get("value")

    async def press(self, key: str, modifiers: int = 0) -> None:
        """A key of the keyboard, by its name in the UI Events standard."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        event = {"key": key, "code": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
        await self.ask("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        await self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    async def choose_file(self, selector: str, file: Path) -> None:
        """What a file dialog does."""
        document = await self.ask("DOM.getDocument")
        node = document["root"]["nodeId"]
        found = await self.ask("DOM.querySelector", nodeId=node, selector=selector)
        await self.ask("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(file)])

    async def drop_file(self, selector: str, file: Path) -> None:
        """What dragging a file onto an element does."""
        box = await self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.ask("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)

    async def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.ask("Emulation.setEmulatedMedia", features=[feature])

    async def wait_for_text(self, *texts: str) -> None:
        for text in texts:
            await self.wait_for(f"document.body.innerText.includes({text!r})")

    async def width(self) -> int:
        """What the page's content takes, to be compared with the window's."""
        found = await self.ask("Page.getLayoutMetrics")
        return int(found["cssContentSize"]["width"])

    async def photograph(self, file: Path, most: int | None = None) -> None:
        """The whole page, down to `most` pixels; a PNG of few colours."""
        size = (await self.ask("Page.getLayoutMetrics"))["cssContentSize"]
        height = min(size["height"], most or size["height"])
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1}
        taken = await self.ask(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        with Image.open(io.BytesIO(base64.b64decode(taken["data"]))) as picture:
            small = picture.convert("RGB").quantize(COLOURS)
        small.save(file, optimize=True)


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    program = shutil.which("chromium")
    assert program is not None, "chromium is not installed (Debian: apt-get install chromium)"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--remote-debugging-port=0", "--remote-debugging-address=127.0.0.1",
            f"--user-data-dir={folder}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(folder) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                url = await _page(session, port)
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), START_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _port(file: Path) -> int:
    for _ in range(int(START_SECONDS / LOOK_SECONDS)):
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        await asyncio.sleep(LOOK_SECONDS)
    raise AssertionError("chromium does not start")


async def _page(session: aiohttp.ClientSession, port: int) -> str:
    """The address of the first tab, which may come a little after the port."""
    for _ in range(int(START_SECONDS / LOOK_SECONDS)):
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = await answer.json()
        if pages := [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]:
            return str(pages[0])
        await asyncio.sleep(LOOK_SECONDS)
    raise AssertionError("chromium has no tab")
