"""The page in a real browser: headless Chromium, driven by playwright. UPDATE_SCREENSHOT=1 renews docs/race.png."""

import json
import os
import re
import shutil

import httpx
import pytest

from llama_engine.errors import InputError
from llama_engine.serving.server import free_port
from llm_demo.app import create_app
from llm_demo.gateway import Gateway
from tests.conftest import ROOT
from tests.llm_demo.test_guard import serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found (Debian: apt-get install chromium)")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
expect = sync_api.expect
expect.set_options(timeout=60_000)  # a page that waits 5 s is no fault where a machine is busy


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, gateway):
    """The open page; fails when it logged an error of its own or asked anything of another host."""
    context = browser.new_context(viewport={"width": 1100, "height": 860})
    page, errors, hosts = context.new_page(), [], set()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(re.match(r"\w+:(//[^/]*)?", request.url)[0]))
    page.goto(gateway)
    expect(page.locator("#status")).to_have_class("ok")
    page.click("summary")
    page.fill("#temperature", "0")
    yield page
    context.close()
    assert errors == []
    assert hosts <= {gateway, "data:"}


def ask(page, text):
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def last_answer(page):
    return page.locator(".assistant").last


def test_an_answer_streams_in(page):
    page.fill("#max_tokens", "1500")
    ask(page, "Write a long story about a fox.")
    growing = page.locator(".assistant.busy .body")
    expect(growing).to_have_text(re.compile(".{20}", re.DOTALL))
    early = growing.inner_text()
    expect(growing).to_have_text(re.compile(f".{{{len(early) + 40}}}", re.DOTALL))
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    assert last_answer(page).locator(".body").inner_text().startswith(early)
    assert re.search(r"first token [\d.]+ m?s\s*[\d.]+ tok/s\s*\d+ tokens", last_answer(page).inner_text())
    expect(last_answer(page).locator("svg polyline")).to_be_attached()


def test_the_conversation_is_sent_along(page):
    sent = []
    page.on("request", lambda request: sent.append(request.post_data) if "completions" in request.url else None)
    for question in ("What is the capital of France? Answer briefly.", "And of Italy?"):
        ask(page, question)
        expect(page.locator(".assistant:not(.busy)")).to_have_count(len(sent) or 1)
        expect(page.locator("#send")).to_be_visible()
    assert "Paris" in page.locator(".assistant .body").first.inner_text()
    assert [message["role"] for message in json.loads(sent[1])["messages"]] == ["user", "assistant", "user"]


def answer_with(page, text, **usage):
    """Every answer is ``text`` from now on."""
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101} | usage
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}], "usage": usage}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


EVIL = [
    "<img src=x onerror='window.harmed=1'><script>window.harmed=1</script><b>bold</b> &amp;",
    '[click](javascript:window.harmed=1) and [here](https://x.example/"onmouseover=window.harmed=1)',
    "# <svg onload=window.harmed=1>\n\n- <i>one</i>\n\n| <b>a</b> |\n|-|\n| <b>b</b> |\n\n> <b>c</b>",
    "```html\n<script>window.harmed=1</script>\n```",
]


@pytest.mark.parametrize("evil", EVIL)
def test_html_in_an_answer_stays_text(page, evil):
    answer_with(page, evil)
    ask(page, "<i>mine</i>")
    expect(page.locator(".actions")).to_be_visible()
    expect(page.locator(".user p")).to_have_text("<i>mine</i>")
    assert page.locator("#log :is(img, script, b, i, svg):not(.meta *)").count() == 0
    assert all(
        href.startswith("https://") for href in page.locator(".body a").evaluate_all("all => all.map(a => a.href)")
    )
    shown = page.locator(".body").inner_text()
    assert all(tag in shown for tag in re.findall("<[a-z]+", evil))
    page.locator(".body").hover()
    assert page.evaluate("window.harmed") is None


