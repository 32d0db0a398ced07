"""Starting from a model that is there already: `start` and `init`, and tokens that it does not know yet."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from generation_models import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples
from tiny_run import STAGES, build_quietly, finished_run, tiny_recipe

from groundup import corpus
from groundup.alignment import LoraSettings, add_adapters, load_adapter, merge, save_adapter
from groundup.console import Console
from groundup.errors import ArtifactError, DataError, GroundupError, RecipeError
from groundup.evaluation import read_comparison
from groundup.evaluation.scorecard import figures_by_metric, read_scores
from groundup.files import value_digest
from groundup.generation import SamplingParams, chat_reply
from groundup.interop import load, load_model, save_model
from groundup.interop.start import start_config, start_model
from groundup.model import Transformer, count_parameters, extend_vocabulary, preset
from groundup.pipeline import plan
from groundup.preview import check_recipe, derived_values
from groundup.recipe import ModelSettings, Recipe, parse_recipe, recipe_toml
from groundup.run import Run
from groundup.stage import model_digest
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.tokenizer.stage import start_tokenizer

FAMILIES = ["ground-nano", "gpt2-nano", "llama-nano"]
BASE = "pretrain/model"


def first_run() -> Path:
    return finished_run().root


def texts() -> Path:
    return first_run().parent / "texts.jsonl"


def larger_tokenizer(folder: Path, *, vocab_size: int = 360, other_texts: bool = False) -> Path:
    """A tokenizer trained as the first run's was, but with more entries: it begins with the same ones."""
    documents = [document.text for document in corpus.stream_documents(first_run() / "corpus", "train")]
    if other_texts:
        documents = [document[::-1] for document in documents]
    Tokenizer.train(documents, vocab_size=vocab_size).save(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("multiple", [1, 64])
def test_new_rows_are_the_mean_and_old_logits_stay(name: str, multiple: int) -> None:
    model = random_model(name, vocab_multiple=multiple, tied_embeddings=name != "llama-nano")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.arange(20)[None] * 7
    with torch.no_grad():
        old = model(ids)
    extend_vocabulary(model, 530)
    with torch.no_grad():
        new = model(ids)
    assert new.shape[-1] == model.config.vocab_size == 530
    torch.testing.assert_close(new[..., :512], old, rtol=1e-5, atol=1e-5)
    # The logit of a mean row is the mean of the logits.
    torch.testing.assert_close(new[..., 512:], old.mean(-1, keepdim=True).expand(1, 20, 18), rtol=1e-4, atol=1e-4)
    assert model.n_parameters == count_parameters(model.config)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Transformer(model.config).parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in after.items():
        if key.startswith(("embed_tokens", "lm_head")):
            assert torch.equal(value[:512], before[key][:512])
            assert torch.equal(value[530:], torch.zeros_like(value[530:]))
            assert value.shape[0] % multiple == 0
        else:
            assert torch.equal(value, before[key])


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.integers(512, 700), min_size=1, max_size=4).map(sorted))
def test_an_extended_model_is_a_model_like_any_other(sizes: list[int]) -> None:
    model = Transformer(preset("ground-nano"))
    for size in sizes:
        extend_vocabulary(model, size)
    same = Transformer(preset("ground-nano", vocab_size=sizes[-1]))
    same.load_state_dict(model.state_dict())
    ids = torch.tensor([[0, sizes[-1] - 1]])
    assert torch.equal(model.eval()(ids), same.eval()(ids))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_are_never_taken_away() -> None:
    with pytest.raises(GroundupError, match="never taken away"):
        extend_vocabulary(random_model("ground-nano"), 511)


@pytest.mark.parametrize("place", ["", "pretrain", BASE])
def test_a_run_a_stage_or_a_folder_can_be_started_from(place: str) -> None:
    expected = load(first_run() / place)
    model = start_model(first_run() / place, tokenizer=expected.tokenizer)
    assert model.config == start_config(first_run() / place) == expected.model.config
    theirs = expected.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert start_tokenizer(first_run() / place).fingerprint == expected.tokenizer.fingerprint


