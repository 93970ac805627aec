"""A headless Chromium, driven through `chromedriver` (the WebDriver protocol, over HTTP)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs Debian's chromium and chromium-driver"
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


class Browser:
    """One window; a context manager that ends what it has started."""

    def __init__(self, folder: Path) -> None:
        """`folder` is empty, for the profile."""
        assert CHROMIUM is not None
        assert DRIVER is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._root = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait()
        chosen = {"binary": CHROMIUM, "args": [*_OPTIONS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": chosen, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{session['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", self._session, None)
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=20)

    def open(self, page: Path, *, width: int, dark: bool, media: str = "screen") -> None:
        """Shows a file in a window of that width, as a reader who prefers dark pages, or light."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._post(f"{self._session}/url", url=page.as_uri())

    def run(self, script: str) -> Any:
        """What a script returns that the driver runs in the page."""
        return self._post(f"{self._session}/execute/sync", script=script, args=[])

    def run_async(self, script: str) -> Any:
        """What a script hands to its last argument, a function that the driver waits for."""
        return self._post(f"{self._session}/execute/async", script=script, args=[])

    def press(self, key: str) -> None:
        """A key of the keyboard, pressed and let go: a character, or a code of WebDriver's."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self._post(f"{self._session}/actions", actions=[keyboard])

    def print_pdf(self, path: Path) -> None:
        """Prints the page as a reader's "Save as PDF" does, on the paper that the page asks for."""
        self._devtools("Emulation.setEmulatedMedia", media="")
        printed = self._devtools("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(printed["data"]))

    def complaints(self) -> list[str]:
        """Errors of the console since the last call."""
        return [entry["message"] for entry in self._post(f"{self._session}/se/log", type="browser")]

    def screenshot(self, path: Path) -> None:
        """The whole page, down to its end, as PNG."""
        shot = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _devtools(self, command: str, **params: Any) -> Any:
        return self._post(f"{self._session}/goog/cdp/execute", cmd=command, params=params)

    def _wait(self) -> None:
        for _ in range(200):
            try:
                if self._ask("GET", "/status", None)["ready"]:
                    return
            except urllib.error.URLError:
                time.sleep(0.05)
        raise AssertionError("chromedriver does not answer")

    def _post(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        asked = urllib.request.Request(self._root + path, body, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(asked, timeout=60) as answer:
            return json.load(answer)["value"]
