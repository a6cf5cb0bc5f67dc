"""A tab of headless Chromium, through its DevTools protocol. `docs/page.py` uses it too."""

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
ENDED = "document.querySelectorAll('.answer').length > 0 && !document.querySelector('.running')"
"""No answer is being written."""


class Browser:
    """The tab."""

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


def browse(folder, address, act):
    """Run the coroutine `act(browser)` on the page at an address; the errors of its console come back.

    `folder` is an empty one for Chromium's files.
    """
    import websockets

    async def with_browser():
        port_file = folder / "DevToolsActivePort"
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

    process = subprocess.Popen([*WORDS, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        return asyncio.run(with_browser())
    finally:
        process.kill()
        process.wait()
