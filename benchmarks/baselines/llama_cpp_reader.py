"""llama.cpp's side of `benchmarks/llama_cpp.py`: reads GGUF files and says what it computes and how it tokenizes.

Runs in an environment of its own, which has llama-cpp-python and nothing of groundup. In: a JSON file of tasks. Out:
one of answers, and beside each file its logits.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

F32 = 0
"""llama.cpp's number of the type, here of cached keys and values: its usual float16 would hide small faults."""


_default_params = llama_cpp.llama_model_default_params


def main() -> None:
    """Answer all tasks."""
    llama_cpp.llama_cpp.llama_model_default_params = params_for_any_machine
    tasks, answers = Path(sys.argv[1]), Path(sys.argv[2])
    found = {
        "llama_cpp_python": llama_cpp.__version__,
        "answers": {task["file"]: answer(task) for task in json.loads(tasks.read_text("utf-8"))},
    }
    answers.write_text(json.dumps(found), encoding="utf-8")


def params_for_any_machine() -> llama_cpp.llama_model_params:
    """Without buffers for AMX and repacked weights: there a virtual machine crashed, on llama.cpp's own files too."""
    params = _default_params()
    params.use_extra_bufts = False
    return params


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp makes of one file."""
    llama = llama_cpp.Llama(
        task["file"], n_ctx=0, n_batch=512, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32
    )
    found: dict[str, Any] = {"n_ctx_train": llama.n_ctx()}
    if "ids" in task:
        llama.eval(task["ids"])
        np.save(f"{task['file']}.npy", llama.scores[: len(task["ids"])])
        found["continuations"] = [continued(llama, ids, task["n_new"]) for ids in task["prompts"]]
    for wish in task.get("quantize", []):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = wish["file_type"], 1
        arguments = task["file"].encode(), wish["quantize_to"].encode(), ctypes.byref(params)
        if llama_cpp.llama_model_quantize(*arguments) != 0:
            raise RuntimeError(f"{task['file']}: llama.cpp cannot quantize it")
    if "texts" in task:
        # special=False: text is text, as in groundup.
        found["tokens"] = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in task["texts"]]
        found["default_tokens"] = llama.tokenize(task["texts"][0].encode())
        pairs = zip(found["tokens"], task["texts"], strict=True)
        found["are_restored"] = [detokenized(llama, ids) == text.encode() for ids, text in pairs]
        formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
        prompt = formatter(messages=task["messages"]).prompt
        found["chat"] = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        vocab = llama._model.vocab
        found["ends"] = [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    llama.close()
    return found


def detokenized(llama: llama_cpp.Llama, ids: list[int]) -> bytes:
    """The text of ids; llama-cpp-python's own way cuts tokens off at 32 bytes."""
    buffer = ctypes.create_string_buffer(1 << 16)
    array = (llama_cpp.llama_token * len(ids))(*ids)
    size = llama_cpp.llama_detokenize(llama._model.vocab, array, len(ids), buffer, len(buffer), False, False)
    return buffer.raw[:size]


def continued(llama: llama_cpp.Llama, ids: list[int], n_new: int) -> list[int]:
    """The most probable next tokens, one after the other."""
    llama.reset()
    new: list[int] = []
    while len(new) < n_new:
        llama.eval(ids if not new else new[-1:])
        new.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
    return new


if __name__ == "__main__":
    main()
