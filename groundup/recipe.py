"""The recipe: what the user asked for, as one TOML file with one section per stage.

In: a TOML file (or the name of a recipe that ships with groundup) and `section.key=value`
overrides. Out: a frozen, typed `Recipe`. Every field has a type, a range, a default and a line of
documentation; unknown keys are refused with the nearest valid name; all problems are reported at once.
A field left unset (`None`) is derived later, by the stage that needs it, which states its reason.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from groundup.errors import Problem, RecipeError


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _flat(value: object) -> object:
    """`{"gopher": {"min_words": 30}}`, as TOML reads a dotted key, and `{"gopher.min_words": 30}` mean the same."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, object] = {}
    for key, item in value.items():
        inner = _flat(item)
        flat.update(
            {f"{key}.{name}": part for name, part in inner.items()} if isinstance(inner, dict) else {key: inner}
        )
    return flat


ByName = Annotated[dict[str, float | bool], BeforeValidator(_flat)]
"""Numbers by dotted names; false stands for "off"."""

Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""A list of strings; a single string is a list of one."""


def _setting(default: Any, about: str, *, affects_result: bool = True, **limits: Any) -> Any:
    """A field with its documentation; `affects_result=False` keeps it out of fingerprints."""
    return Field(default, description=about, json_schema_extra={"affects_result": affects_result}, **limits)


class Section(BaseModel):
    """Common to every section: no unknown keys, nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def fingerprint_values(self) -> dict[str, Any]:
        """The settings that can change the stage's result, JSON-able."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_result") is False:
                del values[name]
        return values


class MinHashSettings(Section):
    """Near-duplicates by MinHash and banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3)."""

    ngram: int = _setting(5, "words in a shingle", ge=1, le=64)
    bands: int = _setting(14, "bands; two texts that agree in one whole band are compared", ge=1, le=512)
    rows: int = _setting(8, "hashes in a band", ge=1, le=64)
    min_agreement: float = _setting(
        0.72, "least share of equal hashes of two texts that share a band (0: sharing a band is enough)", ge=0.0, le=1.0
    )


class ClassifierSettings(Section):
    """A quality classifier that is trained on examples: bags of hashed words and word pairs, as fastText's."""

    positive: Texts = _setting(..., "files of texts to keep more of", min_length=1)
    negative: Texts = _setting(..., "files of texts to keep less of", min_length=1)
    min_score: float = _setting(0.5, "documents that score less are dropped", ge=0.0, le=1.0)


class DecontaminationSettings(Section):
    """Documents that repeat evaluation data are dropped."""

    files: Texts = _setting(..., "evaluation data: JSONL, Parquet, CSV or text files, folders or globs", min_length=1)
    ngram: int = _setting(13, "words in a row that count as repeated (8 to 13 are usual)", ge=5, le=64)
    max_share: float = _setting(
        0.0, "a document is dropped if more than this share of its words is repeated (0: if any is)", ge=0.0, le=1.0
    )


