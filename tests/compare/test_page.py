"""The page in a real browser: it makes no requests and logs no errors, and sorts, filters and draws."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from qat_lightning.compare import Curve, Limits, Run, compare, decide, page
from qat_lightning.compare.ladder import Ladder, LadderRow
from qat_lightning.compare.page import page_data
from tests.compare.making import plain, qat

EVIL = "</script><script>window.broken=1</script><img src=https://example.org/x onerror=window.broken=1>"
EVIL += "\"'&<!--${title}\u2028"
FLAGS = ("quant/fake_quant_enabled", "quant/observers_enabled", "quant/batchnorm_frozen")


def trained(run: Run, start: int = 30, freeze: int = 70) -> Run:
    steps = [float(step) for step in range(0, 101, 10)]
    values = [1 - 0.9 ** (1 + step / 10) for step in steps]
    on = [float(step >= start) for step in steps]
    frozen = [float(step >= freeze) for step in steps]
    curves = {"val/acc": Curve(steps, values), "train/loss": Curve(steps, values[::-1])}
    if "int8/test/acc" in run.metrics:
        flags = (on, [1 - value for value in frozen], frozen)
        curves |= {key: Curve(steps, value) for key, value in zip(FLAGS, flags, strict=True)}
        layers = tuple({"layer": f"net.{i}", "kind": "Conv2d", "weight_sqnr_db": 40.0 + i} for i in range(4))
        run = dataclasses.replace(run, layers=layers)
    return dataclasses.replace(run, curves=curves)


RUNS = [
    *(trained(plain(seed, acc=0.98 + 0.001 * seed)) for seed in (0, 1)),
    *(trained(qat("fx", seed, acc=0.97 + 0.002 * seed, latency=2.0)) for seed in (0, 1)),
    *(trained(qat("pt2e", seed, acc=0.96, latency=1.0, size=0.9), start=50) for seed in (0, 1)),
    *(trained(qat("eager", seed, acc=0.95, latency=3.0)) for seed in (0, 1)),
    qat("fx", 9, status="failed", reason="it broke"),
]
LIMITS = Limits(max_drop=1.5)
LADDER = Ladder(
    "a drop of at most 0.01",
    "val/acc",
    "pp",
    (
        LadderRow("static", "fx x86, static", 5.0, 4.0, 6.0, 2.0, 1.25, 0.1, "misses drop", False),
        LadderRow("adaround", "fx x86, static, AdaRound", 0.5, None, None, 2.0, 1.25, 3.0, "keeps the target", True),
        LadderRow("qat_short", "trained", None, None, None, None, None, 0.0, f"not started {EVIL}", False),
    ),
    f"adaround keeps the target. {EVIL}",
)


def write(folder: Path, runs: list[Run], limits: Limits = LIMITS) -> str:
    comparison = compare(runs)
    path = folder / "page.html"
    path.write_text(page(comparison, decide(comparison, limits), limits, title=f"a title {EVIL}"), encoding="utf-8")
    return path.as_uri()


def asked_for(browser: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def opened(browser: webdriver.Chrome, tmp_path: Path) -> Any:
    """Open a page, and check these properties after any test."""
    browser.get_log("browser")
    browser.get_log("performance")

    def open_page(runs: list[Run], limits: Limits = LIMITS) -> webdriver.Chrome:
        browser.get(write(tmp_path, runs, limits))
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    assert {url.partition(":")[0] for url in asked_for(browser)} <= {"file", "data"}
    assert browser.execute_script("return window.broken === undefined")


def names(browser: webdriver.Chrome) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#table tbody .name")]


def click(browser: webdriver.Chrome, selector: str) -> None:
    browser.find_element(By.CSS_SELECTOR, selector).click()


def choose(browser: webdriver.Chrome, selector: str, value: str) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(script, browser.find_element(By.CSS_SELECTOR, selector), value)


def test_the_decision_is_said_with_its_figures(opened: Any) -> None:
    verdict = opened(RUNS).find_element(By.ID, "verdict").text
    assert "qat fx is the only one of 3 int8 configurations" in verdict
    assert "2.000 ms" in verdict
    assert "out/fx-0" in verdict


def test_rows_are_sorted_by_the_column_that_is_clicked(opened: Any) -> None:
    browser = opened(RUNS, Limits())
    assert names(browser) == ["float", "qat fx", "qat pt2e", "qat eager"]
    click(browser, "th[data-key=latency] button")
    assert names(browser) == ["qat pt2e", "qat fx", "qat eager", "float"]
    assert browser.find_element(By.CSS_SELECTOR, "th[data-key=latency]").get_attribute("aria-sort") == "ascending"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert names(browser) == ["float", "qat eager", "qat fx", "qat pt2e"]
    click(browser, "th[data-key=drop] button")
    assert names(browser)[-1] == "float"  # which has none
    click(browser, "th[data-key=label] button")
    assert names(browser) == ["float", "qat eager", "qat fx", "qat pt2e"]


def test_filters_leave_only_what_passes_all_of_them(opened: Any) -> None:
    browser = opened(RUNS)
    assert names(browser) == ["float", "qat fx"]  # the limits of the decision
    choose(browser, "#filters input[type=number]", "")
    assert len(names(browser)) == 4
    browser.find_element(By.CSS_SELECTOR, "#filters input[type=search]").send_keys("QAT e")
    assert names(browser) == ["qat pt2e", "qat eager"]
    choose(browser, "#filters select[data-setting='1']", "eager")
    assert names(browser) == ["qat eager"]
    click(browser, "#filters input[type=checkbox]")
    assert names(browser) == []
    assert "No configuration passes" in browser.find_element(By.ID, "table").text
    assert "0 of 4 shown" in browser.find_element(By.ID, "count").text


def heads(browser: webdriver.Chrome) -> list[str]:
    return [cell.text.strip() for cell in browser.find_elements(By.CSS_SELECTOR, "#table thead th")]


def tick(browser: webdriver.Chrome, key: str) -> None:
    browser.execute_script("document.getElementById('columns').open = true")
    click(browser, f"#columns input[data-column='{key}']")


def test_columns_are_chosen_and_any_logged_metric_can_be_one(opened: Any) -> None:
    runs = [dataclasses.replace(run, metrics=run.metrics | {"val/loss": 0.1 * k}) for k, run in enumerate(RUNS[:8])]
    browser = opened(runs, Limits())
    assert "val/loss" not in heads(browser)
    tick(browser, "metric:val/loss")
    tick(browser, "size")
    assert "val/loss" in heads(browser)
    assert "size (MB)" not in heads(browser)
    click(browser, "th[data-key='metric:val/loss'] button")
    assert names(browser) == ["float", "qat fx", "qat pt2e", "qat eager"]
    assert "Columns: " in browser.find_element(By.ID, "columns-count").text
    browser.find_element(By.CSS_SELECTOR, "#columns input[type=search]").send_keys("agree test")
    shown = [box for box in browser.find_elements(By.CSS_SELECTOR, "#columns label.tick") if box.is_displayed()]
    assert shown == []


def test_rows_are_grouped_by_a_setting_and_a_group_is_folded(opened: Any) -> None:
    browser = opened(RUNS, Limits())
    choose(browser, "#group-by", "0")
    groups = [row.get_attribute("data-group") for row in browser.find_elements(By.CSS_SELECTOR, "#table tr.group")]
    assert groups == ["method: float", "method: qat"]
    click(browser, "#table tr[data-group='method: qat'] button")
    assert names(browser) == ["float"]
    assert "96.03" in browser.find_element(By.CSS_SELECTOR, "#table tr[data-group='method: qat']").text


def test_what_is_said_to_be_drawn_is_among_what_is_shown(opened: Any) -> None:
    browser = opened(RUNS)
    assert browser.find_element(By.ID, "count").text == "2 of 4 shown, 2 of them drawn below"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curve-legend > span")) == 2


LONG = "a_setting.of_many_words=and_values"


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_no_column_is_out_of_sight_without_a_word_and_no_label_is_cut_within_one(opened: Any, width: int) -> None:
    runs = [
        dataclasses.replace(run, config=run.config | {"model": {LONG: f"value_{k % 3}_of_this_setting"}})
        for k, run in enumerate(RUNS[:8])
    ]
    browser = opened(runs, Limits())
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    try:
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for place in browser.find_elements(By.CSS_SELECTOR, ".scroll"):
            wider, cue, said = browser.execute_script(
                "const p = arguments[0], c = p.previousElementSibling;"
                "return [p.scrollWidth > p.clientWidth + 1, !c.hidden, c.textContent]",
                place,
            )
            assert wider == cue
            assert not wider or re.search(r"\d+ columns? to the right →", said)
            at_the_edge = browser.execute_script(
                "const p = arguments[0], edge = p.getBoundingClientRect().left + p.clientLeft + p.clientWidth;"
                "return [...p.querySelectorAll('thead th')].map(n => n.getBoundingClientRect())"
                ".filter(r => r.left < edge - 2 && r.right > edge + 2).length",
                place,
            )
            assert at_the_edge == 0, "a column is whole, or out of sight"
        cut = browser.execute_script(
            "return [...document.querySelectorAll('#table .name, #table .word, #verdict .word, th > span')]"
            ".filter(n => n.scrollWidth > n.clientWidth + 1 && getComputedStyle(n).display !== 'inline')"
            ".map(n => n.textContent)"
        )
        assert cut == []
        labels = {cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#table tbody .name")}
        words = {word for label in labels for word in re.split(r"[\s_=./,:-]+", label)}
        for text in browser.find_elements(By.CSS_SELECTOR, "#latency text.name"):
            assert set(re.split(r"[\s_=./,:-]+", text.text.replace("…", ""))) - {""} <= words
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_latencies_measured_beside_other_work_are_marked(opened: Any) -> None:
    runs = [qat("fx", seed, latency=latency) for seed, latency in enumerate((1.0, 9.0, 2.0))]
    browser = opened([*runs, qat("pt2e", 0)], Limits(max_drop=100))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#table .doubt")) == 2
    assert not browser.find_elements(By.CSS_SELECTOR, "#latency .front-line")
    assert "latency is ignored" in browser.find_element(By.ID, "table-note").text


def test_points_are_drawn_with_their_front_and_explained_on_focus(opened: Any) -> None:
    browser = opened(RUNS, Limits())
    for chart in ("latency", "size"):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"#{chart} .point")) == 4
        assert browser.find_elements(By.CSS_SELECTOR, f"#{chart} .front-line")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#latency .ring")) == 3
    point = browser.find_element(By.CSS_SELECTOR, "#latency .point[data-i='2']")
    browser.execute_script("arguments[0].focus()", point)
    tip = browser.find_element(By.ID, "tip")
    WebDriverWait(browser, 10).until(lambda _: tip.is_displayed())
    assert "qat pt2e" in tip.text
    assert "96.00 ± 0.00 %" in tip.text


def test_curves_follow_what_is_ticked_and_show_the_schedule(opened: Any) -> None:
    browser = opened(RUNS, Limits())
    assert "ranges and BatchNorm frozen" in browser.find_element(By.ID, "curves").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves .event")) == 3  # rounding at 30 and at 50, freezes at 70
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves path")) == 4 * 3  # two seeds and their mean
    click(browser, "#table tr[data-i='2'] input")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves .event")) == 2
    choose(browser, "#curve-choices select", "train/loss")
    assert "train/loss" in browser.find_element(By.ID, "curves").text


def test_a_drop_of_fewer_seeds_than_the_score_says_of_how_many(opened: Any) -> None:
    browser = opened([plain(0, acc=0.98), *(qat("fx", seed, acc=0.97) for seed in range(3))])
    assert "(n=1)" in browser.find_element(By.ID, "table").text
    assert "(n=1)" in browser.find_element(By.CSS_SELECTOR, "#verdict .figures").text


def test_a_quantized_run_of_which_only_float_has_a_score_keeps_no_limit_of_the_drop(opened: Any) -> None:
    metrics = {k: v for k, v in qat("pt2e").metrics.items() if k.startswith("float/")}
    assert names(opened([plain(), qat("fx"), qat("pt2e", metrics=metrics)])) == ["float", "qat fx"]


def test_a_schedule_point_at_the_first_step_is_drawn() -> None:
    comparison = compare([trained(qat("fx"), start=0)])
    data = page_data(comparison, decide(comparison, LIMITS), LIMITS, "title")
    (run,) = data["configurations"][0]["runs"]
    assert run["events"][0] == {"name": "rounding on", "step": 0.0}


def test_layers_are_side_by_side(opened: Any) -> None:
    browser = opened(RUNS, Limits())
    layers = browser.find_elements(By.CSS_SELECTOR, "#layers .layer")
    assert [layer.get_attribute("aria-label") for layer in layers][:1] == [
        "net.0: qat fx 40, qat pt2e 40, qat eager 40"
    ]
    assert len(layers) == 4


def test_only_differences_are_listed_and_failures_with_their_reason(opened: Any) -> None:
    browser = opened(RUNS)
    differences = browser.find_element(By.ID, "differences").text
    assert "quantization.mode" in differences
    assert "trainer.max_epochs" not in differences
    assert "it broke" in browser.find_element(By.ID, "left-out").text


def test_a_ladder_is_shown_with_what_it_tried(opened: Any) -> None:
    page = opened([plain(0), dataclasses.replace(qat("fx"), ladder=LADDER)])
    card = page.find_element(By.ID, "ladders-card")
    rows = [row.text for row in card.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert "a drop of at most 0.01" in card.text
    assert "adaround keeps the target" in card.text
    assert rows[0].startswith("static fx x86, static 5.00 4.00 to 6.00 2.00 1.250 0.1")
    assert "∞" in rows[1]
    assert "–" in rows[2]
    assert card.find_element(By.CSS_SELECTOR, "tr.chosen").text.startswith("adaround")
    assert not opened([plain(0)]).find_element(By.ID, "ladders-card").is_displayed()


def test_hostile_names_are_text(opened: Any) -> None:
    config = {EVIL: EVIL, "seed": EVIL, "__proto__": {"x": 1}}
    curves = {
        EVIL: Curve([0.0, 1.0], [1.0, 2.0]),
        "__proto__": Curve([0.0, 1.0], [1.0, 2.0]),
        "constructor": Curve([0, 1], [1, 2]),
    }
    layers = ({"layer": EVIL, "__proto__": 1.0, "weight_sqnr_db": 30.0},)
    evil = Run(EVIL, EVIL, config=config, metrics={"int8/test/acc": 0.9}, curves=curves, layers=layers)
    failed = Run(EVIL, EVIL, "failed", reason=EVIL, overrides=(EVIL,))
    browser = opened([evil, *RUNS, failed], Limits(max_latency=0.1))
    assert any("<script>window.broken" in name for name in names(browser))
    assert "onerror" in browser.find_element(By.ID, "left-out").text
    assert "</script>" in browser.title


@pytest.mark.parametrize("width", [360, 1360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_never_wider_than_the_screen_and_text_has_contrast(opened: Any, width: int, scheme: str) -> None:
    browser = opened(RUNS)
    device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        colours = {
            name: _colour(browser, name) for name in ("--page", "--card", "--text", "--muted", "--front", "--bad")
        }
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for text in ("--text", "--muted", "--front", "--bad"):
        assert min(_contrast(colours[text], colours[ground]) for ground in ("--page", "--card")) >= 4.5


def _colour(browser: webdriver.Chrome, name: str) -> tuple[float, ...]:
    text = browser.execute_script(
        "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", name
    )
    return tuple(int(part, 16) / 255 for part in re.findall("[0-9a-f]{2}", text.strip()))


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast as defined by WCAG 2."""

    def luminance(colour: tuple[float, ...]) -> float:
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_single_run_without_curves_is_a_page_as_well(opened: Any) -> None:
    browser = opened([Run("only", "only", metrics={"int8/test/acc": 0.5})], Limits())
    assert names(browser) == ["only"]
    assert not browser.find_element(By.ID, "curves-card").is_displayed()
    assert "No run has a latency" in browser.find_element(By.ID, "latency").text


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_gets_out_of_the_data(name: str, reason: str) -> None:
    runs = [Run(name, name, metrics={"int8/test/acc": 0.5}), Run(reason, reason, "failed", reason=reason)]
    comparison = compare(runs)
    made = page(comparison, decide(comparison, Limits()), title=name)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made, flags=re.DOTALL)
    assert json.loads(data)["leftOut"][0]["reason"] == reason
    assert made.count("</script>") == 2
    assert made.count("<script") == 2
