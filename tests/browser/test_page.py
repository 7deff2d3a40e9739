"""The playground in a real browser: a plan asked from the form is drawn, shared, steered and read, without a network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.api.conftest import Server, serve_real

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1600"
)
FORM = {
    "model": "gpt2",
    "cluster": "a100-sxm-80g:4x1",
    "global_batch": "16",
    "sequence_length": "512",
    "pin-pp": "4",
    "pin-schedule": "1f1b",
    "deadline_s": "400",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_real(tmp_path_factory.mktemp("page"), "--workers", "1") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def wait_for(browser: Chrome, *phases: str, timeout_s: float = 420) -> str:
    end = time.monotonic() + timeout_s
    phase = ""
    while time.monotonic() < end:
        phase = browser.execute_script("return window.stagewright ? window.stagewright.phase : ''")
        if phase in phases:
            return str(phase)
        time.sleep(0.1)
    raise AssertionError(f"still {phase!r}: {browser.execute_script('return document.body.innerText')}")


def fill(browser: Chrome, values: dict[str, str]) -> None:
    for name, value in values.items():
        browser.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )


@pytest.fixture(scope="module")
def drawn(server: Server, browser: Chrome) -> Chrome:
    """The page after a plan was asked from the form."""
    browser.get(server.url)
    wait_for(browser, "ready")
    fill(browser, FORM)
    browser.find_element("id", "plan").click()
    wait_for(browser, "drawn")
    return browser


def test_a_plan_from_the_form_is_shown_with_what_was_proved(drawn: Chrome) -> None:
    state = drawn.execute_script(
        "return {plan: stagewright.plan, resource: stagewright.resource, request: stagewright.request}"
    )
    assert state["resource"]["state"] == "succeeded"
    assert state["plan"]["schedule"]["num_ranks"] == 4
    assert state["request"]["job"]["space"]["pins"] == {"pp": 4, "schedule": "1f1b"}
    text = drawn.find_element("id", "headline").text
    for words in ("step time", "tokens/s", "MFU", "bubble", "peak memory", "Proven"):
        assert words in text
    rows = drawn.find_elements("css selector", "#stages tbody tr")
    assert len(rows) == 4


PIXELS = """
const {gantt, viewport} = stagewright;
const canvas = gantt.canvas, ratio = canvas.width / canvas.clientWidth, plot = canvas.clientWidth - 58;
const pixel = (rank, time) => {
  const x = (58 + viewport.x(time, plot)) * ratio, y = (24 + (rank + 0.12) * gantt.rowHeight) * ratio;
  return [...canvas.getContext('2d').getImageData(Math.round(x), Math.round(y), 1, 1).data].slice(0, 3);
};
const t = stagewright.report.timeline, found = {F: [], B: [], idle: []};
for (let i = 0; i < t.rank.length; i++) {
  const kind = t.kinds[t.kind[i]];
  if (t.lane[i] === 0 && found[kind]) found[kind].push(pixel(t.rank[i], t.start_s[i] + 0.3 * (t.end_s[i] - t.start_s[i])));
}
const last = t.num_ranks - 1, first = t.rank.findIndex((r, i) => r === last && t.lane[i] === 0);
for (let k = 1; k < 9; k++) found.idle.push(pixel(last, t.start_s[first] * k / 10));
return found;
"""


def test_the_gantt_chart_has_forwards_backwards_and_the_bubble_where_they_run(drawn: Chrome) -> None:
    found = drawn.execute_script(PIXELS)
    microbatches = drawn.execute_script("return stagewright.plan.schedule.num_microbatches")
    assert len(found["F"]) == len(found["B"]) == 4 * microbatches
    assert all(blue > green and blue > red for red, green, blue in found["F"]), "forwards are blue"
    assert all(green > blue and green > red for red, green, blue in found["B"]), "backwards are green"
    for red, green, blue in found["idle"]:
        assert max(red, green, blue) - min(red, green, blue) < 30, "an idle rank is grey"
    assert drawn.execute_script("return stagewright.gantt.numDrawn") >= 8 * microbatches


def test_the_memory_chart_is_drawn_under_it_on_the_same_axis(drawn: Chrome) -> None:
    colored = drawn.execute_script(
        """const canvas = stagewright.memory.canvas;
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
          if (data[i + 3] > 0 && Math.max(data[i], data[i+1], data[i+2]) - Math.min(data[i], data[i+1], data[i+2]) > 40) count++;
        return count;"""
    )
    assert colored > 500
    widths = drawn.execute_script(
        "return [stagewright.gantt.canvas.clientWidth, stagewright.memory.canvas.clientWidth]"
    )
    assert widths[0] == widths[1]
    assert drawn.execute_script("return stagewright.gantt.viewport === stagewright.memory.viewport")


def test_wheel_keys_and_drag_steer_both_charts(drawn: Chrome) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    window = "return [stagewright.viewport.from_s, stagewright.viewport.to_s]"
    canvas = drawn.find_element("id", "gantt")
    whole = drawn.execute_script(window)
    ActionChains(drawn).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -200).perform()
    zoomed = drawn.execute_script(window)
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    canvas.send_keys("w")
    closer = drawn.execute_script(window)
    assert closer[1] - closer[0] < zoomed[1] - zoomed[0]
    canvas.send_keys("d")
    assert drawn.execute_script(window)[0] > closer[0]
    ActionChains(drawn).drag_and_drop_by_offset(canvas, 120, 0).perform()
    assert drawn.execute_script(window)[0] < closer[0] + (closer[1] - closer[0]) * 0.15
    canvas.send_keys("0")
    assert drawn.execute_script(window) == pytest.approx(whole)


def test_hovering_names_the_action_and_its_seconds_and_the_bubble(drawn: Chrome) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = drawn.find_element("id", "gantt")
    box = drawn.execute_script("const c = stagewright.gantt; return [c.canvas.clientWidth, c.height, c.rowHeight]")
    seen = {}
    for name, x, rank in (("first", 62, 0), ("idle", 62, 3)):
        y = 24 + (rank + 0.3) * box[2]
        ActionChains(drawn).move_to_element_with_offset(canvas, x - box[0] / 2, y - box[1] / 2).perform()
        seen[name] = drawn.find_element("id", "tooltip").text
    assert seen["first"].startswith("0F0 – forward")
    assert "microbatch 0" in seen["first"] and "s, from 0 s" in seen["first"]
    assert seen["idle"].startswith("bubble") and "rank 3 idles for" in seen["idle"]


def test_an_alternative_is_shown_when_it_is_chosen(drawn: Chrome) -> None:
    rows = drawn.find_elements("css selector", "#alternatives tbody tr")
    assert len(rows) > 1
    rows[1].find_element("tag name", "button").click()
    wait_for(drawn, "drawn")
    assert drawn.execute_script("return stagewright.chosen") == 1
    assert "alternative 1" in drawn.find_element("id", "headline").text
    drawn.find_elements("css selector", "#alternatives tbody tr")[0].find_element("tag name", "button").click()
    assert drawn.execute_script("return stagewright.chosen") == 0
    end = time.monotonic() + 60
    while drawn.execute_script("return stagewright.gantt === null") and time.monotonic() < end:
        time.sleep(0.05)


def test_the_timeline_is_there_as_a_table_too(drawn: Chrome) -> None:
    drawn.execute_script("document.querySelector('.table-alternative summary').click()")
    end = time.monotonic() + 60
    while not (cells := drawn.find_elements("css selector", ".table-alternative tbody tr")) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(cells) == drawn.execute_script("return Math.min(500, stagewright.report.timeline.rank.length)")
    assert "0F0" in cells[0].text


def test_every_control_has_a_name(drawn: Chrome) -> None:
    nameless = drawn.execute_script(
        """return [...document.querySelectorAll('input, select, textarea, button, canvas')].filter((element) =>
          !(element.labels && element.labels.length) && !element.getAttribute('aria-label') && !element.textContent.trim()
        ).map((element) => element.outerHTML)"""
    )
    assert nameless == []


def test_both_themes_draw(drawn: Chrome) -> None:
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    before = drawn.execute_script(background)
    drawn.find_element("id", "theme").click()
    assert drawn.execute_script(background) != before
    drawn.find_element("id", "theme").click()
    assert drawn.execute_script(background) == before


def test_a_wrong_field_is_said_at_the_field_while_it_is_typed(drawn: Chrome) -> None:
    def note(name: str, words: str) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            text = drawn.find_element("id", f"note-{name}").text
            if words in text:
                return text
            time.sleep(0.1)
        raise AssertionError(f"{words!r} never stood at {name}: {text!r}")

    fill(drawn, {"model": "gpt-2"})
    assert "did you mean gpt2" in note("model", "no model")
    fill(drawn, {"model": "gpt2", "global_batch": "0"})
    note("global_batch", "greater than or equal to 1")
    note("model", "")
    fill(drawn, {"global_batch": "16", "cluster": "a100-sxm-80g:8x0"})
    note("cluster", "0")
    fill(drawn, FORM)
    note("cluster", "4 × a100-sxm-80g")


def test_the_address_holds_the_question(server: Server, drawn: Chrome) -> None:
    address = drawn.current_url
    assert "#q=" in address and len(address) < 2000
    plan_id = drawn.execute_script("return stagewright.resource.id")
    drawn.get("about:blank")
    drawn.get(address)
    wait_for(drawn, "drawn")
    assert drawn.find_element("id", "model").get_attribute("value") == "gpt2"
    assert drawn.execute_script("return stagewright.request.job.space.pins.pp") == 4
    drawn.get(f"{server.url}/?plan={plan_id}")
    wait_for(drawn, "drawn")
    assert drawn.execute_script("return stagewright.resource.id") == plan_id


def test_what_cannot_fit_shows_the_diagnosis(drawn: Chrome) -> None:
    fill(drawn, {"model": "llama3.1-405b", "global_batch": "16"})
    drawn.find_element("id", "plan").click()
    wait_for(drawn, "answered")
    end = time.monotonic() + 60
    while not drawn.find_elements("id", "diagnosis") and time.monotonic() < end:
        time.sleep(0.1)
    assert "infeasible" in drawn.find_element("id", "diagnosis").text


def test_no_request_goes_to_another_origin_and_nothing_is_refused(server: Server, drawn: Chrome) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in drawn.get_log("performance")]
    urls = [item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"]
    assert any("/v1/simulations" in url for url in urls)
    foreign = [url for url in urls if not url.startswith((server.url, "data:", "blob:", "about:"))]
    assert foreign == []
    complaints = [entry["message"] for entry in drawn.get_log("browser") if entry["level"] == "SEVERE"]
    assert [text for text in complaints if "422" not in text] == []
