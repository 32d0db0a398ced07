"""The stage `[quantize.NAME]`, and `groundup quantize`: a model in fewer bits, with what that gains and what it costs.

Trains nothing. Measured on the same text and machine, before and after: bytes of weights; bits per byte, with the
standard error of the difference (the units of text are paired, so it is far less than that of either figure); tokens a
second of one text written alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.console import format_bytes
from groundup.corpus import stream_documents
from groundup.distributed import current_world
from groundup.errors import DataError, GroundupError
from groundup.evaluation.metrics import bits_and_bytes, ratio_estimate
from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.quantize import Quantization, QuantizationMethod, quantize
from groundup.interop import save_model
from groundup.interop.folder import WEIGHTS_FILE
from groundup.interop.start import check_shards, check_start, starting_config, starting_point
from groundup.model import Transformer
from groundup.model.cost import weight_bytes
from groundup.recipe import QuantizeSettings
from groundup.report.format import format_lines
from groundup.run import RECIPE_FILE, Run
from groundup.shards import TokenShards
from groundup.stage import MODEL_FOLDER, Check, Context, Method, Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training.planning.memory import device_memory
from groundup.untrusted import read_bytes

_MOST_SCORED = 500_000
_SPEED_TOKENS, _SPEED_ROUNDS = 32, 3


def quantize_and_measure(
    model: Transformer, tokenizer: Tokenizer | None, settings: QuantizeSettings, out: str | Path,
    *, texts: Sequence[str] = (), calibration: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize a model in place, save it, and say what that gains and costs.

    Args:
        model: with float weights.
        tokenizer: of the model; None: only sizes are measured.
        settings: bits, groups and so on; its `start` and `calibration` load nothing.
        out: the new model's folder.
        texts: to measure bits per byte on, apart from those of the calibration; none: it is not measured.
        calibration: (windows, tokens) for GPTQ.

    Returns:
        `method`, and under names that end in `_before` and `_after` what was measured: `bytes`, `bits_per_byte`,
        `tokens_per_second`; `bits_per_byte_change` and `bits_per_byte_change_stderr`.

    Raises:
        GroundupError: settings that do not fit together, GPTQ without calibration, or a model that is quantized.
        ArtifactError: a weight is not finite.
    """
    method = method_of(settings, has_text=calibration is not None)
    how = Quantization(settings.bits, settings.group_size, settings.activations)
    before, bits, n_bytes = _measure(model, tokenizer, texts)
    quantize(model, how, method=method, calibration=calibration)
    after, bits_after, _ = _measure(model, tokenizer, texts)
    save_model(out, model, tokenizer)
    size = (Path(out) / WEIGHTS_FILE).stat().st_size
    figures: dict[str, Any] = {"method": method, "bytes_before": weight_bytes(model.config), "bytes_after": size}
    for when, measured in (("before", before), ("after", after)):
        figures |= {f"{name}_{when}": value for name, value in measured.items()}
    if len(bits):
        change = ratio_estimate(bits_after - bits, n_bytes)
        figures |= {"bits_per_byte_change": change.value, "bits_per_byte_change_stderr": change.stderr}
    return figures


