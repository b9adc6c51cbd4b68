"""A headless Chromium driven over its DevTools pipe with the standard library, and what a page must satisfy in it."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(
    (
        path
        for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "/usr/bin/chromium"))
        if path
    ),
    None,
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
# the browser reads commands from file 3 and writes to file 4, whatever files the tests have open
LAUNCH = "import os,sys; a=sys.argv; os.dup2(int(a[1]),3); os.dup2(int(a[2]),4); os.execv(a[3],a[3:])"
PHONE, DESK = 390, 1280
LOAD = ("Page.lifecycleEvent", "load")

# every text's colour against what lies behind it: (ratio, text) of the least readable, large text (24 px) apart
CONTRAST = """(() => {
  const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[3] * a[i] + (1 - a[3]) * b[i]).concat([1]);
  const light = c => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]); };
  const page = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : page;
  document.querySelectorAll('details').forEach(d => d.open = true);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let worst = [99, ''], seen = 0;
  for (let n; n = walk.nextNode();) {
    if (!n.data.trim() || !n.parentElement.checkVisibility()) continue;
    seen++;
    const back = behind(n.parentElement), a = light(over(rgba(getComputedStyle(n.parentElement).color), back));
    const b = light(back), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, n.data.trim().slice(0, 40)];
  }
  return {worst, seen};
})()"""
IMAGES = """(document.querySelectorAll('details').forEach(d => d.open = true), Promise.all(
  [...document.images].filter(i => !i.closest('[hidden]')).map(i => i.decode().catch(() => 0).then(() =>
  ({alt: i.alt, width: i.naturalWidth, shown: i.getBoundingClientRect().width})))))"""
# what sticks out to the right without a scrolling ancestor to hold it
WIDTH = """({scroll: document.documentElement.scrollWidth, body: document.body.scrollWidth,
  held: [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length,
  behind: document.querySelectorAll('.scroll').length})"""


class Browser:
    """One Chromium with one tab."""

    def __init__(self, profile: Path):
        from_us, commands = os.pipe()
        answers, to_us = os.pipe()
        # away from 3 and 4, so that putting one in place does not close the other
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (from_us, to_us)]
        for fd in (from_us, to_us):
            os.close(fd)
        argv = [sys.executable, "-c", LAUNCH, *map(str, theirs), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(argv, pass_fds=theirs, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for fd in theirs:
            os.close(fd)
        self.commands, self.answers = commands, answers
        self.pending, self.events, self.number, self.session = b"", [], 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        number = self.number
        answer = self._until(lambda m: m.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def evaluate(self, expression: str):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, width: int, scheme: str) -> None:
        """Load ``url`` on a screen of that many pixels; events since then are in ``events``."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        loader = self.call("Page.navigate", url=url)["loaderId"]

        def loaded(message: dict) -> bool:
            """Of this document, not the one before."""
            event = message.get("params", {})
            return message.get("method") == "Page.lifecycleEvent" and (event["name"], event["loaderId"]) == (
                "load",
                loader,
            )

        if not any(map(loaded, self.events)):
            self._until(loaded)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.commands)
            os.close(self.answers)

    def _until(self, wanted, seconds: float = 30.0):
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.pending:
                line, self.pending = self.pending.split(b"\0", 1)
                message = json.loads(line)
                self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser did not answer in time"
            chunk = os.read(self.answers, 1 << 20)
            assert chunk, "the browser ended"
            self.pending += chunk


def faults(browser: Browser, page: Path, width: int, scheme: str) -> dict[str, list]:
    """What is wrong with a page, by kind; empty where all is well."""
    browser.open(page.as_uri(), width, scheme)
    assert browser.evaluate("location.href") == page.as_uri()
    images = browser.evaluate(IMAGES)
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    sizes = browser.evaluate(WIDTH)
    contrast = browser.evaluate(CONTRAST)
    requests = [m["params"]["request"]["url"] for m in browser.events if m.get("method") == "Network.requestWillBeSent"]
    found = {
        "console": [
            m["params"]
            for m in browser.events
            if m.get("method") == "Runtime.exceptionThrown"
            or (m.get("method") == "Runtime.consoleAPICalled" and m["params"]["type"] in ("error", "warning", "assert"))
            or (m.get("method") == "Log.entryAdded" and m["params"]["entry"]["level"] in ("error", "warning"))
        ],
        "images": [i for i in images if i["width"] == 0 or i["shown"] == 0 or not i["alt"]],
        "wide": [sizes] if max(sizes["scroll"], sizes["body"]) > width else [],
        "requests": [u for u in requests if u != page.as_uri() and not u.startswith("data:")],
        "contrast": [contrast] if contrast["worst"][0] < 4.5 or not contrast["seen"] else [],  # WCAG AA for body text
    }
    return {kind: what for kind, what in found.items() if what}
