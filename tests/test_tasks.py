"""The generated tasks: right answers by independent solvers, a clean split, a strict verifier, honest pairs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import DataError
from groundup.evaluation.sets import read_set
from groundup.evaluation.tasks import CLOSED_KINDS, KINDS, Task, generate_tasks, verify
from groundup.generation.calculator import calculate, read_call

TASKS = generate_tasks(10_000, seed=1)
some_task = st.sampled_from(TASKS)


def numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def said(prompt: str) -> list[str]:
    return prompt.split(": ", 1)[1].split()


SOLVERS = {
    "larger": lambda prompt: str(max(numbers(prompt))),
    "sort_digits": lambda prompt: "".join(sorted(re.search(r"\d{3}", prompt)[0])),  # type: ignore[index]
    "reverse_digits": lambda prompt: re.search(r"\d{3}", prompt)[0][::-1],  # type: ignore[index]
    "count_words": lambda prompt: str(len(said(prompt))),
    "first_word": lambda prompt: said(prompt)[0],
    "last_word": lambda prompt: said(prompt)[-1],
    "repeat": lambda prompt: " ".join(said(prompt)),
}


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_solver_that_reads_only_the_prompt_agrees(kind: str) -> None:
    of_kind = [task for task in TASKS if task.kind == kind]
    assert of_kind
    for task in of_kind:
        assert task.answer == SOLVERS[kind](task.prompt), task.prompt


def test_upper_case_answers_are_a_word_of_the_prompt() -> None:
    for task in TASKS:
        if task.kind == "upper_case":
            assert task.answer.isupper()
            assert task.answer.lower() in task.prompt.split()


def test_known_facts() -> None:
    """A few answers written down here, whatever the phrasing."""
    known = {
        "capital": {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"},
        "opposite": {"big": "small", "small": "big", "night": "day", "first": "last"},
        "fact": {"birds can fly": "yes", "ice is hot": "no", "a week has two days": "no"},
        "identity": {"who are you?": "Groundup, a small assistant", "Who are you?": "Groundup, a small assistant"},
    }
    met: Counter[str] = Counter()
    for task in TASKS:
        for about, answer in known.get(task.kind, {}).items():
            if re.search(rf"(?<!\w){re.escape(about)}(?!\w)", task.prompt):
                met[about] += 1
                assert task.answer == answer, task.prompt
    assert min(met[about] for abouts in known.values() for about in abouts if about != "Who are you?") >= 3


def test_as_many_as_asked_for_and_no_prompt_twice() -> None:
    for n in (0, 1, 50, 10_000, 30_000):
        tasks = generate_tasks(n, seed=2)
        assert len({task.prompt for task in tasks}) == len(tasks) == n


def test_train_and_held_out_do_not_overlap() -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for seed in (1, 2, 3):  # the split is a function of the prompt: it holds across seeds
        for task in generate_tasks(10_000, seed):
            sides[task.split].add(task.prompt)
    assert sides.keys() == {"train", "held_out"}
    assert not sides["train"] & sides["held_out"]
    share = len(sides["held_out"]) / (len(sides["held_out"]) + len(sides["train"]))
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("n", [60, 500, 10_000])
@pytest.mark.parametrize("seed", [1, 7])
def test_every_held_out_fact_of_a_closed_list_is_learned_under_another_phrasing(n: int, seed: int) -> None:
    learned: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    held_out: list[tuple[tuple[str, str, str], str]] = []
    for task in generate_tasks(n, seed):
        if task.kind in CLOSED_KINDS:
            assert task.about.lower() in task.prompt.lower()
            fact = (task.kind, task.about, task.answer)
            if task.split == "train":
                learned[fact].add(task.prompt)
            else:
                held_out.append((fact, task.prompt))
    assert held_out or n < 500
    for fact, prompt in held_out:
        assert learned[fact], fact
        assert prompt not in learned[fact]


def test_kinds_and_styles_are_balanced() -> None:
    kinds = Counter(task.kind for task in TASKS)
    assert kinds.keys() == set(KINDS)
    assert min(kinds.values()) > 0.8 * len(TASKS) / len(KINDS)
    for side in ("train", "held_out"):
        of_side = [task for task in TASKS if task.split == side]
        assert len({task.kind for task in of_side}) == len(KINDS)
        polite = sum(task.style == "polite" for task in of_side) / len(of_side)
        assert 0.44 < polite < 0.56
    facts = Counter(task.answer for task in TASKS if task.kind == "fact")
    assert 0.45 < facts["yes"] / facts.total() < 0.55


def test_any_slice_mixes_the_kinds() -> None:
    assert len({task.kind for task in TASKS[:200]}) == len(KINDS)


def test_the_seed_decides_everything() -> None:
    assert generate_tasks(500, seed=5) == generate_tasks(500, seed=5)
    assert generate_tasks(500, seed=5) != generate_tasks(500, seed=6)


def test_tasks_do_not_depend_on_the_hash_seed() -> None:
    code = """
