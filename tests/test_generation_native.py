"""The decode step in C against the model's own forward pass, for every dense family, and how it is compiled."""

import copy
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_parts import SHAPE, random_model, tiny, tokens

from groundup.errors import GroundupError
from groundup.generation import native
from groundup.generation.cache import KVCache
from groundup.generation.native import NativeStep, library, why_not
from groundup.generation.quantize import Quantization, quantize
from groundup.model import RopeScaling, preset, preset_names

EXACT = {"atol": 3e-5, "rtol": 1e-5}
WINDOW = {"attention": ("window", "full"), "window": 7}
SHAPES = {
    "defaults": {},
    "layer norms": {"norm": "layernorm", "bias": True},
    "layer norms without weights": {"norm": "layernorm", "norm_weight": False, "qk_norm": False},
    "post-norm": {"norm_placement": "post", "norm": "layernorm", "bias": True, "position": "sinusoidal"},
    "post-norm, RMS": {"norm_placement": "post", "norm_weight": False},
    "biases of queries only": {"qkv_bias": True},
    "biases of all others": {"o_bias": True, "ff_bias": True},
    "learned positions": {"position": "learned", "activation": "gelu"},
    "ALiBi": {"position": "alibi", "n_heads": 6, "n_kv_heads": 3},
    "no positions": {"position": "none"},
    "half rotated": {"partial_rotary_factor": 0.5, "head_dim": 20},
    "linear scaling": {"rope_scaling": RopeScaling(kind="linear", factor=4)},
    "NTK scaling": {"rope_scaling": RopeScaling(kind="ntk", factor=4)},
    "YaRN": {"rope_scaling": RopeScaling(kind="yarn", factor=4, original_context=16)},
    "Llama 3.1 scaling": {"rope_scaling": RopeScaling(kind="llama3", factor=4, original_context=16)},
    "window": WINDOW,
    "window with sinks": {**WINDOW, "sink_tokens": 2},
    "strided": {"attention": ("strided",), "stride": 5},
    "fixed": {"attention": ("fixed", "full"), "stride": 5, "summary": 2},
    "caps and scale": {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.7},
    "GeGLU": {"activation": "geglu"},
    "GELU": {"activation": "gelu"},
    "GELU's tanh form": {"activation": "gelu_tanh"},
    "squared ReLU": {"activation": "relu2"},
    "untied, padded vocabulary": {"tied_embeddings": False, "vocab_multiple": 16},
    "one key head": {"n_kv_heads": 1},
    "as many key heads": {"n_kv_heads": 4, "head_dim": 80},
    "whole vectors": {"d_model": 64, "d_ff": 128, "head_dim": 64},
}


def run(step: NativeStep, ids: torch.Tensor, chunk: int, slots: list[int]) -> torch.Tensor:
    """Logits of rows that are written into slots in turn, a chunk of each at a time."""
    found = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        where = torch.arange(start, start + part.shape[1]).expand(part.shape)
        owners = torch.tensor(slots)[:, None].expand(part.shape)
        found.append(step(*(some.flatten().tolist() for some in (part, owners, where))).unflatten(0, part.shape))
    return torch.cat(found, dim=1)


def check(config, length: int = 40) -> None:
    """Token by token and in chunks, each in a slot beside another: the logits of the whole, and of one another."""
    model = random_model(config)
    ids = tokens(config, 2, length)
    with torch.no_grad():
        whole = model(ids)
    alone = run(NativeStep(model, KVCache(config, 3, length)), ids, 1, [2, 0])
    torch.testing.assert_close(alone, whole, **EXACT)
    for chunk in (7, length):
        # To the bit: what a token gives does not depend on those that are computed with it, nor on threads.
        cache = KVCache(config, 3, length)
        assert torch.equal(run(NativeStep(model, cache, threads=3), ids, chunk, [1, 2]), alone)


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_gives_the_logits_of_the_forward_pass(name):
    check(tiny(**SHAPES[name]))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_computed_or_refused_by_name(name):
    # The window is a quarter of the context in the originals, too.
    small = {**SHAPE, "window": 12} if "window" in preset(name).attention else SHAPE
    config = preset(name, **small)
    if config.n_experts:
        cache = KVCache(config, 1, 8)
        assert why_not(random_model(config), cache) == "experts are computed by PyTorch"
    else:
        check(config)


