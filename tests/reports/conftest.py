"""A real browser for the pages: offline, and failing on any request, warning or error."""

import re

import pytest


@pytest.fixture
def open_page(browser):
    """Opens an address at a width and in a colour scheme; fails on any request to the network or console error."""
    contexts, troubles = [], []

    def opened(address: str, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)

        def check(route):
            if not route.request.url.startswith(("file:", "data:", "blob:")):
                troubles.append(f"request {route.request.url}")
            route.continue_()

        context.route("**/*", check)
        page = context.new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.goto(address)
        page.wait_for_selector("#plot .scatterlayer .point")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of a CSS colour `rgb(…)`."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture
def contrast():
    """WCAG 2's contrast ratio of two CSS colours."""

    def ratio(a: str, b: str) -> float:
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    return ratio
