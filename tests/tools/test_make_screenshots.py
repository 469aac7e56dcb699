"""The pictures of the documentation are those that tools/make_screenshots.py makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.browser import Browser, is_installed
from tools.make_screenshots import IMAGES, PICTURES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def shown() -> dict[str, list[str]]:
    """Name -> the texts that stand for it, of every picture of ours on a page."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
            path = (page.parent / target).resolve()
            assert path.parent == IMAGES, f"{page}: {target} is not in {IMAGES}"
            found.setdefault(path.name, []).append(text)
    return found


def test_every_picture_is_made_shown_and_described() -> None:
    images = {path.name for path in IMAGES.iterdir()}
    assert images == PICTURES.keys() == shown().keys()
    for name, texts in shown().items():
        assert all(len(text) > 30 for text in texts), f"{name} has no text for those who do not see it"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_small_file(name: str) -> None:
    content = (IMAGES / name).read_bytes()
    assert (content[:4], content[8:12]) == (b"RIFF", b"WEBP")
    assert len(content) < 150 * 1024


@pytest.mark.skipif(not is_installed(), reason="no chromium and chromedriver")
def test_a_picture_is_of_its_elements(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<style>* { margin: 0 } div { height: 500px; background: #f00 } #b { height: 40px; background: #00f }"
        "</style><div></div><div id=b></div><div></div>"
    )
    with Browser(tmp_path, width=300, height=200) as browser:
        browser.open(page.as_uri())
        browser.picture(tmp_path / "b.webp", "#b", "#b", margin=0)
        browser.open((tmp_path / "b.webp").as_uri())
        drawn = """
            const image = document.querySelector("img");
            const context = document.createElement("canvas").getContext("2d");
            context.drawImage(image, 0, 0);
            return [image.naturalWidth, image.naturalHeight, ...context.getImageData(9, 9, 1, 1).data];
        """
        width, height, red, green, blue, _ = browser.run(drawn)
    assert (height, red < 20, green < 20, blue > 235) == (40, True, True, True)
    assert 280 <= width <= 300
