"""The closing table: what is laid beside what, and gates that pass at their border and fail beyond it.

The models are scripted, so that every figure is known beforehand.
"""

import math

import pytest
import torch
from generation_models import random_model
from torch import nn

from groundup.corpus import Document
from groundup.evaluation import compare, exact_match, generate_tasks, verify
from groundup.evaluation import metrics as evaluation_metrics
from groundup.evaluation.metrics import bits_per_byte
from groundup.model import ModelConfig, OutputLayer
from groundup.recipe import EvaluateSettings
from groundup.shards import TokenShards, write_shards
from groundup.tokenizer import Tokenizer, render

N_TASKS, SEED = 200, 1
ALL = generate_tasks(N_TASKS, SEED)
HELD_OUT = [task for task in ALL if task.split == "held_out"]
TOKENIZER = Tokenizer.train([message["content"] for task in ALL for message in task.messages], vocab_size=320)
COMMON = sorted({token for task in ALL for token in TOKENIZER.encode(task.prompt)})
BOTH = ("bits_per_byte", "groundup:tasks")


class Scripted(nn.Module):
    """Goes on from known prompts with known tokens; in plain text, prefers tokens that are common there.

    It remembers what it read in the cache it is given, as a model does: one key a token, its id.
    """

    def __init__(self, replies, sharpness=0.0):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=TOKENIZER.vocab_size, context_length=96, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=1,
            d_model=TOKENIZER.vocab_size, d_ff=1, position="learned",
        )  # fmt: skip
        self.compute_dtype, self.replies, self.sharpness = torch.float32, replies, sharpness
        self.weight = nn.Parameter(torch.eye(TOKENIZER.vocab_size))

    def forward(self, ids, *, positions=None, cache=None, head=None):
        hidden = torch.zeros(*ids.shape, TOKENIZER.vocab_size)
        if cache is None:
            hidden[..., COMMON] = self.sharpness
        else:
            positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
            read, _ = cache.update(0, ids[:, None, :, None].float(), ids[:, None, :, None].float(), positions)
            for row, places in enumerate(positions.tolist()):
                for column, place in enumerate(places):
                    hidden[row, column, self.next_token(read[row, 0, : place + 1, 0].long().tolist())] = 1.0
        return hidden if head is None else head(hidden, OutputLayer(self.weight, self.config.vocab_size))

    def next_token(self, read):
        if TOKENIZER.role_id("assistant") not in read:
            return TOKENIZER.pad_id
        border = read.index(TOKENIZER.role_id("assistant")) + 1
        reply = self.replies.get(tuple(read[:border]), [TOKENIZER.pad_id])
        place = len(read) - border
        return reply[place] if place < len(reply) else TOKENIZER.end_id


