"""Write page-light.png, page-dark.png and page-phone.png, the pictures of the server's page in serving.md.

Start the server with the model before training and the tuned one, then draw:

    pipeline serve configs/tiny.yaml --stage quantize --versus init
    PYTHONPATH=tests/serve python docs/page.py http://127.0.0.1:8000/
"""

import base64
import sys
import tempfile
from pathlib import Path

from browser import ENDED, Browser, browse

HERE = Path(__file__).parent
QUESTION = "普通感冒一般多久能好？"
LIMIT = 150_000  # bytes of a picture


async def draw(browser: Browser) -> None:
    """Ask both models in English and light, then show the same talk in dark, and in Chinese on a phone."""
    await size(browser, 1100, 420)
    await theme(browser, "light")
    await browser.ask(QUESTION, 80)
    await browser.until(ENDED, seconds=120)
    await picture(browser, "light")
    await theme(browser, "dark")
    await size(browser, 1100, 560)
    await browser.run("document.getElementById('more').click()")
    await picture(browser, "dark")
    await browser.run("document.getElementById('more').click(); document.getElementById('language').click()")
    await size(browser, 390, 640, mobile=True)
    await theme(browser, "light")
    await picture(browser, "phone")


async def theme(browser: Browser, name: str) -> None:
    """Choose light or dark, whatever the machine prefers."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    await browser.send("Emulation.setEmulatedMedia", features=features)


async def size(browser: Browser, width: int, height: int, *, mobile: bool = False) -> None:
    """Set the size of the window, in CSS pixels."""
    scale = {"deviceScaleFactor": 1.5 if mobile else 1, "mobile": mobile}
    await browser.send("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)


async def picture(browser: Browser, name: str) -> None:
    """Write one picture."""
    found = await browser.send("Page.captureScreenshot", format="png")
    data = base64.b64decode(found["data"])
    assert len(data) < LIMIT, f"{name}: {len(data):,} bytes"
    (HERE / f"page-{name}.png").write_bytes(data)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        errors = browse(Path(folder), sys.argv[1], draw)
    sys.exit(1 if errors else 0)
