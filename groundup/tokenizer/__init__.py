"""Documents to `tokenizer.json`, text to token ids and back, conversations to ids with a loss mask."""

from groundup.tokenizer.chat import Message, render
from groundup.tokenizer.pretrained import load_tokenizer
from groundup.tokenizer.template import Rendered
from groundup.tokenizer.tokenizer import Tokenizer

__all__ = ["Message", "Rendered", "Tokenizer", "load_tokenizer", "render"]
