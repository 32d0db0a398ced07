"""The calculator, and answers that use a tool."""

from __future__ import annotations

import pytest
import torch
from rl_job import policy, prompts, tokenizer

from groundup.generation import Engine, SamplingParams
from groundup.generation.calculator import calculate, write_call
from groundup.generation.rollouts import roll_out, use_calculator


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
