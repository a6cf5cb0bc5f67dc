"""The page in headless Chromium: ask, watch the answer stream, stop it, compare two models, phone width, dark."""

import pytest
from browser import CHROMIUM, ENDED, browse

pytestmark = [pytest.mark.train, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


def test_the_page(served, engine, tmp_path):
    pytest.importorskip("websockets")
    asked = [{"role": "user", "content": "感冒了怎么办？"}]
    expected = engine.answer(asked, 12)

    async def act(browser):
        await browser.ask(asked[0]["content"], 12)
        await browser.until(ENDED)
        texts = await browser.run("[...document.querySelectorAll('.answer .words')].map(node => node.textContent)")
        names = await browser.run("[...document.querySelectorAll('.answer b')].map(node => node.textContent)")
        assert (names, texts) == (["dpo", "base"], [expected, expected])
        # A stopped answer ends, and the next question can be asked.
        await browser.ask("再说一次", 800)
        await browser.until("!!document.querySelector('.running')")
        await browser.run("document.getElementById('stop').click()")
        await browser.until(ENDED)
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
        await browser.until(ENDED)
        assert await browser.run("document.querySelectorAll('#talk img').length") == 0
        # Dark, Chinese, phone.
        light = await browser.run("getComputedStyle(document.body).backgroundColor")
        await browser.run("document.getElementById('theme').click()")
        assert await browser.run("getComputedStyle(document.body).backgroundColor") != light
        await browser.run("document.getElementById('language').click()")
        assert await browser.run("document.getElementById('send').textContent") == "发送"
        told = await browser.run("document.getElementById('talk').textContent")
        assert all(word in told for word in ("复制", "个词元，用时", "达到长度上限"))
        assert not any(word in told for word in ("Copy", "tokens in", "cut at the limit", "stopped"))
        await browser.send(
            "Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True
        )
        assert await browser.run("document.documentElement.scrollWidth") == 390
        await browser.until("document.getElementById('question').placeholder === '输入问题'")

    with served({"dpo": engine, "base": engine}) as server:
        assert browse(tmp_path, f"{server.url}/", act) == []
