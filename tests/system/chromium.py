"""Pages in a real Chromium: on a desktop and on a phone, light and dark."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page

DESKTOP, PHONE = (1400, 900), (390, 844)
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


def check_contrast(page: Page, *selectors: str, dark: bool) -> None:
    """Each selector's text has the contrast of WCAG 2.2's level AA, 4.5, to the page, which is light or dark."""
    for selector in selectors:
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


@contextmanager
def opened(browser: Browser, file: Path, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Page]:
    """A page with all its charts drawn; fails if it has a problem or sends a request."""
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
    page.goto(file.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.chart').length === document.querySelectorAll('.chart svg').length"
    )
    yield page
    # a corrupt picture rejects
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    # a table may be wider than the screen: then the page scrolls sideways
    page.evaluate("document.querySelectorAll('table').forEach((table) => { table.style.display = 'none'; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "no other part of the page is cut"
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    context.close()


def tooltip(page: Page, chart: str, x: float, y: float) -> str:
    """The text of the tooltip at a place of the chart, as parts of its size."""
    plot = page.locator(f"#chart-{chart} .root > g > .background").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
    page.wait_for_selector("#vg-tooltip-element.visible")
    return page.locator("#vg-tooltip-element").inner_text()
