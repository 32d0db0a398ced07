"""A model and a prompt to text: one engine with cache, sampling, batching, speculation and quantization."""

from groundup.generation.beam import beam_search
from groundup.generation.cache import KVCache
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.engine import Engine, EngineBusy, EngineStats
from groundup.generation.grammar import Constraint, Matcher
from groundup.generation.params import SamplingParams
from groundup.generation.request import Chunk, Generation, Request
from groundup.generation.sampling import (
    History,
    TokenLogprob,
    draw,
    request_seed,
    sample,
    token_logprobs,
    uniforms,
    warp,
)
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
    "Chunk",
    "Constraint",
    "Detokenizer",
    "Engine",
    "EngineBusy",
    "EngineStats",
    "Generation",
    "History",
    "KVCache",
    "Matcher",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "beam_search",
    "chat_prompt",
    "chat_reply",
    "chat_request",
    "draw",
    "generate",
    "generate_batch",
    "prompt_ids",
    "request_seed",
    "sample",
    "stream",
    "stream_chat",
    "text_request",
    "token_logprobs",
    "uniforms",
    "warp",
]
