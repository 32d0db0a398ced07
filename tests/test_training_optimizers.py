"""Optimizers against their textbook forms, parameters in their groups, and what a recipe may say of both."""

from __future__ import annotations

import fnmatch
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cost import config_of
from test_training_loop import QUIET, interrupted_at, make_job, weights

from groundup.distributed import current_world
from groundup.errors import ArtifactError, GroundupError, Interrupted, RecipeError
from groundup.model import Transformer, cost, preset
from groundup.preview import check_recipe, derived_values
from groundup.recipe import GroupSettings, OptimizerSettings, parse_recipe, recipe_toml, resolve, resolve_optimizer
from groundup.reference.optimizers import adafactor_step, lion_step, muon_step
from groundup.training import TrainingJob, muon, optimizers, train
from groundup.training.muon import Muon, orthogonalize
from groundup.training.optimizers import (
    Optimizers,
    check_optimizer,
    describe_groups,
    group_parameters,
    is_matrix,
    scale_to_norm,
    squared_norm,
)

ALL = ("muon", "adamw", "lion", "adafactor")


@pytest.fixture(autouse=True)
def _library_of_lion(request: pytest.FixtureRequest) -> None:
    """Lion needs a library that not everyone installs."""
    if "lion" in request.node.name:
        pytest.importorskip("pytorch_optimizer")


def settings_of(optimizer: str, **over: object) -> OptimizerSettings:
    return OptimizerSettings(optimizer=optimizer, **over)


def random_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-2


class Pair(torch.nn.Module):
    """A matrix and a vector."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        self.matrix = torch.nn.Parameter(torch.randn(rows, cols, generator=generator))
        self.vector = torch.nn.Parameter(torch.randn(cols, generator=generator))


# --- Against the textbook


@given(
    n=st.integers(1, 5), rows=st.integers(1, 20), cols=st.integers(1, 20), n_steps=st.integers(1, 4),
    stack=st.sampled_from([None, 2]), limit=st.sampled_from([1, 2000, 1 << 20]),
)  # fmt: skip
def test_muon_in_batches_is_the_textbook_s(n, rows, cols, n_steps, stack, limit):
    """However many matrices fit into one batch, and whether they are parameters of their own or a stack of experts."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, cols) if stack is None else (stack, rows, cols)
    start = [torch.randn(shape, generator=generator) for _ in range(n)]
    parameters = [torch.nn.Parameter(value.clone()) for value in start]
    mine = Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1)
    plain = [value.reshape(-1, rows, cols) for value in start]
    expected = [(matrix, torch.zeros(rows, cols)) for stacked in plain for matrix in stacked]
    before = dict(muon.BATCH_BYTES)
    muon.BATCH_BYTES["cpu"] = limit
    try:
        for _ in range(n_steps):
            gradients = [torch.randn(shape, generator=generator) for _ in range(n)]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            mine.step()
            flat = [matrix for gradient in gradients for matrix in gradient.reshape(-1, rows, cols)]
            expected = [
                muon_step(weight, gradient, momentum, lr=0.02, beta=0.9, weight_decay=0.1)
                for (weight, momentum), gradient in zip(expected, flat, strict=True)
            ]
    finally:
        muon.BATCH_BYTES.update(before)
    found = torch.cat([parameter.detach().reshape(-1, rows, cols) for parameter in parameters])
    torch.testing.assert_close(found, torch.stack([weight for weight, _ in expected]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_directions_do_not_depend_on_the_gradient_s_size(dtype, size):
    matrix = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(3))
    found = orthogonalize(matrix * size, dtype=dtype).float()
    expected = orthogonalize(matrix)
    assert (found - expected).norm() < 0.025 * expected.norm()


def test_lion_is_the_textbook_s():
    model = Pair(6, 4)
    settings = settings_of("lion", lr=0.01, weight_decay=0.5, beta1=0.9, beta2=0.98)
    mine = Optimizers(model, settings, torch.float32)
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(5):
        random_gradients(model, step)
        for name, parameter in model.named_parameters():
            decay = 0.5 if name == "matrix" else 0.0
            weight, momentum = expected[name]
            expected[name] = lion_step(
                weight, parameter.grad, momentum, lr=0.01, beta1=0.9, beta2=0.98, weight_decay=decay
            )
        mine.step(1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name][0], atol=1e-6, rtol=1e-5)