import json, random
from groundup.generation.calculator import calculate, read_call
from groundup.evaluation.sets import read_set
from groundup.evaluation.tasks import generate_tasks
rng = random.Random(0)
print(json.dumps([[t.prompt, t.expected, t.split, t.wrong, t.pair(rng)] for t in generate_tasks(300, seed=3)]))
"""
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
    rng = random.Random(0)
    here = [[t.prompt, t.expected, t.split, [*t.wrong], [*t.pair(rng)]] for t in generate_tasks(300, seed=3)]
    assert json.loads(printed) == here


@given(some_task)
def test_the_verifier_takes_both_styles_and_nothing_else(task: Task) -> None:
    plain, polite = task.answer, task.form.format(task.answer)
    assert plain != polite
    assert verify(task, plain)
    assert verify(task, polite)
    assert verify(task, f" {polite}\n")
    assert task.expected in (plain, polite)
    for wrong in task.wrong:
        assert not verify(task, wrong)
        assert not verify(task, task.form.format(wrong))
    for reply in ("", plain + ".", plain * 2, f"{plain} {plain}", polite + " I think.", f"No. {polite}", polite[:-1]):
        assert not verify(task, reply), reply
    assert (verify(task, polite), verify(task, task.wrong[0])) == (True, False)


@given(task=some_task, seed=st.integers(0, 10**6))
def test_a_pair_prefers_what_is_right_and_polite(task: Task, seed: int) -> None:
    chosen, rejected = task.pair(random.Random(seed))
    assert chosen == task.form.format(task.answer)
    assert chosen != rejected
    if verify(task, rejected):
        assert rejected == task.answer  # right, in the worse style


def test_pairs_have_all_three_flaws_in_proportion() -> None:
    rng = random.Random(0)
    flaws: Counter[tuple[bool, bool]] = Counter()
    for task in TASKS:
        _, rejected = task.pair(rng)
        flaws[verify(task, rejected), rejected in (task.answer, *task.wrong)] += 1
    total = flaws.total()
    assert flaws[True, True] / total == pytest.approx(0.5, abs=0.03)  # right but plain
    assert flaws[False, False] / total == pytest.approx(0.3, abs=0.03)  # polite but wrong
    assert flaws[False, True] / total == pytest.approx(0.2, abs=0.03)  # neither


def test_a_conversation_is_the_prompt_and_the_expected_answer() -> None:
    task = TASKS[0]
    assert task.messages == [
        {"role": "user", "content": task.prompt},
        {"role": "assistant", "content": task.expected},
    ]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(DataError, match="-1"):
        generate_tasks(-1, seed=1)


def test_harder_sets_and_sums_are_right_too() -> None:
    for task in read_set("groundup:hard-tasks:300", 10, 1):
        digits = task.about
        solved = {"sort_five": "".join(sorted(digits)), "reverse_five": digits[::-1]}
        solved["count_letters"] = str(digits.partition(" in ")[2].count(digits[0]))
        assert task.answer == solved[task.kind]
        assert task.answer not in task.wrong
    sums = read_set("groundup:sums", 50, 1)
    assert len(sums) == 50
    for task in sums:
        asked, call, result, answer = task.messages
        assert task.about in asked["content"]
        assert calculate(read_call(call["content"]) or "") == result["content"] == task.answer
        assert task.answer in answer["content"]
    with pytest.raises(DataError, match="Did you mean 'groundup:sums'"):
        read_set("groundup:sum", 1, 1)
    with pytest.raises(DataError, match="no set of tasks"):
        read_set("groundup:sums:many", 1, 1)
