"""The report in a real browser: it loads silently and offline, fits a phone, and reads well in light and in dark."""

import http.server
import threading

import pytest
from browser import CHROMIUM, DESK, PHONE, WIDTH, Browser, faults
from made_runs import everything, picture, telling

from metaflowmaps.lab.report.html import write_report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium, to see the report in a browser"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    return write_report([telling(place / "story"), *everything(place)], place / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_report_is_sound(browser, page, width, scheme):
    assert faults(browser, page, width, scheme) == {}


def test_wide_tables_and_figures_scroll_in_their_own_boxes_and_the_first_column_stays(browser, page):
    browser.open(page.as_uri(), PHONE, "light")
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    sizes = browser.evaluate(WIDTH)
    assert sizes["scroll"] == PHONE
    assert sizes["held"] >= 3  # the steering table, the carried one, the 13-inch figure
    shift = """(() => { const box = [...document.querySelectorAll('.scroll')].find(
      e => e.querySelector('table') && e.scrollWidth > e.clientWidth + 50);
      const left = i => box.querySelectorAll('tbody td')[i].getBoundingClientRect().left, before = [left(0), left(1)];
      box.scrollLeft = 50; return [left(0) - before[0], left(1) - before[1]]; })()"""
    assert browser.evaluate(shift) == [0, -50]


def test_dark_and_light_differ_and_figures_keep_their_white_card(browser, page):
    grounds = {}
    for scheme in ("light", "dark"):
        browser.open(page.as_uri(), DESK, scheme)
        ground = "getComputedStyle(document.querySelector('{}')).backgroundColor"
        grounds[scheme] = [browser.evaluate(ground.format(what)) for what in ("body", "figure .scroll")]
    assert grounds["light"][0] != grounds["dark"][0]
    assert grounds["light"][1] == grounds["dark"][1] == "rgb(255, 255, 255)"


def test_contents_lead_to_sections_and_details_unfold_without_a_script(browser, page):
    browser.open(page.as_uri(), PHONE, "light")
    browser.evaluate("document.querySelectorAll('nav a')[2].click()")
    assert browser.evaluate("location.hash") == "#section-3"
    top = "document.getElementById('section-3').getBoundingClientRect().top"
    assert abs(browser.evaluate(top)) < 50
    folded = "document.querySelector('#section-1 details pre').checkVisibility()"
    assert browser.evaluate(folded) is False
    browser.evaluate("document.querySelector('#section-1 details:has(pre) summary').click()")
    assert browser.evaluate(folded) is True


PANELS = """[...document.querySelectorAll('.card:nth-child({}) .panel')].filter(p => p.checkVisibility())
  .map(p => p.dataset.name)"""
READOUT = "document.querySelector('.card:nth-child({}) .readout').textContent"


def point(browser, selector):
    place = browser.evaluate(f"""(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView();
      const at = e.getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2]; }})()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    return place


def press(browser, selector):
    x, y = point(browser, selector)
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_slider_a_table_and_the_pointer_turn_the_story(browser, page):
    browser.open(page.as_uri(), DESK, "light")
    assert browser.evaluate(PANELS.format(1)) == ["t = 0.5"]  # the nearest to 0.3
    browser.evaluate("""(() => { const s = document.querySelector('input[type=range]'); s.value = 0;
      s.dispatchEvent(new Event('input')); })()""")
    assert browser.evaluate(PANELS.format(1)) == ["t = 0"]
    point(browser, ".panel:not([hidden]) .strip img:nth-child(3)")
    assert browser.evaluate(READOUT.format(1)) == "draw 2, seed 12"

    assert browser.evaluate(PANELS.format(2))[-1] == "MFM-GF"
    point(browser, ".card:nth-child(2) .panels .panel:not([hidden]) img")
    assert browser.evaluate(READOUT.format(2)) == "reward 1.5, seed 7"
    press(browser, ".card:nth-child(2) tbody button")
    assert browser.evaluate(PANELS.format(2))[-1] == "best of 4"
    assert browser.evaluate("document.querySelector('tr.chosen').cells[0].textContent") == "best of 4"


def test_small_tables_fit_a_phone(browser, page):
    """The story's, and the few columns of the steering run."""
    browser.open(page.as_uri(), PHONE, "light")
    sticking_out = """(() => { const cells = [...document.querySelectorAll('.card td, .card th, .small td, .small th')]
        .filter(cell => cell.checkVisibility());
      return [cells.length, cells.filter(cell => cell.scrollWidth > cell.clientWidth
        || cell.getBoundingClientRect().right > innerWidth - 8).map(cell => cell.textContent)]; })()"""
    seen, out = browser.evaluate(sticking_out)
    assert seen > 30
    assert out == []


def test_nothing_of_a_story_is_lost_without_scripts(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page.as_uri(), DESK, "light")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.evaluate(PANELS.format(1)) == ["t = 0", "t = 0.5"]
    assert browser.evaluate(PANELS.format(2)) == ["lean", "best of 4", "MFM-GF"]
    assert browser.evaluate("[...document.querySelectorAll('.card .name')].every(n => n.checkVisibility())")


def test_a_script_that_a_page_did_not_come_with_does_not_run(browser, tmp_path, page):
    file = tmp_path / "page.html"
    file.write_text(page.read_text().replace("</main>", "<script>document.title = 'run'</script></main>"))
    browser.open(file.as_uri(), DESK, "light")
    assert browser.evaluate("document.title") == "Meta Flow Maps report"


BAD = {
    "wide": '<table style="width: 900px"><tr><td>wide</td></tr></table>',
    "images": '<img alt="broken" width="10" src="data:image/png;base64,iVBORw0KGgo=">',
    "console": '<p>shown</p><script>console.error("an error")</script>',
    "contrast": '<p style="color: #999; background: #aaa">hard to read</p>',
}
SOUND = '<!doctype html><meta name="viewport" content="width=device-width"><p>sound</p>'


@pytest.mark.parametrize("kind", BAD)
def test_the_check_sees_what_is_wrong(browser, tmp_path, kind):
    file = tmp_path / "page.html"
    file.write_text(SOUND)
    assert faults(browser, file, PHONE, "light") == {}
    file.write_text(SOUND + BAD[kind])
    assert faults(browser, file, PHONE, "light").keys() == {kind}


def test_the_check_sees_a_warning_an_exception_and_a_picture_without_words(browser, tmp_path):
    picture(tmp_path / "x.png")
    file = tmp_path / "page.html"
    for body, kind in (
        ("<script>console.warn('careful')</script>", "console"),
        ("<script>undefined_name()</script>", "console"),
        ('<img src="x.png">', "images"),
    ):
        file.write_text(SOUND + body)
        assert kind in faults(browser, file, PHONE, "light")


def test_the_check_sees_a_request_and_the_report_would_not_let_it_out(browser, tmp_path, page):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        link = f'<link rel="stylesheet" href="http://127.0.0.1:{server.server_port}/style.css">'
        file = tmp_path / "page.html"
        file.write_text(SOUND + link)
        assert "requests" in faults(browser, file, PHONE, "light")
        assert asked == ["/style.css"]
        file.write_text(page.read_text().replace("</main>", f"{link}</main>"))
        assert "console" in faults(browser, file, PHONE, "light")  # the policy refuses aloud, and nothing goes out
        assert asked == ["/style.css"]
        server.shutdown()