def test_adafactor_is_the_textbook_s():
    model = Pair(6, 4)
    mine = Optimizers(model, settings_of("adafactor", lr=0.3, weight_decay=0.5), torch.float32)
    weight, rows, cols = model.matrix.detach().clone(), torch.zeros(6, 1), torch.zeros(1, 4)
    for step in range(1, 20):  # from step 12 on, 1 / √step is less than the rate
        random_gradients(model, step)
        weight, rows, cols = adafactor_step(weight, model.matrix.grad, rows, cols, step, lr=0.3, weight_decay=0.5)
        mine.step(1.0)
    torch.testing.assert_close(model.matrix.detach(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ALL)
def test_decay_falls_on_matrices_only(optimizer):
    model = Transformer(preset("gpt2-nano"))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    Optimizers(model, settings_of(optimizer, weight_decay=0.5, lr=0.1, muon_lr=0.1), torch.float32).step(1.0)
    for parameter in model.parameters():
        expected = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
@pytest.mark.parametrize("parts", ["qwen3", "gpt2", "experts with biases"])
def test_the_state_is_as_large_as_counted(parts, optimizer):
    config = config_of(parts)
    model = Transformer(config)
    mine = Optimizers(model, settings_of(optimizer), torch.float32)
    random_gradients(model, 0)
    mine.step(1.0)
    assert sum(value.nbytes for value in mine.state_dict().values()) == cost.optimizer_bytes(config, optimizer)


@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), cut=st.integers(0, 9))
def test_the_norm_is_the_same_bits_however_rows_are_shared(shapes, cut):
    whole = Pair(*shapes[0])
    others = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    generator = torch.Generator().manual_seed(5)
    for parameter in others:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parts = []
    for parameter in others:
        for rows in (slice(0, cut), slice(cut, None)):
            part = torch.nn.Parameter(parameter.detach()[rows])
            part.grad = parameter.grad[rows].clone()
            parts.append(part)
    squared = float(squared_norm(others))
    assert float(squared_norm(parts)) == pytest.approx(squared, rel=1e-14)
    assert squared == pytest.approx(sum(float(p.grad.double().square().sum()) for p in others), rel=1e-5)
    whole.matrix.grad = whole.vector.grad = None


def test_gradients_below_the_limit_are_left_alone():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    for limit in (5.0, 6.0, 0.0):
        scale_to_norm([parameter], limit, 5.0)
        assert parameter.grad.tolist() == [3.0, 0.0, 4.0]
    scale_to_norm([parameter], 2.5, 5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([1.5, 0.0, 2.0]))


# --- Checkpoints


@pytest.mark.parametrize("stop_at", [0, 2])
@pytest.mark.parametrize("optimizer", ALL)
def test_every_optimizer_resumes_to_the_same_bits(tmp_path, optimizer, stop_at):
    groups = [GroupSettings(match="layers.0.*", lr_scale=0.5), GroupSettings(match="embed_tokens*", frozen=True)]
    options = {"optimizer": optimizer, "n_steps": 4, "groups": groups, "weight_decay": 0.1}
    whole = make_job(tmp_path / "whole", **options)
    before = weights(whole)
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(stop_at, make_job(tmp_path / "parts", **options)), current_world(), QUIET)
    parts = make_job(tmp_path / "parts", **options)
    train(parts, current_world(), QUIET)
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(parts).items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    assert [name for name, value in before.items() if torch.equal(value, expected[name])] == ["embed_tokens.weight"]


