"""Chromium by chromedriver's own protocol (W3C WebDriver), for tests and pictures of the report page."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference to an element
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def is_installed() -> bool:
    """Return whether chromium and chromedriver are on the PATH."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


class Browser:
    """One window. Selectors are CSS; an element that is not there is an error."""

    def __init__(self, folder: Path, *, width: int = 1440, height: int = 1000, dark: bool = False) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        if dark:
            flags.append("--force-dark-mode")
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": flags}}
        deadline = time.monotonic() + 60
        while True:
            try:
                made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except (ConnectionError, urllib.error.URLError):
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)
        self._base += f"/session/{made['sessionId']}"
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self.use_scheme("dark" if dark else "light")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", "", None)
        finally:
            self._driver.terminate()
            self._driver.wait(30)

    def _call(self, method: str, path: str, data: Any) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self._base + path, body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Run a command of Chromium's DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def use_scheme(self, name: str) -> None:
        """Prefer the light or dark scheme, and no motion: a click would wait for the end of a scroll."""
        wanted = {"prefers-color-scheme": name, "prefers-reduced-motion": "reduce"}
        features = [{"name": feature, "value": value} for feature, value in wanted.items()]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script in the page returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """Return the reference of the first element."""
        return str(self._call("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT])

    def click_button(self, text: str) -> None:
        """Click the button of this text."""
        script = "return [...document.querySelectorAll('button')].find((b) => b.textContent === arguments[0])"
        self._click(self.run(script, text)[_ELEMENT])

    def attributes(self, selector: str, name: str) -> list[str | None]:
        """Return an attribute of all matching elements."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((n) => n.getAttribute(arguments[1]))"
        )
        return list(self.run(script, selector, name))

    def click(self, selector: str) -> None:
        """Scroll to an element and click its middle, as a mouse would."""
        self._click(self.find(selector))

    def _click(self, element: str) -> None:
        # WebDriver scrolls just into view, below the bar that stays at the top.
        self.run("arguments[0].scrollIntoView({block: 'center'})", {_ELEMENT: element})
        self._call("POST", f"/element/{element}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into a field."""
        self._call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def choose(self, selector: str, value: str) -> None:
        """Choose the option of a select by its value."""
        self.click(f'{selector} option[value="{value}"]')

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all matching elements; of HTML what is visible."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((n) => n.innerText ?? n.textContent)"
        )
        return list(self.run(script, selector))

    def count(self, selector: str) -> int:
        """Return the number of matching elements."""
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def drag(self, selector: str, start: float, end: float) -> None:
        """Press the mouse at a share ``start`` of an element's width, move to ``end``, release it."""
        script = "arguments[0].scrollIntoView({block: 'center'}); return arguments[0].clientWidth"
        reference = {_ELEMENT: self.find(selector)}
        width = self.run(script, reference)

        def at(share: float) -> dict[str, Any]:
            x = round((share - 0.5) * width)
            return {"type": "pointerMove", "duration": 50, "origin": reference, "x": x, "y": 0}

        down, up = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        steps = [at(start), down, at((start + end) / 2), at(end), up]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._call("POST", "/actions", {"actions": [pointer]})

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the window, or of the ``whole`` page."""
        self._capture(path, captureBeyondViewport=whole)

    def picture(self, path: Path, first: str, last: str, margin: int = 12) -> None:
        """Write a WebP of the page from the top of element ``first`` to the bottom of ``last``."""
        script = """
            const box = (selector) => document.querySelector(selector).getBoundingClientRect();
            const [first, last] = [...arguments].map(box);
            return [first.top + scrollY, last.bottom + scrollY, document.documentElement.clientWidth];
        """
        top, bottom, width = self.run(script, first, last)
        start = max(top - margin, 0)
        clip = {"x": 0, "y": start, "width": width, "height": bottom + margin - start, "scale": 1}
        self._capture(path, captureBeyondViewport=True, clip=clip, format="webp", quality=85)

    def _capture(self, path: Path, **options: Any) -> None:
        shot = self.devtools("Page.captureScreenshot", **options)
        path.write_bytes(base64.b64decode(shot["data"]))
