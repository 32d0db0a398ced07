"""Text out of HTML: accuracy, encodings, and pages that hang, crash, eat memory or lie."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading import extract as extract_module
from groundup.corpus.reading import extract_child
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.extract_child import in_utf8
from groundup.corpus.reading.read import read
from groundup.corpus.reading.refusal import RefusedError
from groundup.errors import GroundupError
from groundup.recipe import CorpusSettings

pytest.importorskip("resiliparse")
pytest.importorskip("lxml")

SENTENCES = (
    "The river rises in the hills above the old town and runs for forty miles to the sea.",
    "Every spring the ferrymen paint their boats blue, because their grandfathers did.",
    "Nobody remembers who built the bridge, but the stones were cut by hand.",
)


def page_of(text: str, title: str = "A page", head: str = "") -> str:
    paragraphs = "".join(f"<p>{text} {sentence}</p>" for sentence in SENTENCES)
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/about'>About us</a></li></ul></nav>"
    return (
        f"<!DOCTYPE html><html><head>{head}<title>{title}</title></head><body>{menu}"
        f"<article><h1>{title}</h1>{paragraphs}</article><footer>Copyright</footer></body></html>"
    )


PAGES = [page_of(f"Number {number} of the pages.", f"Page {number}").encode() for number in range(12)]


Refusal = tuple[Reason, str]


def answer_of(extractor: Extractor, html: bytes, url: str = "") -> str | Refusal:
    """The text of a page, or why there is none."""
    try:
        return extractor.extract(html, url)
    except RefusedError as refused:
        return refused.reason, refused.detail


def id_of(extractor: Extractor) -> int | None:
    """The child's, while there is one."""
    process = extractor.process
    return process.pid if process else None


@pytest.fixture(scope="module", params=["trafilatura", "resiliparse"])
def extractor(request: pytest.FixtureRequest) -> Iterator[Extractor]:
    with Extractor(request.param, 20.0) as made:
        yield made


@pytest.fixture(scope="module")
def fast() -> Iterator[Extractor]:
    with Extractor("resiliparse", 20.0) as made:
        yield made


def test_main_text_without_the_menu(extractor: Extractor) -> None:
    text = extractor.extract(PAGES[3], "https://example.org/3")
    assert isinstance(text, str)
    assert "Number 3 of the pages." in text
    assert SENTENCES[2] in text
    assert "About us" not in text


@pytest.mark.parametrize("html", [b"", b" ", b"\0\0\0\0", b"<html></html>", b"<script>var x = 1</script>"])
def test_nothing_is_no_content(extractor: Extractor, html: bytes) -> None:
    answer = answer_of(extractor, html)
    assert isinstance(answer, tuple)
    assert answer[0] in (Reason.NO_CONTENT, Reason.CRASH)  # a parser may refuse what is no HTML at all
    assert extractor.extract(PAGES[0]) != answer


ADVERSARIAL = {
    "deep": b"<div>" * 8_000 + b"text",
    "inline": b"<b><i><a>" * 10_000 + b"text",
    "colspan": b"<table><tr><td colspan=99999999 rowspan=99999999>cell</td></tr></table>",
    "attribute": b"<p class='" + b"x" * 2_000_000 + b"'>text</p>",
    "attributes": b"<p " + b"".join(b"a%d=1 " % n for n in range(8_000)) + b">text</p>",
    "entities": b"<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><p>&b;</p>" * 50,
    "binary": bytes(range(256)) * 500,
    "open": b"<p><table><tr><td><ul><li>" * 3_000,
    "comment": b"<!--" * 100_000,
    "surrogates": b"<p>&#xD800;&#xDFFF;&#x110000; text of the page</p>",
    "declared wrongly": b"<?xml version='1.0' encoding='utf-16'?><html><body><p>text</p></body></html>",
    "unknown charset": b"<meta charset='no-such-thing'><p>caf\xe9</p>",
}