@pytest.mark.parametrize("optimizer", ALL)
def test_a_state_goes_into_other_optimizers_of_the_same_kind(optimizer):
    models = [Transformer(preset("ground-nano"), seed=4) for _ in range(2)]
    one, other = (Optimizers(model, settings_of(optimizer), torch.float32) for model in models)
    for step in range(3):
        random_gradients(models[0], step)
        one.step(1.0)
    models[1].load_state_dict(models[0].state_dict())
    saved = one.state_dict()
    other.load_state_dict({name: value.clone() for name, value in saved.items()})
    for model, mine in zip(models, (one, other), strict=True):
        random_gradients(model, 9)
        mine.step(0.5)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight is missing"):
        other.load_state_dict({name: value for name, value in saved.items() if not name.startswith("embed")})
    with pytest.raises(ArtifactError, match="unknown here"):
        other.load_state_dict({**saved, "layers.9.weight/exp_avg": torch.zeros(1)})


def test_a_checkpoint_from_before_the_first_update_can_be_resumed(tmp_path):
    """The first step of float16 overflows as a rule: its update is left out, and there is no state yet."""
    options = {"on_spike": "skip", "n_steps": 4, "precision": "float16"}
    with pytest.raises(Interrupted):
        train(interrupted_at(0, spoiled(make_job(tmp_path / "a", **options))), current_world(), QUIET)
    saved = load_file(tmp_path / "a" / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert saved == {}
    summary = train(make_job(tmp_path / "a", **options), current_world(), QUIET)
    assert summary["steps"] == 4


def spoiled(job: TrainingJob) -> TrainingJob:
    """The job, whose first training pass has gradients too large for float16."""
    passes = itertools.count()

    def poison(module, arguments, hidden):
        if module.training and next(passes) == 0:
            hidden.register_hook(lambda gradient: gradient * float("inf"))
        return hidden

    job.model.layers[1].register_forward_hook(poison)
    return job


# --- Groups


NAMES = list(cost.parameter_shapes(preset("ground-nano")))
PATTERNS = ["*", "layers.*", "layers.0.*", "*.weight", "embed_tokens*", "norm.weight", "*proj*", "layers.1.mlp.*"]


def matching(pattern: str) -> list[str]:
    return [name for name in NAMES if fnmatch.fnmatchcase(name, pattern)]


@given(
    patterns=st.lists(st.sampled_from(PATTERNS), max_size=4, unique=True), frozen=st.lists(st.booleans(), min_size=4),
    optimizer=st.sampled_from(ALL),
)  # fmt: skip
def test_every_parameter_is_in_one_group_and_the_first_match_counts(patterns, frozen, optimizer):
    shapes = cost.parameter_shapes(preset("ground-nano"))
    groups = [
        GroupSettings(match=pattern, frozen=True) if ice else GroupSettings(match=pattern, lr_scale=0.5)
        for pattern, ice in zip(patterns, frozen, strict=False)
    ]
    settings = settings_of(optimizer, groups=groups)
    covered = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in NAMES]
    shadowed = any(
        all(any(fnmatch.fnmatchcase(name, above) for above in patterns[:place]) for name in matching(pattern))
        for place, pattern in enumerate(patterns)
    )
    if shadowed or (all(covered) and all(frozen[: len(patterns)])):
        with pytest.raises(RecipeError, match=r"group above it|nothing is left"):
            group_parameters(shapes, settings)
        return
    found = group_parameters(shapes, settings)
    placed = [name for group in found.groups for name in group.names] + list(found.frozen)
    assert sorted(placed) == sorted(NAMES)
    for group in found.groups:
        for name in group.names:
            first = next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)
            assert group.match == first
            peak = settings.muon_lr if group.optimizer == "muon" else settings.lr
            assert group.lr == (peak if first is None else 0.5 * peak)
            assert group.weight_decay == (settings.weight_decay if is_matrix(name, shapes[name]) else 0.0)
            is_muon = optimizer == "muon" and name.startswith("layers.") and is_matrix(name, shapes[name])
            assert group.optimizer == ("muon" if is_muon else "adamw" if optimizer == "muon" else optimizer)


