"""Constrained output: what is written parses, validates and ends where it may, whatever the model's logits."""

import functools
import json
import re
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from generation_models import TEXT, small_tokenizer

from groundup.errors import GroundupError
from groundup.generation import Constraint, SamplingParams, grammar
from groundup.generation.sampling import sample
from groundup.tokenizer import Tokenizer

pytest.importorskip("llguidance")
KINDS = ["bpe", "wordpiece", "unigram", "characters"]
N_UNUSED = 5  # rows of the model that stand for no token
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@functools.cache
def tokenizer_of(kind):
    text = TEXT + json.dumps(PERSON) + "".join(map(chr, range(32, 127)))
    return Tokenizer.train([text] * 3, kind=kind, vocab_size=640, spare_tokens=2)


def write(constraint, tokenizer, seed, n=200):
    """Tokens drawn at random among those allowed, and whether they were ended by an end token."""
    vocab_size = tokenizer.vocab_size + N_UNUSED
    matcher, generator = constraint.compile(tokenizer, vocab_size), np.random.default_rng(seed)
    ids = []
    while len(ids) < n:
        mask = matcher.mask().numpy()
        assert mask.shape == (vocab_size,)
        assert not mask[tokenizer.vocab_size :].any()
        assert {bool(mask[end]) for end in tokenizer.end_ids} == {matcher.is_complete}
        assert not mask[sorted(tokenizer.special_ids - tokenizer.end_ids)].any()
        token = int(generator.choice(np.flatnonzero(mask)))
        if token in tokenizer.end_ids or (matcher.is_complete and generator.random() < 0.2):
            return ids, True
        matcher.advance(token)
        ids.append(token)
    return ids, False


def text_of(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids)).decode()  # strictly: no text is cut in a character


@pytest.mark.parametrize("kind", KINDS)
def test_json_of_every_kind_of_tokenizer_is_valid(kind):
    tokenizer, constraint = tokenizer_of(kind), Constraint.json_schema(PERSON)
    for seed in range(20):
        ids, is_finished = write(constraint, tokenizer, seed)
        assert is_finished
        jsonschema.Draft202012Validator(PERSON).validate(json.loads(text_of(tokenizer, ids)))


def test_every_schema_of_the_suite_is_held_or_refused_by_name():
    cases = json.loads((Path(__file__).parent / "data" / "json_schemas.json").read_text())["cases"]
    tokenizer, n_held, n_finished, refused = small_tokenizer(), 0, 0, set()
    for file, description, schema in cases:
        try:
            constraint = Constraint.json_schema(schema)
            constraint.compile(tokenizer, tokenizer.vocab_size)
        except GroundupError as error:
            reason = str(error).rsplit("': ", 1)[-1]
            refused |= set(re.findall(r'"([^"]+)"', reason)) if reason.startswith("Unimplemented") else set()
            known = r"Unimplemented keys|oneOf|Unsatisf|Resource|format|patternProperty|Expected|digits|no token|object"
            assert re.search(known, reason), (file, description, reason)
            continue
        n_held += 1
        for seed in range(3):
            ids, is_finished = write(constraint, tokenizer, seed)
            n_finished += is_finished
            if is_finished:
                text = text_of(tokenizer, ids)
                assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (file, description, text)
    assert n_held > 0.4 * len(cases)
    assert n_finished >= 2.5 * n_held
    listed = set(re.findall(r"`(\S+?)`", Constraint.json_schema.__doc__.split("refused by name:")[1]))
    assert refused <= listed


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_written_whole_and_each_can_be(kind):
    tokenizer = tokenizer_of(kind)
    choices = ["yes", "yesterday", 'a "quoted" one', "back\\slash", "/x/", " one  two ", "naïve 🙂"]
    choices += ["two\nlines", "ß"] if kind != "characters" else []  # characters of the training text alone there
    texts = {text_of(tokenizer, write(Constraint.choices(choices), tokenizer, seed)[0]) for seed in range(150)}
    assert texts == set(choices)


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-z]+", "(é|ß|🙂){2,3}", "a*b?", r"\d+(\.\d\d)?", "(?i)yes|no"])
def test_a_pattern_is_matched_whole(pattern):
    for seed in range(20):
        ids, is_finished = write(Constraint.regex(pattern), small_tokenizer(), seed)
        text = text_of(small_tokenizer(), ids)
        assert re.fullmatch(pattern, text) if is_finished else len(ids) == 200


