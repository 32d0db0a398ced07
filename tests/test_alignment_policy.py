"""PPO and GRPO end to end on a tiny policy: they earn more, go on to the bit, and refuse to learn from strangers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_job import COMMON, grpo, policy, ppo, prompts, run, tokenizer
from torch import nn

from groundup.alignment import on_policy
from groundup.alignment.grpo import GRPO, GRPOSettings
from groundup.alignment.on_policy import without_dropout
from groundup.alignment.online_dpo import OnlineDPOSettings, best_and_worst, online_dpo
from groundup.alignment.ppo import PPOSettings
from groundup.alignment.rejection import RejectionSettings, rejection_sampling
from groundup.alignment.rewards import VERIFY, FunctionReward, Prompt, is_right, load_prompts
from groundup.errors import DataError, GroundupError
from groundup.generation import Engine, SamplingParams
from groundup.generation.rollouts import Rollouts, roll_out
from groundup.interop import load_model
from groundup.tokenizer import render
from groundup.training import IGNORED, pass_flops
from groundup.training.metrics import read_log
from groundup.training.objective import row_lengths

WORKER = Path(__file__).with_name("rl_job.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parent}:{WORKER.parents[1]}"}


@pytest.fixture(scope="module", params=["ppo", "grpo"])
def whole(request, tmp_path_factory) -> tuple[str, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run(folder, request.param).summary


def test_a_policy_earns_more_than_it_did(whole):
    method, folder, summary = whole
    lines = read_log(folder / "metrics.jsonl")
    steps = (PPOSettings if method == "ppo" else GRPOSettings)(**COMMON).steps_per_buffer
    earned = [sum(line["reward"] for line in lines[n : n + steps]) / steps for n in range(0, len(lines), steps)]
    assert earned[-1] > earned[0] + 0.1
    assert summary["held_out_reward"] > lines[0]["held_out_reward"] + 0.1
    assert summary["held_out_n"] == min(COMMON["held_out"], len(prompts().held_out))
    assert all(line["logprob_gap"] < 1e-5 for line in lines)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # nothing has moved yet
    assert 0 < lines[-1]["kl"] < 20
    kept = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["step"] for line in kept} == set(range(0, len(lines), steps))
    assert all(isinstance(line["reward"], float) and line["prompt"] for line in kept)


def killed_and_resumed_is_whole(method: str, folder: Path, whole: Path) -> None:
    command = [sys.executable, str(WORKER), str(folder), method, "5"]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=200).returncode == -signal.SIGKILL
    run(folder, method)
    for name in ("metrics.jsonl", "rollouts.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_killed_while_it_writes_and_resumed_gives_the_same_bits(whole, tmp_path):
    killed_and_resumed_is_whole(whole[0], tmp_path, whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo", "online-dpo"])
def test_two_processes_learn_what_one_does(method, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER), str(tmp_path / "two"), method, "0"]
    subprocess.run([sys.executable, *command], env=ENVIRONMENT, timeout=280, check=True)
    run(tmp_path / "one", method)
    one, two = (read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("reward", "kl", "answer_tokens"):
        assert one[0][name] == pytest.approx(two[0][name], abs=1e-6), name
    for mine, theirs in zip(one[:4], two[:4], strict=True):
        loss = "loss" if method == "online-dpo" else "policy"
        assert mine[loss] == pytest.approx(theirs[loss], abs=1e-5)


def test_answers_of_about_one_length_are_learned_from_together(tmp_path, monkeypatch):
    """Micro-batches are as wide as their longest answer; what is learned is what one wide micro-batch teaches."""
    passes: list[tuple[int, list[int]]] = []

    def noted(self, modules, batch, mask, plain=GRPO.token_losses):
        passes.append((mask.shape[1], row_lengths(batch).tolist()))
        return plain(self, modules, batch, mask)

    monkeypatch.setattr(GRPO, "token_losses", noted)
    for name, micro in (("four", 4), ("all", 16)):
        run(tmp_path / name, "grpo", buffers=2, micro_batch_size=micro)
    four, (whole, *_) = [passes[n : n + 4] for n in range(0, 16, 4)], passes[16:]
    for step in four:
        assert all(max(lengths) <= width <= max(lengths) + on_policy.COLUMNS for width, lengths in step)
    assert sorted(length for _, lengths in four[0] for length in lengths) == sorted(whole[1])
    assert four[0][-1][0] < whole[0] - on_policy.COLUMNS
    one, other = (read_log(tmp_path / name / "metrics.jsonl") for name in ("four", "all"))
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_passes_without_gradient_are_those_of_whole_rows():
    model, ids = policy(), [prompt.ids for prompt in prompts().train[:40]]
    rolled = roll_out(Engine(model, tokenizer(), dtype=torch.float32), ids, SamplingParams(max_tokens=6), range(40))
    batch = {"ids": rolled.ids, "targets": rolled.ids.where(rolled.is_answer, IGNORED)[:, 1:]}
    with torch.no_grad():
        found = on_policy.buffer_logprobs(model, batch, 1.0)
        expected = model(rolled.ids[:, :-1]).log_softmax(-1).gather(2, rolled.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected.where(rolled.is_answer[:, 1:], 0.0))


class Judge(nn.Module):
    """A reward model of a size of its own."""

    def __init__(self):
        super().__init__()
        self.model = policy(n_layers=3)

    def forward(self, ids, lengths):
        return self.model(ids)[:, :, 0].gather(1, lengths[:, None] - 1)[:, 0]


def test_compute_is_that_of_tokens_and_has_the_reward_models_passes(tmp_path, monkeypatch):
    written: list[Rollouts] = []

    def noted(*given, plain=roll_out, **more):
        written.append(plain(*given, **more))
        return written[-1]

    monkeypatch.setattr(on_policy, "roll_out", noted)
    settings, judge = GRPOSettings(**COMMON | {"buffers": 2, "held_out": 0}), Judge()
    given = {"prompts": prompts(), "reward": judge, "out": tmp_path}
    done = grpo(policy(), tokenizer(), settings, **given).summary
    lengths = [length for rolled in written for length in (rolled.ids != tokenizer().pad_id).sum(1).tolist()]
    assert len(lengths) == 64
    config = policy().config
    rollouts, learned = 3 * pass_flops(config, lengths) / 3, pass_flops(config, [length - 1 for length in lengths])
    assert done["flops"] == pytest.approx(rollouts + pass_flops(judge.model.config, lengths) / 3 + learned)
    monkeypatch.setattr("groundup.alignment.rejection.roll_out", noted)
    written.clear()
    shape = {"prompts": 8, "samples": 4, "least": -1e9, "max_tokens": 6, "epochs": 1, "batch_size": 1}
    model = policy()
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer().end_id] *= 8  # so that some answers end
    plain = RejectionSettings(**shape, precision="float32", compile=False)
    done = rejection_sampling(model, tokenizer(), plain, prompts=prompts(), reward=judge, out=tmp_path / "best").summary
    (path,) = (tmp_path / "best").glob("answers-*.jsonl")
    train = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    lengths = written[0].lengths.tolist()
    answers = sum(pass_flops(each, lengths) / 3 for each in (config, judge.model.config))
    assert len(lengths) == 32
    assert train["flops"] == pytest.approx(answers)
    texts = [render(tokenizer(), messages).ids[:-1] for messages in train["messages"]]
    assert done["flops"] == pytest.approx(answers + pass_flops(config, [*map(len, texts)]))


def test_answers_are_a_function_of_prompt_and_seed_and_end_where_the_model_ended(tmp_path):
    model, ids = policy(), [prompt.ids for prompt in prompts().train[:6]]
    params = SamplingParams(max_tokens=6)
    engine = Engine(model, tokenizer(), dtype=torch.float32)
    rolled = roll_out(engine, ids, params, range(6))
    alone = roll_out(engine, ids[3:4], params, [3])
    width = alone.ids.shape[1]
    assert rolled.ids[3, :width].tolist() == alone.ids[0].tolist()
    for row, prompt in enumerate(ids):
        answer = rolled.ids[row][rolled.is_answer[row]].tolist()
        assert rolled.ids[row, : len(prompt)].tolist() == prompt
        assert (answer[-1] == tokenizer().end_id) == bool(rolled.is_ended[row])
        logits = model(rolled.ids[row : row + 1, : len(prompt) + len(answer)]).log_softmax(-1)[0]
        expected = [logits[len(prompt) - 1 + n, token] for n, token in enumerate(answer)]
        torch.testing.assert_close(rolled.logprobs[row][rolled.is_answer[row]], torch.stack(expected).detach())
    with pytest.raises(DataError, match="Lower max_tokens"):
        roll_out(engine, ids, SamplingParams(max_tokens=96), range(6))


def test_an_engine_that_writes_with_another_policy_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "Engine", lambda _, *given, **more: Engine(policy(n_layers=1), *given, **more))
    with pytest.raises(GroundupError, match="from another policy than the one that wrote"):
        run(tmp_path)


def test_a_ratio_that_is_not_one_before_the_first_update_stops_the_run(tmp_path, monkeypatch):
    def drawn(model, batch, temperature, plain=on_policy.buffer_logprobs):
        return plain(model, batch, temperature) + (0.01 if temperature == 0.7 else 0.0)

    monkeypatch.setattr(on_policy, "buffer_logprobs", drawn)
    with pytest.raises(GroundupError, match="ratio to the policy that wrote is not 1"):
        run(tmp_path, temperature=0.7)


def test_temperature_is_applied_to_old_and_new_probabilities_alike(tmp_path):
    run(tmp_path, temperature=0.7, buffers=1, epochs=1)  # or the guard above would speak
    assert read_log(tmp_path / "metrics.jsonl")[0]["clipped"] == 0.0


def test_a_model_with_dropout_learns_without_it():
    model = policy(dropout=0.2)
    plain = without_dropout(model)
    assert plain.config.dropout == 0.0
    assert plain.train()(torch.tensor([[1, 2, 3]])).equal(model.eval()(torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize(("horizon", "share"), [({}, 32 / 1000), ({"kl_horizon": 2}, 1.0)])
def test_beta_follows_the_divergence_and_goes_on_with_the_checkpoint(tmp_path, horizon, share):
    run(tmp_path, buffers=3, held_out=0, kl_target=0.001, **horizon)
    found = [line["kl_coef"] for line in read_log(tmp_path / "metrics.jsonl")]
    steps = PPOSettings(**COMMON).steps_per_buffer
    # kl is over its target in every buffer but the first: each time as much as one step may be
    assert found[steps] < found[0]
    assert found[2 * steps] / found[steps] == pytest.approx(1 + 0.2 * share, rel=1e-5)


def test_pairs_are_the_best_and_the_worst_of_their_prompts_answers(tmp_path):
    rewards = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 1.0], [math.nan, 2.0, 1.0], [math.nan, 5.0, math.nan]])
    pairs, is_silent = best_and_worst(rewards)
    assert is_silent.tolist() == [False, True, False, True]
    assert pairs[~is_silent].tolist() == [[1, 0], [1, 2]]
    # Answers that are worth the same are no pair: nothing is learned of them.
    code = tmp_path / "same.py"
    code.write_text("def score(m, answer, k):\n    return 1.0\n")
    settings = OnlineDPOSettings(**COMMON | {"batch_size": 8, "buffers": 1, "held_out": 0})
    model = policy()
    online_dpo(model, tokenizer(), settings, prompts=prompts(), reward=FunctionReward(f"{code}:score", "x"),
               out=tmp_path / "out")  # fmt: skip
    (line,) = read_log(tmp_path / "out" / "metrics.jsonl")
    assert (line["silent_groups"], line["grad_norm"]) == (1.0, 0.0)
    assert all(value.equal(model.get_parameter(name)) for name, value in policy().named_parameters())


def test_a_separator_of_lines_within_a_prompt_ends_no_line_of_what_is_kept(tmp_path):
    rows = [{"prompt": f"{n}\u2028and\x85{n}?", "response": "2"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "any.py").write_text("def score(m, answer, k):\n    return float(len(answer))\n")
    given = {
        "prompts": load_prompts([str(tmp_path / "asked.jsonl")], 8, 1, tokenizer(), 80, "align.rl"),
        "reward": FunctionReward(f"{tmp_path}/any.py:score", "x"),
    }
    settings = OnlineDPOSettings(**COMMON | {"batch_size": 8, "buffers": 2, "held_out": 0})
    online_dpo(policy(), tokenizer(), settings, **given, out=tmp_path / "policy")
    kept = [json.loads(line) for line in (tmp_path / "policy" / "rollouts.jsonl").read_bytes().splitlines()]
    assert len({line["step"] for line in kept}) == 2
    assert all("\u2028and\x85" in line["prompt"] for line in kept)
    best = RejectionSettings(prompts=8, samples=2, least=0.0, max_tokens=4, epochs=1, batch_size=4, compile=False)
    with pytest.raises(DataError, match=r"of 16 answers [1-9]\d* are good, .*: nothing to learn from"):  # it was read
        rejection_sampling(policy(), tokenizer(), best, **given, out=tmp_path / "best")


def test_dpo_on_its_own_answers_earns_more_and_goes_on_to_the_bit(tmp_path):
    summary = run(tmp_path / "more", "online-dpo", buffers=16, temperature=0.9).summary
    lines = read_log(tmp_path / "more" / "metrics.jsonl")
    silent = lines[0]["silent_groups"]  # and it is its own reference at first
    assert lines[0]["loss"] == pytest.approx((1 - silent) * math.log(2), abs=1e-5)
    assert abs(lines[0]["kl"]) < 1e-5 < lines[-1]["kl"]
    assert summary["held_out_reward"] > lines[0]["held_out_reward"] + 0.1
    run(tmp_path / "whole", "online-dpo")
    killed_and_resumed_is_whole("online-dpo", tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ValueError, match="no whole groups of 5"):
        OnlineDPOSettings(group=5)


def test_one_answer_alone_in_its_group_teaches_nothing(tmp_path):
    tuned = run(tmp_path, "grpo", group=1, buffers=2, held_out=0)
    lines = read_log(tmp_path / "metrics.jsonl")
    assert {line["grad_norm"] for line in lines} == {0.0}
    assert {line["silent_groups"] for line in lines} == {1.0}
    for name, before in policy().named_parameters():
        assert torch.equal(tuned.model.get_parameter(name), before)


def test_values_from_a_shared_trunk_are_learned_too(tmp_path):
    summary = run(tmp_path, shared_trunk=True, buffers=2).summary
    assert summary["parameters"] < 1.1 * sum(p.numel() for p in policy().parameters())


@pytest.mark.parametrize("own_process", [False, True])
def test_a_reward_that_fails_is_counted_and_has_no_say(tmp_path, own_process):
    (tmp_path / "bad.py").write_text(
        "import time, os\n"
        "def score(messages, answer, known):\n"
        "    if answer == 'raise': raise KeyError('x')\n"
        "    if answer == 'hang': time.sleep(60)\n"
        "    if answer == 'die' and messages[0]['content'] == 'process': os._exit(3)\n"
        "    return {'nan': float('nan'), 'text': '1.0', 'none': None, 'true': True}.get(answer, 0.5)\n"
    )
    reward = FunctionReward(f"{tmp_path}/bad.py:score", "[x] reward", seconds=0.5, own_process=own_process)
    prompt = Prompt([{"role": "user", "content": "process" if own_process else "here"}], [1], ("4",))
    answers = ["raise", "fine", "hang", "nan", "text", "none", "true", "die", "fine"]
    found = reward([prompt] * len(answers), answers)
    reward.close()
    expected = [math.nan, 0.5, math.nan, math.nan, math.nan, math.nan, 1.0, math.nan if own_process else 0.5, 0.5]
    assert [repr(value) for value in found] == [repr(value) for value in expected]
    assert len(reward.failures) == sum(map(math.isnan, expected))


def test_nothing_is_learned_from_an_answer_without_a_reward(tmp_path):
    (tmp_path / "half.py").write_text("def score(m, answer, k):\n    return float(len(answer) % 2) or float('nan')\n")
    for method in ("ppo", "grpo"):
        folder = tmp_path / method
        settings = {"reward": "x", "buffers": 1, "epochs": 1, "batch_size": 32, "held_out": 0}
        call, kind = (ppo, PPOSettings) if method == "ppo" else (grpo, GRPOSettings)
        reward = FunctionReward(f"{tmp_path}/half.py:score", "[x] reward")
        given = {"prompts": prompts(), "reward": reward}
        call(policy(), tokenizer(), kind(**COMMON | settings), **given, out=folder)
        (tmp_path / "bad.py").write_text("def score(m, answer, k):\n    return {}[answer]\n")
        bad = FunctionReward(f"{tmp_path}/bad.py:score", "[x] reward")
        given["reward"] = bad
        with pytest.raises(DataError, match="it fails for all answers; the first: KeyError"):
            call(policy(), tokenizer(), kind(**COMMON | settings), **given, out=tmp_path / f"{method}-bad")
        (line,) = read_log(folder / "metrics.jsonl")
        assert 0 < line["reward_failed"] < 1
        assert line["reward"] == 1.0  # of those that have one
        assert math.isfinite(line["policy"])


def test_an_answer_that_was_cut_off_is_not_right_and_costs_its_missing_end(tmp_path, monkeypatch):
    asked = [Prompt([], [1], ("4",))] * 2
    rolled = Rollouts(*[torch.zeros(2, 3)] * 3, torch.tensor([True, False]), ["4", "4"])
    assert on_policy.scores_of(FunctionReward(VERIFY, "x"), asked, rolled).tolist() == [1.0, 0.0]
    monkeypatch.setattr(on_policy, "is_right", lambda prompt, text: True)
    shape = {"buffers": 1, "epochs": 1, "max_tokens": 1, "reward": "x"}
    earned = []
    for missing_end in (0.0, 0.5):
        run(tmp_path / str(missing_end), **shape, missing_end=missing_end)
        first = read_log(tmp_path / str(missing_end) / "metrics.jsonl")[0]
        assert (first["ended"], first["held_out_right"]) == (0.0, 0.0)
        earned.append((first["reward"], first["held_out_reward"]))
    assert earned[1] == pytest.approx([found - 0.5 for found in earned[0]])


def test_held_out_figures_have_standard_errors_over_the_prompts_with_a_reward(tmp_path, monkeypatch):
    def scores(reward, asked, rolled):
        return torch.arange(len(asked)).float().where(torch.arange(len(asked)) > 0, torch.nan)

    monkeypatch.setattr(on_policy, "scores_of", scores)
    summary = run(tmp_path, buffers=1, epochs=1).summary
    known = torch.arange(1.0, summary["held_out_n"])
    assert (summary["held_out_reward"], summary["held_out_reward_n"]) == (known.mean(), len(known))
    assert summary["held_out_reward_stderr"] == pytest.approx(float(known.std()) / math.sqrt(len(known)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pass_in_which_no_answer_has_a_reward_teaches_nothing(tmp_path, batch_size):
    (tmp_path / "once.py").write_text(
        "calls = []\ndef score(m, a, k):\n    calls.append(a)\n    return 1 / (len(calls) - 1)\n"
    )
    shape = {"rollouts": 4, "buffers": 1, "epochs": 1, "held_out": 0, "batch_size": batch_size, "micro_batch_size": 1}
    reward = FunctionReward(f"{tmp_path}/once.py:score", "[x] reward")
    ppo(policy(), tokenizer(), PPOSettings(**COMMON | shape), prompts=prompts(), reward=reward, out=tmp_path / "out")
    lines = read_log(tmp_path / "out" / "metrics.jsonl")
    assert sum(line["reward_failed"] for line in lines) == pytest.approx(1 / batch_size)
    assert all(math.isfinite(line["policy"]) for line in lines)
    alone = [(line["policy"], line["grad_norm"]) for line in lines if line["reward_failed"] == 1]
    assert alone == [(0.0, 0.0)] * (batch_size == 1)


def test_best_answers_are_kept_and_learned(tmp_path):
    (tmp_path / "short.py").write_text("def score(m, answer, k):\n    return -float(len(answer))\n")
    reward = FunctionReward(f"{tmp_path}/short.py:score", "[x] reward")
    shape = {"prompts": 12, "samples": 6, "keep": 2, "least": -8.0, "max_tokens": 6, "epochs": 1, "batch_size": 4}
    settings = RejectionSettings(**shape, precision="float32", compile=False)
    given = {"prompts": prompts(), "reward": reward}
    model = policy()
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer().end_id] *= 8  # so that some answers end
    done = rejection_sampling(model, tokenizer(), settings, **given, out=tmp_path / "out")
    (path,) = (tmp_path / "out").glob("answers-*.jsonl")
    train, _ = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert train["written"] == 72 == done.summary["answers"]
    assert 0 < len(train["messages"]) <= train["good"] <= 72
    asked = [prompt.messages[0]["content"] for prompt in prompts().train[:12]]
    for messages in train["messages"]:
        assert messages[0]["content"] in asked
        assert len(messages[1]["content"]) <= 8
    assert done.summary["answers_failed"] == 0
    settings = settings.model_copy(update={"least": 1.0})
    with pytest.raises(DataError, match="Lower least = 1"):
        rejection_sampling(policy(), tokenizer(), settings, **given, out=tmp_path / "none")


@pytest.mark.parametrize("value", ["1 / (len(m[0]['content']) % 2)", "str(len(answer))"])
def test_answers_whose_reward_fails_are_counted_and_not_learned(tmp_path, value):
    (tmp_path / "bad.py").write_text(f"def score(m, answer, k):\n    return {value}\n")
    settings = RejectionSettings(
        prompts=24, samples=8, least=-8.0, max_tokens=6, epochs=1, batch_size=4, precision="float32", compile=False
    )
    model = policy()
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer().end_id] *= 20
    reward = FunctionReward(f"{tmp_path}/bad.py:score", "[align.x] reward")
    given = {"prompts": prompts(), "reward": reward, "out": tmp_path / "out"}
    if "str" in value:
        with pytest.raises(DataError, match="it fails for all answers; the first: it returns '"):
            rejection_sampling(model, tokenizer(), settings, **given)
        return
    summary = rejection_sampling(model, tokenizer(), settings, **given).summary
    assert 0 < summary["answers_failed"] < summary["answers"] == 192
    (path,) = (tmp_path / "out").glob("answers-*.jsonl")
    for messages in json.loads(path.read_text(encoding="utf-8").splitlines()[0])["messages"]:
        assert len(messages[0]["content"]) % 2


@pytest.mark.parametrize(
    ("known", "answer", "right"),
    [
        ("82", " 82 ", True),
        ("82", "82.", False),
        ("He has 9.\n#### 1,009", "so it is #### 1009", True),
        ("#### 9", "The answer is 9.", True),
        ("#### 9", "The answer is 19", False),
        ("#### -3", "#### -3.0", True),
    ],
)
def test_what_is_right(known, answer, right):
    assert is_right(Prompt([], [], (known,)), answer) is right


def test_settings_that_do_not_fit_are_named():
    for settings, said in (
        ({"rollouts": 50}, "does not divide rollouts 50"),
        ({"batch_warmup_from": 8}, "batch_warmup_from"),
        ({"lora": {"dropout": 0.1}}, "lora dropout 0.1: .* ratio not 1"),
    ):
        for kind in (PPOSettings, GRPOSettings, OnlineDPOSettings):
            with pytest.raises(ValueError, match=said):
                kind(**settings)
    with pytest.raises(ValueError, match="kl_horizon: β stays without kl_target"):
        PPOSettings(kl_horizon=10)
    with pytest.raises(ValueError, match="group 7 does not divide"):
        GRPOSettings(group=7)


def test_adapters_are_enough(tmp_path):
    run(tmp_path, "grpo", buffers=3, lora={"rank": 4})
    divergence = [line["kl"] for line in read_log(tmp_path / "metrics.jsonl")]
    assert abs(divergence[0]) < 1e-5 < abs(divergence[-1])  # from the model with its adapters off
    assert (tmp_path / "adapter").is_dir()
    trained, _ = load_model(tmp_path / "model")
    after = dict(trained.named_parameters())
    moved = [name for name, value in policy().named_parameters() if not value.equal(after[name])]
    assert moved
    assert not any("norm" in name or "embed" in name for name in moved)
