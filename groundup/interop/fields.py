"""The fields of a Hugging Face `config.json`, each read by name and type; fields that nothing reads are refused.

A field that is left unread could be a part of the model that is then silently not computed. So a field is read, is on
the list of those that change nothing (`HARMLESS`), has the one value under which it changes nothing (`ONLY`), or ends
in an error that names it. All problems are reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from groundup.errors import ArtifactError, Problem

Value = TypeVar("Value")

LARGEST = 2**31 - 1
"""The largest count that a configuration may have."""

MOST_LAYERS = 4096
"""Far more than any model has; what is made layer by layer must end."""

HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path",
    "_commit_hash", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "gradient_checkpointing", "output_attentions", "output_hidden_states", "output_scores",
    "output_router_logits", "return_dict", "return_dict_in_generate", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "chunk_size_feed_forward", "is_decoder", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "pretraining_tp", "reorder_and_upcast_attn",
    "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "is_llama_config",
    "unsloth_version", "unsloth_fixed", "transformers.js_config",
}  # fmt: skip
"""Fields that change nothing in what the model computes: labels, precision, memory, generation and training's start."""

ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "use_qk_norm": (False,),
}
"""Fields that are known, and the values with which they change nothing."""

TRAINING_ONLY = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout", "attention_dropout",
    "classifier_dropout", "router_jitter_noise",
)  # fmt: skip
"""Dropout and other noise of training: an imported model has none; an import reports which it left out."""


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


class Fields:
    """One `config.json`.

    Attributes:
        problems: found so far.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.path, self.problems = path, list[Problem]()
        self._values = values
        self._asked: set[str] = set()

    def refuse(self, name: str, why: str) -> None:
        """Note that a field's value cannot be used."""
        self.problems.append(Problem(f"{name} = {self._values.get(name)!r:.80}", why))

    def get(self, name: str, default: Any = None) -> Any:
        """A field of any type, now read."""
        self._asked.add(name)
        return self._values.get(name, default)

    def count(self, name: str, default: int | None = None, null: int | None = None) -> int:
        """A whole number from 1 on.

        Args:
            name: of the field.
            default: where it is missing; None: it must be there.
            null: what null stands for (default: it is as if the field were missing).
        """
        value = self.get(name)
        if value is None:
            value = null if name in self._values and null is not None else default
        most = MOST_LAYERS if "layer" in name else LARGEST
        if value is None:
            self.problems.append(Problem(name, "is missing."))
        elif type(value) is not int or not 1 <= value <= most:
            self.refuse(name, f"must be a whole number from 1 to {most:,}.")
        else:
            return value
        return 1

    def number(self, name: str, default: float, *, or_zero: bool = False) -> float:
        """A number above 0."""
        value = self.get(name, default)
        if not (is_positive(value) or (or_zero and type(value) in (int, float) and value == 0)):
            self.refuse(name, "must be a number above 0.")
            return default
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false.")
            return default
        return value

    def choice(self, name: str, choices: Mapping[str, Value], default: str) -> Value:
        """One of several words."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"is not one that groundup computes: {', '.join(choices)}.")
            return choices[default]
        return choices[value]

    def left_out(self) -> list[str]:
        """The noise of training that this configuration has and an import leaves out."""
        return [f"{name} = {self._values[name]}" for name in TRAINING_ONLY if self._values.get(name)]

    def finish(self) -> None:
        """Refuse what was not read, then everything that is wrong, at once.

        Raises:
            ArtifactError: anything is.
        """
        for name, value in self._values.items():
            if name in self._asked or name in HARMLESS or name in TRAINING_ONLY:
                continue
            if name not in ONLY:
                self.refuse(name, "is no field that groundup knows of this family.")
            elif value not in ONLY[name]:
                self.refuse(name, f"is not computed by groundup; only {ONLY[name][0]!r} is.")
        if self.problems:
            raise ArtifactError(
                f"{self.path}: this model cannot be read: {' '.join(str(problem) for problem in self.problems)}",
                "A field that changes nothing in what the model computes may be removed from the file.",
            )