class CorpusSettings(Section):
    """Raw files to clean documents."""

    inputs: Texts = _setting(
        ("groundup:classics",),
        "files, folders or globs (.txt .md .html .jsonl .parquet .warc .wet, also .gz .zst .bz2), s3:// gs:// https:// "
        "addresses, or a text that ships with groundup: groundup:classics, groundup:shakespeare",
        min_length=1,
    )
    text_field: str = _setting("text", "the field of a JSONL or Parquet record that holds the text")
    source_field: str = _setting("", "the field that names a record's source (unset: the file's name is the source)")
    unicode: Literal["NFC", "NFKC", "none"] = _setting("NFC", "Unicode normalization form")
    max_document_mib: float = _setting(
        16.0,
        "a plain text longer than this is split at paragraphs, else lines; a line longer is set aside",
        gt=0.0,
        le=1024.0,
    )
    extractor: Literal["trafilatura", "resiliparse"] = _setting(
        "trafilatura", "how text is taken out of HTML: trafilatura (better) or resiliparse (many times faster)"
    )
    extract_seconds: float = _setting(20.0, "an HTML page that takes longer is set aside", gt=0.0, le=3600.0)
    languages: Texts = _setting(("en",), "ISO 639-1 codes to keep; an empty list keeps every language")
    language_floor: float = _setting(
        0.0, "least probability of the language on top of being the most probable one", ge=0.0, le=1.0
    )
    language_model: str = _setting("", "another fastText language model, such as lid.176.bin (unset: lid.176.ftz)")
    quality: Texts = _setting(("none",), "rules to apply: gopher, c4, fineweb, gentle (for books), or none")
    thresholds: ByName = _setting(
        {}, 'rules\' thresholds by name, such as "gopher.min_words" = 30; false switches a rule off'
    )
    predicate: str = _setting("", "a function of your own that keeps a document or not: file.py:function")
    privacy: tuple[Literal["email", "phone", "ip", "credit_card"], ...] = _setting(
        (), "what is replaced by placeholders: email, phone, ip, credit_card"
    )
    toxic_words: str = _setting("", "a file of words, one a line, for max_toxic_share")
    max_toxic_share: float = _setting(0.01, "documents with a larger share of toxic words are dropped", ge=0.0, le=1.0)
    dedup: Literal["near", "exact", "none"] = _setting(
        "near", "which duplicates to remove: near (which includes exact), exact or none"
    )
    dedup_within: Literal["none", "paragraphs", "lines"] = _setting(
        "none", "remove paragraphs or lines that another document has already"
    )
    dedup_substring: int = _setting(0, "remove runs of this many words that stand elsewhere too (0: no; 50 is usual)")
    min_characters: int = _setting(1, "shorter documents are dropped", ge=1)
    mix: dict[str, float] = _setting(
        {}, 'share of the text by source, such as { "books*" = 0.7, "*" = 0.3 }; drops or repeats documents'
    )
    mix_tokens: dict[str, float | Literal["all"]] = _setting(
        {}, 'instead of shares: tokens from each source, such as { "books*" = 3e6, "*" = "all" }'
    )
    bytes_per_token: float = _setting(
        4.0, "mix_tokens: how many bytes a token is reckoned at (`groundup tokenizer report` measures it)", gt=0.0
    )
    validation_share: float = _setting(0.1, "share of the text held out for validation", gt=0.0, lt=1.0)
    validation_by: Literal["auto", "document", "tail"] = _setting(
        "auto",
        "document: whole documents, chosen by their id; tail: the end of every document; "
        "auto: document from 20 documents on, else tail",
    )
    minhash: MinHashSettings = Field(default_factory=MinHashSettings, description="how near-duplicates are found")
    classifier: ClassifierSettings | None = None
    decontaminate: DecontaminationSettings | None = None
    workers: int | None = _setting(
        None, "processes at work (unset: one a core, for large inputs)", ge=1, le=4096, affects_result=False
    )
    engine: Literal["local", "ray"] = _setting(
        "local",
        "local: processes on this machine; ray: a Ray cluster (pip install 'groundup[ray]')",
        affects_result=False,
    )
    split_mib: float = _setting(64.0, "size of a piece of work", gt=0.0, le=65536.0, affects_result=False)
    memory_mib: float = _setting(1024.0, "memory that one process may use", ge=128.0, affects_result=False)

    @model_validator(mode="after")
    def _one_mix(self) -> CorpusSettings:
        if self.mix and self.mix_tokens:
            raise ValueError("mix and mix_tokens are two ways to say one thing: leave one of them out")
        return self


