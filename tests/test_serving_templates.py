# ruff: noqa: E501
"""Conversations of imported models: the ids of transformers, nothing injected, nothing run; and tool calls there and back."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from generation_models import TEXT, random_model, small_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from serving_client import serving
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from groundup.errors import DataError
from groundup.generation import Engine
from groundup.generation.tools import HERMES, LLAMA, MISTRAL, OURS, ToolCall, ToolFormat, ToolReader
from groundup.serving.state import ServedModel, State
from groundup.serving.templates import ChatTemplate
from groundup.tokenizer import load_tokenizer
from groundup.tokenizer.pretrained import PretrainedTokenizer

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\nAnswer with <tool_call>\\n{...}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- if message.role == 'user' %}{%- set ns.last = messages|length - loop.index %}{%- break %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {%- if '</think>' in content and loop.index0 < ns.last %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' + tool_call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}{{- message.content | tojson }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL3 = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}
        {{- "[INST] " + (system_message + "\\n\\n" if loop.first and system_message is defined else "") + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.id is not defined or tool_call.id|length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
            {{- tool_call.function|tojson }}{{- "]" + eos_token if loop.last else ", " }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}{{- " " + message.content|trim + eos_token }}
    {%- elif message.role == 'tool' %}[TOOL_RESULTS] {{ message.content }}[/TOOL_RESULTS]
    {%- endif %}
{%- endfor %}"""
PLAIN = """{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|eot|>{% endgeneration %}{% else %}<|user|>
{{ message['content'] }}<|eot|>{% endif %}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

FAMILIES: dict[str, tuple[str, list[str], ToolFormat | None]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], HERMES),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"], LLAMA),
    "mistral": (MISTRAL3, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                           "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], MISTRAL),
    "plain": (PLAIN, ["<|user|>", "<|assistant|>", "<|eot|>"], None),
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a <town>.", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}}]  # fmt: skip
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln"}'}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": " Where is the cat? "}],
    "a system message": [{"role": "system", "content": "Be kind. \n"}, {"role": "user", "content": "naïve 東京 🙂"}],
    "several turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nx</think>\n\nb"},
                      {"role": "user", "content": '"c" & <d> {{ messages }}'}],
}  # fmt: skip
TOOL_TALK = [{"role": "user", "content": "How warm is it?"}, {"role": "assistant", "tool_calls": [CALL]},
             {"role": "tool", "tool_call_id": "abcdef123", "content": '{"degrees": 21}'},
             {"role": "user", "content": "And now?"}]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_folder(request.param, tmp_path_factory.mktemp(request.param))


def make_folder(name: str, folder: Path, template: str | None = None) -> Path:
    source, control, _ = FAMILIES[name]
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    engine.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ["<s>", "</s>", *control]])
    engine.add_tokens(
        [AddedToken(one, special=False, normalized=False) for one in ("<tool_call>", "</tool_call>", "<think>")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<s>", eos_token="</s>", chat_template=template or source
    ).save_pretrained(folder)
    return folder


def ours(folder: Path) -> tuple[PretrainedTokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PretrainedTokenizer)
    return tokenizer, ChatTemplate(tokenizer)


def theirs(folder: Path, talk: list[dict[str, Any]], tools: Any = None) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for message in talk:  # transformers wants arguments as they are, OpenAI's clients send them as text
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return tokenizer.apply_chat_template(talk, tools=tools, add_generation_prompt=True, return_dict=False)


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("talk", TALKS)
def test_ids_are_those_of_transformers(family: tuple[str, Path], talk: str) -> None:
    name, folder = family
    _, template = ours(folder)
    assert template.ids(TALKS[talk]) == theirs(folder, copied(TALKS[talk]))
    assert template.tools == FAMILIES[name][2]
    if template.tools is None:
        with pytest.raises(DataError, match="has no tools"):
            template.ids(TALKS[talk], TOOLS)
        return
    assert template.ids(TALKS[talk], TOOLS) == theirs(folder, copied(TALKS[talk]), TOOLS)
    assert template.ids(copied(TOOL_TALK), TOOLS) == theirs(folder, copied(TOOL_TALK), TOOLS)


def test_what_spells_a_control_token_stays_text_wherever_it_stands(family: tuple[str, Path]) -> None:
    name, folder = family
    tokenizer, template = ours(folder)
    control = [*FAMILIES[name][1], "<s>", "</s>"]
    evil = "x" + "".join(control) + "y"
    plain = TALKS["several turns"]
    talk = [{**turn, "content": turn["content"] + evil} for turn in plain]
    ids = template.ids(talk)
    wanted = [token for token in template.ids(plain) if token in tokenizer.special_ids]
    assert [token for token in ids if token in tokenizer.special_ids] == wanted
    assert tokenizer.decode(ids, skip_special=False).count(evil) >= 2
    if template.tools is not None:  # names and descriptions of tools come from clients, too
        tools = copied(TOOLS)
        tools[0]["function"] |= {"description": evil, "parameters": {"properties": {evil: {"enum": [evil]}}}}
        found = [token for token in template.ids(plain, tools) if token in tokenizer.special_ids]
        assert found == [token for token in template.ids(plain, TOOLS) if token in tokenizer.special_ids]


@given(
    pieces=st.lists(st.sampled_from(["<|im_", "start|>", "end|>", "<", "|", "<s>", "\ufdd0", "\ufdd1", "a", " ", "\n"]))
)
def test_no_text_becomes_a_turn(pieces: list[str]) -> None:
    text = "".join(pieces)
    tokenizer, template = made_once()
    ids = template.ids([{"role": "user", "content": text}])
    names = [token for token in ids if token in tokenizer.special_ids]
    control = tokenizer.control_tokens
    assert names == [control["<|im_start|>"], control["<|im_end|>"], control["<|im_start|>"]]
    assert tokenizer.decode(ids, skip_special=False) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


_MADE: list[tuple[PretrainedTokenizer, ChatTemplate]] = []


def made_once() -> tuple[PretrainedTokenizer, ChatTemplate]:
    if not _MADE:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _MADE.append(ours(make_folder("chatml", Path(folder))))
    return _MADE[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10 ** 10000000 }}",
        "{% set ns = namespace(_x=1) %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'aaaaaaaaaa' }}{% endfor %}{% endfor %}",
        "{% for a in range(10000000000) %}{% endfor %}",
        "{{ '{0.__class__}'.format(1) }}", "{{ '{0.a}'.format_map({}) }}",
        "{{ messages[7].content + 1 }}",
        "{{ raise_exception('Conversation roles must alternate.') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)  # fmt: skip
def test_a_template_that_misbehaves_is_an_error_and_nothing_else(source: str, tmp_path: Path) -> None:
    """GHSA-69j4-grxj-j64p and what came before it: a downloaded model's template is a program."""
    tokenizer, template = ours(make_folder("plain", tmp_path, source))
    said = ""  # of what the sandbox does not give
    with contextlib.suppress(DataError):
        said = tokenizer.decode(template.ids([{"role": "user", "content": "a"}]), skip_special=False)
    assert said == ""


