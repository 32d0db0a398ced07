"""Learning conversations by an imported model's own template: the ids of transformers, and what of them is learned."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation_models import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_serving_templates import CHATML, FAMILIES, make_folder

from groundup.alignment import ConversationRows, Conversations, SFTSettings, fine_tune
from groundup.alignment.preferences import Preference, PreferenceRows, Preferences, encode_answer
from groundup.alignment.rewards import load_prompts
from groundup.console import Console
from groundup.errors import DataError
from groundup.generation.calculator import write_call
from groundup.generation.rollouts import use_calculator
from groundup.tokenizer import Message, load_tokenizer, render
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.training import IGNORED

TAGGED = CHATML.replace(
    "{{- '<|im_start|>assistant\\n' + content }}", "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- content }}"
).replace(
    "{%- endfor %}\n        {{- '<|im_end|>\\n' }}", "{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
)
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "plain": "<|eot|>", "tagged": "<|im_end|>"}
TALKS: list[list[Message]] = [
    [
        {"role": "user", "content": " Where is the cat? "},
        {"role": "assistant", "content": " On the mat.\n\nOr 東京 🙂 "},
    ],
    [
        {"role": "system", "content": "Be kind. \n"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nx</think>\n\nb"},
        {"role": "user", "content": '"c" & <d> {{ messages }}'},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "and?"},
    ],
]


@functools.cache
def family(name: str) -> tuple[PretrainedTokenizer, Any]:
    folder = Path(tempfile.mkdtemp())
    make_folder("chatml" if name == "tagged" else name, folder, TAGGED if name == "tagged" else None)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PretrainedTokenizer)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def learned(tokenizer: PretrainedTokenizer, talk: list[Message], **options: Any) -> str:
    rendered = render(tokenizer, talk, **options)
    ids = [index for index, flag in zip(rendered.ids, rendered.loss_mask, strict=True) if flag]
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("talk", TALKS, ids=len)
def test_ids_are_those_of_transformers_and_answers_are_learned_with_their_ends(name: str, talk: list[Message]) -> None:
    ours, theirs = family(name)
    rendered = render(ours, talk)
    made = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=name in ("plain", "tagged"))
    assert rendered.ids == made["input_ids"]
    if "assistant_masks" in made:
        assert made["assistant_masks"] == [int(flag) for flag in rendered.loss_mask]
    end, said = ENDS[name], [one["content"] for one in talk if one["role"] == "assistant"]
    if name in ("chatml", "tagged"):  # which drops the thoughts of earlier turns
        said = [one.rpartition("\n\n")[2] if "</think>" in one else one for one in said]
    if name in ("llama3", "mistral"):
        said = [one.strip() for one in said]
    space = " " if name == "mistral" else ""
    assert learned(ours, talk) == "".join(f"{space}{one}{end}" for one in said)
    last = max(place for place, one in enumerate(talk) if one["role"] == "assistant")
    assert learned(ours, talk, learned_from=last) == f"{space}{said[-1]}{end}"


def test_both_ways_of_finding_what_is_learned_agree() -> None:
    for talk in TALKS:
        assert render(family("chatml")[0], talk) == render(family("tagged")[0], talk)


@pytest.mark.parametrize("name", ENDS)
@given(
    said=st.lists(
        st.text("a \n\ufdd0", max_size=3) | st.sampled_from(["<|im_start|>", "x<|im_end|>y", "[/INST]", "</s>"]),
        min_size=2, max_size=4,
    )
)  # fmt: skip
def test_what_is_said_is_text_and_ends_nothing(name: str, said: list[str]) -> None:
    tokenizer, _ = family(name)
    talk: list[Message] = [
        {"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(said)
    ]
    plain: list[Message] = [{**one, "content": "x"} for one in talk]  # type: ignore[typeddict-item]
    rendered = render(tokenizer, talk)
    special = [index for index in rendered.ids if index in tokenizer.special_ids]
    assert special == [index for index in render(tokenizer, plain).ids if index in tokenizer.special_ids]
    space, end = " " if name == "mistral" else "", ENDS[name]
    texts = [text.strip() if name in ("llama3", "mistral") else text for text in said[1::2]]
    assert learned(tokenizer, talk) == "".join(f"{space}{text}{end}" for text in texts)


@pytest.mark.parametrize(
    ("each", "words"),
    [
        ("{{ one.role }}: {{ one.content }}\n", "no control token behind an answer"),
        ("{{ 'long' if one.content | length > 1 else 'short' }}{{ one.content }}<|eot|>", "otherwise when an answer"),
        ("{{ raise_exception('No.') }}", "refuses"),
        ("{% for %}", "refuses"),
    ],
)  # fmt: skip
def test_a_template_that_teaches_nothing_is_refused_by_name(each: str, words: str, tmp_path: Path) -> None:
    template = f"{{% for one in messages %}}{each}{{% endfor %}}"
    tokenizer = load_tokenizer(make_folder("plain", tmp_path, template))
    with pytest.raises(DataError, match=words):
        render(tokenizer, TALKS[0])
    with pytest.raises(DataError, match=words):
        rows(tokenizer, [TALKS[0]] * 4)


def rows(tokenizer: Any, talks: list[list[Message]]) -> ConversationRows:
    half = len(talks) // 2
    return ConversationRows(Conversations(talks[:half], talks[half:], {}), tokenizer, 256, SFTSettings(batch_size=2), 1)


def test_a_conversation_that_the_template_refuses_is_counted(tmp_path: Path) -> None:
    tokenizer, _ = family("llama3")
    odd: list[Message] = [{"role": "user", "content": "\ufdd0" + "".join(map(chr, range(0xFDD0, 0xFDF0)))}, TALKS[0][1]]
    source = rows(tokenizer, [TALKS[0], odd, TALKS[0], TALKS[0]])
    assert [str(error) for error in source.refused] == ["the conversation has code points that are no characters."]
    wrong: list[Message] = [{"role": "assistant", "content": "No."}]
    pairs = [Preference(talk[:1], [talk[1:], wrong]) for talk in (TALKS[0], odd, TALKS[0], TALKS[0])]
    found = PreferenceRows(Preferences(pairs[:2], pairs[2:], {}), tokenizer, 256, seed=1)
    assert (len(found.train), len(found.held_out), len(found.refused)) == (1, 2, 1)
    talks = [odd, *([{**TALKS[0][0], "content": str(n)}, TALKS[0][1]] for n in range(30))]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    prompts = load_prompts([str(path)], 0, 1, tokenizer, 256, "align.grpo")
    assert len(prompts.train) + len(prompts.held_out) == 30
    path.write_text((json.dumps({"messages": odd}) + "\n") * 2)
    with pytest.raises(DataError, match="no characters"):
        load_prompts([str(path)], 0, 1, tokenizer, 256, "align.grpo")


def test_what_is_learned_of_a_preference_is_its_answer() -> None:
    for name, end in ENDS.items():
        tokenizer, _ = family(name)
        answer: list[Message] = [{"role": "assistant", "content": "Yes."}]
        ids, targets = encode_answer(tokenizer, TALKS[1], answer)
        assert tokenizer.decode([one for one in targets if one != IGNORED], skip_special=False).strip() == f"Yes.{end}"
        assert targets[-1] == tokenizer.control_tokens[end]
        whole = render(tokenizer, [*TALKS[1], *answer]).ids
        assert ids.tolist() == whole[: len(ids)]


def test_the_calculator_speaks_by_the_template_or_not_at_all(tmp_path: Path) -> None:
    tokenizer, _ = family("chatml")
    said = use_calculator(tokenizer)(write_call("6 * 7"))
    assert said is not None
    text = tokenizer.decode(said, skip_special=False)
    wanted = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert text == wanted
    strict = (
        "{% if messages[-1].role == 'tool' %}{{ raise_exception('No.') }}{% endif %}{{ messages[-1].content }}<|eot|>"
    )
    assert use_calculator(load_tokenizer(make_folder("plain", tmp_path, strict)))(write_call("6 * 7")) is None


def test_a_base_model_learns_to_end_its_answers_and_says_so_to_others(tmp_path: Path) -> None:
    """Its files name the end of a document only; whoever writes with the new model has to stop where an answer ends."""
    tokenizer, _ = family("chatml")
    end = tokenizer.control_tokens["<|im_end|>"]
    assert end not in tokenizer.end_ids
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=128).requires_grad_(True)
    talk: list[Message] = [
        {"role": "user", "content": "Hello <|im_end|>"},
        {"role": "assistant", "content": "Good day."},
    ]
    settings = SFTSettings(epochs=60, batch_size=1, lr=1e-2, optimizer="adamw", compile=False)
    talks = Conversations([talk], [talk], {})
    made = fine_tune(model, tokenizer, settings, out=tmp_path / "sft", conversations=talks, console=Console(quiet=True))
    assert made.summary["supervised_tokens"] == len(tokenizer.encode("Good day.")) + 1
    folder = tmp_path / "sft" / "model"
    loaded = load_tokenizer(folder)
    assert end in loaded.end_ids
    assert end in transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = render(loaded, talk[:1], add_generation_prompt=True).ids
    written = theirs.generate(torch.tensor([asked]), max_new_tokens=30, do_sample=False)[0, len(asked) :].tolist()
    assert loaded.decode(written, skip_special=False) == "Good day.<|im_end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_opens_an_answer_is_not_learned(name: str) -> None:
    tokenizer, _ = family(name)
    asked = render(tokenizer, TALKS[0][:1], add_generation_prompt=True)
    assert not any(asked.loss_mask)
