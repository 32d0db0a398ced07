"""The page in a real browser, against the real server: what people do with it, and what could go wrong."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from generation_models import random_model, small_tokenizer
from page_server import PageServer, chromium
from serving_client import Served, serving, small_state

import groundup as gu
from groundup.alignment.conversations import load_conversations
from groundup.alignment.preferences import load_preferences
from groundup.errors import DataError
from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.calculator import write_call
from groundup.generation.sampling import warp
from groundup.generation.speculative import Speculation
from groundup.serving.feedback import keep
from groundup.serving.page import routes
from groundup.serving.state import ServedModel, State
from groundup.tokenizer import render

PAGE = Path(gu.__file__).parent / "serving" / "page"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with PageServer(("tiny", "other"), run=_unfinished_run(tmp_path_factory.mktemp("run")), draft="ngrams") as made:
        yield made


def _unfinished_run(folder: Path) -> Path:
    """A run whose second training goes on."""
    run = folder / "run"
    shutil.copytree(tiny_run.finished_run().root, run)
    for path in (run / "sft" / "stage.json", *run.glob("evaluate/sft/stage.json")):
        path.unlink()
    return run


class Watched:
    """A tab whose errors and requests are looked at when the test is over."""

    def __init__(self, context: Any, url: str, *, settings: dict[str, Any] | None = None) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        stored = json.dumps(json.dumps({"max_tokens": 24, "seed": 1, **(settings or {})}))
        self.page.add_init_script(f"localStorage.setItem('groundup.settings', {stored})")
        self.url = url
        self.page.goto(url)
        self.page.get_by_role("option", name=re.compile(".")).first.wait_for(state="attached")

    def ask(self, text: str, *, wait: bool = True) -> None:
        answers = self.page.get_by_role("article").count()
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_label("Message", exact=True).press("Enter")
        if wait:
            self.page.wait_for_function("n => document.querySelectorAll('article').length > n", arg=answers)
            self.wait()

    def wait(self) -> None:
        self.page.wait_for_function("() => !document.querySelector('article[aria-busy=true]')")

    def answer(self) -> Any:
        return self.page.locator("article.answer").last

    def check(self, allowed: str = "nothing is") -> None:
        assert [error for error in self.errors if not re.search(allowed, error)] == []
        assert [url for url in self.requests if not url.startswith((self.url, "blob:", "data:"))] == []


@pytest.fixture
def tab(browser: Any, server: PageServer) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    made = Watched(context, server.url)
    yield made
    made.check()
    context.close()


# In the browser


@slow
def test_a_conversation_streams_and_is_there_after_a_reload(tab: Watched, server: PageServer) -> None:
    server.engines["tiny"].seconds = 0.02
    tab.ask("the cat sat", wait=False)
    lengths = set()
    while tab.page.locator("article.answer[aria-busy=false]").count() == 0:
        lengths.add(len("".join(tab.page.locator("article.answer").all_inner_texts())))
    server.engines["tiny"].seconds = 0
    assert len(lengths) > 3  # it grew while it was written
    said = tab.answer().inner_text()
    assert "24 tokens" in said
    assert tab.page.get_by_role("status").inner_text().startswith("Answer: ")  # what a screen reader is told
    tab.page.reload()
    tab.page.get_by_role("button", name="the cat sat", exact=True).click()
    assert tab.answer().inner_text() == said


@slow
def test_stop_stops_and_frees_the_engine(tab: Watched, server: PageServer) -> None:
    engine = server.engines["tiny"]
    engine.seconds = 0.05
    tab.ask("Once", wait=False)
    tab.page.locator("article.answer .markdown > *").first.wait_for()
    tab.page.get_by_role("button", name="Stop").click()
    tab.answer().get_by_text("stopped").wait_for()
    for _ in range(100):
        if not engine.n_running:
            break
        time.sleep(0.05)
    assert engine.n_running == 0
    assert engine.stats.finished["cancelled"] >= 1
    engine.seconds = 0
    assert tab.page.get_by_role("button", name="Send").is_visible()


@slow
def test_a_branch_goes_on_as_the_model_would_have_from_the_other_choice(browser: Any, server: PageServer) -> None:
    context = browser.new_context()
    tab = Watched(context, server.url, settings={"temperature": 0})
    tab.ask("the cat")
    tab.answer().get_by_label("Show how probable").click()
    shown = tab.answer().locator(".token")
    before = shown.all_inner_texts()
    shown.nth(3).focus()
    choices = tab.answer().locator(".choice")
    assert choices.count() == 10
    assert "taken" in (choices.nth(0).get_attribute("class") or "")  # temperature 0 took the most probable one
    choices.nth(1).click()
    tab.wait()
    tab.page.get_by_text("a branch").wait_for()
    after = shown.all_inner_texts()
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    assert tab.answer().get_by_text("2/2").is_visible()

    engine = server.engines["tiny"]
    prompt = render(engine.tokenizer, [{"role": "user", "content": "the cat"}], add_generation_prompt=True).ids  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
    first = engine.run([Request(prompt, params)])[0][0]
    twin = [*first.ids[:3], first.logprobs[3].top[1][0]]
    rest = engine.run([Request([*prompt, *twin], params)])[0][0]
    assert len(after) == 4 + rest.n_tokens
    kept = tab.page.evaluate("import('/page/store.js').then(({ path }) => path().at(-1).tokens.map((one) => one.id))")
    assert kept == [*twin, *rest.ids]
    tab.page.get_by_label("Version before").click()
    assert shown.all_inner_texts() == before
    tab.check()
    context.close()


@slow
def test_what_a_draft_had_guessed_is_shown_below_the_answer_and_inside(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speculation, "_n_guesses", lambda *_: 2)  # whether it pays or not
    with PageServer(draft="ngrams") as server:
        context = browser.new_context()
        tab = Watched(context, server.url, settings={"temperature": 0})
        tab.ask("the cat sat the cat sat the cat")
        tab.answer().get_by_label("Show how probable").click()
        stats = server.engines["tiny"].stats
        n_accepted, n_rejected = stats.accepted_tokens, stats.drafted_tokens - stats.accepted_tokens
        assert tab.answer().locator(".token.accepted").count() == n_accepted > 0
        assert f"{n_accepted} guessed, {n_rejected} guesses thrown away" in tab.answer().inner_text()
        replaced = tab.answer().locator(".token.replaced")
        replaced.first.hover()
        assert tab.answer().locator(".card del code").count() >= 1
        n_replaced = replaced.count()
        tab.answer().get_by_label("Look inside").click()
        tab.page.get_by_text("Struck through: guesses that were thrown away").wait_for()
        assert tab.page.locator(".strip .token.accepted").count() == n_accepted
        assert tab.page.locator(".strip .token.replaced").count() == n_replaced
        assert tab.page.locator(".strip del code").count() == n_rejected > 0
        tab.check()
        context.close()


@slow
def test_two_tabs_see_each_others_conversations_and_lose_no_vote(browser: Any, server: PageServer) -> None:
    context = browser.new_context()
    one, other = Watched(context, server.url), Watched(context, server.url)
    one.ask("from the first tab")
    other.page.get_by_role("button", name="from the first tab", exact=True).wait_for()
    other.ask("from the second tab")
    one.page.get_by_role("button", name="from the second tab", exact=True).wait_for()
    assert server.run is not None
    preferences = server.run / "preferences.jsonl"
    n_before = len(preferences.read_text().splitlines()) if preferences.exists() else 0
    for tab in (one, other):
        tab.answer().get_by_label("Good answer").click()
    for tab in (one, other):
        tab.answer().locator("[aria-label='Good answer'][aria-pressed=true]").wait_for()
        tab.check()
    lines = [json.loads(line) for line in preferences.read_text().splitlines()][n_before:]
    assert {line["prompt"][0]["content"] for line in lines} == {"from the first tab", "from the second tab"}
    context.close()


@slow
def test_the_server_dies_and_comes_back(browser: Any) -> None:
    context = browser.new_context()
    server = PageServer().start()
    server.engines["tiny"].seconds = 0.05
    tab = Watched(context, server.url)
    tab.ask("Once", wait=False)
    tab.page.locator("article.answer .markdown > *").first.wait_for()
    server.die()
    tab.page.get_by_text("The connection broke while the answer was written.").first.wait_for()
    tab.page.locator(".banner").wait_for()
    server.engines["tiny"].seconds = 0
    with server:
        tab.page.locator(".banner").wait_for(state="detached")
        tab.answer().get_by_label("Answer again").click()
        tab.answer().get_by_text("tokens/s").wait_for()
        assert tab.page.get_by_text("The connection broke").count() == 0
    tab.check(allowed="Failed to load resource|ERR_")
    context.close()


HOSTILE = {
    "script": "<script>window.harmed = 1</script><img src=x onerror='window.harmed=1'><svg onload=window.harmed=1>",
    "links": "[a](javascript:window.harmed=1) [b](data:text/html,x) ![c](http://elsewhere.example/i.png) <http://e.example>",
    "entities": "&lt;img src=x onerror=window.harmed=1&gt; <a href='&#106;avascript:window.harmed=1'>x</a> <b>bold</b>",
    "huge word": "W" * 20_000,
    "right to left": "\u202e\u2067 evil \u202e" + "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 " * 50,
    "zalgo": "".join("z" + "\u0300\u0301\u0302\u0303" * 40 for _ in range(30)),
    "broken": "```python\nnever closed\n| a | b\n|--\n**bold *both _x [link](\n> > > > deep\n"
    + "[" * 5_000
    + "*" * 5_000,
    "style": "<style>body{display:none}</style><form action='http://elsewhere.example'><input name=q autofocus></form>",
    "null": "\u0000\u0007\u001b[2J\ufeff\u2028",
}


@slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_does_no_harm(tab: Watched, name: str) -> None:
    text = HOSTILE[name]
    events = [{"choices": [{"index": 0, "delta": {"content": text[at : at + 997]}}]} for at in range(0, len(text), 997)]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    began = time.monotonic()
    tab.ask("Be evil.")
    assert time.monotonic() - began < 10
    assert tab.page.evaluate("window.harmed") is None
    answer = tab.answer()
    assert answer.locator("img, script, style, form, input, iframe, svg:not(.icon)").count() == 0
    for link in answer.locator("a").all():
        assert (link.get_attribute("href") or "http").startswith(("http", "mailto:"))
        assert "noopener" in (link.get_attribute("rel") or "")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = answer.bounding_box()
    composer = tab.page.locator(".composer-box").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    assert composer["y"] + composer["height"] <= 860  # it can still be written in
    if name in ("script", "style"):  # what looks like HTML is shown as it was written
        assert text[:20] in answer.inner_text()
    tab.page.reload()
    tab.page.get_by_role("button", name="Be evil.", exact=True).click()
    assert answer.is_visible()


@slow
def test_a_call_of_the_calculator_is_run_and_what_follows_is_the_answer(tab: Watched) -> None:
    call, asked = write_call("3 * 4"), []

    def write(route: Any) -> None:
        asked.append(route.request.post_data_json["messages"])
        text = "It is 12." if asked[-1][-1]["role"] == "tool" else call if len(asked) == 1 else "Twelve."
        events = [
            {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"completion_tokens": 7}},
        ]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    tab.page.route("**/v1/chat/completions", write)
    tab.ask("3*4?")
    tab.answer().get_by_text("It is 12.").wait_for()
    shown = tab.answer().inner_text()
    assert "3 * 4 = 12" in shown
    assert "14 tokens" in shown
    assert "<tool>" not in shown
    turns = [
        {"role": "user", "content": "3*4?"}, {"role": "assistant", "content": call}, {"role": "tool", "content": "12"}
    ]  # fmt: skip
    assert asked[1] == turns
    tab.ask("Again?")
    assert asked[2] == [*turns, {"role": "assistant", "content": "It is 12."}, {"role": "user", "content": "Again?"}]


@slow
def test_axe_finds_no_serious_fault_in_any_view_and_nothing_is_wider_than_a_phone(
    browser: Any, server: PageServer
) -> None:
    axe = (Path(__file__).parent / "data" / "axe" / "axe.min.js").read_text()
    for scheme in ("light", "dark"):
        for width in (360, 1280):
            size = {"width": width, "height": 800}
            context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
            tab = Watched(context, server.url)
            page = tab.page

            def check(view: str, page: Any = page, width: int = width) -> None:
                page.wait_for_timeout(50)
                page.evaluate(axe)
                found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
                faults = [
                    f"{view}: {one['id']}: {one['nodes'][0]['html'][:200]}: {one['nodes'][0]['failureSummary']}"
                    for one in found
                    if one["impact"] in ("serious", "critical")
                ]
                assert faults == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width, view

            check("welcome")
            page.get_by_label("Two answers side by side").click()
            tab.ask("a **bold** question")
            check("side by side")
            page.get_by_label("Show how probable").first.click()
            page.locator(".token").nth(2).focus()
            check("tokens")
            page.get_by_label("Settings").click()
            check("settings")
            page.keyboard.press("Escape")
            page.get_by_role("link", name="Look inside").click()
            page.get_by_role("button", name="Look", exact=True).click()
            for pane in ("Tokens", "Next token", "Layers", "Attention"):
                page.get_by_role("tab", name=pane).click()
                check(pane)
            page.get_by_role("link", name="Training").click()
            page.locator("figure svg").wait_for()
            check("training")
            tab.check()
            context.close()


@slow
def test_all_of_it_by_keyboard(tab: Watched) -> None:
    page = tab.page

    def focus(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("(document.activeElement.ariaLabel ?? document.activeElement.textContent)") == label:
                return
        raise AssertionError(f"{label} cannot be reached")

    focus("Message")
    page.keyboard.type("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("another")
    page.keyboard.press("Enter")
    page.locator("article[aria-busy=false].answer").wait_for()
    assert page.locator(".said").inner_text() == "one line\nanother"
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("Shift+Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.ariaLabel") == "Show how probable each token was":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 2
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('choice')")
    page.keyboard.press("Enter")
    page.get_by_text("a branch").wait_for()


@slow
def test_what_is_shown_inside_is_what_the_model_computes(tab: Watched, server: PageServer) -> None:
    page, engine = tab.page, server.engines["tiny"]
    assert engine.tokenizer is not None
    page.get_by_role("link", name="Look inside").click()
    page.get_by_label("Text to look into").fill("the cat sat at the window")
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_role("tab", name="Tokens").wait_for()
    seen = gu.inspect(engine.model, engine.tokenizer, "the cat sat at the window")
    ids = [int(text.split("\n")[-1]) for text in page.locator(".strip .token").all_inner_texts()]
    assert ids == seen.ids
    page.locator(".strip .token").nth(3).click()
    detail = page.locator(".detail").inner_text()
    assert f"{-seen.tokens[3].logprob:.2f} nats" in detail  # type: ignore[operator]
    page.get_by_role("tab", name="Layers").click()
    rows = page.locator(".lens tbody tr")
    assert rows.count() == engine.model.config.n_layers + 1
    ranks = [int(text) for text in rows.nth(1).locator("small").all_inner_texts()]
    assert ranks == [cell.rank for cell in seen.lens[-2]]
    page.get_by_role("tab", name="Attention").click()
    page.get_by_label("Layer 1, head 2", exact=True).click()
    page.locator(".strip .token").nth(4).click()
    weights = seen.attention[0, 1, 4]
    assert page.get_by_text("looks at").inner_text().count("%") == 3
    assert (
        f"{seen.tokens[int(weights.argmax())].shown} {100 * weights.max():.0f}%"
        in page.get_by_text("looks at").inner_text()
    )
    page.get_by_role("tab", name="Next token").click()
    page.get_by_label("Top-p").fill("0.5")
    stay = re.search(r"([\d,]+) of", page.get_by_text("tokens stay").inner_text())
    assert stay is not None
    page.locator(".strip .token").nth(2).click()
    page.wait_for_timeout(300)
    law = warp(seen.logits[2:3], SamplingParams(temperature=0.8, top_p=0.5))[0].exp()
    first = page.locator(".next tbody tr").first.inner_text()
    assert f"{100 * law.max():.1f}%" in first or f"{100 * law.max():.0f}%" in first
    assert f"{int((law > 0).sum()):,} of" in page.get_by_text("tokens stay").inner_text()


@slow
def test_the_sliders_law_is_the_engines(tab: Watched) -> None:
    random_numbers = random.Random(3)
    for _ in range(30):
        logits = [round(random_numbers.gauss(0, 3), 1) for _ in range(60)]  # rounded: some tie
        given = {
            "temperature": random_numbers.choice([0, 0.5, 1, 1.7]), "top_k": random_numbers.choice([0, 3, 20]),
            "top_p": random_numbers.choice([1, 0.9, 0.3]), "min_p": random_numbers.choice([0, 0.05, 0.4]),
        }  # fmt: skip
        found = tab.page.evaluate(
            """([logits, given]) => import("/page/inside.js")
                .then(({ warp }) => [...warp(Float32Array.from(logits), given).after])""",
            [logits, given],
        )
        expected = warp(torch.tensor([logits]), SamplingParams(**given))[0].exp()  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), expected, atol=1e-5, rtol=1e-4)


@slow
def test_look_inside_an_answer_shows_the_conversation_as_the_model_reads_it(tab: Watched) -> None:
    tab.ask("the cat")
    tab.answer().get_by_label("Look inside").click()
    tab.page.get_by_text("The conversation, as the model reads it.").wait_for()
    assert tab.page.locator(".strip .token").first.inner_text().startswith("<|user|>")


@slow
def test_votes_rankings_and_corrections_become_data(browser: Any, tmp_path: Path) -> None:
    with PageServer(("tiny", "other"), run=tmp_path) as server:
        context = browser.new_context()
        tab = Watched(context, server.url)
        for turn in range(2):
            tab.ask(f"question {turn}")
        tab.answer().get_by_label("Good answer").click()
        tab.answer().locator("[aria-label='Good answer'][aria-pressed=true]").wait_for()
        good = tab.page.evaluate("import('/page/store.js').then(({ path }) => path().map((one) => one.content))")
        tab.page.evaluate("import('/page/store.js').then(({ configure }) => configure({ seed: 2 }))")
        tab.answer().get_by_label("Answer again").click()
        tab.page.get_by_text("2/2").wait_for()
        tab.wait()
        tab.answer().get_by_label("Bad answer").click()
        tab.answer().locator("[aria-label='Bad answer'][aria-pressed=true]").wait_for()
        tab.answer().get_by_label("Correct this answer").click()
        tab.page.get_by_label("What the answer should have been").fill("As it should be.")
        tab.page.get_by_role("button", name="Keep the correction").click()
        tab.answer().get_by_text("your correction").wait_for()
        tab.page.get_by_label("Two answers side by side").click()
        tab.ask("which?")
        tab.page.get_by_role("button", name="This one is better").nth(1).click()
        tab.page.get_by_role("button", name="Preferred").wait_for()
        lines = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
        up, down, pair, corrected, ranked = lines
        assert [message["content"] for message in up["prompt"]] == good[:-1]
        assert (up["completion"], up["label"], down["label"]) == (good[-1], True, False)
        assert (pair["chosen"], pair["rejected"]) == (good[-1], down["completion"])
        assert (corrected["chosen"], corrected["rejected"]) == ("As it should be.", down["completion"])
        assert ranked["prompt"][-2:][0]["content"] == "As it should be."
        assert ranked["chosen"] != ranked["rejected"]
        found = load_conversations([str(tmp_path / "conversations.jsonl")], 0, 1, "align.sft")
        said = {conversation[-1]["content"] for conversation in found.train + found.held_out}
        assert said == {good[-1], "As it should be."}
        judged = load_preferences([str(tmp_path / "preferences.jsonl")], "align.dpo")
        assert (len(judged.train + judged.held_out), judged.set_aside) == (5, {})
        assert found.set_aside == {}
        tab.check()
        context.close()


@slow
def test_a_run_that_is_training_is_shown_as_it_goes_on(tab: Watched, server: PageServer) -> None:
    assert server.run is not None
    tab.page.get_by_role("link", name="Training").click()
    tab.page.get_by_role("button", name="sft").wait_for()
    folder = server.run / "sft"
    with (folder / "metrics.jsonl").open("a") as metrics, (folder / "samples.jsonl").open("a") as samples:
        metrics.write(json.dumps({"step": 4321, "loss": 1.2345}) + "\n")
        samples.write(json.dumps({"step": 4321, "prompt": "Once", "text": " <b>upon</b> a time"}) + "\n")
    tab.page.get_by_text("step 4,321", exact=True).wait_for()
    assert "<b>upon</b> a time" in tab.page.locator(".sample").inner_text()
    assert "1.23" in tab.page.locator(".figures").inner_text()
    tab.page.get_by_role("button", name="pretrain").click()
    assert tab.page.locator("polyline.validation").get_attribute("points")


@slow
def test_export_and_import(tab: Watched, browser: Any, server: PageServer, tmp_path: Path) -> None:
    tab.ask("to be kept")
    said = tab.answer().locator(".markdown").inner_text()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Export").click()
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    context = browser.new_context()
    other = Watched(context, server.url)
    other.page.get_by_label("Conversations to import").set_input_files(file)
    other.page.get_by_role("button", name="to be kept", exact=True).click()
    assert other.answer().locator(".markdown").inner_text() == said
    asked: list[str] = []
    other.page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    good = json.loads(file.read_text())["conversations"][0]
    node = next(iter(good["nodes"].values()))
    loop = {**good, "nodes": {node["id"]: {**node, "parent": node["id"]}}}
    for wrong in ("no json", "[]", json.dumps({"conversations": [{"id": 1}]}), json.dumps({"conversations": [loop]})):
        (tmp_path / "wrong.json").write_text(wrong)
        other.page.get_by_label("Conversations to import").set_input_files(tmp_path / "wrong.json")
        for _ in range(100):
            if asked:
                break
            other.page.wait_for_timeout(20)
        assert "no conversations of this page" in asked.pop()
    other.check()
    context.close()


@slow
def test_a_server_with_a_key_asks_for_it(browser: Any) -> None:
    with PageServer(keys=("open sesame",)) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill("open sesame")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("option", name="tiny").wait_for(state="attached")
        assert page.evaluate("localStorage.length") == 0  # nothing of it is kept
        context.close()


@slow
def test_an_edited_question_is_another_version_and_the_system_prompt_is_read(tab: Watched) -> None:
    sent: list[Any] = []
    tab.page.on("request", lambda request: sent.append(request.post_data_json) if "chat" in request.url else None)
    tab.page.get_by_label("Settings").click()
    tab.page.get_by_label("System prompt").fill("Be brief.")
    tab.page.keyboard.press("Escape")
    tab.ask("first form")
    tab.page.locator(".question").hover()
    tab.page.get_by_label("Edit and ask again").click()
    tab.page.get_by_label("Your message").fill("second form")
    tab.page.get_by_role("button", name="Ask", exact=True).click()
    tab.wait()
    assert tab.page.locator(".said").inner_text() == "second form"
    assert [one["messages"] for one in sent] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        for text in ("first form", "second form")
    ]
    tab.page.get_by_label("Version before").click()
    assert tab.page.locator(".said").inner_text() == "first form"


@slow
def test_of_a_conversation_too_long_for_the_context_the_newer_part_is_read(tab: Watched) -> None:
    sent: list[Any] = []
    tab.page.on("request", lambda request: sent.append(request.post_data_json) if "chat" in request.url else None)
    for turn in range(5):
        tab.ask(f"question {turn} of the old woman and the cat at the edge of the forest")
    tab.page.get_by_text("no longer fit").last.wait_for()
    last = [message["content"][:10] for message in sent[-1]["messages"] if message["role"] == "user"]
    assert last[-1] == "question 4"
    assert 0 < len(last) < 5
    assert sent[-1]["messages"][0]["role"] == "user"


# Without a browser


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = small_state("small", run=_unfinished_run(tmp_path_factory.mktemp("api")))
    with serving(state, routes()) as made:
        yield made


TALK = [{"role": "user", "content": "the cat"}]
WRONG = {
    "nothing to inspect": ("/inspect", {}, "prompt, messages or tokens"),
    "two things to inspect": ("/inspect", {"prompt": "a", "tokens": [1]}, "prompt, messages or tokens"),
    "too long": ("/inspect", {"prompt": "the cat " * 300}, "must have 1 to 128"),
    "an unknown id": ("/inspect", {"tokens": [9_999]}, "9999"),
    "no such position": ("/inspect", {"tokens": [1, 2], "position": 2}, "2 tokens"),
    "too many alternatives": ("/inspect", {"prompt": "a", "top": 51}, "50"),
    "an unknown field": ("/inspect", {"prompt": "a", "layers": 3}, "not supported"),
    "a vote on nothing": ("/feedback", {"messages": TALK, "vote": "up"}, "need answer"),
    "a turn that is no text": (
        "/feedback", {"messages": [{"role": "user", "content": None}], "answer": "a", "vote": "up"}, "content",
    ),
    "no opinion": ("/feedback", {"messages": TALK, "answer": "a"}, "vote, correction or ranking"),
    "a vote of another kind": ("/feedback", {"messages": TALK, "answer": "a", "vote": "maybe"}, "vote"),
    "a ranking of one": ("/feedback", {"messages": TALK, "ranking": ["a"]}, "at least 2"),
    "a ranking of equals": ("/feedback", {"messages": TALK, "ranking": ["a", "a"]}, "two different"),
    "a correction that is none": ("/feedback", {"messages": TALK, "answer": "a", "correction": "a"}, "something else"),
    "an answer to begin with that cannot be": (
        "/v1/chat/completions", {"messages": TALK, "answer_ids": [9_999]}, "9999",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(api: Served, what: str) -> None:
    path, body, said = WRONG[what]
    status, found, _ = api.ask(path, body)
    assert status == 400
    assert said in found["error"]["message"]


def test_inspect_answers_what_python_gives(api: Served) -> None:
    engine = api.engine
    assert engine.tokenizer is not None
    status, found, _ = api.ask("/inspect", {"prompt": "the cat", "top": 3, "attention": False})
    assert status == 200
    assert found == {
        "model": "small",
        **json.loads(
            json.dumps(gu.inspect(engine.model, engine.tokenizer, "the cat", top=3).to_json(with_attention=False))
        ),
    }
    ids = render(engine.tokenizer, TALK, add_generation_prompt=True).ids  # type: ignore[arg-type]
    assert api.ask("/inspect", {"messages": TALK})[1]["ids"] == ids


def test_an_answer_goes_on_from_tokens_that_are_given(api: Served) -> None:
    body = {"messages": TALK, "max_tokens": 12, "temperature": 0, "logprobs": True, "ignore_eos": True}
    whole = api.ask("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]
    ids = [one["id"] for one in whole]
    rest = api.ask("/v1/chat/completions", {**body, "answer_ids": ids[:5], "max_tokens": 7})[1]["choices"][0]
    assert [one["id"] for one in rest["logprobs"]["content"]] == ids[5:]


def test_the_drafts_guesses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "_n_guesses", lambda *_: 2)  # whether it pays or not
    engine = Engine(random_model(context_length=256), small_tokenizer(), draft="ngrams")
    state = State([ServedModel("drafted", engine)])
    talk = [{"role": "user", "content": "the cat sat the cat sat the cat"}]
    body = {"messages": talk, "max_tokens": 24, "temperature": 0, "logprobs": True, "ignore_eos": True}
    with serving(state) as served:
        whole = served.ask("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]
        assert sum("accepted" in one for one in whole) == engine.stats.accepted_tokens > 0
        wrong = [one["rejected"] for one in whole if "rejected" in one]
        assert sum(map(len, wrong)) == engine.stats.drafted_tokens - engine.stats.accepted_tokens > 0
        assert {*wrong[0][0]} == {"token", "bytes", "id"}
        events = [event for event in served.events("/v1/chat/completions", body) if event != "[DONE]"]
    parts = [event["choices"][0]["logprobs"]["content"] for event in events if event["choices"][0]["logprobs"]]
    for name in ("accepted", "rejected"):
        assert [one.get(name) for part in parts for one in part] == [one.get(name) for one in whole]


def test_a_call_of_the_calculator_is_computed(api: Served) -> None:
    asked = {"answer": f" {write_call('12 / 8')}\n"}
    assert api.ask("/calculator", asked)[1] == {"expression": "12 / 8", "result": "1.5"}
    for text in ("1 + 1", write_call("1") * 2, '<tool>{"name": "other"}</tool>'):
        assert api.ask("/calculator", {"answer": text})[1] == {"expression": None, "result": None}


def test_a_run_without_a_finished_model_has_a_page(tmp_path: Path) -> None:
    with serving(State([], run=_unfinished_run(tmp_path)), routes()) as served:
        assert served.ask("/")[0] == 200
        stages = {one["name"]: one for one in served.ask("/training")[1]["stages"]}
        assert (stages["pretrain"]["state"], stages["sft"]["state"]) == ("done", "unfinished")
        assert len(stages["pretrain"]["loss"]) > 1
        status, found, _ = served.ask("/v1/chat/completions", {"messages": TALK})
        assert (status, found["error"]["code"]) == (404, "model_not_found")


def test_looking_inside_and_votes_need_none_of_the_servers_libraries() -> None:
    code = "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None; import groundup as gu; gu.inspect"
    subprocess.run([sys.executable, "-c", f"{code}; import groundup.cli.chat"], check=True)


def test_many_writers_append_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "preferences.jsonl").write_text('{"half a line": ')  # what a full disk left
    text = "x" * 20_000

    def write(number: int) -> None:
        opinion = {"vote": "down" if number % 2 else "up", "answer": text}
        keep(tmp_path, "m", [{"role": "user", "content": f"{number}"}], opinion)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    first, *lines = (tmp_path / "preferences.jsonl").read_text().splitlines()
    assert first == '{"half a line": '
    assert {int(json.loads(line)["prompt"][0]["content"]) for line in lines} == set(range(40))
    assert len((tmp_path / "conversations.jsonl").read_text().splitlines()) == 20


def test_a_ranking_of_three_and_of_two(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "?"}]
    for answers in (["a", "b", "c"], ["a", "b"]):
        keep(tmp_path, "m", prompt, {"ranking": answers})
    three, two = (json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines())
    assert three["ranking"] == ["a", "b", "c"]
    assert (two["chosen"], two["rejected"]) == ("a", "b")
    with pytest.raises(DataError, match="two different"):
        keep(tmp_path, "m", prompt, {"ranking": ["a", "a"]})


def test_modules_of_others_are_as_published_and_have_their_licences() -> None:
    listed = re.findall(
        r"^\| `(\S+)` .*\(`(LICENSE\S*)`\).*`([0-9a-f]{64})`", (PAGE / "vendor/README.md").read_text(), re.M
    )
    assert {name for name, _, _ in listed} == {path.name for path in (PAGE / "vendor").glob("*.js")}
    for name, licence, digest in listed:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
        assert (PAGE / "vendor" / licence).stat().st_size > 500


def test_the_page_is_small_and_asks_nobody_else() -> None:
    own = [path for path in PAGE.iterdir() if path.suffix in (".js", ".html", ".css")]
    assert sum(len(path.read_text().splitlines()) for path in own) <= 1_500
    for path in own:
        assert not re.search(r"https?://(?!www\.w3\.org)|\bsrc=\"//|eval\(|innerHTML|<style|onclick=", path.read_text())