def knowing(tasks, style=None, **options):
    """A model that answers these tasks rightly, in one style or in each one's own, and all others wrongly."""
    replies = {}
    for task in tasks:
        prompt = render(TOKENIZER, task.messages[:1], add_generation_prompt=True).ids
        answer = task.say(task.answer, style or task.style)
        replies[tuple(prompt)] = [*TOKENIZER.encode(answer), TOKENIZER.end_id]
    return Scripted(replies, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    texts = [" ".join(task.prompt for task in ALL[place : place + 3]) for place in range(0, 90, 3)]
    documents = [Document(str(place), text, "test", split="validation") for place, text in enumerate(texts)]
    write_shards([Document("train", "Once", "test"), *documents], TOKENIZER, folder)
    return folder


def compared(models, folder, tasks=BOTH, **gates):
    settings = EvaluateSettings(tasks=tasks, gates=gates)
    return compare(models, TOKENIZER, settings=settings, shards_folder=folder, n_tasks=N_TASKS, seed=SEED)[0]


def rows_of(*args, **options):
    return {row["key"]: row for row in compared(*args, **options)["rows"]}


@pytest.mark.parametrize("style", ["plain", "polite", None])
def test_perfect_answers_of_every_kind_are_all_right(style):
    estimate, answers, _ = exact_match(knowing(ALL, style), TOKENIZER, ALL)
    assert (estimate.value, estimate.n) == (1.0, len(ALL))
    assert all(verify(task, answer.reply) for task, answer in zip(ALL, answers, strict=True))


def test_a_model_that_knows_some_answers_is_credited_with_these():
    estimate, answers, _ = exact_match(knowing(ALL[::3]), TOKENIZER, ALL)
    assert [answer.correct for answer in answers] == [place % 3 == 0 for place in range(len(ALL))]
    assert estimate.value == pytest.approx(len(ALL[::3]) / len(ALL))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_how_many_windows_or_prompts_are_computed_at_once_changes_nothing(rows, folder, monkeypatch):
    model, shards = random_model(vocab_size=TOKENIZER.vocab_size), TokenShards.open(folder, "validation")
    bits, graded = bits_per_byte(model, shards, TOKENIZER), exact_match(knowing(ALL[::2]), TOKENIZER, ALL[:40])
    monkeypatch.setattr(evaluation_metrics, "_ROWS", rows)
    monkeypatch.setattr(evaluation_metrics, "_PROMPTS", rows)
    again = bits_per_byte(model, shards, TOKENIZER)
    assert again.n == bits.n
    assert (again.value, again.stderr) == pytest.approx((bits.value, bits.stderr), rel=1e-5)
    assert exact_match(knowing(ALL[::2]), TOKENIZER, ALL[:40])[:2] == graded[:2]


def test_rows_of_the_whole_road(folder):
    n_known = len(HELD_OUT) // 2
    models = {
        "initial": Scripted({}),
        "base": Scripted({}, 3.0),
        "assistant": knowing(HELD_OUT[:n_known], sharpness=1.0),
    }
    scores = compared(models, folder)
    rows = {row["key"]: row for row in scores["rows"]}
    assert list(rows) == ["bits_per_byte", "bits_per_byte_sft", "exact_match"]
    bits, after_sft, answers = rows.values()
    shards = TokenShards.open(folder, "validation")
    assert bits["before"]["value"] == pytest.approx(bits_per_byte(models["initial"], shards, TOKENIZER).value)
    assert bits["before"]["n"] == bits["after"]["n"] == shards.n_bytes
    assert after_sft["before"] == bits["after"]
    assert after_sft["after"]["value"] > bits["after"]["value"]
    assert answers["before"] == {"value": 0.0, "stderr": answers["before"]["stderr"], "n": len(HELD_OUT)}
    assert answers["after"]["value"] == pytest.approx(n_known / len(HELD_OUT))
    assert [row["lower_is_better"] for row in rows.values()] == [True, True, False]
    assert [row["n_unit"] for row in rows.values()] == ["bytes", "bytes", "prompts"]
    assert [row["gate"] for row in rows.values()] == [None, None, None]
    assert set(scores["by_kind"]) == {task.kind for task in HELD_OUT}
    known = sum(kind["after"]["value"] * kind["after"]["n"] for kind in scores["by_kind"].values())
    assert known == pytest.approx(n_known)
    assert [answer["correct"] for answer in scores["answers"]] == [place < n_known for place in range(len(HELD_OUT))][
        :60
    ]


def test_rows_without_an_assistant(folder):
    models = {"initial": Scripted({}), "base": knowing(HELD_OUT, sharpness=3.0)}
    rows = rows_of(models, folder)
    assert list(rows) == ["bits_per_byte", "exact_match"]
    assert rows["exact_match"]["before"] is None
    assert rows["exact_match"]["after"]["value"] == 1.0
    assert list(rows_of(models, folder, tasks=("bits_per_byte",))) == ["bits_per_byte"]
    assert list(rows_of(models, folder, tasks=("groundup:tasks",))) == ["exact_match"]


def test_the_gate_on_bits_passes_at_its_border_and_fails_beyond(folder):
    models = {"initial": Scripted({}), "base": Scripted({}, sharpness=3.0)}
    row = rows_of(models, folder, ("bits_per_byte",))["bits_per_byte"]
    fall = row["before"]["value"] - row["after"]["value"]
    assert fall > 0.5
    for least, passes in [(0.0, True), (fall, True), (math.nextafter(fall, 9), False), (fall + 1, False)]:
        gate = rows_of(models, folder, ("bits_per_byte",), min_bits_per_byte_drop=least)["bits_per_byte"]["gate"]
        assert gate == {"text": f"falls by at least {least:g}", "passed": passes}


@pytest.mark.parametrize(
    ("gates", "passes"),
    [
        ({"min_exact_match": 0.5}, True),
        ({"min_exact_match": 0.500001}, False),
        ({"max_exact_match_before": 0.25}, True),
        ({"max_exact_match_before": 0.249999}, False),
        ({"max_exact_match_before": 0.25, "min_exact_match": 0.5}, True),
        ({"max_exact_match_before": 0.0, "min_exact_match": 0.5}, False),
        ({"max_exact_match_before": 0.25, "min_exact_match": 1.0}, False),
    ],
)
def test_the_gates_on_answers_pass_at_their_border_and_fail_beyond(gates, passes, folder):
    four = HELD_OUT[:4]
    models = {"base": knowing(four[:1]), "assistant": knowing(four[:2])}
    settings = EvaluateSettings(tasks=("groundup:tasks",), limit=4, gates=gates)
    scores, _ = compare(models, TOKENIZER, settings=settings, shards_folder=folder, n_tasks=N_TASKS, seed=SEED)
    (row,) = scores["rows"]
    assert (row["before"]["value"], row["after"]["value"]) == (0.25, 0.5)
    assert row["gate"]["passed"] is passes
    assert [word for word in ("at most", "at least") if word in row["gate"]["text"]] == [
        word for word, key in (("at most", "max_exact_match_before"), ("at least", "min_exact_match")) if key in gates
    ]
