"""Presets, thresholds and verdicts of the quality rules."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus import curate
from groundup.corpus.quality.lines import clean_lines, line_rules_of
from groundup.corpus.quality.rules import all_rules, first_failed, left_out, rules_for
from groundup.corpus.quality.signals import SIGNALS, signals
from groundup.errors import DataError, RecipeError
from groundup.recipe import CorpusSettings

CLASSICS = Path(__file__).parents[1] / "groundup" / "data" / "classics.jsonl"


def names(quality: list[str], thresholds: dict[str, float | bool] | None = None) -> list[str]:
    return [rule.name for rule in rules_for(quality, thresholds or {})]


def test_every_rule_has_one_threshold_a_known_signal_and_a_source() -> None:
    rules = all_rules()
    for name, rule in rules.items():
        assert (rule.least is None) != (rule.most is None), name
        assert rule.signal in SIGNALS, name
        assert rule.source, name
        assert name.split(".")[0] in {"gopher", "c4", "fineweb", "gentle"}, name
    assert len(set(rules)) == len(rules)


def test_published_thresholds() -> None:
    rules = all_rules()
    published = {
        "gopher.min_words": 50, "gopher.max_words": 100_000, "gopher.min_mean_word_length": 3,
        "gopher.max_mean_word_length": 10, "gopher.max_hash_signs": 0.1, "gopher.max_ellipses": 0.1,
        "gopher.max_bullet_lines": 0.9, "gopher.max_ellipsis_lines": 0.3, "gopher.min_alphabetic_words": 0.8,
        "gopher.min_stop_words": 2, "gopher.max_duplicate_lines": 0.3, "gopher.max_duplicate_paragraphs": 0.3,
        "gopher.max_duplicate_line_characters": 0.2, "gopher.max_duplicate_paragraph_characters": 0.2,
        "gopher.max_top_2gram_characters": 0.2, "gopher.max_top_3gram_characters": 0.18,
        "gopher.max_top_4gram_characters": 0.16, "gopher.max_duplicate_5gram_characters": 0.15,
        "gopher.max_duplicate_6gram_characters": 0.14, "gopher.max_duplicate_7gram_characters": 0.13,
        "gopher.max_duplicate_8gram_characters": 0.12, "gopher.max_duplicate_9gram_characters": 0.11,
        "gopher.max_duplicate_10gram_characters": 0.1, "c4.min_sentences": 5, "c4.max_curly_braces": 0,
        "c4.max_lorem_ipsum": 0, "fineweb.min_punctuated_lines": 0.12, "fineweb.max_short_lines": 0.67,
        "fineweb.max_duplicate_line_characters": 0.1, "fineweb.max_newlines_per_word": 0.3,
    }  # fmt: skip
    assert {name: rule.threshold for name, rule in rules.items() if not name.startswith("gentle.")} == published
    assert "0.01" in rules["fineweb.max_duplicate_line_characters"].source


def test_presets_are_what_their_papers_use() -> None:
    assert names(["none"]) == names([]) == []
    assert {name.split(".")[0] for name in names(["gopher"])} == {"gopher"}
    assert {name.split(".")[0] for name in names(["fineweb"])} == {"c4", "fineweb"}
    assert names(["fineweb", "c4"]) == names(["fineweb"])
    assert names(["gopher", "c4"]) == names(["c4", "gopher"])


def test_a_threshold_changes_switches_off_and_switches_on() -> None:
    rules = {rule.name: rule for rule in rules_for(["gopher"], {"gopher.min_words": 30, "gopher.max_words": False})}
    assert rules["gopher.min_words"].least == 30
    assert rules["gopher.min_words"].most is None
    assert "gopher.max_words" not in rules
    assert len(rules) == len(names(["gopher"])) - 1
    assert names(["none"], {"c4.min_sentences": 2, "c4.max_lorem_ipsum": True}) == [
        "c4.min_sentences",
        "c4.max_lorem_ipsum",
    ]
    assert names(["none"], {"c4.min_sentences": False}) == []
    assert rules_for([], {"c4.min_sentences": 0})[0].least == 0, "0 is a threshold, not false"
    assert rules_for([], {"c4.min_sentences": 1})[0].least == 1, "1 is a threshold, not true"


def test_all_problems_come_at_once_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError) as raised:
        rules_for(
            ["gofer", "none", "c4"],
            {
                "gopher.min_word": 3,
                "max_words": 5,
                "qqq": 1,
                "c4.min_sentences": -1,
                "c4.max_lorem_ipsum": float("nan"),
            },
        )
    text = str(raised.value)
    assert len(raised.value.problems) == 7
    for part in (
        "'gopher'?",
        "stands alone",
        "'gopher.min_words'?",
        "'gopher.max_words'?",
        "rules.toml",
        "published: 5",
    ):
        assert part in text


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=30),
    st.lists(st.floats(0, 1, width=32), min_size=30, max_size=30),
)
def test_the_first_failed_rule_in_order(words: list[int], shares: list[float]) -> None:
    columns = {
        "words": np.array(words, dtype=np.float32),
        "duplicate_lines": np.array(shares[: len(words)], dtype=np.float32),
    }
    rules = rules_for([], {"gopher.min_words": 50, "gopher.max_words": 100, "gopher.max_duplicate_lines": 0.3})
    wanted = []
    for n, share in zip(words, columns["duplicate_lines"], strict=True):
        fails = [n < 50, n > 100, share > np.float32(0.3)]
        wanted.append(fails.index(True) if any(fails) else -1)
    found = first_failed(columns, rules)
    assert found.dtype == np.int16
    assert found.tolist() == wanted
    assert first_failed(columns, []).tolist() == [-1] * len(words)


def test_a_value_at_the_threshold_is_kept() -> None:
    column = np.array([0.1, 0.8], dtype=np.float32)
    assert first_failed({"hash_signs": column[:1]}, rules_for([], {"gopher.max_hash_signs": True})).tolist() == [-1]
    rules = rules_for([], {"gopher.min_alphabetic_words": True})
    assert first_failed({"alphabetic_words": column[1:]}, rules).tolist() == [-1]


def test_gentle_keeps_the_classics_and_drops_what_is_broken() -> None:
    rules = rules_for(["gentle"], {})
    texts = [json.loads(line)["text"] for line in CLASSICS.read_text(encoding="utf-8").splitlines()]
    needed = sorted({rule.signal for rule in rules})
    kept = first_failed(signals(texts, needed), rules) < 0
    assert kept.mean() >= 0.99
    broken = [
        "",
        "1 2 3 4 5 6",
        "buy now\n" * 50,
        "QUJD" * 500 + " x y z",
        "a b c d e f g h",
        "lorem ipsum dolor sit amet",
        "# # # a",
    ]
    assert (first_failed(signals(broken, needed), rules) >= 0).all()


def test_gopher_keeps_technical_english() -> None:
    """With a tokenizer's words, punctuation would count and such a text would have too few alphabetic words."""
    text = "The call `open(path, mode='r')` returns a file object (see PEP 3116), and it fails with an error. " * 1
    lines = [
        text + f"Step {n} of the guide is about option --flag-{n} = {n * 7} that you have to set." for n in range(12)
    ]
    rules = rules_for(["gopher"], {name: False for name in names(["gopher"]) if "duplicate" in name or "top_" in name})
    columns = signals(["\n".join(lines)], sorted({rule.signal for rule in rules}))
    assert first_failed(columns, rules).tolist() == [-1]