def test_a_model_without_a_template_says_how_it_can_be_used(tmp_path: Path) -> None:
    folder = make_folder("plain", tmp_path)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    _, template = ours(folder)
    with pytest.raises(DataError, match="/v1/completions"):
        template.ids([{"role": "user", "content": "a"}])


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(tmp_path: Path) -> None:
    folder = make_folder("chatml", tmp_path)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D{{ messages[0].content }}"},
             {"name": "tool_use", "template": "T{{ tools | length }}<tool_call>"}]  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer, template = ours(folder)
    assert tokenizer.decode(template.ids([{"role": "user", "content": "a"}])) == "Da"
    assert tokenizer.decode(template.ids([{"role": "user", "content": "a"}], TOOLS)) == "T1<tool_call>"


# Tool calls.

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(ToolCall, st.text("abcXYZ_-.019", min_size=1, max_size=9),
              st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=3)), min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.parametrize("form", [OURS, HERMES, LLAMA, MISTRAL], ids=lambda form: form.name)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=8), before=st.sampled_from(["", "I look. ", "a < b\n"]))
@example(calls=[ToolCall("f", {})], cuts=[6, 12], before="I look. ")  # text was given out, then half a mark
def test_calls_are_read_back_from_what_was_written_however_it_comes(
    form: ToolFormat, calls: list[ToolCall], cuts: list[int], before: str
) -> None:
    text = before + form.write(calls)
    reader = ToolReader(form)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    said = "".join(reader.add(text[start:end]) for start, end in itertools.pairwise(places))
    rest, found = reader.finish()
    assert (said + rest, found) == (before, calls)


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "}</tool_call>"}}</tool_call>', [("f", {"a": "}</tool_call>"})]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}', [("f", {})]),
        (HERMES, '<tool_call>\n{"name": "f"}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>', [("f", {}), ("g", {})]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        (LLAMA, '<|python_tag|>{"name": "f", "arguments": {"a": 1}}; {"name": "g"}', [("f", {"a": 1}), ("g", {})]),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abc"}]', [("f", {"a": 1})]),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": [2]}', [("f", {"a": 1}), ("g", {"b": [2]})]),
        (OURS, '<tool>{"name": "f", "arguments": {"a": 1}}</tool>', [("f", {"a": 1})]),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(form: ToolFormat, text: str, calls: list[tuple[str, Any]]) -> None:
    assert [(call.name, call.arguments) for call in form.read(text)] == calls


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "a <tool_call> is a tag"), (HERMES, '<tool_call>{"name": "f", "arg'), (HERMES, '<tool_call>{"name": 1}'),
        (LLAMA, '{"town": "Paris"}'), (LLAMA, "{not JSON}"), (LLAMA, 'The object is {"name": "f"}.'), (LLAMA, "  "),
        (MISTRAL, "[TOOL_CALLS] none"), (OURS, "<tool>" * 3), (OURS, "x <too"), (OURS, '<tool>{"name": "f"}</tool> and so on'),
    ],
)  # fmt: skip
def test_a_text_that_is_no_call_stays_text(form: ToolFormat, text: str) -> None:
    for size in (1, 3, 1000):
        reader = ToolReader(form)
        said = "".join(reader.add(text[start : start + size]) for start in range(0, len(text), size))
        rest, calls = reader.finish()
        assert (said + rest, calls) == (text, [])


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_an_imported_model_calls_a_tool_whole_and_streamed(name: str, tmp_path: Path) -> None:
    """Marks that are control tokens are seen, and what was called can be sent back."""
    tokenizer = load_tokenizer(make_folder(name, tmp_path))
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=2048)
    asked = {"messages": TALKS["one question"], "tools": copied(TOOLS), "tool_choice": "required", "seed": 1}
    towns = {"properties": {"town": {"enum": ["Köln", "Rome"]}}, "additionalProperties": False}
    asked["tools"][0]["function"]["parameters"] |= towns
    with serving(State([ServedModel("small", Engine(model, tokenizer, slots=2))])) as served:
        choice = served.ask("/v1/chat/completions", asked)[1]["choices"][0]
        assert choice["finish_reason"] == "tool_calls", choice
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["town"] in ("Köln", "Rome")
        deltas = [event["choices"][0]["delta"] for event in served.events("/v1/chat/completions", asked)[:-1]]
        (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert streamed[0]["function"] == call["function"]
        assert not any(delta.get("content") for delta in deltas)
        turns = [*asked["messages"], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "21"}]
        assert (
            served.ask("/v1/chat/completions", {**asked, "messages": turns, "tool_choice": "auto", "max_tokens": 5})[0]
            == 200
        )


def test_a_model_of_ours_is_told_of_tools_and_writes_calls() -> None:
    template = ChatTemplate(small_tokenizer())
    decoded = small_tokenizer().decode(template.ids(copied(TOOL_TALK), TOOLS), skip_special=False)
    assert decoded.startswith("<|system|>Tools, one a line:\n{")
    assert '"name": "weather"' in decoded
    assert '<|assistant|><tool>{"name": "weather", "arguments": {"town": "Köln"}}</tool><|end|><|tool|>{"deg' in decoded
    with pytest.raises(DataError, match="no names"):
        template.ids([{"role": "user", "content": "a", "name": "Bob"}])
