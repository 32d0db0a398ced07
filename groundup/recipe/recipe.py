"""A whole recipe, and what only its sections together show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationInfo, model_validator

from groundup.errors import RunError
from groundup.recipe.data import CorpusSettings, ShardsSettings, TokenizerSettings
from groundup.recipe.model import ModelSettings
from groundup.recipe.registry import TRUNK, find_method
from groundup.recipe.sections import Section, setting
from groundup.recipe.stages import (
    AlignSettings,
    ControlSettings,
    EvaluateSettings,
    GenerateSettings,
    PretrainSettings,
    QuantizeSettings,
    StartSettings,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_STAGE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of a folder, and of a TOML key without quotes
_TAKEN = {*TRUNK, "align", "model", "evaluate", "generate", "quantize", "start"}
BEFORE = "before-"
"""Begins the name under which the model is scored that a stage starts from, where no stage of the recipe made it."""


OUTLINE = "outline"
"""The context of a validation that leaves the sections of methods as they are written."""


class _AsWritten(ControlSettings):
    model_config = ConfigDict(extra="allow")


def _method_settings(value: Any, info: ValidationInfo) -> Any:
    """An `[align.NAME]` section as the settings of its method; `Recipe` has put the method's name into it."""
    if not isinstance(value, dict | AlignSettings):
        return value
    if info.context == OUTLINE:
        return _AsWritten.model_validate(value)
    method = value.get("method") if isinstance(value, dict) else value.method
    try:
        settings: type[AlignSettings] = find_method(str(method)).settings
    except RunError as error:
        raise ValueError(f"{error.message} {error.fix}".rstrip(".")) from error
    return settings.model_validate(value)


def _with_method(section: Any, name: str) -> Any:
    """A section that names its method; the default is the section's own name."""
    if isinstance(section, dict):
        return {"method": name, **section}
    if isinstance(section, AlignSettings) and not section.method:
        return section.model_copy(update={"method": name})
    return section


class Recipe(Section):
    """A whole recipe: what was written, and defaults for the rest. `resolve` adds what follows from it."""

    name: str = setting("mine", "the run's name unless --out names its folder", pattern=NAME)
    about: str = setting("", "one line on what the recipe makes", affects_result=False)
    seed: int = setting(1, "seed of everything random", ge=0, le=2**31 - 1)
    threads: int | None = setting(
        None, "CPU threads (unset: all cores); another count may round differently", ge=1, le=1024
    )
    verify: bool = setting(
        True,
        "compare the digests of what a stage takes from the one before, once; false: only its files' sizes",
        affects_result=False,
    )
    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    shards: ShardsSettings = Field(default_factory=ShardsSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings)
    align: dict[str, SerializeAsAny[Annotated[AlignSettings, BeforeValidator(_method_settings)]]] = Field(
        default_factory=dict, description="[align.NAME]: stages that start from a model of the run"
    )
    quantize: dict[str, QuantizeSettings] = Field(
        default_factory=dict, description="[quantize.NAME]: models of the run in fewer bits"
    )
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    generate: GenerateSettings = Field(default_factory=GenerateSettings)

    @model_validator(mode="before")
    @classmethod
    def _methods_by_name(cls, values: Any) -> Any:
        align = values.get("align") if isinstance(values, dict) else None
        if not isinstance(align, dict):
            return values
        return {**values, "align": {name: _with_method(section, name) for name, section in align.items()}}

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Recipe:
        problems = [*self._names(), *self._references(), *self._unused()]
        if self.init is not None and self.model.follows_from_one_number:
            problems.append("[model] size and depth are of fresh models, but init has a shape already: keep one")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _unused(self) -> Iterator[str]:
        if self.reads_text:
            return
        written = ["shards"] if "shards" in self.model_fields_set else []
        written += ["tokenizer"] if self.tokenizer.model_fields_set - {"use"} else []
        for name in written:
            yield f"[{name}] is about text, and this recipe reads none: leave it out, or add [corpus]"

    def _names(self) -> Iterator[str]:
        others: set[str] = set()
        sections: dict[str, dict[str, Any]] = {"align": self.align, "quantize": self.quantize}
        for section, name in [(section, name) for section, names in sections.items() for name in names]:
            folded = name.casefold()  # of one folder on some disks
            if folded in _TAKEN | others or folded.startswith(BEFORE):
                yield f"[{section}.{name}]: the name is taken: choose another"
            elif not re.fullmatch(_STAGE_NAME, name):
                yield f"[{section}.'{name}']: a stage's name is made of letters, digits, - and _: choose another"
            others.add(folded)

    def _references(self) -> Iterator[str]:
        branches = self.branches
        known = {*branches, *(["pretrain"] if self.has_trunk else [])}
        for name, section in branches.items():
            compute = getattr(section, "compute", None)
            if compute is not None and compute not in known - {name, "pretrain"}:
                yield f'[align.{name}] compute = "{compute}": no other stage of this recipe has that name'
            seen = {name}
            waiting = [section.start, compute]
            while waiting:
                place = waiting.pop()
                if place in branches and place not in seen:
                    seen.add(place)
                    waiting += [branches[place].start, getattr(branches[place], "compute", None)]
                elif place == name:
                    yield f"[{self.section_of(name)}] needs itself, by its start or compute"
                    break
        for gate in self.evaluate.gates:
            for place in {gate.model, gate.over} - {None, "start"} - known:
                yield f'[[evaluate.gates]] "{place}" is no stage of this recipe: {", ".join(sorted(known))}'
        chosen = self.generate.model
        if chosen is not None and chosen not in known:
            yield f'[generate] model = "{chosen}": is no stage of this recipe: {", ".join(sorted(known))}'

    @property
    def branches(self) -> dict[str, StartSettings]:
        """The stages that start from a model: `[align.NAME]` and `[quantize.NAME]`."""
        return {**self.align, **self.quantize}

    def section_of(self, stage: str) -> str:
        """The section of one of them."""
        return f"{'align' if stage in self.align else 'quantize'}.{stage}"

    @property
    def has_trunk(self) -> bool:
        """Whether a model is pretrained; not where every stage that starts from a model takes one made elsewhere."""
        starts = {section.start for section in self.branches.values()}
        return not self.branches or "pretrain" in starts or "pretrain" in self.model_fields_set

    @property
    def reads_text(self) -> bool:
        """Whether there are corpus, tokenizer and shards: with a trunk, and where `[corpus]` is written."""
        return self.has_trunk or "corpus" in self.model_fields_set

    @property
    def init(self) -> str | None:
        """The model made elsewhere that the first training stage starts from; None: a fresh one."""
        if self.has_trunk:
            return self.pretrain.init
        branches = self.branches
        return next((one.start for one in branches.values() if one.start not in branches), None)
