"""Documents to `tokenizer.json`, text to token ids and back, conversations to ids with a loss mask."""

from groundup.tokenizer.chat import Message, Rendered, render
from groundup.tokenizer.pretrained import load_tokenizer
from groundup.tokenizer.tokenizer import Tokenizer

VERSION = 1
"""Raised when the code's results change; part of the stage's fingerprint."""

__all__ = ["VERSION", "Message", "Rendered", "Tokenizer", "load_tokenizer", "render"]
