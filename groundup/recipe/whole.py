"""A whole recipe, and what only its sections together show."""

from __future__ import annotations

from pydantic import Field, model_validator

from groundup.recipe.data import CorpusSettings, ShardsSettings, TokenizerSettings
from groundup.recipe.follow import filled
from groundup.recipe.model import ModelSettings
from groundup.recipe.sections import Section, setting
from groundup.recipe.stages import EvaluateSettings, GenerateSettings, PretrainSettings, SFTSettings


class Recipe(Section):
    """A whole recipe. A stage whose section is absent (`None`) is left out of the road."""

    name: str = setting("mine", "the run's name unless --out names its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = setting("", "one line on what the recipe makes", affects_result=False)
    seed: int = setting(1, "seed of everything random", ge=0, le=2**31 - 1)
    threads: int | None = setting(
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

    @property
    def init(self) -> str | None:
        """The model that the road starts from, if not from a fresh one."""
        return self.sft.init if self.sft is not None and self.sft.init is not None else self.pretrain.init

    @property
    def reads_text(self) -> bool:
        """Whether the road has corpus, tokenizer and shards; not to fine-tune another model without bits per byte."""
        return self.sft is None or self.sft.init is None or "bits_per_byte" in self.evaluate.tasks

    @model_validator(mode="after")
    def _one_model_to_start_from(self) -> Recipe:
        if self.sft is not None and self.sft.init is not None and self.pretrain.init is not None:
            raise ValueError(
                "[pretrain] init and [sft] init are both set: with [sft] init there is no pretraining, keep one"
            )
        if self.init is not None and self.model.follows_from_one_number:
            raise ValueError("[model] size and depth are of fresh models, but init has a shape already: keep one")
        return self

    @model_validator(mode="after")
    def _what_follows_from_the_size(self) -> Recipe:
        # Not yet anybody else's: a frozen model may be filled up while it is made.
        self.__dict__.update(filled(self))
        return self

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
