"""llama.cpp's server of `benchmarks/serving.py`: llama-cpp-python's own, on one GGUF file.

Runs in an environment of its own, which has `llama-cpp-python[server]` and nothing of groundup.
"""

from __future__ import annotations

import sys

import llama_cpp
import uvicorn
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings

_default_params = llama_cpp.llama_model_default_params


def params_for_any_machine() -> llama_cpp.llama_model_params:
    """Without buffers for AMX and repacked weights: there a virtual machine crashed, on llama.cpp's own files too."""
    params = _default_params()
    params.use_extra_bufts = False
    return params


def main() -> None:
    """Serve FILE on PORT with so many threads."""
    file, port, threads, context = sys.argv[1], *map(int, sys.argv[2:5])
    llama_cpp.llama_cpp.llama_model_default_params = params_for_any_machine
    model = ModelSettings(
        model=file, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, model_alias="small"
    )
    # Else a new request ends the one that is being answered.
    settings = ServerSettings(port=port, interrupt_requests=False)
    uvicorn.run(create_app(server_settings=settings, model_settings=[model]), port=port, log_level="error")


if __name__ == "__main__":
    main()