def test_tokens_are_taken_back():
    tokenizer, generator = small_tokenizer(), np.random.default_rng(0)
    matcher = Constraint.json_schema(PERSON).compile(tokenizer, tokenizer.vocab_size)
    masks, ids = [matcher.mask()], []
    for _ in range(12):
        ids.append(int(generator.choice(np.flatnonzero(masks[-1].numpy()))))
        matcher.advance(ids[-1])
        masks.append(matcher.mask())
    for n in (1, 4, 7):
        matcher.rollback(n)
        del masks[-n:], ids[-n:]
        assert matcher.mask().equal(masks[-1])
    assert ids == []


def test_matchers_of_one_grammar_do_not_disturb_each_other():
    tokenizer, constraint = small_tokenizer(), Constraint.choices(["ab", "ac"])
    first, second = (constraint.compile(tokenizer, tokenizer.vocab_size) for _ in range(2))
    start = second.mask()
    first.advance(int(start.nonzero()[0, 0]))
    assert second.mask().equal(start)
    assert not first.mask().equal(start)


def test_a_masked_draw_is_a_token_of_the_grammar():
    tokenizer = small_tokenizer()
    matcher = Constraint.regex("[0-9]").compile(tokenizer, tokenizer.vocab_size)
    logits = -np.square(np.arange(tokenizer.vocab_size, dtype=np.float32))[None]  # token 0 would be by far the best
    token = sample(torch.from_numpy(logits), SamplingParams(temperature=0), [0], [0], masks=[matcher.mask()])
    assert tokenizer.token_bytes(token.item()).isdigit()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Constraint.json_schema("{"), "Expecting"),
        (lambda: Constraint.json_schema("[1]"), "object"),
        (lambda: Constraint.json_schema({"type": object}), "JSON"),
        (lambda: Constraint.json_schema({"not": {}}), "not"),
        (lambda: Constraint.json_schema({"$ref": "http://example.com/schema"}), "http://example.com/schema"),
        (lambda: Constraint.json_schema({"$ref": "file:///etc/passwd"}), "file:///etc/passwd"),
        (lambda: Constraint.json_schema({"enum": ["x" * 70_000]}), "at most 65536"),
        (lambda: Constraint.json_schema("[" * 100_000), "recursion"),
        (lambda: Constraint.regex("[a"), r"\[a"),
        (lambda: Constraint.regex("(?=a)b"), "look-around"),
        (lambda: Constraint.regex("a" * 70_000), "at most 65536"),
        (lambda: Constraint.regex(None), "regex = None"),
        (lambda: Constraint.choices([]), r"choices = \[\]"),
        (lambda: Constraint.choices("yes"), "choices = 'yes'"),
        (lambda: Constraint.choices(["a", ""]), "choices = "),
        (lambda: Constraint.choices(["a", 1]), "choices = "),
        (lambda: SamplingParams(constraint={"type": "object"}), "constraint = "),
    ],
)
def test_what_is_no_grammar_is_an_error_in_words(make, named):
    with pytest.raises(GroundupError, match=named):
        make()


@pytest.mark.parametrize(
    "pattern", ["(a{1000}){1000}", "(x+x+)+y", "(a*)*b", "(.{0,1000}a){50}", "((a|b)?){3000}", ".*a.{40}"]
)
def test_patterns_made_to_take_forever_do_not(pattern):
    started = time.process_time()
    try:
        write(Constraint.regex(pattern), small_tokenizer(), 0, n=20)
    except GroundupError as error:
        told = str(error)
    else:
        told = ""
    assert told == "" or "cannot be followed" in told or pattern[:10] in told
    assert time.process_time() - started < 5


def test_a_choice_that_the_vocabulary_cannot_spell_is_an_error():
    tokenizer = tokenizer_of("characters")
    with pytest.raises(GroundupError, match="no token of the vocabulary fits"):
        write(Constraint.choices(["a\tb"]), tokenizer, 0)


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(grammar.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(GroundupError, match=r"pip install 'groundup\[grammar\]'"):
        Constraint.regex("a")


def test_what_was_compiled_is_kept_within_bounds():
    for number in range(100):
        Constraint.choices([str(number)]).compile(small_tokenizer(), small_tokenizer().vocab_size)
    assert grammar._compiled.cache_info().currsize <= 64
