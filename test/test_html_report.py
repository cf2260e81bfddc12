"""The report as a page: its numbers, its safety, and what a real browser makes of it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rosbags.rosbag2 import StoragePlugin, Writer

from sparserefine_ros.commands.evaluation_session import Options, evaluate
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation import (
    html_report,
    page,
    per_frame,
    provenance,
    replay_metrics,
    report_charts,
    svg,
    worst_frames,
)
from sparserefine_ros.evaluation.bag_writer import LABEL_TOPIC, START_NS
from sparserefine_ros.evaluation.calibration import density_recall
from sparserefine_ros.evaluation.curves import measure
from sparserefine_ros.evaluation.reliability import BINS, reliability_diagram
from sparserefine_ros.evaluation.replay_metrics import ReplayLog
from sparserefine_ros.evaluation.svg import Chart, ticks
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter

FRAMES, PERIOD_NS = 14, 400_000_000
HOSTILE = "<script>window.hacked=1</script>"
TOPIC = "/cam/<img src=x onerror=window.hacked=1>"


def samples() -> list[Sample]:
    rng = np.random.default_rng(5)
    result = []
    for i in range(FRAMES):
        coarse = rng.uniform(0, 255, (6, 9, 3)).repeat(8, 0).repeat(8, 1)
        image = (0.8 * coarse + rng.uniform(0, 50, coarse.shape)).astype(np.uint8)
        label = rng.integers(0, 11, (6, 9), np.uint8).repeat(8, 0).repeat(8, 1)
        label[:3] = 255
        result.append(Sample(image, label, str(i), START_NS + i * PERIOD_NS))
    return result


def write_bag(path: Path, labelled: bool, clock: int = 1) -> Path:
    """``clock`` -1: that of the stamps runs backward."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        store = messages.typestore()
        images = writer.add_connection(TOPIC, messages.IMAGE, typestore=store)
        labels = writer.add_connection(LABEL_TOPIC, messages.IMAGE, typestore=store) if labelled else None
        for s in samples():
            stamp = START_NS + clock * (s.stamp_ns - START_NS)
            writer.write(images, s.stamp_ns, messages.image_message(s.image, "rgb8", stamp, ""))
            if labels is not None and s.label is not None:
                writer.write(labels, s.stamp_ns, messages.image_message(s.label, "mono8", s.stamp_ns, ""))
    return path


def run(folder: Path, bundle: Path, bag: Path, **texts: str) -> tuple[dict[str, Any], str]:
    """(what --json wrote, the page)."""
    parameters = {"model": str(bundle), "device": "cpu", **texts}
    options = Options(bag, parameters, offline=True, json=folder / "r.json", report=folder / "deep" / "r.html")
    evaluate(options, Console(file=io.StringIO()))
    return json.loads((folder / "r.json").read_text()), (folder / "deep" / "r.html").read_text("utf-8")


@pytest.fixture(scope="module")
def evaluated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(tiny_bundle, folder / "bundle")
    replace(Bundle.load(folder / "bundle"), name=HOSTILE).save()
    bag = write_bag(folder / "<b onclick=hacked>", labelled=True)
    return *run(folder, folder / "bundle", bag), folder / "deep" / "r.html"