def test_a_group_has_its_own_rate_and_decay():
    model = Transformer(preset("ground-nano", tied_embeddings=False))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    groups = [GroupSettings(match="embed*", lr=0.25, weight_decay=0.0), GroupSettings(match="lm_head*", lr_scale=2.0)]
    settings = settings_of("adamw", lr=0.1, weight_decay=0.5, groups=groups)
    Optimizers(model, settings, torch.float32).step(0.5)
    for name, parameter in model.named_parameters():
        # AdamW's first step is the whole rate, whatever the gradient
        lr = 0.5 * {"embed_tokens.weight": 0.25, "lm_head.weight": 0.2}.get(name, 0.1)
        decay = 0.5 if parameter.ndim == 2 and name != "embed_tokens.weight" else 0.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - lr * decay - lr))


def test_what_is_frozen_has_no_gradient_no_state_and_is_given_back_as_it_was(tmp_path):
    job = make_job(tmp_path / "run", n_steps=2, groups=[GroupSettings(match="layers.0.*", frozen=True)])
    seen: list[dict[str, bool]] = []
    job.model.register_forward_pre_hook(
        lambda model, arguments: seen.append({name: p.requires_grad for name, p in model.named_parameters()})
    )
    summary = train(job, current_world(), QUIET)
    assert all(needed != name.startswith("layers.0.") for name, needed in seen[0].items())
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    assert {name.split("/")[0] for name in state} == {name for name in NAMES if not name.startswith("layers.0.")}
    assert all(parameter.requires_grad for parameter in job.model.parameters())
    frozen = sum(p.numel() for name, p in job.model.named_parameters() if name.startswith("layers.0."))
    n_tensors = sum(name.startswith("layers.0.") for name in NAMES)
    assert summary["groups"] == [f"layers.0.*: frozen: {frozen:,} weights in {n_tensors} tensors"]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"match": "embed_token.*", "lr": 0.1}], r'match = "embed_token\.\*": no parameter.*embed_tokens\.weight'),
        ([{"match": "layers.0.*", "lr": 0.1}], r"Muon's and AdamW's.*Use lr_scale"),
        ([{"match": "*norm*", "weight_decay": 0.1}], r"matrices only"),
        ([{"match": "layers.*", "lr_scale": 2}, {"match": "layers.0.*", "lr_scale": 3}], r"group above it.*first"),
        ([{"match": "*", "frozen": True}], r"nothing is left to train"),
    ],
)
def test_groups_that_cannot_be_meant_are_refused_with_the_way_out(tmp_path, groups, words):
    job = make_job(tmp_path / "run", groups=groups)
    with pytest.raises(RecipeError, match=words):
        train(job, current_world(), QUIET)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"match": "x"}, '"x" changes nothing'),
        ({"match": "x", "lr": 0.1, "lr_scale": 2.0}, "keep one"),
        ({"match": "x", "frozen": True, "lr": 0.1}, "no learning rate"),
        ({"match": "x", "lr": 2.0}, "[pretrain.groups] lr = 2.0: input should be less than or equal to 1. (their peak"),
        ({"match": "x", "rate": 2.0}, "[pretrain.groups] rate: no such setting."),
        ({"lr": 0.1}, "[pretrain.groups] match"),
    ],
)
def test_a_group_that_is_written_wrong_is_refused_by_name(group, words):
    inner = ", ".join(f"{name} = {json.dumps(value)}" for name, value in group.items())
    with pytest.raises(RecipeError) as raised:
        parse_recipe(f"[pretrain]\ngroups = [{{ {inner} }}]", "mine.toml")
    assert words in str(raised.value)
    assert len(raised.value.problems) == 1


TWO_GROUPS = """
[[pretrain.groups]]
match = "embed_tokens*"
lr = 1e-3
weight_decay = 0.0
[[pretrain.groups]]
match = "layers.0.*"
frozen = true
"""


