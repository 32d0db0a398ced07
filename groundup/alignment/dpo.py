"""Direct preference optimization and its kin: a model learns what people prefer, without a reward model.

With s(y) the log-probability of an answer y to its prompt x, and r(y) = s(y) − s_reference(y), where the reference is
the model that the stage starts from,

    dpo      −(1 − ε) log σ(β (r_w − r_l)) − ε log σ(−β (r_w − r_l))        arXiv:2305.18290; ε: conservative DPO
    robust   the same without bias where a share ε of the pairs is flipped  arXiv:2403.00409
    ipo      (r_w/|w| − r_l/|l| − 1/(2β))²                                  arXiv:2310.12036, averaged over tokens
    hinge    max(0, 1 − β (r_w − r_l))                                      arXiv:2305.10425
    kto      λ (1 − σ(±β (r − z₀))): good and bad answers, in no pairs      arXiv:2402.01306
    simpo    −log σ(β (s_w/|w| − s_l/|l|) − γ); no reference                arXiv:2405.14734
    orpo     NLL_w − β log σ(log odds_w − log odds_l); no reference         arXiv:2403.07691

(`losses.py`). The chosen answer's log-probability usually falls, too, only less than the rejected one's: what the loss
sees is their difference. `nll_weight` adds the chosen answer's cross-entropy, which holds it up (arXiv:2404.19733).

The reference never changes, so its log-probabilities are computed once, before the first step. KTO's z₀ is the mean
over one forward pass's rows, each a prompt with another prompt's answer; so it depends on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment import losses
from groundup.alignment.method import AlignmentMethod, Inputs, reported, share, share_with_error
from groundup.alignment.packing import by_length
from groundup.alignment.preferences import FACTS, Encoded, Preference, PreferenceRows, Preferences, PreferenceSettings
from groundup.console import Console
from groundup.distributed import World
from groundup.model import ModelConfig, Transformer
from groundup.recipe import setting
from groundup.training import IGNORED, Batch, Term, TrainingJob, choose_precision, pass_flops

Loss = Literal["dpo", "robust", "ipo", "hinge", "kto", "simpo", "orpo"]
AVERAGED, WITHOUT_REFERENCE = ("ipo", "simpo", "orpo"), ("simpo", "orpo")


class DPOSettings(PreferenceSettings):
    """A model and preferences to a model that answers as preferred."""

    lr: float = setting(
        2e-5,
        "peak learning rate of all but Muon, far below fine-tuning's (billions of parameters: 5e-7 to 5e-6; with "
        "adapters, ten times that)",
        gt=0.0,
        le=1.0,
    )
    loss: Loss = setting("dpo", "which of the family: dpo, robust, ipo, hinge, kto, simpo, orpo")
    beta: float = setting(0.1, "β: how strongly the model is held to the reference (simpo: 2 to 10 is usual)", gt=0.0)
    gamma: float = setting(0.5, "simpo: the margin γ that the better answer should have", ge=0.0)
    label_smoothing: float = setting(
        0.0, "dpo and robust: ε, the share of the pairs that may be the wrong way round", ge=0.0, lt=0.5
    )
    desirable_weight: float = setting(1.0, "kto: λ of good answers; that of bad ones is 1", gt=0.0)
    nll_weight: float = setting(0.0, "weight of the chosen answers' cross-entropy (orpo: 1 more)", ge=0.0)

    @model_validator(mode="after")
    def _fits_the_loss(self) -> DPOSettings:
        said = self.model_fields_set
        owners = {"label_smoothing": ("dpo", "robust"), "gamma": ("simpo",), "desirable_weight": ("kto",)}
        wrong = [name for name, owner in owners.items() if name in said and self.loss not in owner]
        wrong += ["nll_weight"] if self.loss == "kto" and self.nll_weight else []
        if wrong:
            raise ValueError(f'{", ".join(wrong)}: not of loss = "{self.loss}": leave unset')
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError('loss = "robust" needs label_smoothing, the share of the pairs that are flipped')
        return self


class PreferenceLoss:
    """The objective: one of the losses above, and what is shown of it.

    `loss` is a mean over pairs (kto: answers), `nll` one over the chosen answers' tokens; `accuracy`, `margin` (β Δ),
    `chosen` and `rejected` (log-ratios, or log-probabilities without a reference) are only shown.
    """

    def __init__(self, settings: DPOSettings) -> None:
        self.settings = settings
        self.nll_weight = settings.nll_weight + (settings.loss == "orpo")

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs or answers; the tokens of the chosen ones."""
        is_target = batch["targets"] != IGNORED
        n = int(is_target.any(-1)[:, 0].sum())
        shown = ("kl",) if self.settings.loss == "kto" else ("margin", "chosen", "rejected")
        found: dict[str, float] = dict.fromkeys(("loss", "accuracy", *shown), n)
        return found | ({"nll": int(is_target[:, 0].sum())} if self.nll_weight else {})

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass over both sides together."""
        settings, beta, targets = self.settings, self.settings.beta, batch["targets"]
        mask = targets != IGNORED
        is_real = mask.any(-1)[:, 0]
        logprobs = self._logprobs(modules["model"], batch["ids"], targets)
        is_averaged = settings.loss in AVERAGED
        found = losses.sequence_logprobs(logprobs, mask, average=is_averaged)  # (rows, 2)
        if settings.loss not in WITHOUT_REFERENCE:
            found = found - batch["reference"] / (mask.sum(-1).clamp(min=1) if is_averaged else 1)
        chosen, rejected = found.unbind(1)
        shown = {
            "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected),
            "margin": beta * (chosen - rejected), "chosen": chosen, "rejected": rejected,
        }  # fmt: skip
        match settings.loss:
            case "dpo":
                each = losses.dpo_loss(chosen, rejected, beta=beta, label_smoothing=settings.label_smoothing)
            case "robust":
                each = losses.robust_dpo_loss(chosen, rejected, beta=beta, label_smoothing=settings.label_smoothing)
            case "ipo":
                each = losses.ipo_loss(chosen, rejected, beta=beta)
            case "hinge":
                each = losses.hinge_loss(chosen, rejected, beta=beta)
            case "simpo":
                each = losses.simpo_loss(chosen, rejected, beta=beta, gamma=settings.gamma)
            case "orpo":
                each = beta * losses.orpo_loss(chosen, rejected)
            case "kto":  # an answer, and beside it another prompt's
                is_good, mismatched = batch["is_good"], rejected.detach()
                kl = losses.masked_mean(mismatched, is_real).clamp(min=0)
                each = losses.kto_loss(chosen, is_good, kl, beta=beta, desirable_weight=settings.desirable_weight)
                shown = {"accuracy": ((chosen > kl) == is_good).float(), "kl": mismatched}
        loss, *sums = (values.where(is_real, 0.0).sum() for values in (each, *shown.values()))
        terms = {"loss": Term(loss, loss.detach()), **reported(**dict(zip(shown, sums, strict=True)))}
        if self.nll_weight:
            nll = -logprobs[:, 0].sum()
            terms["nll"] = Term(nll, nll.detach(), self.nll_weight)
        return terms

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """A forward and a backward pass over each answer; none backward over KTO's mismatched ones."""
        return (2 / 3 if self.settings.loss == "kto" else 1.0) * pass_flops(config, lengths)

    def _logprobs(self, model: nn.Module, ids: Tensor, targets: Tensor) -> Float[Tensor, "rows answers seq"]:
        if self.settings.loss == "kto" and ids.shape[1] == 2:
            own = self._logprobs(model, ids[:, :1], targets[:, :1])
            with torch.no_grad():
                mismatched = self._logprobs(model, ids[:, 1:], targets[:, 1:])
            return torch.cat([own, mismatched], dim=1)
        found: Tensor = model(ids.flatten(0, 1), head=losses.logprobs_head(targets.flatten(0, 1))).logprobs
        return found.view_as(targets)


