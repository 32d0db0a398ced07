"""A model and a prompt to text: one engine with cache, sampling, batching, speculation and quantization."""

from groundup.generation.beam import beam_search
from groundup.generation.cache import KVCache
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.engine import Engine, EngineBusy
from groundup.generation.grammar import Constraint
from groundup.generation.params import SamplingParams
from groundup.generation.request import Chunk, Generation, Request
from groundup.generation.sampling import TokenLogprob
from groundup.generation.text import (
    chat_prompt,
    chat_reply,
    chat_request,
    generate,
    generate_batch,
    prompt_ids,
    stream,
    stream_chat,
    text_request,
)

__all__ = [
    "Chunk", "Constraint", "Detokenizer", "Engine", "EngineBusy", "Generation", "KVCache", "Request", "SamplingParams",
    "TokenLogprob", "beam_search", "chat_prompt", "chat_reply", "chat_request", "generate", "generate_batch",
    "prompt_ids", "stream", "stream_chat", "text_request",
]  # fmt: skip