TEXTS = {
    "en": (
        "The village library opens at nine, and the old keeper unlocks the heavy door with a key from her belt."
        " Children come after school to read about ships, while their parents talk quietly in the garden. On"
        " rainy days the lamps are lit early, and that makes the long room feel like the inside of a lantern."
        " Who would have guessed that the blue book was hidden behind the clock? She laughed, and went to fetch"
        " the ladder."
    ),
    "zh": (
        "村里的图书馆每天早上九点开门,老管理员用腰间的钥匙打开沉重的木门。放学以后,孩子们来这里阅读关于轮船的故事"
        ",父母在花园里轻声谈话。\n"
        "下雨的时候,灯很早就亮了,长长的房间像一盏灯笼。谁能想到,那本蓝色的书藏在时钟后面?她笑了起来,去拿梯子。第"
        "二天,邻居们带来了新鲜的面包和热茶。"
    ),
    "ja": (
        "村の図書館は朝九時に開き、年老いた管理人が腰の鍵で重い扉を開ける。放課後になると子どもたちが船の物語を読"
        "みに来て、親たちは庭で静かに話をする。\n"
        "雨の日には早くから明かりが灯り、長い部屋は提灯の中のようになる。青い本が時計の後ろに隠れていたと誰が思っ"
        "ただろうか。彼女は笑って、はしごを取りに行った。"
    ),
    "th": (
        "ห้องสมุดของหมู่บ้านเปิดตอนเก้าโมงเช้า บรรณารักษ์ชราใช้กุญแจที่เอวเปิดประตูไม้หนัก หลังเลิกเรียนเด็กๆ"
        " มาอ่านเรื่องเรือ ส่วนพ่อแม่คุยกันเบาๆ ในสวน\n"
        "วันที่ฝนตกไฟจะเปิดแต่หัวค่ำ ทำให้ห้องยาวดูเหมือนอยู่ในโคมไฟ ใครจะคิดว่าหนังสือสีฟ้าเล่มนั้นซ่อนอยู่หลังน"
        "าฬิกา เธอหัวเราะแล้วเดินไปหยิบบันได"
    ),
}


