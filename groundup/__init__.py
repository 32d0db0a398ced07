"""groundup builds a large language model from the ground up: raw text in, an assistant you can talk to out.

    import groundup as gu

    tok   = gu.Tokenizer.train(gu.corpus.read("texts/*.jsonl.gz"), vocab_size=32_768)
    model = gu.Transformer(gu.preset("llama-160m", vocab_size=tok.vocab_size))
    run   = gu.pretrain(model, shards="runs/mine/shards", settings=gu.PretrainSettings(tokens=2e9))
    print(gu.generate(run.model, tok, "Once upon a time", max_tokens=64, temperature=0.8).text)

Names are imported when first used, so that `import groundup` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup import alignment, corpus
    from groundup.alignment import SFTSettings, fine_tune
    from groundup.console import Console
    from groundup.evaluation import bits_per_byte, generate_tasks, score_model
    from groundup.generation import SamplingParams, chat_reply, generate, stream, stream_chat
    from groundup.interop import LoadedModel, export_folder, import_folder, load, load_model, save_model
    from groundup.interop.start import start_model
    from groundup.model import ModelConfig, Transformer, extend_vocabulary, ladder_config, preset, preset_names
    from groundup.pipeline import build
    from groundup.recipe import (
        CorpusSettings,
        EvaluateSettings,
        ModelSettings,
        PretrainSettings,
        Recipe,
        ShardsSettings,
        TokenizerSettings,
        read_recipe,
        register,
        resolve,
    )
    from groundup.report.page import write_report
    from groundup.run import Run, list_runs
    from groundup.serving.inspect import Inspection, inspect
    from groundup.shards import MixtureLoader, PackedLoader, TokenShards, WindowLoader, write_shards
    from groundup.stage import Method, Shown
    from groundup.tokenizer import Tokenizer, load_tokenizer
    from groundup.training import TrainedModel, pretrain
    from groundup.training.planning.plan import Plan, plan
    from groundup.training.scaling_law import ScalingLaw
    from groundup.training.scaling_sweep import scaling_sweep

__version__ = "0.1.0"

_WHERE = {
    "groundup.alignment": ("SFTSettings", "fine_tune"),
    "groundup.console": ("Console",),
    "groundup.evaluation": ("bits_per_byte", "generate_tasks", "score_model"),
    "groundup.generation": ("SamplingParams", "chat_reply", "generate", "stream", "stream_chat"),
    "groundup.interop": ("LoadedModel", "export_folder", "import_folder", "load", "load_model", "save_model"),
    "groundup.model": (
        "ModelConfig",
        "Transformer",
        "extend_vocabulary",
        "ladder_config",
        "preset",
        "preset_names",
    ),
    "groundup.pipeline": ("build",),
    "groundup.recipe": (
        "CorpusSettings",
        "EvaluateSettings",
        "ModelSettings",
        "PretrainSettings",
        "Recipe",
        "ShardsSettings",
        "TokenizerSettings",
        "read_recipe",
        "register",
        "resolve",
    ),
    "groundup.report.page": ("write_report",),
    "groundup.run": ("Run", "list_runs"),
    "groundup.serving.inspect": ("Inspection", "inspect"),
    "groundup.shards": ("MixtureLoader", "PackedLoader", "TokenShards", "WindowLoader", "write_shards"),
    "groundup.tokenizer": ("Tokenizer", "load_tokenizer"),
    "groundup.interop.start": ("start_model",),
    "groundup.stage": ("Method", "Shown"),
    "groundup.training": ("TrainedModel", "pretrain"),
    "groundup.training.planning.plan": ("Plan", "plan"),
    "groundup.training.scaling_law": ("ScalingLaw",),
    "groundup.training.scaling_sweep": ("scaling_sweep",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Console",
    "CorpusSettings",
    "EvaluateSettings",
    "Inspection",
    "LoadedModel",
    "Method",
    "MixtureLoader",
    "ModelConfig",
    "ModelSettings",
    "PackedLoader",
    "Plan",
    "PretrainSettings",
    "Recipe",
    "Run",
    "SFTSettings",
    "SamplingParams",
    "ScalingLaw",
    "ShardsSettings",
    "Shown",
    "TokenShards",
    "Tokenizer",
    "TokenizerSettings",
    "TrainedModel",
    "Transformer",
    "WindowLoader",
    "alignment",
    "bits_per_byte",
    "build",
    "chat_reply",
    "corpus",
    "export_folder",
    "extend_vocabulary",
    "fine_tune",
    "generate",
    "generate_tasks",
    "import_folder",
    "inspect",
    "ladder_config",
    "list_runs",
    "load",
    "load_model",
    "load_tokenizer",
    "plan",
    "preset",
    "preset_names",
    "pretrain",
    "read_recipe",
    "register",
    "resolve",
    "save_model",
    "scaling_sweep",
    "score_model",
    "start_model",
    "stream",
    "stream_chat",
    "write_report",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name in ("alignment", "corpus"):
        return importlib.import_module(f"groundup.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'groundup' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
