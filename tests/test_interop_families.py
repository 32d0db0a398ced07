"""Hugging Face's families: transformers and groundup compute the same from the same files, in both directions."""

import json
from pathlib import Path

import gguf
import interop_models
import pytest
import torch
from interop_models import ONE_OF_EACH, VARIANTS, some_ids
from safetensors.torch import load_file

import groundup as gu
from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.cache import KVCache
from groundup.interop import export_folder, import_folder
from groundup.interop.families import differences
from groundup.interop.gguf import export_gguf

transformers = pytest.importorskip("transformers")


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes from a folder as it stands; no weight missing, none too many."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(ids).logits


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    theirs = interop_models.save(variant, tmp_path / "theirs")
    ids = some_ids()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.05

        # as it stands
        ours = gu.load(tmp_path / "theirs").model
        torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)

        # imported, and what was imported in transformers
        summary = import_folder(tmp_path / "theirs", tmp_path / "ours")
        assert summary["family"] == VARIANTS[variant][0]
        assert summary["parameters"] == ours.n_parameters == sum(p.numel() for p in theirs.parameters())
        imported = gu.load(tmp_path / "ours")
        assert imported.model.config == ours.config
        assert torch.equal(imported.model(ids), ours(ids))
        torch.testing.assert_close(their_logits(tmp_path / "ours", ids), expected, atol=1e-6, rtol=1e-5)

        # cached, in three steps
        cache = KVCache(ours.config, 2, 24)
        steps = [ours(ids[:, a:b], positions=torch.arange(a, b).expand(2, -1), cache=cache) for a, b in STEPS]
        torch.testing.assert_close(torch.cat(steps, dim=1), ours(ids), atol=2e-5, rtol=1e-5)

    # exported, and imported again: the same bytes
    export_folder(tmp_path / "ours", tmp_path / "again")
    assert "groundup" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert same_weights(weights_of(tmp_path / "again"), weights_of(tmp_path / "theirs"))
    import_folder(tmp_path / "again", tmp_path / "ours-again")
    for path in (tmp_path / "ours").glob("[!.]*"):
        assert path.read_bytes() == (tmp_path / "ours-again" / path.name).read_bytes(), path.name


STEPS = [(0, 9), (9, 10), (10, 24)]

WAYS = {
    "in slots, a few tokens at a time": {"chunk": 3},
    "in slots, without the step in C": {"is_native": False},
    "in pages": {"pages": True, "chunk": 16},
    "with guesses": {"draft": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_every_way_to_write_gives_the_tokens_of_the_uncached_forward_pass(variant: str, tmp_path: Path) -> None:
    interop_models.save(variant, tmp_path)
    model = gu.load(tmp_path).model
    prompts = [some_ids(1, 40)[0, :n].tolist() for n in (40, 1, 23, 39, 40)]  # some begin alike
    expected = []
    for prompt in prompts[:4]:
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append((ids[len(prompt) :], model(torch.tensor([ids]))[0].log_softmax(dim=-1)))
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    for way, options in WAYS.items():
        engine = Engine(model, slots=3, **options)
        results = engine.run(
            [Request(ids, params, prompt_logprobs=0 if n < 2 else None) for n, ids in enumerate(prompts)]
        )
        for prompt, (result,), (ids, logprobs) in zip(prompts, results, [*expected, expected[0]], strict=True):
            assert result.ids == ids, way
            scored = [*result.prompt_logprobs, *result.logprobs]
            exact = [logprobs[place, one.token] for place, one in enumerate(scored, len(prompt) + 7 - len(scored))]
            torch.testing.assert_close(
                torch.tensor([one.logprob for one in scored]), torch.tensor(exact), atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_model_goes_in_is_trained_and_goes_out(variant: str, tmp_path: Path) -> None:
    interop_models.save(variant, tmp_path / "theirs")
    model = gu.load(tmp_path / "theirs").model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = some_ids(4)
    losses = []
    for _ in range(4):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    gu.save_model(tmp_path / "trained", model.eval())
    export_folder(tmp_path / "trained", tmp_path / "out")
    with torch.no_grad():
        expected = model(ids)
        for name in ("trained", "out"):
            torch.testing.assert_close(their_logits(tmp_path / name, ids), expected, atol=1e-5, rtol=1e-5)
    export_gguf(gu.load(tmp_path / "trained").model, None, tmp_path / "model.gguf", dtype="f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight"].copy()), model.embed_tokens.weight.detach())


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_each_family_says_of_itself_that_it_can(variant: str, tmp_path: Path) -> None:
    interop_models.save(variant, tmp_path)
    config = gu.load(tmp_path).model.config
    assert differences(config, VARIANTS[variant][0]) == []
