"""The sections of the stages that train, and of those that look at what came out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from groundup.recipe.sections import Section, Texts, setting

OptimizerName = Literal["muon", "adamw", "lion", "adafactor"]
PrecisionName = Literal["auto", "float32", "bfloat16", "float16", "float8"]


class GroupSettings(Section):
    """Parameters that are trained in another way than the rest; the first group whose pattern matches one counts."""

    match: str = setting(..., 'pattern of parameter names, such as "embed_tokens*" or "layers.0.*"', min_length=1)
    lr: float | None = setting(None, "their peak learning rate", gt=0.0, le=1.0)
    lr_scale: float | None = setting(None, "what their peak learning rate is multiplied by", gt=0.0, le=1000.0)
    weight_decay: float | None = setting(None, "of the matrices among them", ge=0.0, le=10.0)
    frozen: bool = setting(False, "they stay as they are, without gradient and optimizer state")

    @model_validator(mode="after")
    def _says_one_thing(self) -> GroupSettings:
        rates = [value for value in (self.lr, self.lr_scale) if value is not None]
        if len(rates) == 2:
            raise ValueError(f'"{self.match}": lr and lr_scale are both set: keep one')
        if self.frozen and (rates or self.weight_decay is not None):
            raise ValueError(f'"{self.match}": frozen parameters have no learning rate and no decay')
        if not self.frozen and not rates and self.weight_decay is None:
            raise ValueError(f'"{self.match}" changes nothing: set lr, lr_scale, weight_decay or frozen')
        return self


class DuringSettings(Section):
    """What a model is asked while it trains."""

    tasks: Texts = setting(
        ..., "benchmarks (arc_easy, or a .toml file) and generated sets (groundup:tasks), as groundup evaluate has them"
    )
    data: str = setting("", "folder of the benchmarks' files")
    limit: int = setting(100, "most items of each, the same every time", ge=2)
    every: int = setting(5, "validation passes from one time to the next; it is done after the last pass, too", ge=1)


class OptimizerSettings(Section):
    """What every training stage can be told about its optimizer, schedule and numbers.

    Attributes:
        rates_follow_size: of next-token prediction, the rates follow from the model's one number, if it has one.
        without: what would do nothing in this stage, and is refused.
    """

    rates_follow_size: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ()

    batch_size: int = setting(32, "sequences in one optimizer step, over all devices", ge=1)
    micro_batch_size: int | None = setting(
        None, "sequences in one forward pass on one device (unset: the batch, or what memory allows)", ge=1
    )
    optimizer: OptimizerName = setting(
        "muon", "muon: Muon for the blocks' matrices and AdamW for the rest; adamw, lion or adafactor: for all"
    )
    lr: float = setting(
        3e-3,
        "peak learning rate of all but Muon (unset: what suits the optimizer and the model's size)",
        gt=0.0,
        le=1.0,
    )
    muon_lr: float = setting(0.02, "peak learning rate of Muon", gt=0.0, le=1.0)
    weight_decay: float = setting(
        0.1, "decoupled weight decay, on matrices only (unset: 0.3 with lion)", ge=0.0, le=10.0
    )
    beta1: float = setting(0.9, "AdamW: decay of the first moment; Lion: share in a step", ge=0.0, lt=1.0)
    beta2: float = setting(
        0.95, "AdamW: decay of the second moment; Lion: of its momentum (unset: 0.99)", ge=0.0, lt=1.0
    )
    muon_momentum: float = setting(0.95, "Muon: momentum", ge=0.0, lt=1.0)
    groups: tuple[GroupSettings, ...] = setting(
        (), "[[groups]] of parameters with a learning rate or decay of their own, or frozen"
    )
    schedule: Literal["wsd", "cosine", "linear", "constant"] = setting(
        "wsd", "warm-up then: stable and linear decay (wsd), cosine, linear, or constant"
    )
    warmup_share: float = setting(0.03, "share of the steps that warm up", ge=0.0, le=1.0)
    decay_share: float = setting(0.6, "wsd: share of the steps that decay", ge=0.0, le=1.0)
    final_lr_share: float = setting(0.0, "learning rate at the end, as a share of its peak", ge=0.0, le=1.0)
    batch_warmup_from: int | None = setting(
        None, "batch-size warm-up: rows of the first batch, from which it grows to batch_size (unset: no warm-up)", ge=1
    )
    batch_warmup_share: float = setting(
        0.25, "batch-size warm-up: share of the run's rows over which the batch grows", gt=0.0, le=1.0
    )
    max_grad_norm: float = setting(
        1.0, "the gradient is scaled down to this global norm where it is larger (0: never)", ge=0.0
    )
    label_smoothing: float = setting(0.0, "share of the target's probability that is spread evenly", ge=0.0, lt=1.0)
    z_loss: float = setting(0.0, "weight of log(Z)², which keeps logits near 0 (1e-4 is usual)", ge=0.0)
    ema: float = setting(0.0, "decay of an average of the weights, which becomes the model (0: none)", ge=0.0, lt=1.0)
    on_spike: Literal["stop", "skip", "rollback", "ignore"] = setting(
        "stop",
        "what happens when the loss spikes or is not finite: stop the run, skip the update, roll back to the last "
        "checkpoint and pass over the batch, or ignore spikes",
    )
    spike_z: float = setting(
        8.0,
        "standard deviations above the mean of the last 128 steps from which a loss is a spike (0: only a loss that is "
        "not finite)",
        ge=0.0,
    )
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none", "what the backward pass computes again instead of keeping it: less memory, more time"
    )
    precision: PrecisionName = setting(
        "auto",
        "arithmetic of the model (auto: bfloat16 where the machine does it natively, else float32); float8: the "
        "blocks' linear layers, on GPUs that have it",
    )
    compile: bool | Literal["auto"] = setting(
        "auto", "compile the model with torch.compile (auto: where a short trial on this machine says that it pays)"
    )
    eval_every: int | None = setting(None, "steps between validation passes (unset: 20 over the run)", ge=1)
    eval_tokens: int | None = setting(
        None, "validation tokens scored each time while training (unset: at most 50,000)", ge=1
    )
    evaluate: DuringSettings | None = setting(
        None, "benchmarks that are scored after validation passes, for metrics.jsonl", affects_result=False
    )
    log_every: int = setting(10, "steps between log lines", ge=1, affects_result=False)
    checkpoint_seconds: float = setting(30.0, "seconds between checkpoints", ge=0.0, affects_result=False)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints stay", ge=1, affects_result=False)
    keep_best: bool = setting(False, "keep the model of the lowest validation loss too, in best/", affects_result=False)
    checkpoint_beside: bool | None = setting(
        None, "write checkpoints while training goes on (unset: on a GPU)", affects_result=False
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = setting(
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
        if self.batch_warmup_from is not None and self.batch_size % self.batch_warmup_from:
            raise ValueError(f"batch_warmup_from {self.batch_warmup_from} does not divide batch_size {self.batch_size}")
        if idle := [name for name in self.without if getattr(self, name)]:
            raise ValueError(f"{', '.join(idle)}: would do nothing in this stage: leave unset")
        return self

    def fingerprint_values(self) -> dict[str, Any]:
        """The settings that can change the result; no groups are as if there had never been any."""
        values = super().fingerprint_values()
        return values if self.groups else {name: value for name, value in values.items() if name != "groups"}


class MixtureSettings(Section):
    """Other token shards that pretraining takes rows from."""

    shards: str = setting(
        ..., "a folder of token shards, made with the run's tokenizer: another run's shards/", min_length=1
    )
    weight: float = setting(
        1.0, "how many rows come from it for each row of the run's own shards", gt=0.0, le=1_000_000.0
    )


class PretrainSettings(OptimizerSettings):
    """Model and shards to a base model."""

    init: str | None = setting(
        None,
        "a run or a model's folder, groundup's or Hugging Face's, to start from (unset: a fresh model)",
        affects_result=False,
    )
    tokens: int | Literal["compute-optimal"] = setting(
        3_000_000, 'tokens to train on, or "compute-optimal" (20 for each parameter)', union_mode="left_to_right"
    )
    sequence_length: int | None = setting(None, "tokens in a row (unset: the model's context)", ge=8)
    mixture: tuple[MixtureSettings, ...] = setting(
        (), "[[pretrain.mixture]]: other folders of token shards that rows are drawn from too, each with a weight"
    )
    document_mask: bool = setting(
        False,
        "no token attends to another document of its row (slower; choose it where documents are short and unrelated)",
    )
    samples: Texts = setting(("",), "prompts that are continued now and then, for the report")
    sample_tokens: int = setting(48, "tokens of each sample", ge=0, le=4096)

    def fingerprint_values(self) -> dict[str, Any]:
        """Of the mixture the weights: what is in the folders, wherever they are, has digests of its own."""
        return {**super().fingerprint_values(), "mixture": [part.weight for part in self.mixture]}

    @model_validator(mode="after")
    def _some_tokens(self) -> PretrainSettings:
        if isinstance(self.tokens, int) and self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be at least 1")
        return self


class StartSettings(Section):
    """What every stage can be told that starts from a model."""

    start: str = setting(
        "pretrain",
        "the stage whose model it starts from, or a run or a model's folder",
        min_length=1,
        affects_result=False,
    )


class AlignSettings(StartSettings):
    """What every `[align.NAME]` section can be told, whatever its method."""

    method: str = setting("", "what the stage does (unset: the section's own name)")


class QuantizeSettings(StartSettings):
    """A model to the same in fewer bits."""

    bits: Literal[8, 4] = setting(8, "of a weight: 8 or 4")
    method: Literal["rtn", "gptq"] | None = setting(
        None, "rtn: round to nearest; gptq: calibrated on the run's text (unset: gptq with 4 bits where there is text)"
    )
    group_size: int | None = setting(
        None, "inputs that share a scale, a multiple of 32 (unset: 32 with 4 bits, the whole row with 8)", ge=32
    )
    activations: Literal["float", "int8"] = setting(
        "float", "int8: activations are rounded for each product, too (8 bits, whole rows, on CPUs)"
    )
    calibration: int = setting(128, "gptq: windows of the training text, of the model's context", ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _fits_together(self) -> QuantizeSettings:
        if self.group_size is not None and self.group_size % 32:
            raise ValueError(f"group_size {self.group_size} must be a multiple of 32")
        if self.activations == "int8" and (self.bits, self.group_size) != (8, None):
            raise ValueError('activations = "int8" needs bits = 8 and no group_size')
        return self


class ControlSettings(AlignSettings):
    """What a method can be told that trains as long as it is asked to, and so can be another one's control."""

    compute: str | None = setting(
        None, "a stage: train until as many FLOPs are spent as it took, as its control", affects_result=False
    )