def test_what_leaves_the_weights_their_shapes_may_change() -> None:
    changes = ModelSettings(context_length=128, dropout=0.1, attention=("window", "full"), window=16)
    model = start_model(first_run() / BASE, changes)
    assert (model.config.context_length, model.config.attention, model.config.dropout) == (128, ("window", "full"), 0.1)
    logits = model.eval()(torch.arange(100)[None])
    assert logits.shape == (1, 100, 320)
    plain = load_model(first_run() / BASE)[0]
    torch.testing.assert_close(logits[:, :16], plain(torch.arange(16)[None]))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_layers": 3}, "n_layers = 3"),
        ({"d_ff": 100}, "d_ff = 100"),
        ({"tied_embeddings": False}, "tied_embeddings = False"),
        ({"position": "learned"}, "position = 'learned'"),
        ({"preset": "gpt2"}, "preset = 'gpt2'"),
        ({"size": "1m"}, "size = '1m'"),
        ({"n_layers": 5, "bias": True}, "bias = True"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError, match=r"does not fit|has one") as raised:
        start_config(first_run(), ModelSettings(**changes))
    assert any(problem.where.endswith(named) for problem in raised.value.problems)
    assert len(raised.value.problems) == len(changes)


def test_a_learned_context_cannot_grow(tmp_path: Path) -> None:
    save_model(tmp_path / "gpt2", random_model("gpt2-nano"))
    with pytest.raises(RecipeError, match="context_length = 128"):
        start_config(tmp_path / "gpt2", ModelSettings(context_length=128))


def test_a_larger_tokenizer_that_begins_the_same_extends_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(larger_tokenizer(tmp_path))
    model = start_model(first_run() / BASE, tokenizer=tokenizer)
    assert model.config.vocab_size == tokenizer.vocab_size == 360
    old = load_model(first_run() / BASE)[0].embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight[:320], old)
    torch.testing.assert_close(model.embed_tokens.weight[320:], old.mean(0).expand(40, -1))


def test_a_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    other = load_tokenizer(larger_tokenizer(tmp_path, other_texts=True))
    with pytest.raises(DataError, match=r"\d+ \(b'.*' there, b'.*' here\).* and \d+ more") as raised:
        start_model(first_run() / BASE, tokenizer=other)
    assert "begins with the same entries" in str(raised.value)
    smaller = load_tokenizer(larger_tokenizer(tmp_path, vocab_size=310))
    with pytest.raises(DataError, match=r"310 \(missing here\)"):
        start_model(first_run() / BASE, tokenizer=smaller)


def test_a_model_without_a_tokenizer_is_no_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "bare", random_model("ground-nano"))
    own = start_tokenizer(first_run())
    start_model(tmp_path / "bare", tokenizer=own, console=Console())
    assert "cannot be compared" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="no tokenizer beside"):
        start_tokenizer(tmp_path / "bare")
    larger = load_tokenizer(larger_tokenizer(tmp_path / "tokenizer", vocab_size=600))
    if larger.vocab_size > 512:
        with pytest.raises(DataError, match="knows 512"):
            start_model(tmp_path / "bare", tokenizer=larger)


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first_run() / BASE, tmp_path / "copy"))
    assert model_digest(copy) == model_digest(first_run() / BASE) != model_digest(first_run() / "sft")
    weights = copy / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    assert model_digest(copy) != model_digest(first_run() / BASE)


def problems_of(recipe: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        check_recipe(recipe, "my.toml")
    return [str(problem) for problem in raised.value.problems]


def continued(*overrides: str) -> Recipe:
    recipe = tiny_recipe(texts(), "pretrain.tokens=1_500", *overrides)
    return parse_recipe(recipe_toml(recipe).replace('preset = "ground-nano"\n', ""), "tiny.toml")


def test_pretraining_goes_on_from_a_model(tmp_path: Path) -> None:
    recipe = continued(f'pretrain.init="{first_run() / BASE}"')
    run = build_quietly(recipe, tmp_path / "run", only=["pretrain"])
    before, after = finished_run().manifest("pretrain"), run.manifest("pretrain")
    assert before is not None
    assert after is not None
    # It begins where the other ended, not at ln V.
    assert after.summary["initial_loss"] < before.summary["initial_loss"] - 0.5
    assert after.summary["expected_initial_loss"] is None
    assert run.manifest("tokenizer").summary["vocab_size"] == 320  # type: ignore[union-attr]
    assert load_tokenizer(run.folder("tokenizer")).fingerprint == start_tokenizer(first_run()).fingerprint
    derived = {name: reason for name, _, reason in derived_values(recipe)}
    assert derived["model.n_layers"] == f"start {first_run() / BASE}"


def test_a_changed_model_to_start_from_is_noticed(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first_run() / BASE, tmp_path / "copy"))
    recipe = continued(f'pretrain.init="{copy}"')
    run = build_quietly(recipe, tmp_path / "run", only=["pretrain"])

    def states() -> dict[str, str]:
        return {one.stage.name: one.state for one in plan(recipe, run, only=["pretrain"])}

    assert set(states().values()) == {"done"}
    moved = copy.rename(tmp_path / "moved")
    recipe = continued(f'pretrain.init="{moved}"')
    assert set(states().values()) == {"done"}  # the same weights elsewhere are the same weights
    save_model(moved, random_model("ground-nano", vocab_size=320, context_length=64), start_tokenizer(first_run()))
    assert states() == {"corpus": "done", "tokenizer": "done", "shards": "done", "pretrain": "changed"}