def in_words(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of `quantize_and_measure` as labels and values."""
    before, after = figures["bytes_before"], figures["bytes_after"]
    found = [
        ("rounding", "GPTQ" if figures["method"] == "gptq" else "to nearest"),
        ("weights", f"{before / 1e6:,.1f} MB in float32 → {after / 1e6:,.1f} MB ({before / after:.1f} times smaller)"),
    ]
    if "bits_per_byte_change" in figures:
        was, now = figures["bits_per_byte_before"], figures["bits_per_byte_after"]
        change = f"{figures['bits_per_byte_change']:+.4f} ± {figures['bits_per_byte_change_stderr']:.4f}"
        found.append(("bits per byte", f"{was:.4f} → {now:.4f} ({change})"))
    if "tokens_per_second_before" in figures:
        was, now = figures["tokens_per_second_before"], figures["tokens_per_second_after"]
        slower = " (slower on this machine: it saves memory here, not time)" if now < was else ""
        found.append(("writing alone", f"{was:,.0f} → {now:,.0f} tokens/s{slower}"))
    return found


def method_of(settings: QuantizeSettings, *, has_text: bool) -> QuantizationMethod:
    """How weights are rounded, where the settings leave it open."""
    return settings.method or ("gptq" if settings.bits == 4 and has_text else "rtn")


def calibration_windows(run: Run, tokenizer: Tokenizer, shape: tuple[int, int], *, verify: bool = True) -> Tensor:
    """Windows of token ids from all over a run's shards, int64, of this shape (or shorter, if the shards are)."""
    fingerprint = tokenizer.fingerprint
    shards = TokenShards.open(run.folder("shards"), "train", tokenizer_fingerprint=fingerprint, verify=verify)
    n, length = shape[0], min(shape[1], shards.n_tokens)
    starts = np.random.default_rng(run.recipe.seed).integers(0, shards.n_tokens - length + 1, n)
    return torch.from_numpy(shards.windows(starts, length))


def run_text(folder: Path, tokenizer: Tokenizer, shape: tuple[int, int]) -> tuple[list[str], Tensor | None]:
    """What to measure and to calibrate on, of the run that a model's folder is in; nothing where it is in none.

    Args:
        folder: of the model.
        tokenizer: of the model.
        shape: of the calibration: windows, and tokens in each.

    Raises:
        ArtifactError: the run's shards are damaged, or in another tokenizer's tokens.
    """
    run = Run(folder.resolve().parents[1])
    if not (run.root / RECIPE_FILE).is_file() or run.manifest("corpus") is None:
        return [], None
    has_shards = run.manifest("shards") is not None
    return scored_texts(run), calibration_windows(run, tokenizer, shape) if has_shards else None


def file_text(path: Path, tokenizer: Tokenizer, shape: tuple[int, int]) -> tuple[list[str], Tensor]:
    """The last tenth of a text file to measure on, and windows of the rest to calibrate on; as `run_text`.

    Raises:
        DataError: it is no text, or too short.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error}).", "Give a text file in UTF-8.") from error
    cut = len(text) * 9 // 10
    ids = torch.tensor(tokenizer.encode(text[:cut])[: shape[0] * shape[1]], dtype=torch.int64)
    length = min(shape[1], len(ids))
    if not length:
        raise DataError(f"{path}: is too short to calibrate and to measure on.", "Give a longer text.")
    return [text[cut:][:_MOST_SCORED]], ids[: len(ids) // length * length].view(-1, length)


def scored_texts(run: Run) -> list[str]:
    """The first held-out documents: enough for an error bar far below what 4 bits cost."""
    found, room = [], _MOST_SCORED
    for document in stream_documents(run.folder("corpus"), "validation"):
        found.append(document.text[:room])
        room -= len(found[-1])
        if room <= 0:
            break
    return found


def _measure(
    model: Transformer, tokenizer: Tokenizer | None, texts: Sequence[str]
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Bits per byte and tokens a second, the fastest of a few short rounds; bits and bytes of the units of the text."""
    figures: dict[str, float] = {}
    bits = n_bytes = np.zeros(0)
    if tokenizer is None:
        return figures, bits, n_bytes
    if texts:
        bits, n_bytes = bits_and_bytes(model, texts, tokenizer)
    if len(bits):
        figures["bits_per_byte"] = ratio_estimate(bits, n_bytes).value
    params, fastest = SamplingParams(temperature=0.0, max_tokens=_SPEED_TOKENS), math.inf
    engine = Engine(model, slots=1)
    for _ in range(_SPEED_ROUNDS):
        start = time.perf_counter()
        engine.run([Request([tokenizer.end_of_text_id], params)])
        fastest = min(fastest, time.perf_counter() - start)
    return {**figures, "tokens_per_second": _SPEED_TOKENS / fastest}, bits, n_bytes


class Quantize(Method):
    """The stage."""

    settings = QuantizeSettings
    makes = "lm"
    trainable = False
    teaches = False
    is_default = False
    figures = ("bits_per_byte_change", "bytes_after", "tokens_per_second_after")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The text to measure on, and the shards to calibrate with."""
        has_text = stage.recipe.reads_text
        calibrates = has_text and method_of(stage.settings, has_text=has_text) == "gptq"
        return (*(("corpus",) if has_text else ()), *(("shards",) if calibrates else ()))

    def checks(self, stage: Stage) -> Iterable[Check]:
        """The model, and the text."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        if method_of(stage.settings, has_text=stage.recipe.reads_text) == "gptq":
            yield f"[{stage.section}] method", lambda: check_shards(stage, "method", ', or set method = "rtn"')

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """How weights are rounded."""
        if stage.settings.method is None:
            method = method_of(stage.settings, has_text=stage.recipe.reads_text)
            why = "4 bits lose more, and calibration wins much of it back" if method == "gptq" else "it loses little"
            yield f"{stage.section}.method", method, why

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit: the weights in float32, and one matrix more."""
        needed, memory = weight_bytes(starting_config(stage)[0]), device_memory(current_world())
        if needed > memory.total:
            raise GroundupError(
                f"[{stage.section}]: the model's weights take {format_bytes(needed)} in float32, and {memory.what} is "
                f"{format_bytes(memory.total)}.",
                "Quantize it on a larger machine.",
            )

    def quick(self, settings: QuantizeSettings) -> QuantizeSettings:
        """Fewer windows."""
        return settings.model_copy(update={"calibration": min(settings.calibration, 8)})

    def work(self, context: Context) -> dict[str, Any]:
        """See `quantize_and_measure`."""
        stage, run, settings = context.stage, context.run, context.stage.settings
        model, tokenizer = starting_point(stage, run, context.console)
        shape, calibration = (settings.calibration, model.config.context_length), None
        if "shards" in stage.needs:
            calibration = calibration_windows(run, tokenizer, shape, verify=context.recipe.verify)
        texts = scored_texts(run) if stage.recipe.reads_text else []
        with context.console.bar(stage.name) as bar:
            figures = quantize_and_measure(
                model, tokenizer, settings, context.folder / MODEL_FOLDER, texts=texts, calibration=calibration
            )
            bar.finish(" · ".join(f"{label} {value}" for label, value in in_words(figures)[1:3]))
        for label, value in in_words(figures)[3:]:
            context.console.note(f"{stage.name}: {label}: {value}")
        return figures

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """What it gains and costs."""
        if "bytes_after" not in summary:
            return Shown(f"{stage.settings.bits} bits a weight")
        lines = format_lines(
            (summary["bytes_after"], lambda size: f"{size / 1e6:,.1f} MB"),
            (summary.get("bits_per_byte_change"), lambda change: f"{change:+.4f} bits/byte"),
        )
        return Shown(f"{stage.settings.bits} bits a weight", in_words(summary), lines)


QUANTIZE = Quantize()
