"""The page in headless Chromium: ask, watch the answer stream, stop it, compare two models, phone width, dark."""

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.train, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


class Browser:
    """A tab of Chromium, through its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.count, self.errors = socket, 0, []

    async def send(self, method, **params):
        self.count += 1
        await self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(await self.socket.recv())
            if message.get("id") == self.count:
                return message["result"]
            bad = message.get("method") == "Runtime.exceptionThrown" or (
                message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")
                and "error" in json.dumps(message["params"])
            )
            if bad:
                self.errors.append(message["params"])

    async def run(self, script):
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    async def until(self, script, seconds=30):
        deadline = time.monotonic() + seconds
        while not await self.run(script):
            assert time.monotonic() < deadline, script
            await asyncio.sleep(0.05)

    async def ask(self, question, tokens):
        await self.run(
            f"document.getElementById('max_tokens').value = {tokens};"
            f"document.getElementById('question').value = {json.dumps(question)};"
            "document.getElementById('ask').requestSubmit(); 1"
        )


@pytest.fixture
def browse(tmp_path):
    """Run a coroutine with a browser on an address."""
    websockets = pytest.importorskip("websockets")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen([*words, f"--user-data-dir={tmp_path}", "about:blank"], stderr=subprocess.DEVNULL)

    async def with_browser(address, act):
        port_file = tmp_path / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not port_file.is_file() or not port_file.read_text().strip():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json"))
        page = next(tab for tab in tabs if tab["type"] == "page")
        async with websockets.connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            browser = Browser(socket)
            for domain in ("Page", "Runtime", "Log"):
                await browser.send(f"{domain}.enable")
            await browser.send("Page.navigate", url=address)
            await browser.until("document.querySelectorAll('#first option').length > 0")
            await act(browser)
            return browser.errors

    yield lambda address, act: asyncio.run(with_browser(address, act))
    process.kill()
    process.wait()


def test_the_page(served, engine, browse):
    asked = [{"role": "user", "content": "感冒了怎么办？"}]
    expected = engine.answer(asked, 12)
    ended = "document.querySelectorAll('.answer').length > 0 && !document.querySelector('.running')"

    async def act(browser):
        await browser.ask(asked[0]["content"], 12)
        await browser.until(ended)
        texts = await browser.run("[...document.querySelectorAll('.answer .words')].map(node => node.textContent)")
        names = await browser.run("[...document.querySelectorAll('.answer b')].map(node => node.textContent)")
        assert (names, texts) == (["dpo", "base"], [expected, expected])
        # A stopped answer ends, and the next question can be asked.
        await browser.ask("再说一次", 800)
        await browser.until("!!document.querySelector('.running')")
        await browser.run("document.getElementById('stop').click()")
        await browser.until(ended)
        assert "stopped" in await browser.run("document.getElementById('talk').textContent")
        assert not await browser.run("document.getElementById('send').hidden")
        # A new chat while an answer runs: the next request holds the new question alone.
        await browser.ask("旧的问题", 800)
        await browser.until("[...document.querySelectorAll('.running .words')].some(node => node.textContent)")
        await browser.run("document.getElementById('reset').click()")
        await browser.until("running === null")
        assert await browser.run("JSON.stringify(body('dpo', '新的问题').messages)") == (
            '[{"role":"user","content":"新的问题"}]'
        )
        # Enter that confirms a Chinese word of an input method does not send; key code 229 is Safari's mark of it.
        enter = "new KeyboardEvent('keydown', {key: 'Enter', cancelable: true, %s})"
        for mark in ("isComposing: true", "keyCode: 229"):
            await browser.run("document.getElementById('question').value = '感'")
            await browser.run(f"document.getElementById('question').dispatchEvent({enter % mark})")
            assert await browser.run("running === null && document.getElementById('question').value") == "感"
        # Every control has a name for a screen reader.
        names = await browser.run(
            "[...document.querySelectorAll('button, select, input, textarea')].map(node => node.textContent.trim() || "
            "node.labels?.[0]?.textContent.trim() || "
            "document.getElementById(node.getAttribute('aria-labelledby'))?.textContent.trim() || '').filter(n => !n)"
        )
        assert names == []
        # Markup in a question stays text.
        await browser.ask("<img src=x onerror=alert(1)>", 1)
        await browser.until(ended)
        assert await browser.run("document.querySelectorAll('#talk img').length") == 0
        # Dark, Chinese, phone.
        light = await browser.run("getComputedStyle(document.body).backgroundColor")
        await browser.run("document.getElementById('theme').click()")
        assert await browser.run("getComputedStyle(document.body).backgroundColor") != light
        await browser.run("document.getElementById('language').click()")
        assert await browser.run("document.getElementById('send').textContent") == "发送"
        await browser.send(
            "Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True
        )
        assert await browser.run("document.documentElement.scrollWidth") == 390

    with served({"dpo": engine, "base": engine}) as server:
        assert browse(f"{server.url}/", act) == []