def test_markdown_becomes_elements(page):
    answer_with(
        page,
        "## Title\n\nSome **bold** and *slanted* words, `code` and snake_case_names 2*3*4.\nMore, "
        "https://example.org/a_b.\n\n1. one\n2. two\n   - inner\n\n> said\n\n| a | b |\n|---|---|\n| 1 | **2** |\n\n"
        "---\n"
        "```python\nprint('*no*')\n\nx = 1\n```\nEnd",
    )
    ask(page, "x")
    expect(page.locator(".actions")).to_be_visible()
    seen = page.locator(".body").evaluate("body => [...body.children].map(e => e.tagName).join(' ')")
    assert seen == "H2 P OL BLOCKQUOTE DIV HR PRE P"
    texts = {
        "h2": "Title",
        "p strong": "bold",
        "em": "slanted",
        "p code": "code",
        "ol ul li": "inner",
        "td strong": "2",
    }
    for where, text in texts.items():
        expect(page.locator(f".body {where}")).to_have_text(text)
    expect(page.locator(".body pre")).to_have_text("print('*no*')\n\nx = 1")
    expect(page.locator(".body p").first).to_contain_text("snake_case_names 2*3*4.")
    assert page.locator(".body a").get_attribute("href") == "https://example.org/a_b"


def test_an_answer_is_copied_as_it_came_and_made_again(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    sent = []
    page.on("request", lambda request: sent.append(request.post_data) if "completions" in request.url else None)
    page.fill("#system", "Be brief.")
    page.fill("#top_k", "5")
    for text in ("**one**", "**two**"):
        page.unroute_all()
        answer_with(page, text)
        ask(page, f"say {text}")
        expect(page.locator(".assistant:not(.busy) .body").last).to_have_text(text.strip("*"))
    page.locator(".assistant").last.get_by_text("Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**two**"
    assert page.get_by_role("button", name="Regenerate").count() == 1
    page.unroute_all()
    answer_with(page, "**three**", prompt_tokens_details={"cached_tokens": 64})
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".body")).to_have_text("three")
    assert page.locator(".assistant").count() == page.locator(".user").count() == 2
    first, again = json.loads(sent[1]), json.loads(sent[2])
    assert first == again
    assert first["top_k"] == 5
    assert [message["content"] for message in first["messages"]] == [
        "Be brief.",
        "say **one**",
        "**one**",
        "say **two**",
    ]
    expect(last_answer(page).locator(".reused")).to_have_text("64 of 100 prompt tokens reused")