def test_the_pipeline_extends_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = larger_tokenizer(tmp_path / "tokenizer")
    recipe = continued(f'pretrain.init="{first_run() / BASE}"', f'tokenizer.use="{tokenizer}"')
    check_recipe(recipe, "tiny.toml")
    run = build_quietly(recipe, tmp_path / "run")
    assert {stage: run.manifest(stage) is not None for stage in STAGES} == dict.fromkeys(STAGES, True)
    model, own = load_model(run.folder("sft") / "model")
    assert own is not None
    assert model.config.vocab_size == own.vocab_size == 360
    other = larger_tokenizer(tmp_path / "other", other_texts=True)
    wrong = continued(f'pretrain.init="{first_run() / BASE}"', f'tokenizer.use="{other}"')
    assert any("its ids are not those" in problem for problem in problems_of(wrong))


def test_assistants_start_from_a_model_without_text(tmp_path: Path) -> None:
    recipe = parse_recipe(
        f'[align.one]\nmethod = "sft"\nstart = "{first_run() / BASE}"\nexamples = 200\nepochs = 0.5\neval_every = 100\n'
        '[align.two]\nmethod = "sft"\nstart = "one"\nexamples = 200\nepochs = 0.5\neval_every = 100\n'
        '[evaluate]\ntasks = ["groundup:tasks"]\nlimit = 10\nmax_tokens = 4\n',
        "tiny.toml",
    )
    check_recipe(recipe, "tiny.toml")
    run = build_quietly(recipe, tmp_path / "run")
    made = sorted(path.name for path in run.root.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert made == ["evaluate", "one", "two"]
    scored = ["evaluate/before-one", "evaluate/one", "evaluate/two"]
    states = {one.stage.name: one.state for one in plan(recipe, Run(run.root))}
    assert states == dict.fromkeys(["one", "two", *scored], "done")
    assert [row["before"] is not None for row in read_comparison(run)["rows"]] == [True, True]
    model, tokenizer = load_model(run.folder("two") / "model")
    assert model.config == load_model(first_run() / BASE)[0].config
    assert tokenizer is not None


def test_a_changed_model_to_start_from_is_noticed_by_what_stands_on_it(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first_run() / BASE, tmp_path / "copy"))
    text = (
        '[align.one]\nmethod = "sft"\nstart = "{}"\n[align.two]\nmethod = "sft"\n[evaluate]\ntasks = "groundup:tasks"'
    )
    recipe = parse_recipe(text.format(copy), "my.toml", [f'pretrain.init="{first_run()}"'])
    before = {one.stage.name: one.fingerprint for one in plan(recipe, Run(tmp_path / "run"))}
    save_model(copy, random_model("ground-nano", vocab_size=320, context_length=64), start_tokenizer(first_run()))
    after = {one.stage.name: one.fingerprint for one in plan(recipe, Run(tmp_path / "run"))}
    assert {name for name in after if after[name] != before[name]} == {"one", "evaluate/before-one", "evaluate/one"}


def test_problems_of_a_start_are_told_before_anything_runs(tmp_path: Path) -> None:
    assert any("no model here" in one for one in problems_of(continued(f'pretrain.init="{tmp_path}"')))
    init = f'pretrain.init="{first_run()}"'
    found = problems_of(continued(init, "model.n_layers=7", "pretrain.sequence_length=32"))
    assert any("n_layers = 7: does not fit the weights" in one for one in found)
    with pytest.raises(RecipeError, match="keep one"):
        continued(init, 'model.size="1m"')


