"""Base model to assistant."""

from groundup.alignment import losses
from groundup.alignment.classify import Classifier, ClassifySettings, train_classifier
from groundup.alignment.conversations import Conversations, data_fingerprint, load_conversations
from groundup.alignment.dpo import DPOSettings, train_dpo
from groundup.alignment.lora import LoraSettings, adapters_off, add_adapters, load_adapter, merge, merged, save_adapter
from groundup.alignment.preferences import Preference, Preferences, load_preferences
from groundup.alignment.reward import RewardSettings, Scorer, train_reward
from groundup.alignment.sft import ConversationRows, SFTSettings, fine_tune

__all__ = [
    "Classifier",
    "ClassifySettings",
    "ConversationRows",
    "Conversations",
    "DPOSettings",
    "LoraSettings",
    "Preference",
    "Preferences",
    "RewardSettings",
    "SFTSettings",
    "Scorer",
    "adapters_off",
    "add_adapters",
    "data_fingerprint",
    "fine_tune",
    "load_adapter",
    "load_conversations",
    "load_preferences",
    "losses",
    "merge",
    "merged",
    "save_adapter",
    "train_classifier",
    "train_dpo",
    "train_reward",
]