def test_adversarial_pages_cost_only_themselves(extractor: Extractor) -> None:
    for name, html in ADVERSARIAL.items():
        answer = answer_of(extractor, html)
        if isinstance(answer, str):
            answer.encode()
        after = extractor.extract(PAGES[1])
        assert isinstance(after, str), name
        assert "Number 1 of the pages." in after, name


def test_a_page_larger_than_a_pipe(extractor: Extractor) -> None:
    large = page_of("A long page. " * 60_000).encode()
    assert len(str(extractor.extract(large))) > 700_000


def test_text_does_not_depend_on_the_pages_before(extractor: Extractor) -> None:
    # The trap: an extractor that drops paragraphs it has seen gives less of a page the more often it comes.
    forward = [extractor.extract(html) for html in PAGES * 4]
    with Extractor(extractor.kind, 20.0) as fresh:
        backward = [fresh.extract(html) for html in reversed(PAGES)]
    assert forward == backward[::-1] * 4


def test_process_is_replaced_after_some_pages() -> None:
    with Extractor("resiliparse", 20.0, pages_per_process=5) as extractor:
        answers, processes = [], set()
        for html in PAGES:
            answers.append(extractor.extract(html))
            processes.add(id_of(extractor))
        assert [f"Number {number} " in str(answer) for number, answer in enumerate(answers)] == [True] * 12
        assert len(processes) == 3


def test_without_a_page_there_is_no_process() -> None:
    with Extractor("trafilatura", 20.0) as extractor:
        assert extractor.process is None


SLOW_PAGE = page_of("A page that takes a while. " * 40_000).encode() * 12


def test_page_over_time() -> None:
    with Extractor("trafilatura", 0.1) as extractor:
        pages = [PAGES[0], SLOW_PAGE, PAGES[2], SLOW_PAGE, PAGES[3]]
        answers = [answer_of(extractor, html) for html in pages]
    late = (Reason.TIMEOUT, "more than 0.1 s")
    assert answers[1] == answers[3] == late
    assert [f"Number {number} " in str(answers[at]) for at, number in ((0, 0), (2, 2), (4, 3))] == [True] * 3


@pytest.mark.parametrize("html", [PAGES[1], page_of("A long page. " * 60_000).encode()])
def test_a_page_whose_process_was_stopped_is_set_aside(html: bytes) -> None:
    """Nobody waits for ever: neither for its answer nor until it takes a page that no buffer holds."""
    with Extractor("resiliparse", 0.25) as extractor:
        before = extractor.extract(PAGES[0])
        stopped = id_of(extractor)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        begin = time.monotonic()
        assert answer_of(extractor, html) == (Reason.TIMEOUT, "more than 0.25 s")
        assert 0.9 < time.monotonic() - begin < 10
        assert not psutil.pid_exists(stopped)
        assert extractor.extract(PAGES[0]) == before


def test_a_run_ends_though_its_extractor_is_stopped(tmp_path: Path) -> None:
    """The page is set aside, and the next one has a fresh process."""
    for number, html in enumerate(PAGES[:3]):
        (tmp_path / f"{number}.html").write_bytes(html)
    settings = CorpusSettings(extractor="resiliparse", extract_seconds=0.5)
    aside: list[SetAside] = []
    before = set(psutil.Process().children())
    documents = read(tmp_path, settings=settings, on_set_aside=aside.append)
    texts = [next(documents).text]
    (stopped,) = set(psutil.Process().children()) - before
    stopped.suspend()
    texts += [document.text for document in documents]
    assert [re.findall(r"Number \d", text)[0] for text in texts] == ["Number 0", "Number 2"]
    assert [(Path(item.source).name, item.reason) for item in aside] == [("1.html", Reason.TIMEOUT)]
    assert not stopped.is_running()


def test_an_extractor_that_is_stopped_while_it_loads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_module, "_LOADING_SECONDS", 0.0)
    with (
        Extractor("resiliparse", 20.0) as extractor,
        pytest.raises(GroundupError, match="cannot be started: more than 0 s"),
    ):
        extractor.extract(PAGES[0])