class TokenizerSettings(Section):
    """Documents to `tokenizer.json`."""

    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = _setting(
        "bpe", "byte-level BPE, WordPiece, Unigram, or one token per character"
    )
    vocab_size: int = _setting(
        2048, "number of tokens, control tokens included (characters: decided by the text)", ge=280, le=131_072
    )
    split: Literal["qwen2", "llama3", "gpt2"] | None = _setting(
        None, "how text is cut before merging (unset: qwen2, digits one by one; llama3 from 32,768 entries on)"
    )
    spare_tokens: int = _setting(4, "unused control tokens kept for later stages", ge=0, le=1024)
    trainer: Literal["huggingface", "rustbpe"] = _setting(
        "huggingface", "bpe: who counts the pairs; rustbpe is faster and breaks ties otherwise"
    )
    sample_mib: float = _setting(
        1024.0, "most text to learn from; beyond it every source gives its share", gt=0.0, le=65536.0
    )


class ShardsSettings(Section):
    """Documents and tokenizer to binary token shards."""

    shard_tokens: int = _setting(100_000_000, "most tokens in one shard file", ge=1024, le=2_000_000_000)
    workers: int | None = _setting(
        None, "processes at work (unset: one a core, for large inputs)", ge=1, le=4096, affects_result=False
    )


class ModelSettings(Section):
    """The Transformer: a preset, and what to change in it (unset: the preset's value)."""

    preset: str = _setting("ground-1m", "a shape to start from; `groundup recipe new --list` names them")
    context_length: int | None = _setting(None, "tokens the model can see at once", ge=8, le=1 << 20)
    n_layers: int | None = _setting(None, "number of blocks", ge=1, le=512)
    n_heads: int | None = _setting(None, "query heads", ge=1, le=512)
    n_kv_heads: int | None = _setting(None, "key/value heads (a divisor of n_heads)", ge=1, le=512)
    head_dim: int | None = _setting(None, "width of one head", ge=2, le=1024)
    d_model: int | None = _setting(None, "width of the residual stream", ge=2, le=1 << 16)
    d_ff: int | None = _setting(None, "width of the feed-forward layer", ge=2, le=1 << 18)
    tied_embeddings: bool | None = _setting(None, "input and output embeddings share one matrix")
    dropout: float | None = _setting(None, "dropout on the residual stream while training", ge=0.0, lt=1.0)
    initialization: Literal["scaled", "gpt2"] | None = _setting(
        None, "scaled: 1/sqrt(fan-in), zero output projections; gpt2: N(0, 0.02)"
    )

    def overrides(self) -> dict[str, Any]:
        """What the user set beside the preset."""
        return {name: value for name, value in self.model_dump().items() if name != "preset" and value is not None}