def somebody_elses(folder: Path) -> Path:
    """A Llama with a byte-level tokenizer of 300 entries that groundup did not train."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, special_tokens=["</s>"], show_progress=False
    )  # fmt: skip
    engine.train_from_iterator([document.text for document in corpus.stream_documents(first_run() / "corpus")], trainer)
    save_model(folder, random_model("llama-nano", vocab_size=engine.get_vocab_size()))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    return folder


def test_somebody_elses_model_and_tokenizer_go_through_the_pipeline_and_leave_as_they_came(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = somebody_elses(tmp_path / "theirs")
    recipe = parse_recipe(
        f'[corpus]\ninputs = ["{texts()}"]\nlanguages = []\n'
        f'[pretrain]\ninit = "{theirs}"\ntokens = 2000\nbatch_size = 4\nsequence_length = 32\nprecision = "float32"\n'
        "lr = 1e-3\nsample_tokens = 4\n"
        '[evaluate]\ntasks = ["bits_per_byte"]\n',
        "tiny.toml",
    )
    check_recipe(recipe, "tiny.toml")
    run = build_quietly(recipe, tmp_path / "run")
    folder = run.folder("pretrain") / "model"
    assert (folder / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    model, tokenizer = load_model(folder)
    hub, hub_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("Once upon a time")
    assert ids == hub_tokenizer.encode("Once upon a time", add_special_tokens=False)
    with torch.no_grad():
        batch = torch.tensor([ids])
        torch.testing.assert_close(model(batch), hub(batch).logits, atol=1e-5, rtol=1e-5)
        before = load_model(theirs)[0](batch)
    assert not torch.allclose(model(batch), before)


def test_somebody_elses_tokenizer_without_a_template_makes_no_chats(tmp_path: Path) -> None:
    found = problems_of(continued(f'pretrain.init="{somebody_elses(tmp_path / "theirs")}"', "corpus.languages=[]"))
    assert [problem.partition(": ")[0] for problem in found] == ["[align.sft]", '[evaluate] tasks = "groundup:tasks"']
    assert all("has no chat template" in problem for problem in found)


def test_somebody_elses_model_is_fine_tuned_by_its_own_template(tmp_path: Path) -> None:
    theirs = somebody_elses(tmp_path / "theirs")
    template = "{% for one in messages %}{{ one.role }}: {{ one.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (theirs / "chat_template.jinja").write_text(template)
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(f'{{"prompt": "Say {n}.", "response": "Well, {n}."}}\n' for n in range(40)))
    recipe = parse_recipe(
        f'[align.sft]\nstart = "{theirs}"\ndata = ["{data}"]\nbatch_size = 2\nepochs = 1\n'
        '[align.reward]\nstart = "sft"\n[align.ppo]\nstart = "sft"\nreward = "reward"\nrollouts = 4\nbatch_size = 4\n'
        'buffers = 1\nmax_tokens = 8\nheld_out = 2\n[evaluate]\ntasks = ["groundup:tasks"]\nlimit = 3\n',
        "tiny.toml", ["align.reward.examples=100", "align.reward.limit=8", "align.ppo.examples=100"],
    )  # fmt: skip
    run = build_quietly(recipe, tmp_path / "run")
    card = read_scores(run.folder("evaluate/ppo"))
    assert figures_by_metric(card)["exact_match"]["n"] == 3
    assert card["template"] == value_digest(template)
    model, tokenizer = load_model(run.folder("ppo") / "model")
    assert tokenizer is not None
    assert (run.folder("ppo") / "model" / "chat_template.jinja").read_text() == template
    said = chat_reply(model, tokenizer, [{"role": "user", "content": "Say 7."}], SamplingParams(max_tokens=5))
    assert len(said.ids) <= 5


def test_adapters_are_no_model_to_start_from_and_that_is_said(tmp_path: Path) -> None:
    theirs = somebody_elses(tmp_path / "theirs")
    (theirs / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}</s>{% endfor %}")
    model, tokenizer = load_model(theirs)
    add_adapters(model, LoraSettings(rank=2))
    save_adapter(tmp_path / "adapter", model, LoraSettings(rank=2), str(theirs))
    section = f'[align.dpo]\nstart = "{tmp_path / "adapter"}"\n[evaluate]\ntasks = []\n'
    found = problems_of(parse_recipe(section, "tiny.toml"))
    assert any("adapters of PEFT without the model that they belong to" in problem for problem in found)
    loaded, _ = load_model(theirs)
    load_adapter(tmp_path / "adapter", loaded)
    merge(loaded)
    save_model(tmp_path / "whole", loaded, tokenizer)
    check_recipe(parse_recipe(section.replace('/adapter"', '/whole"'), "tiny.toml"), "tiny.toml")
