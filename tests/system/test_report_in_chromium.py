"""`report.html` as people meet it: in a real Chromium, on a desk and on a phone, by day and by night."""

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageColor
from playwright.sync_api import Browser, Page, sync_playwright

from tests.tuning.test_report import HOSTILE, STOPPED, TRIALS, build_sweep, reported
from vae_ray.tuning.directory import SweepDirectory

pytestmark = pytest.mark.system

DESK, PHONE = (1280, 900), (390, 844)
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync"]
WITH_HISTORY = [name for name, (_, epochs, _) in TRIALS.items() if epochs]
RANKED = [name for name, (_, _, state) in TRIALS.items() if state in ("finished", "stopped")]
PICTURE_KINDS = ("samples", "reconstructions", "traversals")
# Contrast of two sRGB colours as WCAG 2.1 defines it.
CONTRAST = """(colours) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [low, high] = colours.map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail("needs a Chromium: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=[f"--{flag}" for flag in FLAGS])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    directory = build_sweep(tmp_path_factory.mktemp("report") / HOSTILE)
    reported(directory)
    return directory


class Seen:
    """What a page did besides showing itself."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: self.problems.append(f"console {message.type}: {message.text}"))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("crash", lambda _: self.problems.append("crash"))


@contextmanager
def opened(
    browser: Browser, directory: SweepDirectory, *, size: tuple[int, int] = DESK, dark: bool = False
) -> Iterator[tuple[Page, Seen]]:
    """The report with all its charts drawn."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    seen = Seen(page)
    page.goto(directory.report.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.chart').length === document.querySelectorAll('.chart svg').length"
    )
    yield page, seen
    context.close()


def assert_quiet(seen: Seen, directory: SweepDirectory) -> None:
    assert seen.problems == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [directory.report.as_uri()]


def decode_all_pictures(page: Page) -> None:
    """Fails for a picture that is none; also those that would only be loaded once they are scrolled to."""
    page.evaluate("Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode(); }))")
    widths = page.evaluate("[...document.images].map((i) => i.naturalWidth)")
    assert min(widths, default=1) > 0


def count(page: Page, chart: str, layer: str, mark: str) -> int:
    return page.locator(f"#chart-{chart} .{layer}_marks {mark}").count()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_it_opens_without_a_complaint_and_asks_nobody(
    browser: Browser, sweep: SweepDirectory, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    with opened(browser, sweep, size=size, dark=dark) as (page, seen):
        decode_all_pictures(page)
        screenshot = page.screenshot(full_page=True, path=tmp_path / "report.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert_quiet(seen, sweep)
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB")
    paper, best = ("#13161a", "#82aeff") if dark else ("#f6f7f9", "#1f5fd0")
    colours = {colour: number for number, colour in picture.getcolors(1 << 24)}
    assert colours[ImageColor.getrgb(paper)] > picture.width * picture.height / 20
    assert colours[ImageColor.getrgb(best)] > 500, "links, and the best trial's curve"


def test_every_trial_is_drawn_in_every_chart(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as (page, _):
        assert page.locator(".chart svg").count() == 3
        assert count(page, "curves-0", "trials", "path") == len(WITH_HISTORY)
        assert count(page, "curves-0", "ends", "path") == len(WITH_HISTORY)
        assert count(page, "curves-0", "rungs", "line") == 1
        assert count(page, "parallel", "trials", "path") == len(RANKED)
        assert count(page, "plane", "points", "path") == len(WITH_HISTORY)
        assert count(page, "plane", "front", "path") == 1
        for chart in ("curves-0", "plane"):
            assert "nats per image" in (page.locator(f"#chart-{chart}").text_content() or "")
        assert page.locator("#leaderboard ~ .leaderboard tbody tr").count() == len(TRIALS)


def test_a_hostile_text_is_read_and_never_run(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as (page, seen):
        reasons = page.locator("#failed ~ .leaderboard").inner_text()
        assert reasons.count(HOSTILE) == 2
        # also where Vega writes it: the tooltip of the trial whose name is hostile
        ends = page.locator("#chart-curves-0 .ends_marks path")
        tooltip_columns = []
        for number in range(ends.count()):
            ends.nth(number).hover(force=True)
            page.wait_for_selector("#tip", state="visible")
            tooltip_columns.append(page.locator("#tip").inner_text())
        assert sum(STOPPED in text for text in tooltip_columns) == 1
        assert page.locator("#tip img, #tip script").count() == 0
        assert_quiet(seen, sweep)


def test_what_slipped_in_could_neither_run_nor_call_home(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as (page, seen):
        failures: list[str | None] = []
        page.on("requestfailed", lambda request: failures.append(request.failure))
        page.evaluate("""() => {
          document.body.insertAdjacentHTML("beforeend", '<img src="data:," onerror="window.ran = true">');
          document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = true"}));
          document.body.insertAdjacentHTML("beforeend", '<img src="https://example.org/pixel.png">');
        }""")
        page.wait_for_timeout(300)
        assert page.evaluate("window.ran") is None
        assert len([problem for problem in seen.problems if "Content Security Policy" in problem]) >= 3
        assert failures == ["csp"], "Chromium refuses the pixel before it asks anybody"


def test_pointing_at_a_line_names_its_trial(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as (page, _):
        for chart in ("curves-0", "parallel"):
            place = page.evaluate(
                """(chart) => {
                  const line = [...document.querySelectorAll(`#chart-${chart} .pointed_marks path`)].at(-1);
                  line.scrollIntoView({block: "center", behavior: "instant"});
                  const middle = line.getPointAtLength(line.getTotalLength() / 2).matrixTransform(line.getScreenCTM());
                  return [middle.x, middle.y];
                }""",
                chart,
            )
            page.mouse.move(*place)
            page.wait_for_selector("#tip", state="visible")
            tooltip_columns = page.locator("#tip").inner_text()
            assert any(name in tooltip_columns for name in WITH_HISTORY)
            assert "model.latent_dim" in tooltip_columns
            assert "val/nelbo" in tooltip_columns


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_the_gallery_shows_one_kind_at_a_time(browser: Browser, sweep: SweepDirectory, kind: str) -> None:
    with opened(browser, sweep) as (page, seen):
        page.locator(f"label[for=show-{kind}]").click()
        decode_all_pictures(page)
        for other in PICTURE_KINDS:
            pictures = page.locator(f"figure .picture.{other}")
            assert pictures.count() == len(WITH_HISTORY)
            assert all(pictures.nth(n).is_visible() == (other == kind) for n in range(pictures.count()))
        page.locator(f"figure .picture.{kind}").first.click()
        enlarged = page.locator("dialog[open] img")
        assert enlarged.get_attribute("alt", timeout=1000) == page.locator(
            f"figure .picture.{kind} img"
        ).first.get_attribute("alt")
        enlarged.click()
        assert page.locator("dialog[open]").count() == 0
        assert_quiet(seen, sweep)


def test_the_leaderboard_leads_to_the_command(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep, size=PHONE) as (page, seen):
        command = page.locator("#trial-0001 pre")
        assert not command.is_visible()
        page.locator("#leaderboard ~ .leaderboard a", has_text="0001").click()
        command.wait_for(state="visible")
        assert command.inner_text().startswith("vae-ray train digits ")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        assert_quiet(seen, sweep)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_are_legible(browser: Browser, sweep: SweepDirectory, dark: bool) -> None:
    with opened(browser, sweep, dark=dark) as (page, _):
        for selector, behind in (
            (".chart .role-axis-label text", ".card"),
            (".chart .role-axis-title text", ".card"),
            (".chart .role-legend-label text", ".card"),
            (".chart .ticks_marks text", ".card"),
            ("figcaption", "body"),
            ("td .front, td.front", ".card"),
            (".reason", ".card"),
            ("p", "body"),
            ("a", "body"),
        ):
            colours = page.evaluate(
                """([selector, behind]) => {
                  const style = getComputedStyle(document.querySelector(selector));
                  return [selector.includes(".chart") ? style.fill : style.color,
                          getComputedStyle(document.querySelector(behind)).backgroundColor];
                }""",
                [selector, behind],
            )
            assert page.evaluate(CONTRAST, colours) >= 4.5, selector


@pytest.mark.parametrize(
    ("trials", "description", "num_charts"),
    [
        (["0000"], {}, 3),
        (["0004"], {}, 0),
        (["0003", "0004"], {}, 2),
        (["0000", "0001"], {"metrics": ["val/rate", "val/distortion"], "scheduler": "none"}, 4),
    ],
    ids=["one trial", "none began", "all failed", "two metrics"],
)
def test_smaller_sweeps_are_quiet_too(
    browser: Browser, tmp_path: Path, trials: list[str], description: dict[str, Any], num_charts: int
) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={name: TRIALS[name] for name in trials}, **description)
    reported(directory)
    for size in (DESK, PHONE):
        with opened(browser, directory, size=size) as (page, seen):
            assert page.locator(".chart svg").count() == num_charts
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
            decode_all_pictures(page)
            assert_quiet(seen, directory)


def test_a_hundred_trials_stay_usable(browser: Browser, sweep: SweepDirectory, tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path / "hundred")
    directory.path.mkdir()
    directory.description_file.write_text(yaml.safe_dump({**sweep.description(), "num_trials": 100}))
    for number in range(100):
        name = f"{number:04d}"
        overrides, epochs, state = TRIALS["0000" if number % 3 else "0001"]
        shutil.copytree(sweep.trial("0000" if number % 3 else "0001").path, directory.trial(name).path)
        directory.append_to_journal(
            {"trial": name, "event": "proposed", "overrides": overrides},
            {"trial": name, "event": "ended", "epoch": epochs, "state": state, "reason": ""},
        )
    reported(directory)
    started = time.monotonic()
    with opened(browser, directory) as (page, seen):
        assert time.monotonic() - started < 10
        assert count(page, "curves-0", "trials", "path") == 100
        assert count(page, "plane", "points", "path") == 100
        box = page.locator("#leaderboard ~ .leaderboard").bounding_box()
        assert box is not None
        assert box["height"] < DESK[1]
        assert_quiet(seen, directory)
    assert directory.report.stat().st_size < 12e6