class Gate(Section):
    """A figure that a finished run must reach."""

    metric: str = setting(..., "a score (bits_per_byte, exact_match) or a figure of the stage's own (val_loss, …)")
    model: str = setting("pretrain", "the stage whose model is meant", min_length=1)
    over: str | None = setting(
        None,
        'a second stage, or "start" for what the first starts from: their difference then counts (unset: the value)',
    )
    min: float | None = setting(None, "the least that passes")
    max: float | None = setting(None, "the most that passes")

    @model_validator(mode="after")
    def _has_a_bound(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError(f"the gate on {self.metric} of {self.model} can never fail: set min or max")
        if self.model in ("start", self.over):
            raise ValueError(f'model = "{self.model}": name a stage, and another one (or "start") in over')
        return self


def _list_of_gates(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError('is a list now: write [[evaluate.gates]] with metric = "exact_match", model = "…", min = 0.8')
    return value


class EvaluateSettings(Section):
    """Models to scores with error bars."""

    tasks: Texts = setting(
        ("bits_per_byte",),
        "bits_per_byte (of the validation text), groundup:tasks (short questions), groundup:hard-tasks, groundup:sums, "
        "groundup:style (of drawn answers), groundup:first-messages, groundup:harm (harmful requests and look-alikes), "
        "benchmarks (arc_easy, …), or .toml files that describe some",
    )
    data: str = setting("", "folder of the benchmarks' files (unset: the current folder)")
    shots: int = setting(0, "worked examples before each item of a benchmark", ge=0)
    chat: bool = setting(False, "put a benchmark's items through the model's chat template, each as one message")
    limit: int | None = setting(None, "most prompts of a task (unset: all held-out ones)", ge=2)
    max_tokens: int = setting(32, "tokens that an answer to a generated question may have", ge=1)
    samples: int = setting(1, "programs for each problem, for pass@k (one: greedy)", ge=1, le=1000)
    unisolated_code: bool = setting(False, "run what a model wrote even where it cannot be isolated")
    gates: Annotated[tuple[Gate, ...], BeforeValidator(_list_of_gates)] = setting(
        (), "[[evaluate.gates]]: figures that the run must reach", affects_result=False
    )


class GenerateSettings(Section):
    """How `generate` and `chat` draw tokens, unless told otherwise."""

    temperature: float = setting(0.7, "0: always the most probable token", ge=0.0, le=100.0)
    top_k: int = setting(0, "draw among the k most probable tokens (0: all)", ge=0)
    top_p: float = setting(1.0, "draw among the most probable tokens that hold this mass", gt=0.0, le=1.0)
    max_tokens: int = setting(128, "most tokens of an answer", ge=1)
    model: str | None = setting(None, "the stage that chat talks to (unset: the last one that is no control)")