class OptimizerSettings(Section):
    """What every training stage can be told about its optimizer, schedule and numbers."""

    batch_size: int = _setting(32, "sequences in one optimizer step, over all devices", ge=1)
    micro_batch_size: int | None = _setting(
        None, "sequences in one forward pass on one device (unset: the batch, or what memory allows)", ge=1
    )
    optimizer: Literal["muon", "adamw"] = _setting(
        "muon", "muon: Muon for the blocks' matrices and AdamW for the rest; adamw: AdamW for all"
    )
    lr: float = _setting(3e-3, "peak learning rate of AdamW", gt=0.0, le=1.0)
    muon_lr: float = _setting(0.02, "peak learning rate of Muon", gt=0.0, le=1.0)
    weight_decay: float = _setting(0.1, "decoupled weight decay, on matrices only", ge=0.0, le=10.0)
    beta1: float = _setting(0.9, "AdamW: decay of the first moment", ge=0.0, lt=1.0)
    beta2: float = _setting(0.95, "AdamW: decay of the second moment", ge=0.0, lt=1.0)
    muon_momentum: float = _setting(0.95, "Muon: momentum", ge=0.0, lt=1.0)
    schedule: Literal["wsd", "cosine", "linear", "constant"] = _setting(
        "wsd", "warm-up then: stable and linear decay (wsd), cosine, linear, or constant"
    )
    warmup_share: float = _setting(0.03, "share of the steps that warm up", ge=0.0, le=1.0)
    decay_share: float = _setting(0.6, "wsd: share of the steps that decay", ge=0.0, le=1.0)
    final_lr_share: float = _setting(0.0, "learning rate at the end, as a share of its peak", ge=0.0, le=1.0)
    ramp_from: int | None = _setting(None, "rows of the first batch, which then grows to batch_size (unset: no)", ge=1)
    ramp_share: float = _setting(0.25, "share of the rows over which the batch grows", gt=0.0, le=1.0)
    clip: float = _setting(1.0, "clip the gradient to this global norm (0: never)", ge=0.0)
    label_smoothing: float = _setting(0.0, "share of the target's probability that is spread evenly", ge=0.0, lt=1.0)
    z_loss: float = _setting(0.0, "weight of log(Z)², which keeps logits near 0 (1e-4 is usual)", ge=0.0)
    ema: float = _setting(0.0, "decay of an average of the weights, which becomes the model (0: none)", ge=0.0, lt=1.0)
    on_trouble: Literal["stop", "skip", "rollback", "ignore"] = _setting(
        "stop", "what to do about a loss that is not finite or leaps: stop, skip the update, roll back, or ignore leaps"
    )
    spike_z: float = _setting(
        8.0, "standard deviations above the last 128 steps' mean from which a loss is a leap (0: none is)", ge=0.0
    )
    activation_checkpointing: Literal["none", "selective", "full"] = _setting(
        "none", "what the backward pass computes again instead of keeping it: less memory, more time"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "arithmetic of the model (auto: bfloat16 where the machine does it natively, else float32)"
    )
    compile: bool = _setting(False, "compile the model with torch.compile (needs a C++ compiler)")
    eval_every: int | None = _setting(None, "steps between validation passes (unset: 20 over the run)", ge=1)
    eval_tokens: int | None = _setting(
        None, "validation tokens scored each time while training (unset: at most 50,000)", ge=1
    )
    log_every: int = _setting(10, "steps between log lines", ge=1, affects_result=False)
    checkpoint_seconds: float = _setting(30.0, "seconds between checkpoints", ge=0.0, affects_result=False)
    keep_checkpoints: int = _setting(
        2, "how many of the newest checkpoints stay while training", ge=1, affects_result=False
    )
    keep_best: bool = _setting(False, "keep the model of the lowest validation loss too", affects_result=False)
    checkpoint_beside: bool | None = _setting(
        None, "write checkpoints while training goes on (unset: on a GPU)", affects_result=False
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = _setting(
        (), "where figures go beside metrics.jsonl: tensorboard, wandb, trackio", affects_result=False
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> OptimizerSettings:
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share:g} + decay_share {self.decay_share:g} is over 1: lower one of them"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}: "
                "choose a divisor, or leave it unset"
            )
        if self.ramp_from is not None and self.batch_size % self.ramp_from:
            raise ValueError(f"ramp_from {self.ramp_from} does not divide batch_size {self.batch_size}")
        return self


class PretrainSettings(OptimizerSettings):
    """Model and shards to a base model."""

    tokens: int | Literal["compute-optimal"] = _setting(
        3_000_000, 'tokens to train on, or "compute-optimal" (20 for each parameter)', union_mode="left_to_right"
    )
    sequence_length: int | None = _setting(None, "tokens in a row (unset: the model's context)", ge=8)
    samples: Texts = _setting(("",), "prompts that are continued now and then, for the report")
    sample_tokens: int = _setting(48, "tokens of each sample", ge=0, le=4096)

    @model_validator(mode="after")
    def _some_tokens(self) -> PretrainSettings:
        if isinstance(self.tokens, int) and self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be at least 1")
        return self


class SFTSettings(OptimizerSettings):
    """Base model and conversations to an assistant."""

    data: Texts = _setting(
        ("groundup:tasks",), 'conversations: JSONL files with a "messages" list, or groundup:tasks', min_length=1
    )
    examples: int = _setting(10_000, "conversations that groundup:tasks generates", ge=100, le=10_000_000)
    epochs: float = _setting(3.0, "passes over the conversations", gt=0.0, le=1000.0)


