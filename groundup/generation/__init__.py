"""A model and a prompt to text: cache, sampling, decoding, streaming."""

from groundup.generation.cache import KVCache
from groundup.generation.decode import Generation, decode, generate_ids
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.grammar import Constraint, Matcher
from groundup.generation.params import SamplingParams
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
    end_ids,
    generate,
    generate_batch,
    prompt_ids,
    stream,
    stream_chat,
)

__all__ = [
    "Constraint",
    "Detokenizer",
    "Generation",
    "History",
    "KVCache",
    "Matcher",
    "SamplingParams",
    "TokenLogprob",
    "chat_prompt",
    "chat_reply",
    "decode",
    "draw",
    "end_ids",
    "generate",
    "generate_batch",
    "generate_ids",
    "prompt_ids",
    "request_seed",
    "sample",
    "stream",
    "stream_chat",
    "token_logprobs",
    "uniforms",
    "warp",
]
