"""Untrusted files: each ends in an error that names file and fault; nothing is run."""

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_models import random_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import groundup as gu
from groundup.errors import ArtifactError
from groundup.interop import export_folder, import_folder
from groundup.interop.read_weights import read_header

SOME = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a Llama."""
    gu.save_model(tmp_path / "made", random_model("llama-nano"))
    export_folder(tmp_path / "made", tmp_path / "theirs")
    (tmp_path / "theirs" / "digests.json").unlink()
    return tmp_path / "theirs"


@pytest.fixture
def shards(folder: Path) -> Path:
    """The same in several files with an index."""
    export_folder(folder, folder.parent / "sharded", most_bytes=40_000)
    (folder.parent / "sharded" / "digests.json").unlink()
    assert len(list((folder.parent / "sharded").glob("*.safetensors"))) > 2
    return folder.parent / "sharded"


def refused(folder: Path, message: str) -> None:
    """Neither loading nor importing takes it, and nothing is left of the attempt."""
    for attempt in (lambda: gu.load(folder), lambda: import_folder(folder, folder.parent / "out")):
        with pytest.raises(ArtifactError, match=message) as error:
            attempt()
        assert str(folder) in str(error.value)
        assert str(error.value).replace("\n", " ").isprintable()
    assert not list(folder.parent.glob("out*"))


def write_file(path: Path, header: Any, contents: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + contents)


HEADERS: dict[str, tuple[Any, bytes]] = {
    "a list": ([], b""),
    "no JSON": (b"{]", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "a name twice": (
        b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": {"dtype": "U8", "shape": [0]}}',
        b"\0" * 8,
    ),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"\0" * 8),
    "nested without end": (b'{"a":' * 100_000, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "a dtype of its own": ({"a": {**SOME["a"], "dtype": "NaN"}}, b"\0" * 8),
    "a dtype that is none": ({"a": {**SOME["a"], "dtype": ["F32"]}}, b"\0" * 8),
    "a negative shape": ({"a": {**SOME["a"], "shape": [-2]}}, b"\0" * 8),
    "half a row": ({"a": {**SOME["a"], "shape": [2.0]}}, b"\0" * 8),
    "true rows": ({"a": {**SOME["a"], "shape": [True, 2]}}, b"\0" * 8),
    "a shape that overflows": ({"a": {**SOME["a"], "shape": [2**62, 4, 2**62]}}, b"\0" * 8),
    "offsets backwards": ({"a": {**SOME["a"], "data_offsets": [8, 0]}}, b"\0" * 8),
    "three offsets": ({"a": {**SOME["a"], "data_offsets": [0, 4, 8]}}, b"\0" * 8),
    "another size": ({"a": {**SOME["a"], "data_offsets": [0, 4]}}, b"\0" * 4),
    "overlapping": ({**SOME, "b": {**SOME["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
    "one place for two": ({**SOME, "b": SOME["a"]}, b"\0" * 8),
    "a hole": ({**SOME, "b": {**SOME["a"], "data_offsets": [12, 20]}}, b"\0" * 20),
    "a hole at the start": ({"a": {**SOME["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
    "something behind": (SOME, b"\0" * 9),
    "cut short": (SOME, b"\0" * 7),
}


@pytest.mark.parametrize("fault", [*HEADERS, 0, 1, 2**63, 2**64 - 1, 10**9])
def test_a_header_that_does_not_hold_is_refused(fault: str | int, tmp_path: Path) -> None:
    if isinstance(fault, int):
        write_file(tmp_path / "model.safetensors", SOME, b"\0" * 8, length=fault)
    else:
        write_file(tmp_path / "model.safetensors", *HEADERS[fault])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read"):
        read_header(tmp_path / "model.safetensors")


def test_a_huge_header_is_not_even_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", 2**34))
        handle.truncate(2**34 + 100)  # a hole in the file: it takes no room on the disk
    refused(folder, r"its header is 17,179,869,184 bytes long")


@given(contents=st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_error(contents: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(contents)
    with contextlib.suppress(ArtifactError):
        # Two bytes are the least that an object has.
        assert read_header(path) == {}
        assert contents[8:].strip() == b"{}"


@given(place=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_changed_byte_is_an_error_or_another_model(place: int, value: int, changed: Path) -> None:
    path = changed / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    with contextlib.suppress(ArtifactError):
        gu.load(changed)
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights are changed and put back."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    gu.save_model(folder, random_model("llama-nano"))
    (folder / "digests.json").unlink()
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_never_loaded(name: str, place: float, tmp_path: Path) -> None:
    """Most flips leave a model that loads and writes nonsense."""
    folder = tmp_path / "model"
    gu.save_model(folder, random_model("llama-nano"), small_tokenizer())
    contents = bytearray((folder / name).read_bytes())
    contents[int(place * len(contents))] ^= 1
    (folder / name).write_bytes(contents)
    refused(folder, rf"{name}: (damaged or changed|not valid JSON)")
    with pytest.raises(ArtifactError):
        export_folder(folder, tmp_path / "out")
    if name == "model.safetensors" and place > 0.2:
        gu.load(folder, verify=False)
        (folder / "digests.json").unlink()  # what the message says
        gu.load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_half_a_character_is_not_passed_on(name: str, folder: Path) -> None:
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(values | {"bos_token_id": "\U0001f600"}))
    import_folder(folder, folder.parent / "whole")
    (folder / name).write_text(json.dumps(values | {"bos_token_id": "\ud800"}))
    with pytest.raises(ArtifactError, match=rf"{name}: not valid JSON .*surrogates not allowed"):
        import_folder(folder, folder.parent / "out")


@pytest.mark.parametrize(
    "entries",
    [[], {"a": []}, {"../a": [1, "a"]}, {"config.json": [1, "a"]}, {"config.json": {"a": 1}}, {"gone": [1, "a"]}],
)
def test_digests_that_do_not_hold_are_refused(entries: Any, folder: Path) -> None:
    (folder / "digests.json").write_text(json.dumps(entries))
    refused(folder, r"digests\.json: |gone: not found|not in the folder|bytes instead of 1;")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one missing": (lambda w: w.pop(NAME), r"not the weights .*layers\.0\.mlp\.up_proj\.weight missing"),
    "one too many": (lambda w: w.update(extra=torch.zeros(2)), r"not the weights .*\(extra left over"),
    "one that a terminal would obey": (lambda w: w.update({"\x1b[2J": torch.zeros(2)}), r"\(\\x1b\[2J left over"),
    "another shape": (lambda w: w.update({NAME: w[NAME].T.contiguous()}), r"has shape \(\d+, \d+\), not \("),
    "flat": (lambda w: w.update({NAME: w[NAME].flatten()}), r"has shape \(\d+,\), not \("),
    "integers": (lambda w: w.update({NAME: w[NAME].to(torch.int8)}), r"dtype I8; weights have F32, F16, BF16"),
    "doubles": (lambda w: w.update({NAME: w[NAME].double()}), "dtype F64"),
    "a scale of quantization": (lambda w: w.update({f"{NAME}_scale": torch.ones(1)}), "left over"),
    "no layers at all": (lambda w: [w.pop(name) for name in list(w) if "layers" in name], "missing"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(fault: str, folder: Path) -> None:
    change, message = WEIGHTS[fault]
    change_weights(folder, change)
    refused(folder, message)


def test_tables_that_old_versions_saved_are_no_weights(folder: Path) -> None:
    before = gu.load(folder).model
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    after = gu.load(folder).model
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))


def test_a_tied_output_layer_may_be_there_twice_but_not_be_another(tmp_path: Path) -> None:
    gu.save_model(tmp_path / "made", random_model("llama-nano", tied_embeddings=True))
    export_folder(tmp_path / "made", tmp_path / "tied")
    (tmp_path / "tied" / "digests.json").unlink()
    copy = load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"].clone()
    change_weights(tmp_path / "tied", lambda w: w.update({"lm_head.weight": copy}))
    assert gu.load(tmp_path / "tied").model.lm_head is None
    copy[3, 4] += 1
    change_weights(tmp_path / "tied", lambda w: w.update({"lm_head.weight": copy}))
    refused(tmp_path / "tied", "not the embedding, though tie_word_embeddings = true")


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def first_shard(index: dict[str, Any]) -> str:
    return min(index["weight_map"].values())


def last_shard(index: dict[str, Any]) -> str:
    return max(index["weight_map"].values())


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "up and out": (lambda i: i["weight_map"].update({NAME: "../made/model.safetensors"}), "which is not in the folder"),
    "absolute": (lambda i: i["weight_map"].update({NAME: "/etc/passwd.safetensors"}), "which is not in the folder"),
    "a drive": (lambda i: i["weight_map"].update({NAME: "..\\x.safetensors"}), "which is not in the folder"),
    "a zero byte": (lambda i: i["weight_map"].update({NAME: "a\0.safetensors"}), "which is not in the folder"),
    "a pickle": (lambda i: i["weight_map"].update({NAME: "weights.bin"}), "is no safetensors"),
    "no such file": (lambda i: i["weight_map"].update({NAME: "model-9.safetensors"}), "not found"),
    "no such tensor": (
        lambda i: i["weight_map"].update({"model.x": first_shard(i)}),
        "stands in only one of them",
    ),
    "another shard": (
        lambda i: i["weight_map"].update({"lm_head.weight": last_shard(i)}),
        "stands in only one of them",
    ),
    "one not named": (lambda i: i["weight_map"].pop(NAME), "stands in only one of them"),
    "a number": (lambda i: i["weight_map"].update({NAME: 3}), "has no weight_map"),
    "no map": (lambda i: i.pop("weight_map"), "has no weight_map"),
    "an empty map": (lambda i: i.update(weight_map={}), "has no weight_map"),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_an_index_that_does_not_hold_is_refused(fault: str, shards: Path) -> None:
    gu.load(shards)
    change, message = INDEXES[fault]
    change_index(shards, change)
    refused(shards, message)


def test_one_tensor_in_two_shards_is_refused(shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    tensor, value = next(iter(load_file(shards / names[0]).items()))
    save_file({**load_file(shards / names[1]), tensor: value}, shards / names[1])
    refused(shards, f"does not fit {names[1]}: '{tensor}' stands in only one")


def test_a_lost_shard_is_refused(shards: Path) -> None:
    next(shards.glob("model-00002*")).unlink()
    refused(shards, "model-00002-of-.*not found")


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "is a link that leads out of its folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    refused(folder, "not found")


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out": (
        lambda path: path.symlink_to(path.parent.parent / "made" / "config.json"),
        "leads out of its folder",
    ),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "leads out of its folder"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "a pipe": (lambda path: os.mkfifo(path), "is not an ordinary file"),
    "a folder": (lambda path: path.mkdir(), "is not an ordinary file"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "digests.json"]
)
def test_only_files_of_the_folder_are_read(name: str, kind: str, folder: Path) -> None:
    make, message = NO_FILES[kind]
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ArtifactError, match=rf"{name}: .*{message}"):
        import_folder(folder, folder.parent / "out")


def test_links_within_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "snapshots" / "r1").mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(home / "blobs" / str(number))
        (home / "snapshots" / "r1" / path.name).symlink_to(f"../../blobs/{number}")
    gu.load(home / "snapshots" / "r1")


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    gu.load(folder)  # safetensors beside it are taken
    (folder / "model.safetensors").unlink()
    refused(folder, f"{name}: is a pickle, which can run any code")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(folder, "model.safetensors: cannot be read")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "is a JSON list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"model_type": NaN}', "NaN is no number"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"groundup": {"vocab_size": 1e400}}', "config.json"),
        (b'{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers = 1000000000"),
    ],
)
def test_a_configuration_that_does_not_hold_is_refused(contents: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(contents)
    refused(folder, message)


def test_sizes_without_end_take_neither_time_nor_memory(folder: Path) -> None:
    ours = json.loads((folder.parent / "made" / "config.json").read_text())
    for changes in ({"n_layers": 10**9}, {"n_experts": 10**9}, {"d_ff": 2**60, "d_model": 2**60}):
        changed = {**ours, "groundup": {**ours["groundup"], **changes}}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(folder, "not the weights of this configuration|has shape")


def test_a_damaged_generation_config_is_not_passed_on(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"generation_config\.json: not valid JSON"):
        import_folder(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
