"""A model and a prompt to text: one engine with cache, sampling, batching, speculation and quantization."""

from groundup.generation.beam import beam_search
from groundup.generation.cache import KVCache
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.engine import Engine, EngineBusy, EngineStats
from groundup.generation.request import Chunk, Generation, Request
from groundup.generation.sampling import SamplingParams, TokenLogprob, draw, sample, warp
from groundup.generation.text import (
    chat_prompt,
    chat_reply,
    generate,
    generate_batch,
    prompt_ids,
    stream,
    stream_chat,
)

__all__ = [
    "Chunk",
    "Detokenizer",
    "Engine",
    "EngineBusy",
    "EngineStats",
    "Generation",
    "KVCache",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "beam_search",
    "chat_prompt",
    "chat_reply",
    "draw",
    "generate",
    "generate_batch",
    "prompt_ids",
    "sample",
    "stream",
    "stream_chat",
    "warp",
]