def cpu_seconds(process_id: int) -> float:
    return sum(psutil.Process(process_id).cpu_times()[:2])


def kill_busy_children(
    extractor: Extractor, number: signal.Signals, times: int, loading: float, stop: threading.Event
) -> None:
    """Kill the extractor's child while it works on a page, so many times; `loading` takes so many CPU seconds."""
    killed = set()
    while len(killed) < times and not stop.is_set():
        process_id = id_of(extractor)
        if process_id is not None and process_id not in killed:
            try:
                used = cpu_seconds(process_id)
            except psutil.Error:
                continue
            if used > loading + 0.2:
                os.kill(process_id, number)
                killed.add(process_id)
        time.sleep(0.01)


@pytest.mark.parametrize(("kills", "number"), [(1, signal.SIGKILL), (2, signal.SIGSEGV)])
def test_page_whose_process_dies_is_tried_once_more(kills: int, number: signal.Signals) -> None:
    stop = threading.Event()
    with Extractor("trafilatura", 60.0) as extractor:
        answer_of(extractor, PAGES[0])
        first = id_of(extractor)
        assert first is not None
        killer = threading.Thread(target=kill_busy_children, args=(extractor, number, kills, cpu_seconds(first), stop))
        killer.start()
        try:
            # So slow that it cannot be done before it is caught, on a busy machine either.
            answers = [answer_of(extractor, html) for html in (SLOW_PAGE * 6, PAGES[4])]
        finally:
            stop.set()
            killer.join()
    if kills == 1:
        assert isinstance(answers[0], str)
    else:
        assert answers[0] == (Reason.CRASH, "the extractor's process was ended by signal 11 (Segmentation fault)")
    assert "Number 4" in str(answers[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit a process's memory")
@pytest.mark.parametrize("kind", ["trafilatura", "resiliparse"])
def test_page_over_memory(kind: str) -> None:
    with Extractor(kind, 60.0, memory_mib=64) as extractor:
        answers = [answer_of(extractor, html) for html in (PAGES[0], SLOW_PAGE * 4, PAGES[5])]
    assert answers[1][0] == Reason.CRASH
    assert "Number 0" in str(answers[0])
    assert "Number 5" in str(answers[2])


def is_running(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(process_id: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and is_running(process_id):
        time.sleep(0.02)
    return not is_running(process_id)


ORPHAN = """
import sys
from groundup.corpus.reading.extract import Extractor
with Extractor("resiliparse", 2.0) as extractor:
    extractor.extract(b"<p>text of a page</p>")
    print(extractor.process.pid, flush=True)
    if sys.argv[1] == "busy":
        sys.stdin.readline()
        extractor.extract(b"<p>text <b>and</b> more</p>" * 1_000_000)
    sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_no_orphan_when_the_parent_is_killed(state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        assert is_running(process_id)
        if state == "busy":
            parent.stdin.write("\n")
            parent.stdin.flush()
            time.sleep(0.5)
        parent.kill()
        parent.wait()
    assert wait_until_gone(process_id, 15.0)


def test_no_process_is_left_behind() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with Extractor("resiliparse", 20.0, pages_per_process=2) as extractor:
        [extractor.extract(html) for html in PAGES]
        last = id_of(extractor)
        assert last is not None
    assert not psutil.pid_exists(last)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def extract_some(kind: str) -> list[str]:
    with Extractor(kind, 20.0) as extractor:  # type: ignore[arg-type]
        return [str(extractor.extract(html)) for html in PAGES]


def test_inside_a_worker_of_a_pool(fast: Extractor) -> None:
    expected = [fast.extract(html) for html in PAGES]
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(extract_some, fast.kind).result() == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its workers may not have children of multiprocessing
        assert pool.apply(extract_some, (fast.kind,)) == expected


@pytest.mark.long
def test_inside_a_ray_task(fast: Extractor) -> None:
    pytest.importorskip("ray")
    from groundup.corpus.engine import RayCluster

    pages = PAGES

    def extract_there(kind: str) -> list[str]:  # a worker of Ray cannot import this file
        from groundup.corpus.reading.extract import Extractor

        with Extractor(kind, 20.0) as extractor:  # type: ignore[arg-type]
            return [str(extractor.extract(html)) for html in pages]

    with RayCluster(1) as cluster:
        assert list(cluster.map(extract_there, ["resiliparse"])) == [[fast.extract(html) for html in PAGES]]


def test_extractor_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resiliparse.py").write_text("raise ImportError('not this one')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Extractor("resiliparse", 20.0) as extractor, pytest.raises(GroundupError, match="not this one") as caught:
        extractor.extract(PAGES[0])
    assert "pip install" in str(caught.value.fix)


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [extract_child.load(kind) for kind in ("trafilatura", "resiliparse")]

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    head = (
        "<base href='https://example.org/'><link rel=canonical href='https://example.org/x'>"
        "<link rel=stylesheet href='https://example.org/s.css'><meta http-equiv=refresh content='0;https://example.org'>"
    )
    body = page_of(
        "Linked <img src='https://example.org/i.png'> <iframe src='https://example.org'></iframe>", head=head
    )
    for extract in loaded:
        assert "forty miles" in str(extract(body, "https://example.org/page"))


JAPANESE = "川は古い町の上の丘から流れ出し、海まで四十マイルを流れる。"
RUSSIAN = "Река начинается в холмах над старым городом и течёт сорок миль до моря."
KOREAN = "강은 오래된 마을 위의 언덕에서 시작하여 바다까지 사십 마일을 흐른다."
TRADITIONAL = "河流發源於古鎮之上的山丘，流淌四十英里到達大海。"
SIMPLIFIED = "河流发源于古镇之上的山丘，流淌四十英里到达大海。"
FRENCH = "La rivière naît dans les collines près de la vieille cité, à côté d’un château."


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        (JAPANESE, "utf-8", ""),
        (JAPANESE, "utf-8", "utf-8"),
        (JAPANESE, "utf-8", "iso-8859-1"),  # a lie that UTF-8 itself gives away
        (JAPANESE, "utf-8-sig", "shift_jis"),  # the mark outranks the declaration
        (JAPANESE, "utf-16", "utf-8"),
        (JAPANESE, "shift_jis", "Shift_JIS"),
        (JAPANESE, "euc-jp", "EUC-JP"),
        (JAPANESE, "iso-2022-jp", "iso-2022-jp"),
        (JAPANESE, "euc-jp", ""),
        (JAPANESE, "shift_jis", "utf-8"),  # declared wrongly: told from the bytes
        (RUSSIAN, "windows-1251", "windows-1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (RUSSIAN, "windows-1251", ""),
        (FRENCH, "cp1252", "iso-8859-1"),  # what the name means on the web
        (FRENCH, "cp1252", ""),
        (KOREAN, "cp949", ""),
        (TRADITIONAL, "big5", ""),
        (SIMPLIFIED, "gb18030", ""),
        (JAPANESE, "iso-2022-jp", ""),
        (KOREAN, "iso-2022-kr", ""),
        (SIMPLIFIED, "hz", ""),
    ],
)
def test_encoding_of_a_page(text: str, encoding: str, declared: str) -> None:
    head = f'<meta charset="{declared}">' if declared else ""
    data = page_of(text * 5, head=head).encode(encoding)
    assert text * 5 in extract_child.decode_html(data)


def test_control_characters_of_a_wrong_encoding_are_not_lost() -> None:
    """Extractors leave them out; as U+FFFD they are counted."""
    assert extract_child.decode_html(b"<p>Der Fr\x81hling ist sch\x94n" * 9).count("\ufffd") == 18
    assert extract_child.decode_html(b"<p>a\x1b[0m b") == "<p>a\ufffd[0m b"


@pytest.mark.parametrize("declared", ["", "utf-8", "iso-8859-1", "koi8-r"])
def test_utf8_with_a_broken_byte_is_still_utf8(declared: str) -> None:
    data = bytearray(f"<meta charset='{declared}'>{RUSSIAN * 10}".encode())
    data[data.index("Река".encode()) + 1] = 0xFF
    text = extract_child.decode_html(data)
    assert text.count("\ufffd") in (1, 2)
    assert RUSSIAN * 9 in text


@pytest.mark.parametrize(
    "declaration",
    [
        "<meta charset=koi8-r>",
        "<META HTTP-EQUIV='Content-Type' CONTENT='text/html; charset=koi8-r'>",
        '<meta content="text/html;charset=KOI8-R" http-equiv="content-type"/>',
        '<?xml version="1.0" encoding="koi8-r"?>',
    ],
)
def test_ways_to_declare_an_encoding(declaration: str) -> None:
    assert RUSSIAN in extract_child.decode_html((declaration + RUSSIAN).encode("koi8-r"))


@given(st.binary(max_size=400))
def test_any_bytes_are_some_text(data: bytes) -> None:
    extract_child.decode_html(data).encode()
    extract_child.decode_html(b"<meta charset=shift_jis>" + data).encode()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff~"), max_size=200))
def test_utf8_is_read_as_it_is(text: str) -> None:
    assert extract_child.decode_html(text.encode()) == text


def test_encoding_that_the_server_names() -> None:
    undeclared = page_of(RUSSIAN).encode("koi8-r")
    assert in_utf8(undeclared, "koi8-r").decode("utf-8-sig") == page_of(RUSSIAN)
    assert in_utf8(undeclared, "") == in_utf8(undeclared, "no-such-thing") == undeclared
    assert in_utf8(undeclared, "utf-8") == undeclared  # the bytes do not agree
    utf8 = page_of(RUSSIAN).encode()
    assert in_utf8(utf8, "koi8-r") == utf8
    japanese = JAPANESE.encode("iso-2022-jp")
    assert in_utf8(japanese, "iso-2022-jp").decode("utf-8-sig") == JAPANESE
    wrong_meta = page_of(RUSSIAN, head="<meta charset=windows-1252>").encode("koi8-r")
    assert RUSSIAN in extract_child.decode_html(in_utf8(wrong_meta, "koi8-r"))


def shingles(text: str, size: int = 4) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1)))


def benchmark_f1(pairs: list[tuple[str, str]]) -> float:
    """The article extraction benchmark's score: 4-word shingles, every page of equal weight."""
    hits = extra = missing = 0.0
    for gold, found in pairs:
        expected, got = shingles(gold), shingles(found)
        common = sum((expected & got).values())
        total = sum((expected | got).values())
        hits += common / total
        extra += sum((got - expected).values()) / total
        missing += sum((expected - got).values()) / total
    return 2 * hits / (2 * hits + extra + missing)


def test_benchmark_score_by_hand() -> None:
    assert benchmark_f1([("a b c d e", "a b c d e"), ("x y", "x y")]) == 1.0
    # One of two shingles found, and one beside it: 1/3 hit, 1/3 missing, 1/3 extra.
    assert benchmark_f1([("a b c d e", "a b c d f")]) == pytest.approx(0.5)
    assert benchmark_f1([("a b c d", "e f g h")]) == 0.0


@pytest.mark.long
@pytest.mark.parametrize(("kind", "least"), [("trafilatura", 0.95), ("resiliparse", 0.91)])
def test_accuracy_on_the_article_extraction_benchmark(shared_data: Path, kind: str, least: float) -> None:
    folder = shared_data / "html" / "article_extraction_benchmark"
    gold = json.loads((folder / "ground-truth.json").read_text())
    assert len(gold) == 181
    pages = (gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes()) for name in gold)
    with Extractor(kind, 20.0) as extractor:  # type: ignore[arg-type]
        found = [extractor.extract(html) for html in pages]
    assert all(isinstance(text, str) for text in found)
    assert (
        benchmark_f1([(page["articleBody"], str(text)) for page, text in zip(gold.values(), found, strict=True)])
        >= least
    )
