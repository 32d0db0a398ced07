"""From the first connection to the last answer: clients that leave or do not read, a server that fails or stops."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
import webbrowser
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from command import CommandLine, groundup, start
from generation_models import small_tokenizer
from serving_client import Served, request_bytes, serving, slow_down, small_model, small_state, wait_until

from groundup.cli.talking import read_models
from groundup.errors import ArtifactError
from groundup.generation.quantize import Quantization, quantize
from groundup.interop import save_model
from groundup.serving import app
from groundup.serving.server import listen
from groundup.serving.state import Limits, ServedModel, State

__all__ = ["groundup"]

ENDLESS = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(stream: bool) -> None:
    with serving(small_state()) as served:
        slow_down(served.engine, 0.2)
        connection = served.post("/v1/completions", {**ENDLESS, "n": 3, "stream": stream})
        wait_until(lambda: served.engine.stats.new_tokens > 3)
        connection.close()
        steps = served.engine.stats.steps
        wait_until(lambda: served.engine.n_used == 0)
        assert served.engine.stats.steps <= steps + 1
        assert served.engine.stats.finished == {"cancelled": 3}


def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    with serving(small_state(slots=1)) as served:
        slow_down(served.engine)
        first = served.post("/v1/completions", ENDLESS)
        wait_until(lambda: served.engine.n_running == 1)
        second = served.post("/v1/completions", ENDLESS)
        wait_until(lambda: served.engine.n_waiting == 1)
        second.close()
        wait_until(lambda: served.engine.n_waiting == 0)
        assert served.engine.n_running == 1
        first.close()
        wait_until(lambda: served.engine.n_used == 0)


def test_embeddings_for_clients_that_have_left_or_wait_too_long_are_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, computed = app.embed, []

    def slow(served: ServedModel, ids: list[int]) -> np.ndarray:
        computed.append(ids)
        time.sleep(0.05)
        return real(served, ids)

    monkeypatch.setattr(app, "embed", slow)
    with serving(small_state(limits=Limits(seconds=1))) as served:
        first, second = (served.post("/v1/embeddings", {"input": ["Once"] * 100}) for _ in range(2))
        wait_until(lambda: len(computed) > 2)
        first.close()
        second.close()
        assert served.ask("/v1/embeddings", {"input": "The cat"})[0] == 200
        assert len(computed) < 15
        status, found, _ = served.ask("/v1/embeddings", {"input": ["Once"] * 100})
        assert (status, found["error"]["code"]) == (504, "timeout")


def test_who_reads_too_slowly_is_cut_off_with_an_error_and_nobody_waits() -> None:
    state = small_state(limits=Limits(unread=16))
    with serving(state, send_buffer=4096) as served:
        slow_down(served.engine, 0.002)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(request_bytes("/v1/completions", {**ENDLESS, "n": 4, "stream": True, "logprobs": 20}))
            wait_until(lambda: served.engine.stats.new_tokens > 4)
            wait_until(lambda: served.engine.n_used == 0)  # and not because all was written:
            assert served.engine.stats.new_tokens < 4 * 900
            assert served.ask("/v1/completions", {"prompt": "Once", "max_tokens": 3})[0] == 200
            connection.settimeout(20)
            told = b""
            while piece := connection.recv(65536):
                told += piece
                if told.endswith(b"0\r\n\r\n"):
                    break
        assert b'"code":"slow_reader"' in told
        assert b"data: [DONE]" in told


def test_an_engine_that_fails_is_told_and_the_server_goes_on() -> None:
    with serving(small_state("small", "other")) as served:
        engine = served.engine
        slow_down(engine)
        connection = served.post("/v1/completions", {**ENDLESS, "stream": True})
        wait_until(lambda: engine.n_running == 1)
        real, engine._model_step = engine._model_step, None  # type: ignore[assignment]
        told = b""
        while b"[DONE]" not in told:
            told += (piece := connection.recv(65536))
            assert piece, told
        connection.close()
        assert b'"code":"internal_error"' in told
        assert served.ask("/v1/completions", {"prompt": "Once"})[0] == 500
        engine._model_step = real
        assert served.ask("/v1/completions", {"prompt": "Once"})[0] == 200
        engine.stop()
        assert served.ask("/ready")[0] == 503
        assert served.ask("/health")[0] == 200
        status, _, headers = served.ask("/v1/completions", {"prompt": "Once"})
        assert (status, headers["retry-after"]) == (503, "10")
        assert served.ask("/v1/completions", {"prompt": "Once", "model": "other"})[0] == 200


def read_all(connection: socket.socket) -> bytes:
    """What was sent until the connection ended, in whatever way."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            told += piece
    return told


def test_a_server_that_stops_finishes_what_it_has_begun() -> None:
    with serving(small_state(), drain_seconds=20) as served:
        slow_down(served.engine)
        connections = [
            served.post(
                "/v1/completions", {"prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": number % 2 == 0}
            )
            for number in range(6)
        ]
        wait_until(lambda: served.engine.n_running == 4 and served.engine.n_waiting == 2)
        served.server.should_exit = True
        wait_until(lambda: not _accepts(served.port))
        told = [read_all(connection) for connection in connections]
        for connection in connections:
            connection.close()
    assert all(b'"finish_reason":"length"' in one for one in told)
    assert sum(b"data: [DONE]" in one for one in told) == 3


