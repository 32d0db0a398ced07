"""Pictures of the page, of a finished run, by headless Chromium: three widths, light and dark.

    python docs/page_screenshots.py runs/demo [FOLDER]     all of them, to look at
    python docs/page_screenshots.py runs/demo --manual     the manual's, into docs/

Needs `pip install 'groundup[test]'` and Chromium (`make chromium`).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

SIZES = {360: 740, 768: 1024, 1280: 860}
TEXT = "“That is very strange,” said Dorothy to the Scarecrow and the Tin"


def main() -> None:
    """Start a server, walk through its page at every size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("screenshots"))
    parser.add_argument("--manual", action="store_true")
    given = parser.parse_args()
    folder = Path(__file__).parent if given.manual else given.folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "groundup", "serve", given.run, "--port", "0", "--draft", "ngrams"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in server.stderr or () if (found := re.search(r"listening: (\S+)", line)))
        with sync_playwright() as playwright:
            chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"] if os.getuid() == 0 else []
            )
            for scheme in ("light",) if given.manual else ("light", "dark"):
                for width in (1280,) if given.manual else SIZES:
                    context = browser.new_context(
                        viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme,
                        device_scale_factor=1 if not given.manual else 1.5,
                    )  # fmt: skip
                    walk(context.new_page(), url, taker(folder, f"{width}-{scheme}", given.manual))
                    context.close()
            browser.close()
    finally:
        server.terminate()


def taker(folder: Path, kind: str, is_for_manual: bool) -> Callable[[Any, str], None]:
    """What takes a picture of a name; of the manual's few, with few colours."""
    kept = {"tokens": "page_tokens", "attention": "page_attention", "next": "page_next"}

    def take(page: Any, name: str) -> None:
        if is_for_manual and name not in kept:
            return
        path = folder / (f"{kept[name]}.png" if is_for_manual else f"{name}-{kind}.png")
        page.wait_for_timeout(250)
        page.screenshot(path=path)
        if is_for_manual:
            Image.open(path).convert("RGB").quantize(192).save(path, optimize=True)

    return take


def walk(page: Any, url: str, take: Callable[[Any, str], None]) -> None:
    """Through all views."""
    page.add_init_script("localStorage.setItem('groundup.settings', JSON.stringify({ seed: 4, max_tokens: 90 }))")
    page.goto(url)
    page.get_by_role("option").first.wait_for(state="attached")
    take(page, "welcome")
    ask(page, "What is the capital of France?")
    ask(page, "Tell me about the Scarecrow.")
    take(page, "chat")
    page.get_by_label("Two answers side by side").click()
    ask(page, "Who are you?")
    page.get_by_role("button", name="This one is better").first.click()
    take(page, "side-by-side")
    page.get_by_label("Settings").click()
    take(page, "settings")
    page.keyboard.press("Escape")
    page.get_by_label("Two answers side by side").click()
    page.evaluate("import('/page/store.js').then(({ begin, state, set }) => (begin(), set({ model: 'pretrain' })))")
    ask(page, "Once upon a time")
    page.get_by_label("Show how probable").click()
    shades = "(all) => all.slice(0, 60).map((one) => Number(one.style.getPropertyValue('--p')))"
    shaded = page.locator(".token").evaluate_all(shades)
    page.locator(".token").nth(shaded.index(max(shaded))).hover()
    take(page, "tokens")
    page.get_by_role("link", name="Look inside").click()
    page.get_by_label("Text to look into").fill(TEXT)
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_role("tab", name="Tokens").wait_for()
    take(page, "inside")
    page.get_by_role("tab", name="Next token").click()
    page.locator(".strip .token").nth(10).click()
    page.get_by_label("Top-p").fill("0.8")
    take(page, "next")
    page.get_by_role("tab", name="Layers").click()
    take(page, "layers")
    page.get_by_role("tab", name="Attention").click()
    page.get_by_label("Layer 3, head 1", exact=True).click()
    take(page, "attention")
    page.get_by_role("link", name="Training").click()
    page.get_by_role("button", name="pretrain").click()
    page.locator("figure svg").wait_for()
    take(page, "training")


def ask(page: Any, text: str) -> None:
    """And wait for the answer."""
    answers = page.locator("article.answer").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    page.wait_for_function("n => document.querySelectorAll('article.answer').length > n", arg=answers)
    page.wait_for_function("() => !document.querySelector('article[aria-busy=true]')", timeout=60_000)


if __name__ == "__main__":
    main()