def rounded(model):
    """The model in float32, with weights that bfloat16 holds."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("name", ["defaults", "layer norms", "learned positions", "whole vectors"])
@torch.no_grad()
def test_weights_in_bfloat16_are_read_as_they_are(name):
    config = tiny(**SHAPES[name])
    model = random_model(config)
    ids = tokens(config, 2, 24)
    whole = rounded(model)(ids)
    halved = copy.deepcopy(model).bfloat16()
    alone = run(NativeStep(halved, KVCache(config, 2, 24)), ids, 1, [0, 1])
    # Where the processor multiplies bfloat16 by bfloat16, inputs of products are rounded, as in PyTorch's forward pass;
    # everything between them is float32. Elsewhere nothing is rounded.
    halved.compute_dtype = torch.bfloat16
    rounding = (halved(ids) - whole).square().mean().sqrt()
    assert (alone - whole).square().mean().sqrt() < 0.8 * rounding
    for chunk in (5, 24):
        assert torch.equal(run(NativeStep(halved, KVCache(config, 2, 24), threads=3), ids, chunk, [0, 1]), alone)


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_tied", [True, False])
def test_quantized_weights_are_read_as_they_are(bits, group, is_tied):
    config = tiny(d_model=64, d_ff=192, bias=True, tied_embeddings=is_tied)
    model = quantize(random_model(config), Quantization(bits, group))
    ids = tokens(config, 2, 24)
    with torch.no_grad():
        whole = model(ids)
    cache = KVCache(config, 2, 24)
    assert why_not(model, cache) is None
    alone = run(NativeStep(model, cache), ids, 1, [0, 1])
    torch.testing.assert_close(alone, whole, **EXACT)
    for chunk in (5, 24):  # many tokens meet rows that were unpacked before
        assert torch.equal(run(NativeStep(model, KVCache(config, 2, 24)), ids, chunk, [0, 1]), alone)


def test_weights_that_change_in_place_are_seen():
    config = tiny()
    model, cache = random_model(config), KVCache(tiny(), 1, 8)
    step = NativeStep(model, cache)
    before = step([3], [0], [0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert not torch.equal(step([3], [0], [0]), before)
    torch.testing.assert_close(step([3], [0], [0]), model(torch.tensor([[3]]))[0].detach(), **EXACT)


@pytest.mark.parametrize("pattern", [{}, {**WINDOW, "sink_tokens": 2}, {"attention": ("strided",), "stride": 5}])
def test_pages_equal_slots(pattern):
    config = tiny(**pattern)
    model, ids = random_model(config), tokens(config, 2, 40)
    slots = run(NativeStep(model, KVCache(config, 2, 40)), ids, 3, [0, 1])
    pages = KVCache(config, 2, 40, block_size=4)
    pages.table[:] = torch.randperm(20, generator=torch.Generator().manual_seed(0)).view(2, 10)
    assert torch.equal(run(NativeStep(model, pages), ids, 3, [0, 1]), slots)


@pytest.mark.parametrize("sinks", [0, 2])
def test_rings_equal_slots(sinks):
    config = tiny(**WINDOW, sink_tokens=sinks)
    model, ids = random_model(config), tokens(config, 2, 40)
    rings = KVCache(config, 2, 40, chunk=3)
    assert [layer.ring for layer in rings.layers] == [sinks + 10, 0]
    slots = run(NativeStep(model, KVCache(config, 2, 40)), ids, 3, [0, 1])
    assert torch.equal(run(NativeStep(model, rings), ids, 3, [0, 1]), slots)


class RoundingCache(KVCache):
    """Entries that bfloat16 holds."""

    def update(self, layer, keys, values, positions):
        return super().update(layer, keys.bfloat16().float(), values.bfloat16().float(), positions)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@torch.no_grad()
def test_caches_of_fewer_bits_equal_the_forward_pass_over_them(kind):
    config = tiny()
    model, ids = random_model(config), tokens(config, 2, 24)
    if kind == "int8":
        cache, same = (KVCache(config, 2, 24, is_int8=True) for _ in range(2))
    else:
        cache, same = KVCache(config, 2, 24, torch.bfloat16), RoundingCache(config, 2, 24)
    native_logits = run(NativeStep(model, cache), ids, 3, [0, 1])
    # A sum in another order may tip an entry to the next of the few numbers that it can be.
    torch.testing.assert_close(native_logits, model(ids, cache=same), atol=0.03, rtol=0.0)
    for mine, theirs in ((cache.layers[0].keys, same.layers[0].keys), (cache.layers[0].values, same.layers[0].values)):
        assert (mine.float() != theirs.float()).float().mean() < 0.01


def test_some_logits_and_some_layers():
    config = tiny(n_layers=3)
    model, ids = random_model(config), tokens(config, 1, 12)
    row = ids[0].tolist()
    step = NativeStep(model, KVCache(config, 1, 12))
    whole = step(row, [0] * 12, range(12))
    assert torch.equal(step(row, [0] * 12, range(12), wanted=[11, 0, 5]), whole[[11, 0, 5]])
    assert step(row, [0] * 12, range(12), wanted=[]).shape == (0, config.vocab_size)
    assert step([], [], []).shape == (0, config.vocab_size)
    shallow = random_model(tiny(n_layers=1))
    shallow.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        early = shallow(ids)[0]
    torch.testing.assert_close(step(row, [0] * 12, range(12), n_layers=1), early, **EXACT)


@pytest.mark.parametrize(
    ("ids", "slots", "positions", "wanted"),
    [
        ([61], [0], [0], None),
        ([-1], [0], [0], None),
        ([0], [2], [0], None),
        ([0], [-1], [0], None),
        ([0], [0], [16], None),
        ([0], [0], [-1], None),
        ([0], [0], [0], [1]),
        ([0], [1], [5], None),  # its second page was never handed out
    ],
)
def test_what_is_out_of_range_is_an_error_and_nothing_else(ids, slots, positions, wanted):
    config = tiny()
    cache = KVCache(config, 2, 16, block_size=4)
    cache.table[1, 1] = -1
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(IndexError):
        NativeStep(random_model(config), cache)(ids, slots, positions, wanted)
    for n_layers in (0, 3):
        with pytest.raises(IndexError, match="layers"):
            NativeStep(random_model(config), cache)([0], [0], [0], n_layers=n_layers)
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(cache.layers, before, strict=True))


def test_what_is_not_computed_is_refused_by_name():
    config = tiny()
    cache = KVCache(config, 1, 8)
    assert why_not(random_model(config), cache) is None
    assert "float16" in why_not(random_model(config).half(), cache)
    assert "not on the CPU" in why_not(random_model(config).to("meta"), cache)
    rounding = quantize(random_model(config), Quantization(activations="int8"))
    assert "8-bit activations" in why_not(rounding, cache)
    odd = random_model(config)
    odd.layers[0].mlp.up_proj.weight.data = torch.zeros(24, 40).T
    assert "layers.0.mlp.up_proj.weight" in why_not(odd, cache)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime():
    """In a process of its own: libraries of other tests bring theirs."""
    code = (
        "from model_parts import random_model, tiny\n"
        "from groundup.generation.cache import KVCache\n"
        "from groundup.generation.native import NativeStep\n"
        "config = tiny()\n"
        "NativeStep(random_model(config), KVCache(config, 1, 8), threads=2)([1], [0], [0])\n"
        "print(open('/proc/self/maps').read())"
    )
    asked = {"capture_output": True, "text": True, "check": True, "cwd": Path(__file__).parent}
    lines = subprocess.run([sys.executable, "-c", code], **asked).stdout.splitlines()
    assert len({line.split()[-1] for line in lines if "gomp" in line or "iomp" in line or "libomp" in line}) == 1


# --- compiling


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache" / "groundup" / "native"
    library.cache_clear()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_reason_is_one_line(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    config = tiny()
    model, cache = random_model(config), KVCache(config, 1, 8)
    assert why_not(model, cache) == "no C compiler found (install gcc, or name one in CC)"
    with pytest.raises(GroundupError, match="no C compiler found"):
        NativeStep(model, cache)


def test_a_compiler_that_fails_is_quoted(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "echo 'note: x' >&2; echo 'native.c:1: error: no such flag' >&2; exit 1"))
    assert library()[1].endswith("cannot compile the step: native.c:1: error: no such flag")
    assert not fresh.exists()


def test_a_cache_that_cannot_be_written_is_a_reason(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo > "$2"'))
    fresh.parent.parent.write_text("a file", encoding="utf-8")
    assert "cannot be kept or loaded" in library()[1]


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's vector units")
@pytest.mark.parametrize("units", ["x86-64-v3", "x86-64-v2"])
def test_narrower_vectors_give_the_same(units, fresh, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", [flag.replace("native", units) for flag in native.FLAGS])
    for shape in ("defaults", "caps and scale", "GELU", "whole vectors"):
        check(tiny(**SHAPES[shape]))
    for bits in (8, 4):
        test_quantized_weights_are_read_as_they_are(bits, 32, is_tied=True)
    test_weights_in_bfloat16_are_read_as_they_are("whole vectors")
    test_caches_of_fewer_bits_equal_the_forward_pass_over_them("int8")
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.slow
def test_killed_and_simultaneous_compiling(fresh, tmp_path):
    started = tmp_path / "started"
    command = [sys.executable, "-c", "from groundup.generation.native import library; print(library()[1])"]
    slow = {**os.environ, "CC": script(tmp_path, f"echo half > {started}; exec sleep 60")}
    killed = subprocess.Popen(command, env=slow, start_new_session=True)
    deadline = time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.exists()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(fresh.glob("*.so"))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["None", "None"]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
