"""The chat page in a real browser: what a person types, sees, points at, and stops."""

import os
import re
import shutil

import pytest

from .test_process import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, as continuous integration does; the page is ours.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(server, **context options) -> a page; at the end nothing may have gone wrong on it, nor been asked elsewhere."""
    contexts, wrong = [], []

    def hear(message) -> None:
        if message.type == "error" and not re.search("status of 40[01]", message.text):  # a full context, a missing key
            wrong.append(message.text)

    def make(server, key="", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", hear)
        page.on(
            "request",
            lambda request: None if request.url.startswith((server.url, "data:")) else wrong.append(request.url),
        )
        page.goto(server.url)
        if key:
            page.fill("#key", key)
            page.press("#key", "Tab")
            page.click("#settings summary")
        page.wait_for_selector(".empty-hint")
        return page

    yield make
    for context in contexts:
        context.close()
    assert not wrong, wrong


def ask(page, text: str) -> str:
    """Types, sends, waits; the answer's text."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:visible")
    return page.locator(".answer .text").last.inner_text()


def test_a_question_is_answered_and_its_experts_are_shown(trained, started, visit):
    with started(trained.chat) as server:
        page = visit(server)
        page.click("#settings summary")
        page.fill("#temperature", "0")
        page.click("#settings summary")
        answer = ask(page, "2 + 3 = ?")
        assert "2 + 3 =" in answer
        tokens = page.locator(".answer .token.coloured")
        n = tokens.count()
        assert n > 3 and "".join(tokens.all_inner_texts()) == answer
        assert page.locator("#strip .cell").count() == 3 * 8 and f"{n} tokens of this answer" in page.inner_text(
            "#strip-words"
        )

        def strongest() -> list[int]:
            """The experts, layer by layer, whose cells are full."""
            shares = page.eval_on_selector_all(
                "#strip .cell", "cells => cells.map(c => Number(c.style.getPropertyValue('--share')))"
            )
            return [i % 8 for i, share in enumerate(shares) if share == 1]

        asked = {"messages": [{"role": "user", "content": "2 + 3 = ?"}], "temperature": 0, "experts": True}
        told = page.request.post(f"{server.url}/v1/chat/completions", data=asked).json()["minimoe"]["choices"][0][
            "tokens"
        ]
        for index in (0, n - 1):
            tokens.nth(index).hover()
            assert f"Token {index + 1} of {n}" in page.inner_text("#strip-words")
            assert strongest() == [chosen[0] for chosen in told[index]["experts"]]
        page.hover("header")
        assert "of this answer" in page.inner_text("#strip-words"), "nothing pointed at: the whole answer"
        tokens.nth(1).click()
        page.hover("header")
        assert f"Token 2 of {n}" in page.inner_text("#strip-words"), "a click stays"
        page.keyboard.press("ArrowRight")
        assert f"Token 3 of {n}" in page.inner_text("#strip-words")

        def hues() -> list[str]:
            return tokens.evaluate_all("spans => spans.map(span => span.style.getPropertyValue('--hue'))")

        for place in (0, 2):
            page.select_option("#layer", str(place))
            assert hues() == [str(round(360 * token["experts"][place][0] / 8)) for token in told], (
                "coloured by the first choice"
            )

        assert ask(page, "4 + 4 = ?") != answer and page.locator(".turn.user").count() == 2
        for _ in range(12):  # until the context is full: the oldest turns go, and it is said
            ask(page, "7 + 8 = ?")
        assert page.get_by_text("forgotten").count() > 0 and page.locator(".note.bad").count() == 0
        page.click("#clear")
        assert page.locator(".turn").count() == 0


def test_a_text_stays_text_and_an_answer_can_be_stopped(random_run, started, visit):
    run = random_run(format="text", max_position_embeddings=4096, n_routed_experts=32, num_experts_per_tok=4)
    with started(run) as server:
        page = visit(server)
        page.click("#settings summary")
        page.fill("#max_tokens", "4000")
        page.fill("#temperature", "0")  # random weights, drawn from, soon draw the end
        hostile = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
        page.fill("#prompt", hostile)
        page.press("#prompt", "Enter")
        page.locator(".token").nth(30).wait_for(state="attached")
        page.click("#stop")
        page.wait_for_selector("#send:visible")
        assert page.inner_text(".note") == "stopped" and page.locator(".token").count() < 3900
        assert page.inner_text(".prompt-text") == hostile and page.locator("main img, main b").count() == 0
        assert "taken" not in page.title()
        wait_for(lambda: page.request.get(f"{server.url}/health").json()["running"] == 0)
        page.fill("#top_p", "7")
        page.fill("#prompt", "a")
        page.press("#prompt", "Enter")
        assert page.locator(".turn").count() == 1, "a setting out of range is not sent"


def test_it_fits_a_phone_and_asks_for_the_key(random_run, started, visit):
    run = random_run(n_routed_experts=16, num_hidden_layers=6)
    with started(run, "--api-key-env", "KEY_OF_TEST", environment={"KEY_OF_TEST": "s3cret"}) as server:
        for scheme, paper in (("light", "rgb(250, 250, 247)"), ("dark", "rgb(22, 24, 27)")):
            page = visit(server, key="s3cret", **PHONE, color_scheme=scheme)
            page.click("#settings summary")
            page.fill(
                "#temperature", "0"
            )  # drawn from, random weights may end after a token or two, none of which can be tapped
            page.click("#settings summary")
            ask(page, "A question that is long enough to be broken into several lines on a phone, and then some.")
            page.locator(".token.coloured", has_text=re.compile(r"\w")).nth(1).tap()
            assert "Token " in page.inner_text("#strip-words")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing to scroll sideways"
            for selector in ("#strip", "#prompt", "#send", "#layer"):
                box = page.locator(selector).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, selector
            assert page.locator("main").bounding_box()["height"] > 250, "room for the conversation"
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
