"""What pretraining can be told of its rows: other shards by weight, and documents that do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shards_bytes import opened

from groundup.console import Console
from groundup.distributed import current_world
from groundup.errors import ArtifactError, RecipeError
from groundup.model import Transformer, preset
from groundup.recipe import PretrainSettings
from groundup.recipe.reading import parse_recipe
from groundup.shards import TokenShards
from groundup.training import IGNORED, NextToken, ShardBatches, head_loss, pretrain, train
from groundup.training.metrics import read_log
from groundup.training.pretrain import mixture_digests, pretraining_job

QUIET = Console(quiet=True)
OWN = ["".join(chr(97 + (n * k) % 26) for k in range(n * 7 % 61)) for n in range(25)]
SMALL = {"vocab_size": 257, "context_length": 24, "n_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three texts: lowercase, the digit 7 and the digit 8; validation is lowercase."""
    root = tmp_path_factory.mktemp("shards")
    opened(root / "own", OWN, validation=["held out " * number for number in range(1, 9)])
    for digit in "78":
        opened(root / digit, [digit * 300])
    return root


def rows_with(digit: str, ids: torch.Tensor) -> int:
    return int((ids == ord(digit) + 1).any(dim=1).sum())


def job_of(folder: Path, out: Path, **settings: object):
    options = {"tokens": 40 * 8 * 24, "batch_size": 8, "precision": "float32", "sample_tokens": 0} | settings
    return pretraining_job(
        Transformer(preset("ground-nano", **SMALL)), folder / "own", PretrainSettings(**options), out, None, 1, QUIET
    )


def test_rows_come_from_every_folder_in_the_asked_shares(folder: Path, tmp_path: Path) -> None:
    parts = [{"shards": str(folder / "7"), "weight": 2.0}, {"shards": str(folder / "8"), "weight": 0.5}]
    job = job_of(folder, tmp_path, mixture=parts)
    ids = job.source.rows(0, 700)["ids"]
    assert (rows_with("7", ids), rows_with("8", ids)) == (pytest.approx(400, abs=2), pytest.approx(100, abs=2))
    # The loop computes them too: the text of one digit is learned, whatever the own text does.
    job = job_of(folder, tmp_path, mixture=[{"shards": str(folder / "7"), "weight": 7.0}])
    seen: list[torch.Tensor] = []
    job.model.register_forward_pre_hook(lambda model, given: seen.append(given[0]) if model.training else None)
    train(job, current_world(), QUIET)
    rows = torch.cat(seen)
    assert rows_with("7", rows) == pytest.approx(len(rows) * 7 / 8, abs=2)
    losses = [line["loss"] for line in read_log(tmp_path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 1.0 < 4.0 < losses[0]


def test_a_mixture_decides_the_run_wherever_its_folders_are(folder: Path, tmp_path: Path) -> None:
    def fingerprint(**settings: object) -> str:
        return job_of(folder, tmp_path, **settings).fingerprint

    seven, eight = ({"shards": str(folder / digit)} for digit in "78")
    moved = tmp_path / "moved"
    moved.symlink_to(folder / "7")
    prints = [fingerprint(), fingerprint(document_mask=True), fingerprint(mixture=[seven])]
    prints += [fingerprint(mixture=[eight]), fingerprint(mixture=[{**seven, "weight": 2.0}])]
    assert len(set(prints)) == 5
    assert fingerprint(mixture=[{"shards": str(moved)}]) == prints[2]
    digests = mixture_digests(PretrainSettings(mixture=[seven, eight]))
    assert list(digests.values()) == [TokenShards.open(folder / digit, "train").fingerprint for digit in "78"]


def test_shards_of_another_tokenizer_or_none_are_refused(folder: Path, tmp_path: Path) -> None:
    opened(tmp_path / "other", ["7" * 300], fingerprint="e" * 32)
    with pytest.raises(ArtifactError, match="another tokenizer"):
        job_of(folder, tmp_path, mixture=[{"shards": str(tmp_path / "other")}])
    with pytest.raises(ArtifactError, match="nowhere"):
        mixture_digests(PretrainSettings(mixture=[{"shards": str(tmp_path / "nowhere")}]))
    with pytest.raises(RecipeError, match=r"mixture.*weight"):
        parse_recipe('[[pretrain.mixture]]\nshards = "x"\nweight = 0', "my.toml")


def test_a_recipe_says_the_mixture_either_way() -> None:
    table = parse_recipe('[[pretrain.mixture]]\nshards = "x"\nweight = 2', "my.toml")
    inline = parse_recipe('pretrain.mixture = [{ shards = "x", weight = 2.0 }]', "my.toml")
    assert table.pretrain.mixture == inline.pretrain.mixture != ()


def test_masked_documents_have_the_losses_that_they_have_alone(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder, tmp_path, document_mask=True)
    model, objective = job.model.eval(), NextToken()
    for parameter in model.parameters():  # fresh ones give every token the same probability, whatever it sees
        torch.nn.init.normal_(parameter, std=0.5)
    batches = [job.source.rows(0, 8), next(job.source.validation(8, None))]
    for batch in batches:
        alone, n_parts = 0.0, 0
        for ids, targets, documents in zip(batch["ids"], batch["targets"], batch["documents"], strict=True):
            for number in documents.unique():
                here = documents == number
                alone += model(ids[None, here], head=head_loss(targets[None, here])).nats.item()
                n_parts += 1
        assert n_parts > len(batch["ids"])
        terms = objective.terms({"model": model}, batch)
        assert terms["loss"].reported.item() == pytest.approx(alone, rel=1e-5)
        plain = objective.terms({"model": model}, {name: batch[name] for name in ("ids", "targets")})
        assert abs(plain["loss"].reported.item() - alone) > 1e-3 * alone  # unmasked, they see each other


def test_what_is_validated_is_masked_as_what_is_trained(folder: Path, tmp_path: Path) -> None:
    settings = {"tokens": 10 * 8 * 24, "batch_size": 8, "precision": "float32", "document_mask": True}
    trained = pretrain(
        Transformer(preset("ground-nano", **SMALL)), folder / "own", out=tmp_path, world=current_world(), console=QUIET,
        settings=PretrainSettings(**settings, mixture=[{"shards": str(folder / "7")}]),
    )  # fmt: skip
    source = ShardBatches(
        *(TokenShards.open(folder / "own", split) for split in ("train", "validation")), 24, 8, 1, document_mask=True
    )
    nats = count = 0.0
    for batch in source.validation(8, None):
        nats += NextToken().terms({"model": trained.model.eval()}, batch)["loss"].reported.item()
        count += int((batch["targets"] != IGNORED).sum())
    assert trained.summary["val_loss"] == pytest.approx(nats / count, rel=1e-4)
