"""The pages of a run and of a comparison in a real Chromium."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.report.pages import HOSTILE
from tests.system.chromium import DESKTOP, PHONE, check_contrast, opened
from vae_ray import TrainResult
from vae_ray.report.compared_runs import compared_runs
from vae_ray.report.comparison_page import write_comparison
from vae_ray.report.run_page import write_run_report

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def run(trained_run: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / HOSTILE
    shutil.copytree(trained_run.run_dir, path)
    write_run_report(path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_of_a_run_is_legible(browser: Browser, run: Path, size: tuple[int, int], dark: bool) -> None:
    parts = (".chart .role-axis-label text", ".chart .role-axis-title text", ".chart .role-legend-label text")
    with opened(browser, run / "report.html", size=size, dark=dark) as page:
        assert page.locator(".chart svg").count() == 7, "three terms, lr, rates, and two maps"
        check_contrast(page, *parts, "figcaption", "p", "dt", "th", ".muted", dark=dark)


def test_the_slider_shows_one_epoch_at_a_time(browser: Browser, run: Path) -> None:
    with opened(browser, run / "report.html") as page:
        figures = page.locator(".slider figure")
        for epoch in (1, 3, 2):
            page.locator(".slider input").fill(str(epoch - 1))
            visible = [n for n in range(figures.count()) if figures.nth(n).is_visible()]
            assert visible == [epoch - 1]
            assert figures.nth(epoch - 1).inner_text().startswith(f"epoch {epoch}")


def test_the_pointer_on_the_map_shows_the_image(browser: Browser, run: Path) -> None:
    with opened(browser, run / "report.html") as page:
        points = page.locator("#chart-map-1 .mark-symbol.role-mark path")
        assert points.count() == 359
        points.nth(100).scroll_into_view_if_needed()
        points.nth(100).hover(force=True)
        picture = page.locator("#vg-tooltip-element.visible img")
        picture.wait_for()
        assert picture.evaluate("(image) => image.naturalWidth") == 8
        assert "squared error" in page.locator("#vg-tooltip-element").inner_text()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_comparison_has_no_problem(browser: Browser, run: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    write_comparison(compared_runs([run, other]), tmp_path / "compare.html")
    with opened(browser, tmp_path / "compare.html", size=size) as page:
        assert page.locator(".chart svg").count() == 2
        assert page.locator("#chart-curves-0 .lines_marks path").count() == 2
        assert page.locator("#chart-plane-0 .role-mark path").count() == 2
        page.locator(".picture").first.click()
        page.locator("dialog[open] img").click()
