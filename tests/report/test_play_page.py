"""The playground in a real browser: a picture is chosen, noised, drawn on; samples are steered before one's eyes."""

import threading
import time

import pytest
from browser import CHROMIUM, CONTRAST, DESK, PHONE, Browser

from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.play.playground import Playground
from metaflowmaps.lab.play.server import PlayServer

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.attack,  # a browser that waits for a network
]
SOURCES = "[...document.querySelectorAll('#{} img')].map(i => i.src)"


@pytest.fixture(scope="module")
def server():
    playground = Playground(OpenedModel.open("digits", "cpu"))
    with PlayServer(playground) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        playground.close()
        started.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def until(browser, expression, seconds=60):
    end = time.monotonic() + seconds
    while not (value := browser.evaluate(expression)):
        assert time.monotonic() < end, (expression, browser.evaluate("document.body.innerText"))
        time.sleep(0.05)
    return value


def opened(browser, server, width, scheme="light"):
    browser.open(server.url, width, scheme)
    until(browser, "document.querySelectorAll('#draws img').length === 16")


def complaints(browser):
    return [
        m["params"]
        for m in browser.events
        if m.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        or (m.get("method") == "Runtime.consoleAPICalled" and m["params"]["type"] in ("error", "warning"))
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_fits_and_reads_well(browser, server, width, scheme):
    opened(browser, server, width, scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRAST)["worst"][0] >= 4.5
    assert complaints(browser) == []


def test_draws_follow_the_slider_the_noise_and_the_brush(browser, server):
    opened(browser, server, DESK)
    first = browser.evaluate(SOURCES.format("draws"))
    slide = """(() => {{ const t = document.getElementById('t'); t.value = {};
      t.dispatchEvent(new Event('input')); }})()"""
    browser.evaluate(slide.format(1))
    until(browser, f"new Set({SOURCES.format('draws')}).size === 1")  # at t = 1 the picture itself
    browser.evaluate(slide.format(0.25))
    until(browser, f"JSON.stringify({SOURCES.format('draws')}) === JSON.stringify({first})")
    browser.evaluate("document.getElementById('noise').click()")
    until(browser, f"JSON.stringify({SOURCES.format('draws')}) !== JSON.stringify({first})")
    browser.evaluate(slide.format(1))
    before = until(browser, f"new Set({SOURCES.format('draws')}).size === 1 && {SOURCES.format('draws')}[0]")
    x, y = browser.evaluate("""(() => { const at = document.getElementById('canvas').getBoundingClientRect();
      return [at.x + at.width / 4, at.y + at.height / 4]; })()""")
    for kind, buttons in (("mousePressed", 1), ("mouseReleased", 0)):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)
    until(browser, f"{SOURCES.format('draws')}[0] !== '{before}'")
    assert browser.evaluate("document.querySelector('#choices .chosen')") is None
    assert complaints(browser) == []


def test_samples_are_steered_stopped_and_told(browser, server):
    opened(browser, server, DESK)
    browser.evaluate("""document.getElementById('steps').value = 20; document.getElementById('num').value = 4;
      document.getElementById('steer').click()""")
    until(browser, "document.querySelector('#runs tbody tr.chosen')?.cells.length === 4")
    titles = browser.evaluate("[...document.querySelectorAll('#samples img')].map(i => i.title)")
    assert len(titles) == 4
    assert all(title.startswith("reward ") and ", seed " in title for title in titles)
    command = browser.evaluate("document.getElementById('command').textContent")
    assert command.startswith("mfm steer digits --reward margin ")
    assert "--steps 20 --num 4" in command
    assert "/samples.safetensors" in browser.evaluate("document.getElementById('save-tensors').href")
    browser.evaluate("""document.getElementById('steps').value = 250; document.getElementById('num').value = 64;
      document.getElementById('steer').click()""")
    until(browser, "!document.getElementById('stop').disabled")
    browser.evaluate("document.getElementById('stop').click()")
    until(browser, "document.getElementById('steering-said').textContent === 'stopped'")
    assert browser.evaluate("document.querySelectorAll('#runs tbody tr').length") == 1
    assert complaints(browser) == []


def test_what_is_wrong_is_said_in_the_page(browser, server):
    opened(browser, server, DESK)
    browser.evaluate("document.getElementById('words').value = '77'; document.getElementById('steer').click()")
    until(browser, "document.getElementById('steering-said').textContent.includes('margin:77')")
    assert browser.evaluate("document.getElementById('steer').disabled") is False