@torch.no_grad()
def answer_logprobs(
    model: Transformer, rows: PreferenceRows, chosen: Sequence[Encoded], world: World, console: Console | None = None,
    what: str = "log-probabilities",
) -> Float[np.ndarray, "preferences answers"]:  # fmt: skip
    """Σ log p of every answer, in evaluation mode; every process takes its share, and all must call it."""
    model.eval()
    n_answers = max(len(one.texts) for one in chosen)
    found, done = torch.zeros(len(chosen), n_answers), 0
    lengths = [n_answers * max(len(ids) for ids, _ in one.texts) for one in chosen]
    with (console or Console(quiet=True)).bar(what, len(chosen)) as bar:
        for places in by_length(lengths, world.size * 8192):
            n_own = -(-len(places) // world.size)
            own = [chosen[place] for place in places[world.rank * n_own :][:n_own]]
            batch = rows.lay_out(own or [chosen[0]], n_own)  # every process makes the same passes
            targets = batch["targets"].to(world.device).flatten(0, 1)
            part = model(batch["ids"].to(world.device).flatten(0, 1), head=losses.logprobs_head(targets)).logprobs
            sums = torch.zeros(n_own, n_answers)
            sums[:, : batch["ids"].shape[1]] = part.sum(-1).view(n_own, -1).cpu()
            found[places] = world.gather(sums)[: len(places)]
            done += len(places)
            bar.update(done)
    return found.numpy()


def _mismatched(found: Preferences) -> Preferences:
    """Every judged answer, and beside it, for KTO's z₀, its prompt with an answer to another one."""

    def beside(side: Sequence[Preference]) -> list[Preference]:
        rows, half = [], len(side) // 2
        for place, one in enumerate(side):
            others = (side[(place + half + step) % len(side)] for step in range(len(side)))
            other = next((other for other in others if other.prompt != one.prompt), one)
            rows.append(one._replace(answers=[one.answers[0], other.answers[0]]))
        return rows

    found = found.judged()
    return Preferences(beside(found.train), beside(found.held_out), found.set_aside)


class DPOMethod(AlignmentMethod):
    """The stage: a model learns what is preferred."""

    name = "dpo"
    settings = DPOSettings
    version = 3
    makes = "lm"
    figures = ("val_loss", "val_accuracy", "final_loss", "preference_accuracy")
    row_sequences = 2
    title = "Preference optimization"
    facts = (
        *FACTS,
        ("prefers the better answer", share("preference_accuracy")),
        ("log-ratio of chosen answers", "{val_chosen:+.2f} nats"),
        ("log-ratio of rejected answers", "{val_rejected:+.2f} nats"),
    )
    lines = ("{preferences_train:,} pairs", "loss {initial_loss:.2f} → {final_loss:.2f}", share("preference_accuracy"))
    curves = ("accuracy", "margin", "chosen", "rejected")

    def job(self, inputs: Inputs, *, preferences: Preferences | None = None) -> TrainingJob:  # type: ignore[override]
        """Pairs or judged answers (default: what `settings.data` names), with the reference's log-probabilities."""
        settings, model, world = inputs.settings, inputs.model, inputs.world
        is_judged = settings.loss == "kto"
        source = PreferenceRows.of_stage(inputs, preferences, _mismatched if is_judged else Preferences.pairs)
        if settings.loss not in WITHOUT_REFERENCE:
            model.to(world.device).compute_dtype = choose_precision(settings.precision, world.device.type)[0]
            for side in (source.train, source.held_out):
                found = answer_logprobs(model, source, side, world, inputs.console, f"{inputs.name}: reference")
                side[:] = [replace(one, reference=row) for one, row in zip(side, found, strict=True)]
        unit, n_rows = "answers" if is_judged else "pairs", settings.epochs * len(source.train)
        return inputs.job(PreferenceLoss(settings), source, n_rows, row_sequences=2, unit=unit)

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """How often the model's own measure prefers the better answer of all held-out pairs; the reference's FLOPs."""
        source: Any = job.source
        loss, config = inputs.settings.loss, job.model.config
        figures = source.figures()
        if loss not in WITHOUT_REFERENCE:
            lengths = [len(ids) for one in source.train for ids, _ in one.texts]
            figures["flops"] = summary["flops"] + pass_flops(config, lengths) / 3
        if loss == "kto":
            return figures
        found = answer_logprobs(
            job.model, source, source.held_out, inputs.world, inputs.console, f"{inputs.name}: held out"
        )
        if loss not in WITHOUT_REFERENCE:
            found = found - np.stack([one.reference for one in source.held_out if one.reference is not None])
        if loss in AVERAGED:
            lengths = [[(targets != IGNORED).sum() for _, targets in one.texts] for one in source.held_out]
            found = found / np.array(lengths)
        return figures | share_with_error("preference_accuracy", np.sign(found[:, 0] - found[:, 1]) / 2 + 0.5)


DPO = DPOMethod()
train_dpo = DPO.train
