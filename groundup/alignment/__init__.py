"""Base model to assistant."""

from groundup.alignment.conversations import Conversations, data_fingerprint, load_conversations
from groundup.alignment.sft import ConversationRows, SFTSettings, fine_tune

__all__ = ["ConversationRows", "Conversations", "SFTSettings", "data_fingerprint", "fine_tune", "load_conversations"]