class Gates(Section):
    """Figures that a finished run must reach; unset ones are not checked."""

    min_bits_per_byte_drop: float | None = _setting(None, "least fall of bits per byte by pretraining", ge=0.0)
    max_exact_match_before: float | None = _setting(None, "most exact match before SFT", ge=0.0, le=1.0)
    min_exact_match: float | None = _setting(None, "least exact match after SFT", ge=0.0, le=1.0)


class EvaluateSettings(Section):
    """Models to scores with error bars."""

    tasks: Texts = _setting(("bits_per_byte",), "bits_per_byte, groundup:tasks", min_length=1)
    limit: int | None = _setting(None, "most prompts of a task (unset: all held-out ones)", ge=2)
    max_tokens: int = _setting(32, "tokens that an answer may have", ge=1)
    gates: Gates = Field(default_factory=Gates, description="figures that the run must reach")


class GenerateSettings(Section):
    """How `generate` and `chat` draw tokens, unless told otherwise."""

    temperature: float = _setting(0.7, "0: always the most probable token", ge=0.0, le=100.0)
    top_k: int = _setting(0, "draw among the k most probable tokens (0: all)", ge=0)
    top_p: float = _setting(1.0, "draw among the most probable tokens that hold this mass", gt=0.0, le=1.0)
    max_tokens: int = _setting(128, "most tokens of an answer", ge=1)


