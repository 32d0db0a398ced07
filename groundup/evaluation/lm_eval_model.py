"""A model of ours inside lm-evaluation-harness (extra `harness`), without a way over exported files.

    from groundup.evaluation.lm_eval_model import GroundupLM, task_file
    lm_eval.simple_evaluate(model=GroundupLM("runs/demo"), tasks=[…])

Importing this module registers it there under the name `groundup`. The usual way stays the exported folder, which any
program reads (`lm_eval --model hf --model_args pretrained=runs/demo/sft/model`); a third is the server. All agree.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from groundup.errors import ArtifactError
from groundup.evaluation.benchmarks import Benchmark
from groundup.evaluation.likelihood import score_ids
from groundup.generation import SamplingParams, generate_batch
from groundup.interop import load
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.special import CHAT_TEMPLATE
from groundup.tokenizer.template import ChatTemplate, LaidOut

_MAX_TOKENS = 256
_CONTROL, _SAID = "\ufdef", "\ufdee"  # no characters, so in no text: before a control token, inside what spells one


@register_model("groundup")
class GroundupLM(TemplateLM):
    """A run's model, or that of a folder.

    Args:
        pretrained: `runs/demo`, or a model's folder of anybody's.
        stage: of a run.
        dtype: of the arithmetic: "float32" or "bfloat16".
        **ignored: `batch_size` and `device`, which the harness passes to every model: batches are made by length.
    """

    def __init__(
        self, pretrained: str | Path, stage: str | None = None, dtype: str = "float32", **ignored: Any
    ) -> None:
        super().__init__()
        loaded = load(Path(pretrained), stage=stage)
        if loaded.tokenizer is None:
            raise ArtifactError(f"{pretrained}: this model has no tokenizer beside it.", "Copy its tokenizer.json.")
        self.network, self.cutter = loaded.model.eval(), loaded.tokenizer
        self.network.compute_dtype = getattr(torch, dtype)
        self._name = str(pretrained)

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which also stands before one."""
        return self.cutter.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Token ids; nothing is added, and text stays text: control tokens are those of `apply_chat_template` alone."""
        if _CONTROL not in string:
            return self.cutter.encode(string)
        parts = re.split(_CONTROL + self._layout.names.pattern, string)  # text, name, text, …
        if isinstance(self.cutter, PretrainedTokenizer):
            parts[::2] = (self._layout.names.sub(lambda name: name[0][0] + _SAID + name[0][1:], text)
                          for text in parts[::2])  # fmt: skip
            return self.cutter.encode_laid_out(LaidOut("".join(parts), _SAID, [])).ids
        texts, names = self.cutter.encode_batch(parts[::2]), [[self.cutter.control_tokens[one]] for one in parts[1::2]]
        return [index for pair in zip(texts, [*names, []], strict=True) for part in pair for index in part]

    @functools.cached_property
    def _layout(self) -> ChatTemplate:
        if isinstance(self.cutter, PretrainedTokenizer):
            return self.cutter.chat_template()
        return ChatTemplate(CHAT_TEMPLATE, self.cutter.control_tokens, {})

    @property
    def tokenizer_name(self) -> str:
        """What the harness's caches know it by."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The program that lays out its chats."""
        return self._layout.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, for `tok_encode`: a mark stands before what are control tokens.

        Without `add_generation_prompt` the last message is left open, to be gone on with.
        """
        laid_out = self._layout.lay_out(chat_history, add_generation_prompt=add_generation_prompt)
        text = self._layout.names.sub(_CONTROL + r"\1", laid_out.text).replace(laid_out.mark, "")
        said = chat_history[-1]["content"].rstrip()
        return text if add_generation_prompt else text[: text.rindex(said) + len(said)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        scored = score_ids(self.network, [(context, continuation) for _, context, continuation in requests])
        found = [(one.logprob, one.is_greedy) for one in scored]
        for (key, *_), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the context that score each token once."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.eot_token_id, self.network.config.context_length, 1
            )
            parts = [utils.make_disjoint_window(window) for window in windows]
            found.append(sum(one.logprob for one in score_ids(self.network, parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes up to a stop text, greedily unless asked to draw."""
        found: list[str | None] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=list), []).append(place)
        for key, places in kinds.items():
            asked = json.loads(key)
            until = asked.get("until") or []
            n_most = min(asked.get("max_gen_toks", _MAX_TOKENS), self.network.config.context_length - 1)
            params = SamplingParams(
                temperature=asked.get("temperature", 0.0) if asked.get("do_sample") else 0.0,
                max_tokens=n_most,
                stop=tuple([until] if isinstance(until, str) else until),
            )
            prompts = [self.tok_encode(requests[place].args[0]) or [self.eot_token_id] for place in places]
            for place, result in zip(places, generate_batch(self.network, self.cutter, prompts, params), strict=True):
                found[place] = result.text
                self.cache_hook.add_partial("generate_until", requests[place].args, result.text)
        return [text for text in found if text is not None]


def task_file(benchmark: Benchmark, data: str | Path, folder: str | Path) -> Path:
    """Write a benchmark of ours as a task of the harness, for local files and offline.

    Args:
        benchmark: a choice whose choices are a field, or one continuation behind one context or several.
        data: folder of its files.
        folder: where to write; give it to `TaskManager(include_path=…)`.

    Returns:
        The file.

    Raises:
        ArtifactError: of a kind that the harness asks otherwise.
    """
    is_told = isinstance(benchmark.choices, str) or benchmark.continuation
    if benchmark.kind != "choice" or not is_told:
        raise ArtifactError(f"benchmark {benchmark.name}: lm-evaluation-harness cannot be told it in a file.")
    asked: dict[str, Any] = {
        "task": f"groundup_{benchmark.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(data).resolve() / benchmark.files)}},
        "test_split": "test",
        "doc_to_text": benchmark.context,
        "target_delimiter": benchmark.delimiter,
    }
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    if benchmark.contexts:  # a text that is a number stands for several contexts, which it takes from the choices
        asked |= {"output_type": "multiple_choice", "doc_to_choice": f"{{{{ {benchmark.contexts} }}}}"}
        asked |= {"doc_to_text": benchmark.gold, "doc_to_target": benchmark.continuation}
        metrics = ("acc",)
    elif benchmark.continuation:
        # of one continuation the harness puts no delimiter before it
        asked |= {"output_type": "loglikelihood", "doc_to_target": benchmark.delimiter + benchmark.continuation}
        metrics = ("acc", "perplexity")
    else:
        asked |= {"output_type": "multiple_choice", "doc_to_choice": f"{{{{ {benchmark.choices} }}}}"}
        asked |= {"doc_to_target": benchmark.gold}
    asked["metric_list"] = [{"metric": metric} for metric in metrics]
    path = Path(folder) / f"{asked['task']}.yaml"
    path.write_text(json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8")  # JSON is YAML
    return path