def test_a_conversation_reuses_its_prefix(page):
    page.fill("#max_tokens", "24")
    ask(page, "Tell me of the sea, of its depth and of those who live in it, and of the ships that sail it. " * 4)
    expect(page.locator(".actions")).to_have_count(1)
    ask(page, "Go on.")
    expect(last_answer(page).locator(".reused")).to_have_text(re.compile(r"\d+ of \d+ prompt tokens reused"))


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (360, "dark")])
def test_axe_finds_nothing_and_nothing_overflows(page, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    answer_with(
        page, "# A\n\n1. `x`\n\n```\n" + "wide " * 60 + "\n```\n\n|a|b|\n|-|-|\n|" + "c" * 200 + "|d|\n\n" + "e" * 300
    )
    ask(page, "x")
    expect(page.locator(".actions")).to_be_visible()
    for tab in ("#tab-chat", "#tab-race"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything(page):
    answer_with(page, "one")
    ask(page, "x")
    expect(page.locator(".actions")).to_be_visible()
    reached = set()
    page.focus("#tab-chat")
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"log", "Copy", "Regenerate", "prompt", "send", "Settings", "temperature", "system", "clear"} <= reached


def test_an_over_long_prompt_says_so_and_is_given_back(page):
    ask(page, "word " * 3000)
    expect(page.locator(".error")).to_contain_text("context is 2048 tokens")
    expect(page.locator(".error")).to_be_in_viewport()
    assert page.input_value("#prompt").startswith("word word")
    ask(page, "What is the capital of France? Answer briefly.")
    expect(last_answer(page).locator(".body")).to_contain_text("Paris")


def test_a_key_is_asked_for_and_sent(page):
    refusal = json.dumps({"error": {"message": "Incorrect or missing API key.", "code": "invalid_api_key"}})

    def guard(route):
        known = route.request.headers.get("authorization") == "Bearer sesame"
        route.continue_() if known else route.fulfill(status=401, body=refusal, content_type="application/json")

    page.route("**/v1/chat/completions", guard)
    ask(page, "What is the capital of France? Answer briefly.")
    expect(page.locator(".error")).to_contain_text("Incorrect or missing API key")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    page.click("#send")  # the question was given back
    expect(last_answer(page).locator(".body")).to_contain_text("Paris")


@pytest.mark.slow
def test_the_race_ends_with_a_ratio(page, tmp_path):
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#race")).to_be_visible()
    page.select_option("#race-tokens", "64")
    for one_after_the_other in (False, True):  # the second is the fairer picture
        page.locator("#turns").set_checked(one_after_the_other)
        page.focus("#race-prompt")
        page.keyboard.press("Enter")
        expect(page.locator("#abort")).to_be_visible()
        expect(page.locator("#abort")).to_be_hidden(timeout=240_000)
        expect(page.locator("#verdict")).to_contain_text(re.compile(r"(engine|Baseline): \d+\.\d× faster"))
        for lane in page.locator(".lane").all():
            assert re.search(r"first token [\d.]+ m?s · 64 tokens in [\d.]+ m?s", lane.locator(".times").inner_text())
            assert len(lane.locator(".text").inner_text()) > 100
        assert page.locator("#plot polyline").count() == 2
        assert page.locator("#plot text", has_text="finish line: 64 tokens").count() == 1
    expect(page.locator("#status")).to_have_class("ok")
    picture = page.screenshot(path=tmp_path / "race.png")
    assert picture.startswith(b"\x89PNG")
    if os.environ.get("UPDATE_SCREENSHOT"):
        shutil.copy(tmp_path / "race.png", ROOT / "docs/race.png")
    for width, scheme in ((390, "dark"), (320, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        for tab in ("#tab-race", "#tab-chat"):
            page.click(tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_stopped_server_is_said_and_recovered_from(page, triton):
    ask(page, "What is the capital of France? Answer briefly.")
    expect(last_answer(page).locator(".body")).to_contain_text("Paris")
    triton.stop()
    try:
        expect(page.locator("#banner")).to_contain_text("The inference server does not answer", timeout=20_000)
        expect(page.locator("#send")).to_be_disabled()
    finally:
        triton.start()
    expect(page.locator("#banner")).to_be_hidden(timeout=20_000)
    ask(page, "What is the capital of Italy? Answer briefly.")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(last_answer(page).locator(".body")).to_contain_text("Rome")


def test_another_server_runs_in_a_lane(browser, gateway, smollm2_engine):
    """The gateway of the other tests, as it looks from a second one that has no engine of its own."""
    app = create_app(
        Gateway(smollm2_engine, "127.0.0.1:1", model_dir=None, device="cpu", others=[f"neighbour={gateway}/v1"]),
        api_key=None,
        local_only=True,
    )
    with serve(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        asked = {
            "model": "neighbour",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4,
            "temperature": 0,
        }
        mine, theirs = (
            http.post(f"{base}/v1/chat/completions", json=asked | {"model": model}).json()["choices"]
            for base, model in ((url, "neighbour"), (gateway, "SmolLM2-135M-Instruct"))
        )
        assert mine == theirs
        refused = http.post("/v1/chat/completions", json=asked | {"top_logprobs": 3, "logprobs": False})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
        page = browser.new_page()
        page.goto(f"{url}/#race")
        expect(page.locator("#lane-1 option:checked")).to_have_text("neighbour")
        page.select_option("#lane-0", "neighbour")
        expect(page.locator(".lane h2").first).to_have_text("neighbour")
        page.close()
        gone = Gateway(
            smollm2_engine,
            "127.0.0.1:1",
            model_dir=None,
            device="cpu",
            others=[f"gone=http://127.0.0.1:{free_port()}/v1"],
        )
        with serve(create_app(gone, api_key=None, local_only=True)) as other:
            answer = http.post(f"{other}/v1/chat/completions", json=asked | {"model": "gone"})
        assert answer.status_code == 502
        assert "gone at http" in answer.json()["error"]["message"]


@pytest.mark.parametrize("flag", ["x", "=http://a", "x=ftp://a", "SmolLM2-135M-Instruct=http://a"])
def test_another_server_has_a_name_of_its_own_and_a_url(smollm2_engine, flag):
    with pytest.raises(InputError, match="--other"):
        Gateway(smollm2_engine, "127.0.0.1:1", model_dir=None, device="cpu", others=[flag])
