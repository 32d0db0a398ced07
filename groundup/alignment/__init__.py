"""Base model to assistant."""

from groundup.alignment.conversations import Conversations, data_fingerprint, load_conversations
from groundup.alignment.sft import ConversationRows, fine_tune

VERSION = 3
"""Raised when the code's results change; part of the stage's fingerprint."""

__all__ = ["VERSION", "ConversationRows", "Conversations", "data_fingerprint", "fine_tune", "load_conversations"]
