"""`report.html` in a real Chromium: on a desktop and on a phone, light and dark."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

from tests.tuning.test_report import HOSTILE, TRIALS, build_sweep, reported
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.report.trials import PICTURE_KINDS

pytestmark = pytest.mark.system

DESKTOP, PHONE = (1400, 900), (390, 844)
FLAGS = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"]
WITH_HISTORY = [name for name, (_, epochs, _) in TRIALS.items() if epochs]
RANKED = [name for name, (_, _, state) in TRIALS.items() if state in ("finished", "stopped")]
# Contrast of two sRGB colors as WCAG 2.1 defines it.
CONTRAST = """(colors) => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [low, high] = colors.map(luminance).sort((a, b) => a - b);
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


@pytest.fixture(scope="module")
def hierarchies(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    """A sweep of ladders: they have pictures of every kind."""
    base = {"model.network.name": "ladder", "model.network.upper_dims": [2]}
    trials = {name: TRIALS[name] for name in ("0000", "0002")}
    directory = build_sweep(tmp_path_factory.mktemp("hierarchies") / HOSTILE, trials=trials, base=base)
    reported(directory)
    return directory


@contextmanager
def opened(
    browser: Browser, directory: SweepDirectory, *, size: tuple[int, int] = DESKTOP, dark: bool = False
) -> Iterator[Page]:
    """The report with all its charts drawn; fails if the page has a problem or sends a request."""
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("crash", lambda _: problems.append("crash"))
    page.goto(directory.report.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.chart').length === document.querySelectorAll('.chart svg').length"
    )
    yield page
    # a corrupt picture rejects
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "no part of the page is cut"
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [directory.report.as_uri()]
    context.close()


def count(page: Page, chart: str, layer: str, mark: str) -> int:
    return page.locator(f"#chart-{chart} .{layer}_marks {mark}").count()


def tooltip(page: Page, chart: str, x: float, y: float) -> str:
    """The text of the tooltip at a place of the chart, as parts of its size."""
    plot = page.locator(f"#chart-{chart} .root > g > .background").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
    page.wait_for_selector("#vg-tooltip-element.visible")
    return page.locator("#vg-tooltip-element").inner_text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_text_is_legible(browser: Browser, sweep: SweepDirectory, size: tuple[int, int], dark: bool) -> None:
    parts = [
        f".chart .{part} text" for part in ("role-axis-label", "role-axis-title", "role-legend-label", "labels_marks")
    ]
    with opened(browser, sweep, size=size, dark=dark) as page:
        for selector in (*parts, "figcaption", "td.front", "td.reason", "p", "a", "th"):
            colors = page.evaluate(
                """(selector) => {
                  const style = getComputedStyle(document.querySelector(selector));
                  return [selector.includes(".chart") ? style.fill : style.color,
                          getComputedStyle(document.body).backgroundColor];
                }""",
                selector,
            )
            assert colors[1] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
            assert page.evaluate(CONTRAST, colors) >= 4.5, selector


def test_every_trial_is_drawn_in_every_chart(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as page:
        assert page.locator(".chart svg").count() == 3
        assert count(page, "curves-0", "lines", "path") == len(WITH_HISTORY)
        assert page.locator("#chart-curves-0 .ends_marks path[opacity='1']").count() == len(WITH_HISTORY)
        assert count(page, "curves-0", "rungs", "line") == 1
        assert count(page, "parallel", "lines", "path") == len(RANKED)
        assert count(page, "plane", "points", "path") == len(RANKED)
        assert count(page, "plane", "front", "path") == 1
        for chart in ("curves-0", "plane"):
            assert "nats per image" in (page.locator(f"#chart-{chart}").text_content() or "")
        assert page.locator(".leaderboard tbody a").count() == len(TRIALS)


def test_hostile_text_is_displayed(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as page:
        assert page.locator(".leaderboard").inner_text().count(HOSTILE) == 2


def test_injected_code_could_neither_run_nor_send_a_request(browser: Browser, sweep: SweepDirectory) -> None:
    page = browser.new_page()
    messages: list[str] = []
    failures: list[str | None] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("requestfailed", lambda request: failures.append(request.failure))
    page.goto(sweep.report.as_uri())
    page.evaluate("""() => {
      document.body.insertAdjacentHTML("beforeend", '<img src="data:," onerror="window.ran = true">');
      document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = true"}));
      document.body.insertAdjacentHTML("beforeend", '<img src="https://example.org/pixel.png">');
    }""")
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    assert len([message for message in messages if "Content Security Policy" in message]) >= 3
    assert failures == ["csp"], "Chromium refuses the pixel before it sends the request"
    page.close()


def test_a_tooltip_names_the_nearest_trial(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep) as page:
        # the only trial of latent_dim 2 is 0001, at the bottom of the first axis
        text = tooltip(page, "parallel", 0.13, 0.7)
        assert text.split()[:2] == ["trial", "0001"]
        assert "model.latent_dim" in text
        assert "val/nelbo" in text
        widths = page.locator("#chart-parallel .lines_marks path").evaluate_all(
            "(paths) => paths.map((path) => path.getAttribute('stroke-width'))"
        )
        assert widths.count("4.5") == 1, "its line is thick"
        assert any(name in tooltip(page, "curves-0", 0.5, 0.5) for name in WITH_HISTORY)


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_the_gallery_shows_one_kind_at_a_time(browser: Browser, hierarchies: SweepDirectory, kind: str) -> None:
    with opened(browser, hierarchies) as page:
        page.locator(f"#show-{kind}").click()
        for other in PICTURE_KINDS:
            pictures = page.locator(f"figure .picture.{other}")
            assert pictures.count() == 2
            assert all(pictures.nth(n).is_visible() == (other == kind) for n in range(pictures.count()))
        page.locator(f"figure .picture.{kind}").first.click()
        page.locator(f"dialog[open] img[alt^='{kind} of trial']").click()
        assert page.locator("dialog[open]").count() == 0


def test_the_leaderboard_leads_to_the_command(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep, size=PHONE) as page:
        command = page.locator("#trial-0001 pre")
        assert not command.is_visible()
        page.locator(".leaderboard a", has_text="0001").click()
        command.wait_for(state="visible")
        assert command.inner_text().startswith("vae-ray train notebook ")


@pytest.mark.parametrize(
    ("trials", "description", "num_charts"),
    [
        (["0000"], {}, 3),
        (["0004"], {}, 0),
        (["0003", "0004"], {}, 1),
        (["0000", "0001"], {"metrics": ["val/rate", "val/distortion"], "scheduler": "none"}, 4),
    ],
    ids=["one trial", "no epoch", "all failed", "two metrics"],
)
def test_smaller_sweeps_have_no_problem_either(
    browser: Browser, tmp_path: Path, trials: list[str], description: dict[str, Any], num_charts: int
) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={name: TRIALS[name] for name in trials}, **description)
    reported(directory)
    for size in (DESKTOP, PHONE):
        with opened(browser, directory, size=size) as page:
            assert page.locator(".chart svg").count() == num_charts


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
    with opened(browser, directory) as page:
        assert time.monotonic() - started < 10
        assert count(page, "curves-0", "lines", "path") == 100
        assert count(page, "plane", "points", "path") == 100
        page.locator(".leaderboard tr").last.scroll_into_view_if_needed()
        heading = page.locator(".leaderboard th").last.bounding_box()
        assert heading is not None
        assert heading["y"] == 0, "the header stays in view"
        assert heading["x"] + heading["width"] <= DESKTOP[0], "no column is cut"
    assert directory.report.stat().st_size < 12e6
