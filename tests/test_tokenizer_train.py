"""Training: kinds and splits, samples by source within a budget, counts that cannot overflow, the textbook's merges."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.console import Console
from groundup.corpus import Document
from groundup.errors import DataError, GroundupError, RecipeError
from groundup.reference import bpe
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.tokenizer import sample as sampling
from groundup.tokenizer.letters import BYTE_OF_LETTER, LETTERS, spelled, unspelled
from groundup.tokenizer.sample import COUNTABLE_BYTES, SAMPLE_CHARACTERS, Sample, _pieces, sample
from groundup.tokenizer.special import CONTROL_TOKENS, control_tokens
from groundup.tokenizer.split import PATTERNS, cut_into_pieces, default_split, pre_tokenizer
from groundup.tokenizer.train import merges_of

WORDS = ["the", "king", "and", "1900", "birds", "don't", "sing:", "it's", "naïve", "—", "日本語", "über", "alles!"]


def prose(n_words: int, seed: int) -> str:
    rng = random.Random(seed)
    made = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(300)]
    weights = [1 / (place + 1) for place in range(300)]
    return " ".join(rng.choice(WORDS) if rng.random() < 0.1 else rng.choices(made, weights)[0] for _ in range(n_words))


TEXTS = [prose(2000, seed) for seed in range(4)] + ["aaaa aaaaa aaaaaaaa bananana ==== ======= \n\n\n   x"] * 3


def corpus(sizes: dict[str, list[int]]) -> list[Document]:
    """Documents of so many words from each source."""
    return [
        Document(f"{source}-{place}", prose(n_words, place + 31 * len(source)), source)
        for source, lengths in sizes.items()
        for place, n_words in enumerate(lengths)
    ]


def spec_of(tokenizer: Tokenizer) -> dict[str, object]:
    return json.loads(tokenizer._contents)


# --- The textbook


@pytest.mark.parametrize("split", list(PATTERNS))
def test_the_textbook_learns_the_same_merges_and_cuts_the_same(split: str) -> None:
    n_merges = 200
    merges = bpe.train(TEXTS, n_merges, PATTERNS[split])
    n_before = len(control_tokens(0))
    fast = Tokenizer.train(TEXTS, vocab_size=n_before + 256 + n_merges, split=split, spare_tokens=0)
    model = spec_of(fast)["model"]
    assert [tuple(map(unspelled, merge)) for merge in model["merges"]] == merges  # type: ignore[index]
    for text in [*TEXTS, "unseen: ß Ж 漢字 \u200b 12345", ""]:
        assert [index - n_before for index in fast.encode(text)] == bpe.encode(text, merges, PATTERNS[split])


def test_the_textbook_stops_where_no_pair_occurs_twice() -> None:
    assert bpe.train(["abc"], 10, PATTERNS["gpt2"]) == []
    assert bpe.train(["ab ab"], 10, PATTERNS["gpt2"]) == [(b"a", b"b")]


def test_letters_stand_for_bytes_one_to_one() -> None:
    assert sorted(BYTE_OF_LETTER.values()) == list(range(256))
    assert all(letter.isprintable() and not letter.isspace() for letter in LETTERS)
    assert unspelled(spelled(bytes(range(256)))) == bytes(range(256))
    assert (spelled(b" \n"), LETTERS) == ("ĠĊ", sorted(LETTERS))


# --- Kinds and splits


@pytest.mark.parametrize(("vocab_size", "split"), [(280, "qwen2"), (32_767, "qwen2"), (32_768, "llama3")])
def test_a_split_that_is_not_named_follows_from_the_size(vocab_size: int, split: str) -> None:
    assert default_split(vocab_size) == split
    derived = Tokenizer.train(TEXTS, vocab_size=vocab_size)
    assert derived.fingerprint == Tokenizer.train(TEXTS, vocab_size=vocab_size, split=split).fingerprint


@pytest.mark.parametrize(("split", "cut"), [("qwen2", 5), ("llama3", 2), ("gpt2", 1)])
def test_splits_cut_digits_by_ones_threes_and_not_at_all(split: str, cut: int) -> None:
    pieces = [piece for piece, _ in pre_tokenizer(split).pre_tokenize_str("12345")]
    assert len(pieces) == cut
    # With a cut of one's own behind it, gpt2 is made of other parts; it must be the same regex.
    text = "it's 123  \n\n x—y\t'll'  "
    own = [piece for piece, _ in pre_tokenizer(split, before=[pre_tokenizer_of_nothing()]).pre_tokenize_str(text)]
    assert own == [piece for piece, _ in pre_tokenizer(split).pre_tokenize_str(text)]


def pre_tokenizer_of_nothing() -> object:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Split("never in the text", "isolated")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_size_asked_for_is_the_size_given(kind: str) -> None:
    for vocab_size in (560, 640):
        assert Tokenizer.train(TEXTS, kind=kind, vocab_size=vocab_size).vocab_size == vocab_size


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_learned_tokens_compress(kind: str) -> None:
    tokenizer = Tokenizer.train(TEXTS, kind=kind, vocab_size=1000)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert n_bytes / sum(map(len, tokenizer.encode_batch(TEXTS))) > 1.8


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters", "rustbpe"])
def test_the_order_of_documents_changes_nothing(kind: str) -> None:
    trainer = {"kind": kind}
    if kind == "rustbpe":
        pytest.importorskip("rustbpe")
        trainer = {"trainer": kind}
    documents = corpus({"a": [900, 2000], "b": [60] * 8})
    for sample_bytes in (None, 9_000):
        trained = {
            Tokenizer.train(order, vocab_size=600, sample_bytes=sample_bytes, **trainer).fingerprint
            for order in (documents, documents[::-1], documents[5:] + documents[:5])
        }
        assert len(trained) == 1


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_control_tokens_of_ones_own_stand_behind_those_of_every_tokenizer(kind: str, tmp_path: Path) -> None:
    own = ["<think>", "[INST]"]
    Tokenizer.train([*TEXTS, "<think> [INST] " * 50], kind=kind, vocab_size=640, control_tokens=own).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (type(tokenizer), tokenizer.role_id("tool")) == (Tokenizer, 6)
    assert list(tokenizer.vocab().values())[:13] == [*CONTROL_TOKENS, *own, *control_tokens(4)[7:]]
    every = control_tokens(4, own)
    assert tokenizer.encode("".join(every), allowed_special=every) == list(range(13)) == sorted(tokenizer.special_ids)
    assert not tokenizer.special_ids & set(tokenizer.encode("<think>[INST] <think"))


@pytest.mark.parametrize("name", ["the", " ", "", "<<<", "\ud800>a<", "<|end|>", "<|spare_0|>"])
def test_a_control_token_that_text_could_spell_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="control_tokens"):
        Tokenizer.train(TEXTS, vocab_size=640, control_tokens=[name])


def test_vocabulary_and_merges_are_plain_objects() -> None:
    tokenizer = Tokenizer.train(TEXTS, vocab_size=400)
    vocabulary, merges = tokenizer.vocab(), tokenizer.merges()
    assert [vocabulary[index] for index in range(7)] == list(CONTROL_TOKENS)
    assert [left + right for left, right in merges] == [vocabulary[11 + 256 + at] for at in range(len(merges))]
    assert Tokenizer.train(TEXTS, kind="unigram", vocab_size=400).merges() == []


def test_it_is_trained_on_a_file_by_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / "texts" / "text.txt", tmp_path / "chapter.tex"]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text(TEXTS[0], encoding="utf-8")
    trained = {Tokenizer.train(name, vocab_size=400).fingerprint for name in (paths[0].parent, *map(str, paths))}
    assert trained == {Tokenizer.train([TEXTS[0]], vocab_size=400).fingerprint}
    with pytest.raises(DataError, match=r"missing\.txt"):
        Tokenizer.train("missing.txt")


# --- Samples


@pytest.mark.parametrize("run", ["\u0301\u0328", "a", " ", "7", "_\u0301", "中"])
def test_no_word_is_so_long_that_a_trainer_takes_the_square_of_it(run: str) -> None:
    """0.2 MB of combining marks took a BPE 41 seconds, and 0.8 MB ended a Unigram with a segmentation fault."""
    text = f"the king{run * 10_000} and"
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    assert max(len(word) for piece in pieces for word, _ in pre_tokenizer("gpt2").pre_tokenize_str(piece)) < 1100
    prose_pieces = list(cut_into_pieces(TEXTS[0], SAMPLE_CHARACTERS))
    assert list(_pieces(TEXTS[0])) == prose_pieces


def kept(chosen: Sample) -> list[str]:
    return sorted(chosen.pieces())


def test_what_fits_is_kept_whole() -> None:
    documents = corpus({"a": [5000, 3], "b": [70]})
    chosen = sample(documents, 1 << 20)
    assert chosen.is_whole
    n_bytes = sum(len(document.text.encode()) for document in documents)
    assert chosen.seen_bytes == chosen.kept_bytes == n_bytes
    pieces = kept(chosen)
    assert sum(len(piece.encode()) for piece in pieces) == n_bytes
    assert len(pieces) > len(documents)


@given(
    lengths=st.lists(st.integers(0, 400), max_size=12),
    most_bytes=st.integers(1, 6000),
    rng=st.randoms(use_true_random=False),
)
def test_a_sample_keeps_to_its_budget_in_any_order(lengths: list[int], most_bytes: int, rng: random.Random) -> None:
    documents = [Document(str(place), "x" * length, "s") for place, length in enumerate(lengths)]
    chosen = sample(documents, most_bytes)
    pieces = kept(chosen)
    total = sum(map(len, pieces))
    assert total == chosen.kept_bytes
    assert chosen.seen_bytes == sum(lengths)
    assert total <= most_bytes or len(pieces) == 1
    if sum(lengths) <= most_bytes:
        assert total == sum(lengths)
    rng.shuffle(documents)
    assert kept(sample(documents, most_bytes)) == pieces


def test_every_source_gives_its_share() -> None:
    # One long book, many short pages, some letters: 6/10, 3/10 and 1/10 of the text.
    documents = corpus({"book": [60_000], "pages": [600] * 50, "letters": [100] * 100})
    marked = [
        Document(document.id, document.text.replace("the", mark), document.source)
        for document, mark in ((document, document.source[0].upper() * 3) for document in documents)
    ]
    sizes = Counter[str]()
    for document in marked:
        sizes[document.source] += document.text.count(document.source[0].upper() * 3)
    chosen = sample(marked, sum(len(document.text) for document in marked) // 3)
    assert not chosen.is_whole
    text = "\n".join(chosen.pieces())
    for source, count in sizes.items():
        share = text.count(source[0].upper() * 3) / count
        assert 0.15 < share < 0.55, (source, share)


def test_a_sample_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    documents = corpus({"a": [3000] * 4})
    Tokenizer.train(documents, vocab_size=300, sample_bytes=20_000, console=Console())
    said = capsys.readouterr().err
    assert "KiB of " in said
    assert "every source" in said
    Tokenizer.train(documents, vocab_size=300, console=Console())
    assert capsys.readouterr().err == ""


def test_unigram_is_given_few_words_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    marks = "".join(chr(draw.randrange(0x300, 0x370)) for _ in range(20_000))
    chosen = sample([prose(20_000, 1), marks], 1 << 20)
    monkeypatch.setattr(sampling, "RARE_WORD_BYTES", 3000)
    given = list(chosen.pieces_of_words())
    assert sum(len(piece.encode()) for piece in given if "\u0300" <= piece[0] < "\u0370") <= 3000
    assert chosen.left_out_bytes >= 37_000 - 500
    assert Counter(prose(20_000, 1).split()) <= Counter(" ".join(given).split())
    rules = sample([f"{'=' * 80} rule\n" * 500], 1 << 20)
    assert "".join(rules.pieces_of_words()).count("=" * 80) == 500  # what comes again and again is no more work
    Tokenizer.train([prose(20_000, 1), marks[:4000]], kind="unigram", vocab_size=400, console=Console())
    assert "of words of more than 24 characters are left out" in capsys.readouterr().err


def test_a_text_without_any_place_to_cut_is_sampled_too() -> None:
    text = "。" * 3_000_000  # 9 MB
    chosen = sample([Document("1", text, "s")], 4_000_000)
    assert 0 < chosen.kept_bytes <= 4_000_000


@pytest.mark.parametrize("size", [SAMPLE_CHARACTERS, 1 << 16])
def test_pieces_are_cut_where_every_split_cuts(size: int) -> None:
    text = prose(40_000, 3)
    pieces = list(cut_into_pieces(text, size))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    for split in PATTERNS:
        whole = [piece for piece, _ in pre_tokenizer(split).pre_tokenize_str(text)]
        apart = [piece for part in pieces for piece, _ in pre_tokenizer(split).pre_tokenize_str(part)]
        assert whole == apart


# --- Counts


def test_no_pair_can_be_counted_beyond_what_a_trainer_counts_with() -> None:
    """Both trainers count pairs in signed 32 bits. The most frequent pair of all: a text of one letter."""
    assert COUNTABLE_BYTES - 1 <= 2**31 - 1
    assert Sample(10**12).most_bytes == COUNTABLE_BYTES
    assert Sample(1000).most_bytes == 1000


@given(texts=st.lists(st.text(alphabet="ab é中", max_size=60), max_size=8), most_bytes=st.integers(1, 200))
def test_a_pair_stands_at_most_once_a_byte(texts: list[str], most_bytes: int) -> None:
    """The arithmetic behind the bound, with small numbers: pairs of neighbours in a sample are fewer than its bytes."""
    chosen = sample(texts, most_bytes)
    if chosen.kept_bytes > most_bytes:  # one piece that is larger than the whole budget
        return
    pairs = Counter[tuple[int, int]]()
    words = Counter[bytes]()
    for piece in chosen.pieces():
        value = piece.encode()
        words[value] += 1
        pairs.update(itertools.pairwise(value))
    assert sum(pairs.values()) <= max(0, most_bytes - 1)
    assert sum(count * len(word) for word, count in words.items()) <= most_bytes


# --- rustbpe


def test_rustbpe_gives_a_bpe_that_compresses_as_well() -> None:
    pytest.importorskip("rustbpe")
    texts = [prose(20_000, seed) for seed in range(10, 13)]
    for split in PATTERNS:
        usual = Tokenizer.train(texts, vocab_size=1200, split=split)
        fast = Tokenizer.train(texts, vocab_size=1200, split=split, trainer="rustbpe")
        assert fast.vocab_size == usual.vocab_size
        assert fast.kind == "bpe"
        counts = [sum(map(len, tokenizer.encode_batch(texts))) for tokenizer in (usual, fast)]
        assert abs(counts[1] / counts[0] - 1) < 0.001
        tokens = [{tokenizer.token_bytes(index) for index in range(1200)} for tokenizer in (usual, fast)]
        assert len(tokens[0] & tokens[1]) > 0.97 * 1200
        text = "unseen: ß Ж 漢字 1234 \n\n <|end|>"
        assert fast.decode(fast.encode(text)) == text
        assert fast.choose_engine() == usual.choose_engine()


def test_without_rustbpe_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(GroundupError, match=r"pip install 'groundup\[fast\]'"):
        Tokenizer.train(TEXTS, trainer="rustbpe")


def test_ranks_that_are_no_bpe_are_refused() -> None:
    single = [bytes([value]) for value in range(256)]
    good = [*single, b"ab", b"cd", b"abcd", b"abc"]
    ranks = {token: rank for rank, token in enumerate(good)}
    assert merges_of(good, ranks) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"ab", b"c")]
    bad = [*single, b"ab", b"abcd"]
    with pytest.raises(GroundupError, match="not made of two"):
        merges_of(bad, {token: rank for rank, token in enumerate(bad)})
