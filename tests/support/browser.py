"""A headless Chromium for the tests of pages: found on the path, or the tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


def chromium() -> str | None:
    """The browser's path."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@contextmanager
def launched() -> Iterator[Any]:
    """The browser, as Playwright drives it; skips where it, or Playwright, is not there."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on the path")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        except sync_api.Error as error:
            pytest.skip(f"{path} does not start: {error.message.splitlines()[0]}")
        try:
            yield browser
        finally:
            browser.close()


class Shown:
    """A page of the browser, with what it wrote to its console and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def focused(self) -> tuple[str, int]:
        """The name of the row and the column of the cell that has the focus."""
        return tuple(
            self.page.evaluate(
                "(() => { const cell = document.activeElement;"
                " return [cell.parentElement.querySelector('th').title, cell.cellIndex - 1]; })()"
            )
        )

    def told(self) -> str:
        """What the page says of the cell."""
        return self.page.locator(".inspector").inner_text()
