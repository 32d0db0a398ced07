"""Data of people in the forms that they come in: a few steps of fine-tuning, a reward model and GRPO on each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alignment_runs import QUIET, model, tokenizer

from groundup.alignment import SFTSettings, fine_tune, load_conversations
from groundup.alignment.conversations import conversation_of
from groundup.alignment.grpo import GRPOSettings, grpo
from groundup.alignment.preferences import load_preferences
from groundup.alignment.reward import RewardSettings, train_reward
from groundup.alignment.rewards import VERIFY, FunctionReward, Prompts, is_right, load_prompts

TINY: dict[str, Any] = {"precision": "float32", "compile": False, "optimizer": "adamw"}
INSTRUCTIONS = {
    "dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl": "prompt/response",
    "oasst_sample/oasst_sft_paths.jsonl": "messages",
    "llms_from_scratch/instruction-data.json": "instruction/input/output",
}


def records(path: Path, n: int) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(json.loads(text))[:n]
    return [json.loads(line) for line in text.splitlines()[:n]]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_are_learned_from_jsonl_json_and_parquet_alike(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    found = records(shared_data / "instruct" / name, 60)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    (tmp_path / "data.json").write_text(json.dumps(found))
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "data.parquet")
    read = [
        load_conversations([str(tmp_path / f"data.{kind}")], 0, 1, "align.sft") for kind in ("jsonl", "json", "parquet")
    ]
    assert read[0] == read[1] == read[2]
    assert len(read[0].train) + len(read[0].held_out) + sum(read[0].set_aside.values()) == 60
    settings = SFTSettings(batch_size=2, epochs=0.2, eval_tokens=512, **TINY)
    summary = fine_tune(
        model(context_length=256), tokenizer(), settings, out=tmp_path / "out", conversations=read[2], console=QUIET
    ).summary
    assert math.isfinite(summary["val_loss"])
    assert conversation_of(found[0])[0] == INSTRUCTIONS[name]
    assert 0 < summary["conversations_train"] <= len(read[0].train)
    forms = load_conversations([str(shared_data / "instruct" / name)], 0, 1, "align.sft")
    assert len(forms.train) + len(forms.held_out) > 50 * sum(forms.set_aside.values())


def test_a_reward_model_learns_from_peoples_votes(tmp_path: Path, shared_data: Path) -> None:
    path = str(shared_data / "preference" / "hh_harmless" / "pairs.jsonl.gz")
    found = load_preferences([path], "align.reward", limit=12)
    few = type(found)(found.train, found.held_out[:6], found.set_aside)
    settings = RewardSettings(data=(path,), batch_size=4, eval_tokens=512, **TINY)
    summary = train_reward(
        model(context_length=1024), tokenizer(), settings, out=tmp_path, preferences=few, console=QUIET
    ).summary
    assert math.isfinite(summary["final_loss"])
    assert 0 <= summary["pair_accuracy"] <= 1


def test_grpo_is_rewarded_for_the_exact_final_number(tmp_path: Path, shared_data: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    lines = (shared_data / "evaluation" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:300]), encoding="utf-8")
    prompts = load_prompts([str(path)], 0, 1, tokenizer(), 480, "align.grpo")
    for prompt in (*prompts.train, *prompts.held_out):
        (known,) = prompt.known
        number = known.rpartition("####")[2].strip()
        assert is_right(prompt, known)
        assert is_right(prompt, f"First 3 + 4 = 7. The answer is ${number}.")
        assert not is_right(prompt, f"{number} at first, but 1 more: {number}1")
        assert not is_right(prompt, "I do not know.")
    few = Prompts(prompts.train[:4], prompts.held_out[:2], 0)
    settings = GRPOSettings(buffers=2, rollouts=8, batch_size=8, max_tokens=8, held_out=2, **TINY)
    reward = FunctionReward(VERIFY, "[align.grpo] reward")
    made = grpo(
        model(context_length=512),
        tokenizer(),
        settings,
        prompts=few,
        reward=reward,
        out=tmp_path / "out",
        console=QUIET,
    )
    assert made.summary["prompts"] == 4
    kept = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert {one["prompt"] for one in kept} <= {prompt.messages[-1]["content"] for prompt in few.train}
    assert {one["reward"] for one in kept} <= {0.0, 1.0}
