"""A headless Chromium for tests, over the W3C WebDriver interface of chromedriver."""

import base64
import os
import shutil
import subprocess
import time
from pathlib import Path

import requests
from ports import reserve_port

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's key of an element
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Space": " ", "Control": "\ue009"}
KEYS |= {"Left": "\ue012", "Right": "\ue014"}
PATIENCE = 120  # seconds, on a busy machine


def find_programs() -> tuple[str, str] | None:
    """(Chromium, chromedriver), or None if one of them is not installed."""
    names = ("google-chrome", "chrome", "chromium", "chromium-browser")  # chromedriver is often that of the first
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver", path=os.environ.get("CHROMEWEBDRIVER")) or shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A browser with one page.

    folder: an empty folder for its profile.

    Use it as a context; it ends with it.
    """

    def __init__(self, folder: Path):
        browser, driver = find_programs()
        self.web = requests.Session()
        self.web.trust_env = False  # the driver is on this machine, whatever proxy is set
        with reserve_port() as held:
            port = held.getsockname()[1]
        self.driver = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.address = f"http://127.0.0.1:{port}"
        chrome = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._wait_for_driver()
            found = self._post("session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.kill()
            raise
        self.address += f"/session/{found['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.web.delete(self.address, timeout=PATIENCE)
        finally:
            self.driver.terminate()
            self.driver.wait(PATIENCE)

    def _wait_for_driver(self) -> None:
        limit = time.monotonic() + PATIENCE
        while True:
            try:
                if self.web.get(f"{self.address}/status", timeout=10).json()["value"]["ready"]:
                    return
            except requests.ConnectionError:
                if time.monotonic() > limit or self.driver.poll() is not None:
                    raise
            time.sleep(0.05)

    def _post(self, command: str, content: dict):
        reply = self.web.post(f"{self.address}/{command}", json=content, timeout=PATIENCE).json()["value"]
        if isinstance(reply, dict) and "error" in reply:
            raise RuntimeError(f"{command}: {reply['error']}: {reply['message']}")
        return reply

    def _devtools(self, command: str, **parameters):
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, width: int, height: int = 900, style: str = "light") -> None:
        """Sets the size of the window in pixels, and the style of the system."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **sizes)
        self._devtools(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": style}], media=""
        )

    def open(self, path: Path) -> None:
        """Loads a page, also one that is open, and waits for it."""
        self._post("url", {"url": "about:blank"})
        self._post("url", {"url": path.as_uri()})
        limit = time.monotonic() + PATIENCE
        while self.run("return [location.href, document.readyState]") != [path.as_uri(), "complete"]:
            if time.monotonic() > limit:
                raise TimeoutError(f"{path} does not load")
            time.sleep(0.05)

    def run(self, script: str, *arguments):
        """What a JavaScript function body returns."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        """The visible texts of the elements that are displayed."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())"
            ".map(e => e.innerText.trim())",
            selector,
        )

    def click(self, selector: str, index: int = 0) -> None:
        """Clicks as a mouse does: an element that is covered or out of sight is an error."""
        found = self._post("elements", {"using": "css selector", "value": selector})[index]
        self._post(f"element/{found[ELEMENT]}/click", {})

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, where the focus is; "Control+v" is both at once."""
        actions = []
        for key in keys:
            held = [KEYS.get(part, part) for part in (key.split("+") if len(key) > 1 else [key])]
            actions += [{"type": "keyDown", "value": part} for part in held]
            actions += [{"type": "keyUp", "value": part} for part in reversed(held)]
        self._post("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def messages(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._post("se/log", {"type": "browser"})]

    def picture(self, path: Path, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        found = self._devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