def test_a_server_that_may_wait_no_longer_says_so() -> None:
    with serving(small_state(), drain_seconds=1) as served:
        slow_down(served.engine)
        streamed = served.post("/v1/completions", {**ENDLESS, "stream": True})
        whole = served.post("/v1/completions", ENDLESS)
        wait_until(lambda: served.engine.n_running == 2)
        wait_until(lambda: served.engine.stats.new_tokens > 2)
        served.server.should_exit = True
        told = [read_all(streamed), read_all(whole)]
        streamed.close()
        whole.close()
    assert b"the server is stopping" in told[0]
    assert b"[DONE]" in told[0]
    assert told[1].startswith(b"HTTP/1.1 503")
    assert b"the server is stopping" in told[1]


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_model(path, small_model(), small_tokenizer())
    return path


def test_two_servers_on_one_port_say_so(groundup: CommandLine, folder: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        ended = groundup("serve", folder, "--port", str(port))
    assert ended.code == 1
    assert ended.err.startswith(f"groundup: port {port} of 127.0.0.1 is taken")
    assert f"--port {port + 1}" in ended.err


def test_other_addresses_need_a_key(groundup: CommandLine, folder: Path) -> None:
    for key in ((), ("--api-key", "")):
        ended = groundup("serve", folder, "--host", "0.0.0.0", *key)
        assert ended.code == 1
        assert "GROUNDUP_API_KEY" in ended.err
        assert "--insecure" in ended.err


def test_without_its_libraries_it_says_what_to_install(
    groundup: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("groundup.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    ended = groundup("serve", folder)
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "groundup: serve needs starlette.",
        "          pip install 'groundup[serve]'",
    ]


def test_names_of_models(groundup: CommandLine, folder: Path) -> None:
    ended = groundup("serve", folder, folder, "--port", "0")
    assert ended.code == 1
    assert "two models are called small" in ended.err


def test_a_run_serves_all_its_models_that_of_the_chat_first(folder: Path) -> None:
    run = tiny_run.finished_run()
    served, of = read_models([str(run.root), f"mine={folder}"], None, 2, None, None)
    assert ([one.name for one in served], of) == (["sft", "pretrain", "mine"], run.root)
    served, of = read_models([str(run.root)], ["pretrain"], 2, None, None)
    assert [one.name for one in served] == ["pretrain"]
    with pytest.raises(ArtifactError, match="no model of a stage 'dpo' here"):
        read_models([str(run.root)], ["dpo"], 2, None, None)


def test_a_quantized_model_is_served_beside_the_whole_one(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "int8"
    save_model(small, quantize(copy.deepcopy(small_model()), Quantization(8)), small_tokenizer())
    served, _ = read_models([str(folder), str(small)], None, 2, None, None)
    with serving(State(served)) as server:
        asked = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
        for name in ("small", "int8"):
            status, answer, _ = server.ask("/v1/completions", {**asked, "model": name})
            assert (status, answer["model"], answer["usage"]["completion_tokens"]) == (200, name, 4)


def test_open_opens_the_page_once_it_is_there(
    groundup: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []

    def open_page(url: str) -> None:
        opened.append((url, urllib.request.urlopen(url).status))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", open_page)
    for name in ("groundup.serving", "uvicorn.error"):  # the command logs to this test's standard error
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    ended = groundup("serve", folder, "--port", "0", "--open")
    assert [status for _, status in opened] == [200]
    assert opened[0][0].startswith("http://127.0.0.1:")  # whoever says nothing else is heard by this machine only
    assert f"listening: {opened[0][0]}" in ended.err


@pytest.mark.slow
def test_sigterm_under_load_loses_no_finished_answer(folder: Path) -> None:
    port = _free_port()
    process = start("serve", folder, f"other={folder}", "--port", str(port), "--slots", "8", OMP_NUM_THREADS="1")
    try:
        wait_until(lambda: _accepts(port), 120)
        served = Served(None, port, None)  # type: ignore[arg-type]
        wait_until(lambda: served.ask("/ready")[0] == 200, 120)
        assert [model["id"] for model in served.ask("/v1/models")[1]["data"]] == ["small", "other"]
        told: dict[int, bytes] = {}

        def ask(number: int) -> None:
            body = {"model": ("small", "other")[number % 2], "prompt": "Once", "max_tokens": 800, "ignore_eos": True,
                    "stream": number % 4 < 2, "seed": number}  # fmt: skip
            with served.post("/v1/completions", body) as connection:
                told[number] = read_all(connection)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    begun = {number: one for number, one in told.items() if one}  # the others were not read before the end
    assert begun
    assert all(b'"finish_reason":"length"' in one for one in begun.values())
    assert "Traceback" not in err
    assert "status=200" in err
    assert not _accepts(port)


def _free_port() -> int:
    with listen("127.0.0.1", 0) as one:
        return int(one.getsockname()[1])
