"""The calculator, and answers that use a tool."""

from __future__ import annotations

import json

import pytest
import torch
from distill_job import FAST
from rl_job import policy, prompts, tokenizer
from shards_bytes import document

from groundup.alignment import Conversations, SFTSettings, fine_tune
from groundup.alignment.distill import DistillSettings, distill
from groundup.alignment.rejection import RejectionSettings, rejection_sampling
from groundup.alignment.rewards import load_prompts
from groundup.generation import Engine, SamplingParams
from groundup.generation.calculator import calculate, write_call
from groundup.generation.rollouts import roll_out, use_calculator
from groundup.model import Transformer, preset
from groundup.recipe import ShardsSettings
from groundup.shards import write_shards
from groundup.tokenizer import Message, Tokenizer


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * 7", "84"), ("-3+5", "2"), ("0.1 + 0.2", "0.3"), ("1/3", "0.333333"), ("7 // 2 % 2", "1"),
        ("(2 + 3) * 4", "20"), ("10 ** 9", "error: not arithmetic"), ("1/0", "error: Fraction(1, 0)"),
        ("__import__('os')", "error: not arithmetic"), ("'a' * 9", "error: not arithmetic"), ("True + 1", "error"),
        ("(" * 150, "error"), ("9" * 60, "error: too large"), ("1" * 300, "error: too long"), ("", "error"),
        ("99999999999999999999999999 * 99999999999999999999999999", "error: too large"), ("1e999", "error"),
    ],
)  # fmt: skip
def test_arithmetic_and_nothing_else(expression, value):
    found = calculate(expression)
    assert found == value if value != "error" else found.startswith("error")


def test_what_a_tool_says_is_read_and_not_learned():
    use = use_calculator(tokenizer())
    said = use(write_call("12 * 7"))
    assert said == [tokenizer().role_id("tool"), *tokenizer().encode("84"), *said[-2:]]
    assert said[-2:] == [tokenizer().end_id, tokenizer().role_id("assistant")]
    for text in ("84", '<tool>{"name": "other"}</tool>', "<tool>{}", '<tool>{"name": "calculate"}</tool>'):
        assert use(text) is None
    ids = [prompt.ids for prompt in prompts().train[:8]]
    model = policy()
    engine = Engine(model, tokenizer(), dtype=torch.float32)
    params = SamplingParams(max_tokens=20, logit_bias={tokenizer().end_id: 3.5})
    plain = roll_out(engine, ids, params, range(8))
    rolled = roll_out(engine, ids, params, range(8), use_tool=lambda text: said)
    used = 0
    for row, prompt in enumerate(ids):
        answer = plain.ids[row][plain.is_answer[row]].tolist()
        tokens = rolled.ids[row].tolist()
        assert tokens[: len(prompt) + len(answer)] == [*prompt, *answer]
        place = len(prompt) + len(answer)
        if bool(plain.is_ended[row]) and len(answer) + len(said) < 20:
            used += 1
            assert tokens[place : place + len(said)] == said
            assert not rolled.is_answer[row, place : place + len(said)].any()
            assert rolled.is_answer[row, place + len(said)]
        end = int(rolled.is_answer[row].nonzero().max()) + 1
        logits = model(rolled.ids[row : row + 1, :end]).log_softmax(-1)[0]
        expected = logits[:-1].gather(1, rolled.ids[row, 1:end, None])[:, 0].where(rolled.is_answer[row, 1:end], 0.0)
        torch.testing.assert_close(rolled.logprobs[row, 1:end], expected.detach())
    assert used


def test_a_call_its_result_and_the_answer_to_that_are_turns_of_what_is_learned(tmp_path):
    """By rejection sampling, and by the student of a teacher that calls."""
    asked = [f"{n} times 3 * 4?" for n in range(40)]
    said: list[Message] = [
        {"role": "assistant", "content": write_call("3 * 4")},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]
    talks: list[list[Message]] = [[{"role": "user", "content": text}, *said] for text in asked]
    words = Tokenizer.train([" ".join(turn["content"] for turn in talk) for talk in talks], vocab_size=400)

    def random(seed):
        return Transformer(preset("ground-nano", vocab_size=words.vocab_size, context_length=96), seed=seed)

    quick, model = {**FAST, "precision": "float32"}, random(1)
    conversations = Conversations(talks[:36], talks[36:], {})
    fine_tune(model, words, SFTSettings(epochs=20, **quick), out=tmp_path / "start", conversations=conversations)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "response": "It is 12."}) + "\n" for text in asked)
    )
    write_shards(
        [document("It is 12. " * 60), document("It is 12. " * 60, "validation")], words, tmp_path / "shards",
        ShardsSettings(),
    )  # fmt: skip
    settings = DistillSettings(
        level="sequence", prompts=(str(tmp_path / "a.jsonl"),), tokens=400, temperature=0.5, **quick
    )
    distill(random(2), words, settings, out=tmp_path / "student", teacher=model, shards=tmp_path / "shards")
    answers = {"prompts": 12, "samples": 2, "max_tokens": 60, "temperature": 0.5, "epochs": 1, **quick}
    given = {"prompts": load_prompts([str(tmp_path / "a.jsonl")], 0, 1, words, 36, "align.best")}
    rejection_sampling(model, words, RejectionSettings(**answers), **given, out=tmp_path / "best")
    (best,), (own,) = (tmp_path / "best").glob("answers-*.jsonl"), (tmp_path / "student").glob("own-text-*.jsonl")
    kept = [json.loads(line)["messages"] for line in best.read_bytes().splitlines()]
    for learned in (*kept, *map(json.loads, own.read_bytes().splitlines()[:2])):  # then its FLOPs
        assert [talk for talk in learned if talk in talks]
    assert all(talk in talks for learned in kept for talk in learned)  # what is not right is not learned
