"""Our losses against TRL 1.16.0's trainers, on tiny random models. Run as a program, it writes the golden figures anew.

Four conventions of TRL that one has to know: it appends the end token to plain text itself; it shuffles (so the batch
that it made is what is compared); its IPO averages log-ratios over tokens; its GRPO divides logits by a temperature and
multiplies the KL by the ratio.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parent / "data" / "alignment_losses.json"
WANTED = "1.16.0"

try:
    has_trl = version("trl") == WANTED
except PackageNotFoundError:
    has_trl = False
if not has_trl:
    pytest.skip(f"needs trl=={WANTED} (pip install 'groundup[oracle]')", allow_module_level=True)

os.environ["HF_HUB_OFFLINE"] = "1"
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from groundup.alignment import losses as ours  # noqa: E402
from groundup.training import IGNORED  # noqa: E402

PROMPTS = ("w1 w2 ", "w3 w4 w5 ", "w6 ", "w7 w8 ")
CHOSEN = ("w9 w10 w11", "w12", "w13 w14", "w15 w16 w17 w18")
REJECTED = ("w19", "w20 w21 w22", "w23 w24 w25", "w26")
MAX_TOKENS, TEMPERATURE = 8, 0.7


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number + 3 for number in range(61)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(seed: int, kind: type = LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    return kind(LlamaConfig(**shape, **heads, eos_token_id=1, **more)).eval()


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    return {"output_dir": str(folder), "per_device_train_batch_size": 4, **quiet, **more}


def logprobs_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the completions' tokens, and where they are."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = batch["completion_mask"][:, 1:].bool()
    return ours.token_logprobs(logits, batch["input_ids"][:, 1:].where(mask, IGNORED)), mask


def pairs(folder: Path) -> dict[str, Any]:
    data = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    found: dict[str, Any] = {"losses": {}}
    for kind, smoothing in (("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1)):
        config = DPOConfig(**arguments(folder, loss_type=[kind], beta=0.1, label_smoothing=smoothing))
        policy, reference = llama(1), llama(2)
        trainer = DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        policy.eval()
        found["losses"][kind] = trainer.compute_loss(policy, batch).item()
        own, mask = logprobs_of(policy, batch)
        found |= {"policy": own, "reference": logprobs_of(reference, batch)[0], "mask": mask}
    return found


def unpaired(folder: Path) -> dict[str, Any]:
    label = [True, False, True, False]
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN, "label": label})
    policy, reference = llama(1), llama(2)
    trainer = KTOTrainer(
        policy, reference, KTOConfig(**arguments(folder, beta=0.1, desirable_weight=1.5)), train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    policy.eval()
    loss = trainer.compute_loss(policy, batch)
    mismatched = {name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")}
    ratios = [(logprobs_of(policy, part)[0] - logprobs_of(reference, part)[0]).sum(-1) for part in (batch, mismatched)]
    return {
        "logratios": ratios[0],
        "mismatched": ratios[1],
        "is_desirable": torch.as_tensor(batch["label"], dtype=torch.bool),
        "loss": loss.item(),
    }


def averaged() -> dict[str, Any]:
    chosen, rejected = torch.tensor([-1.2, -0.7, -2.0]), torch.tensor([-1.5, -0.9, -1.1])
    here = SimpleNamespace(device=torch.device("cpu"))
    simpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.0, accelerator=here
    )
    orpo = SimpleNamespace(beta=0.1, accelerator=here)
    return {
        "chosen": chosen,
        "rejected": rejected,
        "simpo": CPOTrainer.cpo_loss(simpo, chosen, rejected)[0],
        "orpo": -ORPOTrainer.odds_ratio_loss(orpo, chosen, rejected)[0],
    }


def reward(folder: Path) -> dict[str, Any]:
    data = Dataset.from_dict(
        {
            "chosen": [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)],
            "rejected": [p + c for p, c in zip(PROMPTS, REJECTED, strict=True)],
        }
    )
    found: dict[str, Any] = {"losses": {}}
    for centering in (0.0, 0.01):
        model = llama(3, LlamaForSequenceClassification, num_labels=1)
        config = RewardConfig(**arguments(folder, center_rewards_coefficient=centering or None))
        trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        model.eval()
        found["losses"][str(centering)] = trainer.compute_loss(model, dict(batch)).item()
        with torch.no_grad():
            found["chosen"], found["rejected"] = model(**batch).logits[:, 0].chunk(2)
    return found


def supervised(folder: Path) -> dict[str, Any]:
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
    found: dict[str, Any] = {"losses": {}}
    for completion_only in (True, False):
        model = llama(1)
        config = SFTConfig(**arguments(folder, completion_only_loss=completion_only))
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        model.eval()
        name = "completion" if completion_only else "all"
        found["losses"][name] = trainer.compute_loss(model, dict(batch)).item()
        targets = batch["labels"][:, 1:]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        found[name] = {"logprobs": ours.token_logprobs(logits, targets), "mask": targets != IGNORED}
    return found


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def group(folder: Path) -> dict[str, Any]:
    words = tokenizer()
    completions = [words(text + " <eos>")["input_ids"] for text in CHOSEN]
    prompts = [words(text)["input_ids"] for text in PROMPTS]
    ids, wide = max(map(len, completions)), max(map(len, prompts))
    batch = {
        "prompt_ids": torch.tensor([[0] * (wide - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([c + [0] * (ids - len(c)) for c in completions]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (ids - len(c)) for c in completions]),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
    }
    policy, old, reference = llama(1), llama(1), llama(2)
    with torch.no_grad():  # a policy of a few steps ago
        for seed, parameter in enumerate(old.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    places = (attention.cumsum(1) - 1).clamp(min=0)
    mask = batch["completion_mask"].bool()

    def drawn(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=whole, attention_mask=attention, position_ids=places).logits[:, wide - 1 : -1]
        return ours.token_logprobs(logits, batch["completion_ids"].where(mask, IGNORED), TEMPERATURE)

    found: dict[str, Any] = {
        "policy": drawn(policy), "old": drawn(old), "reference": drawn(reference), "mask": mask,
        "advantages": batch["advantages"], "losses": {},
    }  # fmt: skip
    batch |= {"old_per_token_logps": found["old"], "ref_per_token_logps": found["reference"]}
    batch["num_items_in_batch"] = mask.sum()
    levels = [(kind, "token") for kind in ("grpo", "bnpo", "dapo", "dr_grpo")] + [("grpo", "sequence")]
    for kind, level in levels:
        more = {"loss_type": kind, "importance_sampling_level": level, "temperature": TEMPERATURE, "beta": 0.0}
        sizes = {"max_completion_length": MAX_TOKENS, "num_generations": 4, "max_steps": 1}
        data = Dataset.from_dict({"prompt": PROMPTS})
        config = GRPOConfig(**arguments(folder, **more, **sizes))
        trainer = GRPOTrainer(policy, no_reward, args=config, train_dataset=data, processing_class=words)
        policy.eval()
        for beta in (0.0, 0.04):
            trainer.beta, trainer.current_gradient_accumulation_steps = beta, 1
            found["losses"][f"{kind} {level} {beta}"] = trainer._compute_loss(policy, dict(batch)).item()
    return found


PARTS = {"pairs": pairs, "unpaired": unpaired, "reward": reward, "supervised": supervised, "group": group}


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {name: plain(part) for name, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.slow
@pytest.mark.parametrize("part", [*PARTS, "averaged"])
def test_trls_figures(part: str, tmp_path: Path) -> None:
    """TRL gives the golden figures still; that our losses give them too, test_alignment_losses.py says."""
    from test_alignment_losses import check_golden

    found = averaged() if part == "averaged" else PARTS[part](tmp_path)
    check_golden(part, plain(found))
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))[part]
    if "losses" in kept:
        assert found["losses"] == pytest.approx(kept["losses"], abs=1e-4)


if __name__ == "__main__":
    import tempfile

    folder = Path(tempfile.mkdtemp())
    figures = {name: plain(make(folder)) for name, make in PARTS.items()} | {"averaged": plain(averaged())}
    GOLDEN.write_text(json.dumps({"trl": WANTED, **figures}) + "\n", encoding="utf-8")