class Loads(HTMLParser):
    """Everything in a page that a browser could fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts = self.handlers = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            self.handlers += name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.links.append(value or "")


def test_nothing_is_loaded_from_anywhere(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    text = evaluated[1]
    loads = Loads(text)
    assert loads.links and all(link.startswith(("data:", "#")) for link in loads.links)
    assert not re.search(r"@import|url\((?!data:)", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text


def test_names_from_bags_and_bundles_stay_text(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    text = evaluated[1]
    loads = Loads(text)
    assert (loads.scripts, loads.handlers) == (1, 0)
    assert HOSTILE not in text and TOPIC not in text and "<b onclick" not in text
    assert text.count("&lt;script&gt;window.hacked=1&lt;/script&gt;") >= 2  # title and heading
    assert "&lt;img src=x onerror" in text and "&lt;b onclick=hacked&gt;" in text


def test_chart_text_is_escaped() -> None:
    chart = Chart(HOSTILE, (0, 1), (0, 1), HOSTILE, HOSTILE, names=[HOSTILE])
    chart.point(0.5, 0.5, "dot", HOSTILE)
    assert "<script" not in chart.text() and chart.text().count("&lt;script&gt;") == 5


def test_the_page_shows_the_results_numbers(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    result, text, _ = evaluated

    def tile(name: str) -> str:
        found = re.search(rf'id="{name}">(.*?)</strong>', text)
        assert found
        return re.sub("<.*?>", "", found.group(1))

    assert tile("miou") == f"{100 * result['miou']:.2f} %"
    assert tile("boundary-iou") == f"{100 * result['boundary_iou']:.2f} %"
    assert tile("accuracy") == f"{100 * result['pixel_accuracy']:.2f} %"
    assert tile("processed") == f"{FRAMES} of {FRAMES}"
    low, high = result["intervals"]["miou"]
    assert low <= result["miou"] <= high and low < high
    confusion = per_frame.unpack(result["per_frame"]["confusion"])
    wrong = 1 - confusion.diagonal(axis1=1, axis2=2).sum(1) / confusion.sum((1, 2))
    chosen = worst_frames.spread(dict(zip(result["per_frame"]["scored"], wrong.tolist(), strict=True)))
    assert text.count('class="frame"') == len(chosen) > 1
    assert f"{100 * wrong.max():.1f} % of labelled pixels wrong" in text
    for fact in (result["hardware"]["cpu"], result["versions"]["torch"], result["bag"]["sha256"]):
        assert str(fact) in text
    for sha in result["weights_sha256"].values():
        assert sha in text


def test_a_bag_without_labels_says_what_cannot_be_known(tiny_bundle: Path, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", labelled=False, clock=-1)
    result, text = run(tmp_path, tiny_bundle, bag, decoder="dense")
    assert result["curves"] is None and result["confusion"] is None and result["intervals"] is None
    for words in (
        "no accuracy by class",
        "no confusion matrix",
        "no reliability diagram",
        "nothing refined",
        "ms of a segmenter call",
    ):
        assert words in text
    assert text.count("<svg") == 2  # timeline and histogram
    times = [
        float(t) for t in re.findall(r'class="frame"><h3>([-\d.]+) s', text)
    ]  # of the recording, not of the stamps
    assert sorted(times) == pytest.approx([0.4 * i for i in (0, 3, 5, 8, 10, 13)])


def test_names_that_are_no_utf8(evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    result = {**evaluated[0], "bag": {**evaluated[0]["bag"], "name": os.fsdecode(b"b\xff")}}
    html_report.write(result, "spread", [], tmp_path / "r.html")
    assert "b\\udcff" in (tmp_path / "r.html").read_text("utf-8")


def test_no_mask_at_all_is_said(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    result = json.loads(json.dumps(evaluated[0]))
    result["per_frame"]["latency_ms"] = [None] * FRAMES
    context = html_report.context(result, "spread", [])
    text = page.render("report.html.j2", context)
    assert "Not one mask came back, so there is no latency" in text and "nothing to show" in text


def test_curves_are_the_segmenters(tiny_bundle: Path) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), device="cpu")
    some = samples()[:4]
    found = measure(segmenter, some)
    assert found is not None and found["frames"] == 4
    gap, total = 0.0, 0
    confidences, rights = [], []
    for sample in some:
        final = segmenter.segment([sample.image])[0]
        known = sample.label != 255
        confidences.append(final.confidence[known] / 255)
        rights.append((final.mask == sample.label)[known])
    confidence, right = np.concatenate(confidences), np.concatenate(rights)
    for i in range(BINS):
        inside = np.minimum((confidence * BINS).astype(int), BINS - 1) == i
        assert found["reliability"]["pixels"][i] == inside.sum()
        if inside.any():
            gap += abs(confidence[inside].mean() - right[inside].mean()) * inside.sum()
            total += inside.sum()
    assert found["reliability"]["ece"] == pytest.approx(gap / total, rel=1e-6)
    curve = density_recall(segmenter, some)
    assert found["at_threshold"] == curve.at(segmenter.entropy_threshold)
    for density, recall in zip(found["density_recall"]["density"], found["density_recall"]["recall"], strict=True):
        here = np.isclose(curve.density, density, atol=1e-6) & np.isclose(curve.recall, recall, atol=1e-6)
        assert here.any()
    assert found["density_recall"]["recall"][0] == 1.0
    assert measure(segmenter, [some[0]._replace(label=np.full((48, 72), 255, np.uint8))]) is None
    with pytest.raises(ValueError, match="no labelled pixel"):
        reliability_diagram(segmenter, [some[0]._replace(label=None)])


def test_the_timeline_counts_no_time_twice() -> None:
    """The node times parts of a live frame and sums of parts; the timeline may stack the parts alone."""
    parts = {"transport": 0.0, "wait": 1.0, "decode": 2.0, "preprocess": 3.0, "dense": 20.0, "select": 1.0,
             "refine": 9.0, "merge": 2.0, "publish": 2.0}  # fmt: skip
    times = {**parts, "segment": 35.0, "total": 39.0, "latency": 40.0}
    frames = {"sent_s": [0.0, 1.0], "latency_ms": [50.0, 50.0], "stages_ms": {k: [v, v] for k, v in times.items()}}
    found = report_charts.latency_charts({"mode": "live", "per_frame": frames})
    assert found is not None and found["stages"] == list(parts)
    shapes = re.findall(r'class="(stage stage-\d)" d="(.*?)"', found["timeline"])
    assert len({style for style, _ in shapes}) == len(shapes) == 9  # no colour stands for two
    tops = [float(y) for _, path in shapes for y in re.findall(r"V([\d.]+)H", path)]
    bottom, height = 300 - svg.BOTTOM, 300 - svg.BOTTOM - svg.TOP
    assert (bottom - min(tops)) / height * 1.05 * 50.0 == pytest.approx(sum(parts.values()), abs=0.1)


def test_worst_frames_are_apart() -> None:
    second = worst_frames.APART_NS
    badness = {0: 0.5, second // 2: 0.9, second: 0.4, 3 * second: 0.7, 4 * second: 0.1}
    assert worst_frames.spread(badness) == [second // 2, 3 * second, 4 * second]
    log = ReplayLog(answered={1: 0.0, 2 * second: 0.0}, density={1: 0.1, 2 * second: 0.3, 9 * second: 0.9})
    assert list(worst_frames.choose(log, None)[1]) == [2 * second, 1]
    void = replay_metrics.score([(1, np.full((2, 2), 255, np.uint8))], {1: np.zeros((2, 2), np.uint8)}, CAMVID)
    assert worst_frames.choose(log, void)[0] == "uncertain"  # a mask, a label, and not one labelled pixel


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 322.8), (-6.3, 6.3), (0, 1e-4), (3, 1e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    assert float(f"{steps[0]:e}".split("e")[0]) in (1, 2, 5)


def test_commit_is_that_of_a_checkout_only(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None
    found = provenance.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}", found["sha"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, as Debian packages it."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def test_in_a_real_browser(evaluated: tuple[dict[str, Any], str, Path], browser: Any) -> None:
    """The policy lets the page's own script run and nothing else; pictures decode; the zoom opens, turns and closes."""
    result, _, file = evaluated
    browser.get(file.as_uri())

    def one(css: str) -> Any:
        return browser.find_element("css selector", css)

    assert one("#miou").text == f"{100 * result['miou']:.2f} %"
    assert len(browser.find_elements("css selector", ".classes tbody tr")) == 11
    assert len(browser.find_elements("css selector", ".confusion tbody td")) == 121
    views = browser.find_elements("css selector", ".frame:first-of-type button.view")
    assert [v.get_dom_attribute("data-name") for v in views] == [
        "image", "mask", "ground truth", "errors", "entropy", "refined pixels",
    ]  # fmt: skip
    sizes = browser.execute_script("return [...document.images].map(i => i.id ? 72 : i.naturalWidth)")
    assert set(sizes) == {72}
    assert browser.execute_script("return window.hacked") is None
    assert (
        browser.execute_script("return performance.getEntriesByType('resource').filter(r => !/^data:/.test(r.name))")
        == []
    )
    dialog = one("#zoom")
    assert not dialog.is_displayed()
    views[1].click()
    assert dialog.is_displayed() and "mask (2 of 6)" in one("#zoom-name").text
    one("#zoom-close").send_keys("\ue014")  # arrow right
    assert "ground truth (3 of 6)" in one("#zoom-name").text
    turn = "{deltaY: -400, clientX: 300, clientY: 300, cancelable: true}"
    browser.execute_script(f"arguments[0].dispatchEvent(new WheelEvent('wheel', {turn}))", one("#zoom-field"))
    assert "scale(2.718" in one("#zoom-image").get_dom_attribute("style")
    one("#zoom-close").click()
    assert not dialog.is_displayed()
    for width in (360, 1400):  # no page wider than the window: wide tables scroll by themselves
        browser.set_window_size(width, 800)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []


def test_on_paper(evaluated: tuple[dict[str, Any], str, Path], browser: Any) -> None:
    """Nothing is cut off at the page's width, and colours are printed: the confusion matrix has white numbers."""
    browser.get(evaluated[2].as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.set_window_size(720, 1000)  # A4 less its margins is 718 pixels wide
    try:
        tables = "[...document.querySelectorAll('.scroll')]"
        wide = f"return {tables}.filter(s => s.firstElementChild.scrollWidth > s.clientWidth).length"
        assert browser.execute_script(wide) == 0
        style = "getComputedStyle(document.querySelector('.confusion td')).printColorAdjust"
        assert browser.execute_script(f"return {style}") == "exact"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
