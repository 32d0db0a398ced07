"""Which stages there are: the one place, beside a method's own file, that names it.

A recipe's trunk is `[corpus] [tokenizer] [shards] [pretrain]`; `[align.NAME]` sections use the methods; `evaluate`
scores every language model that the others make. Each line says where the method's object is (a
`groundup.stage.Method`, imported when first used) and what `--help` says of it.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from groundup.errors import RunError


@dataclass(frozen=True)
class Registered:
    """One method."""

    where: Any  # "module:object", or the object itself
    about: str  # what it does, one line


TRUNK = {
    "corpus": Registered(
        "groundup.corpus.curate:CORPUS",
        "Raw files to clean documents: read, extract, filter by language and quality, remove duplicates.",
    ),
    "tokenizer": Registered(
        "groundup.tokenizer.stage:TOKENIZER",
        "Documents to tokenizer.json: byte-level BPE, WordPiece, Unigram, or one token per character.",
    ),
    "shards": Registered("groundup.shards.write:SHARDS", "Documents and tokenizer to binary token shards."),
    "pretrain": Registered(
        "groundup.training.pretrain:PRETRAIN", "Model and shards to a base model: next-token prediction."
    ),
}
METHODS = {
    "sft": Registered(
        "groundup.alignment.sft:SFT", "Base model and conversations to an assistant: supervised fine-tuning."
    ),
    "reward": Registered(
        "groundup.alignment.reward:REWARD", "A model and preferences to a reward model: one number for an answer."
    ),
    "classify": Registered(
        "groundup.alignment.classify:CLASSIFY", "A model and labelled texts to a classifier, held against the majority."
    ),
    "dpo": Registered(
        "groundup.alignment.dpo:DPO",
        "A model and preferences to a model that answers as preferred: DPO, IPO, KTO, SimPO, ORPO.",
    ),
    "ppo": Registered(
        "groundup.alignment.ppo:PPO_METHOD",
        "A model and a reward to one that earns more of it: PPO, with a value model.",
    ),
    "grpo": Registered(
        "groundup.alignment.grpo:GRPO_METHOD",
        "A model and a verifier to one that is right more often: groups of answers, compared with each other.",
    ),
    "online-dpo": Registered(
        "groundup.alignment.online_dpo:ONLINE_DPO",
        "A model and a reward to one that prefers its better answers: DPO on pairs of its own.",
    ),
    "rejection": Registered(
        "groundup.alignment.rejection:REJECTION",
        "A model and a reward to one that has learned from its own best answers: rejection-sampling fine-tuning.",
    ),
    "distill": Registered(
        "groundup.alignment.distill:DISTILL",
        "A model to a smaller one that guesses its tokens: a draft for generation.",
    ),
}
QUANTIZE = Registered(
    "groundup.alignment.quantization:QUANTIZE", "A model to the same in 8 or 4 bits a weight, and what that costs."
)
EVALUATE = Registered(
    "groundup.evaluation.harness:EVALUATE", "Models to scores with error bars: a recipe's, or with --tasks any model."
)


def register(name: str, method: Any, about: str) -> None:
    """Add a method of `[align.NAME]` sections.

    Args:
        name: what a recipe calls it.
        method: a `groundup.stage.Method`.
        about: one line for `--help`.
    """
    METHODS[name] = Registered(method, about)


def registered() -> dict[str, Registered]:
    """All of them, in the order of the pipeline."""
    return {**TRUNK, **METHODS, "evaluate": EVALUATE}


def find_method(name: str) -> Any:
    """The object of a method of `[align.NAME]` sections.

    Raises:
        RunError: no such method.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Methods: {', '.join(METHODS)}."
        raise RunError(f"{name!r} is no method.", fix)
    return load(METHODS[name])


def load(entry: Registered) -> Any:
    """A method's object, from its module."""
    if isinstance(entry.where, str):
        module, _, attribute = entry.where.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return entry.where