class Recipe(Section):
    """A whole recipe. A stage whose section is absent (`None`) is left out of the road."""

    name: str = _setting(
        "mine", "the run's name unless --out names its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    about: str = _setting("", "one line on what the recipe makes", affects_result=False)
    seed: int = _setting(1, "seed of everything random", ge=0, le=2**31 - 1)
    threads: int | None = _setting(
        None, "CPU threads (unset: all cores); another count may round differently", ge=1, le=1024
    )
    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    shards: ShardsSettings = Field(default_factory=ShardsSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings)
    sft: SFTSettings | None = None
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    generate: GenerateSettings = Field(default_factory=GenerateSettings)

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        gates, tasks = self.evaluate.gates, self.evaluate.tasks
        if gates.min_bits_per_byte_drop is not None and "bits_per_byte" not in tasks:
            raise ValueError('[evaluate.gates] min_bits_per_byte_drop needs "bits_per_byte" in [evaluate] tasks')
        if gates.min_exact_match is not None and "groundup:tasks" not in tasks:
            raise ValueError('[evaluate.gates] min_exact_match needs "groundup:tasks" in [evaluate] tasks')
        if gates.max_exact_match_before is not None and ("groundup:tasks" not in tasks or self.sft is None):
            raise ValueError(
                '[evaluate.gates] max_exact_match_before needs [sft], and "groundup:tasks" in [evaluate] tasks'
            )
        return self


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes that ship with groundup, each with its line of description."""
    found = {}
    for entry in resources.files("groundup.recipes").iterdir():
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = tomllib.loads(entry.read_text("utf-8")).get("about", "")
    return dict(sorted(found.items()))


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path, or by the name of one that ships with groundup.

    Args:
        source: path of a TOML file, or a shipped recipe's name such as "demo".
        overrides: `section.key=value` strings; the value is read as TOML, or else as plain text.

    Raises:
        RecipeError: with every problem found, each with a way out.
    """
    text, label = _recipe_text(str(source))
    return parse_recipe(text, label, overrides, default_name=Path(label).stem)


def parse_recipe(text: str, label: str, overrides: Sequence[str] = (), default_name: str | None = None) -> Recipe:
    """Turn TOML text into a `Recipe`; `label` names it in messages. Raises as `read_recipe`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(label, [Problem("TOML", f"{error}.", "Mend that line; strings need quotes.")]) from error
    problems = _apply_overrides(values, overrides)
    values.setdefault("name", default_name or "mine")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # A value that could be of several types has one error for each: one problem is enough.
        problems += {problem.where: problem for problem in map(_problem, error.errors())}.values()
        raise RecipeError(label, problems) from error
    if problems:
        raise RecipeError(label, problems)
    return recipe


def recipe_toml(recipe: Recipe, *, comments: bool = False) -> str:
    """Write a recipe as TOML that reads back equal; `comments` adds each field's documentation."""
    lines: list[str] = []
    _write_section(lines, recipe, "", comments)
    return "\n".join(lines).strip() + "\n"


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """The settings that differ, as `section.key: old -> new` lines."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _recipe_text(source: str) -> tuple[str, str]:
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
        shipped = resources.files("groundup.recipes").joinpath(f"{source}.toml")
        if "/" not in source and shipped.is_file():
            return shipped.read_text(encoding="utf-8"), f"{source}.toml"
    except UnicodeDecodeError as error:
        raise RecipeError(source, [Problem("file", "is not UTF-8 text.", "Save it as UTF-8.")]) from error
    names = list(shipped_recipes())
    near = difflib.get_close_matches(source, names, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"Shipped recipes: {', '.join(names)}."
    raise RecipeError(source, [Problem("recipe", "no such file, and no recipe of that name ships with groundup.", fix)])


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    problems = []
    for item in overrides:
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(f"--set {item}", "is not of the form section.key=value."))
            continue
        try:
            value = tomllib.loads(f"value = {raw.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = raw.strip()
        *sections, name = key.strip().split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                problems.append(Problem(f"--set {item}", f"{section} is a value, not a section."))
                break
        else:
            target[name] = value
    return problems


def _problem(item: Any) -> Problem:
    """One pydantic error in the user's terms: [section] key = value, what is wrong, the way out."""
    parts = list(item["loc"])
    if item["type"] != "extra_forbidden" and parts[-1:] in (["int"], ["literal['compute-optimal']"]):
        parts.pop()  # pydantic's name for one of several types that a value may have
    section, field = _field_at([str(part) for part in parts])
    keys = [part for part in parts if isinstance(part, str)]  # numbers count the items of a list
    where = f"[{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else (keys[0] if keys else "recipe")
    shown = item.get("input")
    if item["type"] == "extra_forbidden":
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(names)}."
        return Problem(where, "no such setting.", fix)
    if not isinstance(shown, dict | BaseModel):
        where += f" = {json.dumps(shown, default=str)}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    about = f"({field.description})" if field is not None and field.description else None
    if field is None and item["type"] != "value_error":
        about = "Write it as a [section] with key = value lines."
    return Problem(where, f"{message}.", about)


def _field_at(location: Sequence[str]) -> tuple[type[Section] | None, FieldInfo | None]:
    """The section class and the field that a pydantic location points at."""
    section: type[Section] | None = Recipe
    field: FieldInfo | None = None
    for part in location:
        if section is None or part not in section.model_fields:
            break
        field = section.model_fields[part]
        nested = _section_class(field.annotation)
        if nested is None:
            break
        section, field = nested, None
    return section, field


def _section_class(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _write_section(lines: list[str], section: Section, path: str, comments: bool) -> None:
    nested = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            nested.append((name, value))
            continue
        if _section_class(field.annotation) is not None:
            continue
        about = f"  # {field.description}" if comments and field.description else ""
        if value is not None:
            lines.append(f"{name} = {_toml_value(value)}{about}")
        elif comments:
            lines.append(f"# {name} ={about}")
    for name, value in nested:
        header = f"{path}.{name}" if path else name
        lines.append(f"\n[{header}]")
        _write_section(lines, value, header, comments)


def _toml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL (and surrogate pairs, so no ASCII escapes).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, where)
        else:
            yield where, value