@pytest.mark.parametrize("preset", ["gopher", "c4", "fineweb", "gentle"])
@pytest.mark.parametrize("language", TEXTS)
def test_good_text_in_scripts_without_spaces_passes_as_english_does(language: str, preset: str) -> None:
    text, _ = clean_lines(TEXTS[language], line_rules_of([preset]))
    assert text == TEXTS[language]
    rules = rules_for([preset], {}, [language])
    measured = signals([text], sorted({rule.signal for rule in rules}))
    failed = first_failed(measured, rules, [language])[0]
    assert failed < 0, rules[failed]


def test_rules_that_mean_english_words_judge_english_documents_only() -> None:
    assert [rule.name for rule in left_out(["gopher", "c4"], {}, ["zh"])] == [
        "gopher.min_mean_word_length", "gopher.max_mean_word_length", "gopher.min_stop_words",
    ]  # fmt: skip
    assert left_out(["gopher"], {}, []) == left_out(["gopher"], {}, ["zh", "en"]) == []
    assert left_out(["gopher"], {"gopher.min_stop_words": False}, ["de"]) == []
    stop_words = rules_for([], {"gopher.min_stop_words": True}, ["zh", "en"])
    assert first_failed({"stop_words": np.zeros(2, np.float32)}, stop_words, ["zh", "en"]).tolist() == [-1, 0]
    with pytest.raises(RecipeError, match=r'thresholds\."gopher.min_stop_words" = 3.*English words.*zh.*false'):
        rules_for(["gopher"], {"gopher.min_stop_words": 3}, ["zh"])


def test_when_nothing_is_left_the_error_names_the_rule_that_took_the_wanted_language(tmp_path: Path) -> None:
    for number, language in enumerate(["en", "en", "en", "zh", "zh"]):
        (tmp_path / f"{number}.txt").write_text(f"{number}. {TEXTS[language]}", encoding="utf-8")
    settings = CorpusSettings(
        inputs=(str(tmp_path),), languages=("zh",), quality=("gopher",), thresholds={"gopher.min_words": 5000}
    )
    with pytest.raises(DataError, match=r'3 language, 2 gopher.min_words.*\n.*Set "gopher.min_words"'):
        curate(settings, tmp_path / "out")


def test_a_short_line_is_short_in_any_script() -> None:
    """A Chinese or Japanese sentence takes a third of the characters of an English one."""
    texts = [
        "The cat sat on the mat and looked at me.",
        "吾輩は猫である。名前はまだ無い。どこで生れたか。",
        "名前はまだ無い。",
        "고양이는 나를 보았다.",
    ]
    assert signals(["\n".join([line] * 3) for line in texts], ["short_lines"])["short_lines"].tolist() == [0, 0, 1, 1]
