"""`report.html` in a real Chromium: on a desktop and on a phone, light and dark."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, Page

from tests.report.pages import HOSTILE
from tests.system.chromium import DESKTOP, PHONE, check_contrast, opened, tooltip
from tests.tuning.test_report import REPEATED, TRIALS, build_sweep, reported
from vae_ray.report.pictures import PICTURE_KINDS
from vae_ray.tuning.directory import SweepDirectory

pytestmark = pytest.mark.system

WITH_HISTORY = [name for name, (_, epochs, _) in TRIALS.items() if epochs]
RANKED = [name for name, (_, _, state) in TRIALS.items() if state in ("finished", "stopped")]


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


def count(page: Page, chart: str, layer: str, mark: str) -> int:
    return page.locator(f"#chart-{chart} .{layer}_marks {mark}").count()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_text_is_legible(browser: Browser, sweep: SweepDirectory, size: tuple[int, int], dark: bool) -> None:
    parts = [
        f".chart .{part} text" for part in ("role-axis-label", "role-axis-title", "role-legend-label", "labels_marks")
    ]
    with opened(browser, sweep.report, size=size, dark=dark) as page:
        check_contrast(page, *parts, "figcaption", "td.front", "td.reason", "p", "a", "th", dark=dark)


def test_every_trial_is_drawn_in_every_chart(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep.report) as page:
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
    with opened(browser, sweep.report) as page:
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
    with opened(browser, sweep.report) as page:
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
    with opened(browser, hierarchies.report) as page:
        page.locator(f"#show-{kind}").click()
        for other in PICTURE_KINDS:
            pictures = page.locator(f"figure .picture.{other}")
            assert pictures.count() == 2
            assert all(pictures.nth(n).is_visible() == (other == kind) for n in range(pictures.count()))
        page.locator(f"figure .picture.{kind}").first.click()
        page.locator(f"dialog[open] img[alt^='{kind} of trial']").click()
        assert page.locator("dialog[open]").count() == 0


def test_the_leaderboard_leads_to_the_command(browser: Browser, sweep: SweepDirectory) -> None:
    with opened(browser, sweep.report, size=PHONE) as page:
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
        with opened(browser, directory.report, size=size) as page:
            assert page.locator(".chart svg").count() == num_charts


def test_the_seeds_of_each_configuration_are_drawn_with_mean_and_interval(browser: Browser, tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials=REPEATED, scheduler="none", repeats=2, num_trials=2)
    reported(directory)
    for size in (DESKTOP, PHONE):
        with opened(browser, directory.report, size=size) as page:
            marks = {"seeds": 3, "means": 2}
            assert {name: count(page, "seeds-0", name, "path") for name in marks} == marks
            assert count(page, "seeds-0", "intervals", "line") == 1
            chart = page.locator("#chart-seeds-0")
            labels = chart.locator(".role-axis-label text").all_text_contents()
            assert [text for text in labels if text.startswith("000")] == ["0000", "0001"]
            box = chart.bounding_box()
            assert box is not None
            assert box["width"] > 0.8 * size[0]


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
    with opened(browser, directory.report) as page:
        assert time.monotonic() - started < 10
        assert count(page, "curves-0", "lines", "path") == 100
        assert count(page, "plane", "points", "path") == 100
        page.locator(".leaderboard tr").last.scroll_into_view_if_needed()
        heading = page.locator(".leaderboard th").last.bounding_box()
        assert heading is not None
        assert heading["y"] == 0, "the header stays in view"
        assert heading["x"] + heading["width"] <= DESKTOP[0], "no column is cut"
    assert directory.report.stat().st_size < 12e6