def test_groups_are_read_written_shown_and_checked():
    recipe = parse_recipe(TWO_GROUPS, "mine.toml")
    assert [group.match for group in recipe.pretrain.groups] == ["embed_tokens*", "layers.0.*"]
    assert parse_recipe(recipe_toml(recipe), "mine.toml").pretrain == recipe.pretrain
    shown = [(value, reason) for name, value, reason in derived_values(recipe) if name == "pretrain.groups"]
    assert [value for value, _ in shown] == ["embed_tokens*", "layers.0.*"]
    assert "lr 0.001" in shown[0][1]
    assert "frozen" in shown[1][1]
    check_recipe(recipe, "mine.toml")
    wrong = parse_recipe(TWO_GROUPS.replace("layers.0.", "layer.0."), "mine.toml", ["pretrain.precision=float8"])
    with pytest.raises(RecipeError) as raised:
        check_recipe(wrong, "mine.toml")
    assert len(raised.value.problems) == 2  # of the precision too


def test_groups_belong_to_the_fingerprint_and_none_are_as_if_there_had_never_been_any():
    plain = settings_of("muon")
    assert "groups" not in plain.fingerprint_values()
    grouped = settings_of("muon", groups=[GroupSettings(match="*", lr_scale=2.0)])
    assert grouped.fingerprint_values() == plain.fingerprint_values() | {
        "groups": [{"match": "*", "lr": None, "lr_scale": 2.0, "weight_decay": None, "frozen": False}]
    }


def test_all_groups_are_described():
    shapes = cost.parameter_shapes(preset("ground-nano"))
    rows = describe_groups(shapes, settings_of("muon", groups=[GroupSettings(match="norm*", lr_scale=0.5)]))
    assert [name for name, _, _ in rows] == ["pretrain.optimizer", "pretrain.groups"]
    assert rows[1][2] == f"adamw: {shapes['norm.weight'][0]} weights in 1 tensor, lr 0.0015"


# --- What a recipe may ask for


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("muon", (3e-3, 0.1, 0.95)), ("lion", (1e-3, 0.3, 0.99)), ("adafactor", (0.03, 0.1, 0.95))],
)
def test_what_is_unset_follows_from_the_optimizer(optimizer, expected):
    settings = resolve_optimizer(settings_of(optimizer))
    assert (settings.lr, settings.weight_decay, settings.beta2) == expected
    assert resolve_optimizer(settings_of(optimizer, lr=0.5, weight_decay=0.2)).lr == 0.5
    recipe = parse_recipe(f'[model]\nsize = "1m"\n[pretrain]\noptimizer = "{optimizer}"', "mine.toml")
    of_a_size = resolve(recipe).pretrain
    assert of_a_size.lr == expected[0]
    assert resolve(parse_recipe(recipe_toml(recipe), "mine.toml")).pretrain == of_a_size


def test_a_library_that_is_missing_is_named_before_any_work(tmp_path, monkeypatch):
    find_spec = optimizers.importlib.util.find_spec
    monkeypatch.setattr(
        optimizers.importlib.util, "find_spec", lambda name: None if name == "pytorch_optimizer" else find_spec(name)
    )
    job = make_job(tmp_path / "run", optimizer="lion")
    with pytest.raises(GroundupError, match=r"pytorch_optimizer is not installed\.\n.*pip install 'groundup\[optim\]'"):
        train(job, current_world(), QUIET)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(RecipeError, match="is not installed"):
        check_recipe(parse_recipe('[pretrain]\noptimizer = "lion"', "mine.toml"), "mine.toml")


def test_an_optimizer_of_whole_parameters_is_refused_on_several_processes():
    check_optimizer(settings_of("adafactor"), n_processes=1)
    check_optimizer(settings_of("adamw"), n_processes=2)
    with pytest.raises(GroundupError, match=r'\[sft\] optimizer = "adafactor": works on whole parameters, but 2'):
        check_optimizer(settings_of("adafactor"), "sft", 2)
