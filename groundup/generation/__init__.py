"""A model and a prompt to text: cache, sampling, decoding, streaming."""

from groundup.generation.cache import KVCache, Rows
from groundup.generation.decode import Generation, decode, generate_ids
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.sampling import SamplingParams, draw, sample, warp
from groundup.generation.text import (
    chat_prompt,
    chat_reply,
    end_ids,
    generate,
    generate_batch,
    prompt_ids,
    stream,
    stream_chat,
)

__all__ = [
    "Detokenizer",
    "Generation",
    "KVCache",
    "Rows",
    "SamplingParams",
    "chat_prompt",
    "chat_reply",
    "decode",
    "draw",
    "end_ids",
    "generate",
    "generate_batch",
    "generate_ids",
    "prompt_ids",
    "sample",
    "stream",
    "stream_chat",
    "warp",
]
