"""The decode step of a dense model on CPUs, in C: `native.c`, compiled once a machine.

A step of PyTorch's operations takes microseconds for each of them, and its products of one row reach a quarter of the
memory's bandwidth (benchmarks/decode.py). The library is kept in the user's cache by a digest of its source, its flags
and the processor. Without a compiler, and for what the step does not compute, `why_not` says so, and models are run by
PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn

from groundup.environment import cpu_features, cpu_name
from groundup.errors import GroundupError
from groundup.files import atomic_writer, value_digest
from groundup.generation.cache import KVCache, LayerCache
from groundup.measured import cache_root
from groundup.model import Transformer
from groundup.model.masks import alibi_slopes
from groundup.model.positions import rotation_table, sinusoids

FLAGS = (
    "-O3", "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native", "-std=gnu11",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared",
)  # fmt: skip
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_INT8_GROUPS, _INT4 = 3, 4
_PATTERNS = ("full", "window", "strided", "fixed")
_ACTIVATIONS = ("swiglu", "geglu", "gelu", "gelu_tanh", "relu2")
_FAULTS = {
    1: "an id is no token of the vocabulary",
    2: "a slot is not in the cache",
    3: "a position is beyond the cache or the model's positions",
    4: "a block is not in the cache",
    5: "`wanted` is not among the tokens",
    6: "there are not so many layers",
}


_SOURCE = resources.files(__package__).joinpath("native.c").read_text("utf-8")


def _structures(source: str) -> SimpleNamespace:
    """The source's structures, for ctypes."""
    kinds: dict[str, Any] = {"int": c_int, "int32_t": c_int32, "int64_t": c_int64, "float": c_float}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", source, flags=re.DOTALL):
        lines = re.findall(r"(?:const )?(\w+) ([^;]+);", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))
        fields = [(kind, field.strip()) for kind, fields in lines for field in fields.split(",")]
        types = [(field.lstrip("*"), c_void_p if field.startswith("*") else kinds[kind]) for kind, field in fields]
        kinds[name] = type(name, (ctypes.Structure,), {"_fields_": types})
    return SimpleNamespace(**kinds)


_C = _structures(_SOURCE)


def why_not(model: Transformer, cache: KVCache) -> str | None:
    """Why this model and cache cannot be stepped natively; None where they can."""
    if getattr(type(model), "forward", None) is not Transformer.forward:
        return "the model has a forward pass of its own"
    if model.config.n_experts:
        return "experts are computed by PyTorch"
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [one for layer in cache.layers for one in (layer.keys, layer.values)]
    if any(one.device.type != "cpu" for one in tensors):
        return "the model or its cache is not on the CPU"
    reasons = (_why_not_matrix(name, module) for name, module in model.named_modules())
    return next((reason for reason in reasons if reason), None) or library()[1]


def _why_not_matrix(name: str, module: Any) -> str | None:
    if hasattr(module, "packed"):
        if getattr(module, "rounds_activations", False):
            return f"{name}: 8-bit activations are computed by PyTorch"
        if module.scales.dtype != torch.float16:  # they are read as they stand
            return f"{name}.scales is {str(module.scales.dtype).removeprefix('torch.')}, not float16"
        group = module.packed.shape[1] * (8 // module.bits) // module.scales.shape[1]
        whole = 32 if module.bits == 4 else 16 if module.scales.shape[1] > 1 else 1
        return f"{name}: {module.bits}-bit groups of {group} are computed by PyTorch" if group % whole else None
    if hasattr(module, "lora_A"):
        return f"{name}: adapters are computed by PyTorch"
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return None
    weight = module.weight
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{name}.weight is {str(weight.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    is_plain = type(weight.data) is Tensor and weight.is_contiguous()
    return None if is_plain else f"{name}.weight is not one plain tensor"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled step, compiled now unless it was before; or None and the reason."""
    key = value_digest([_SOURCE, FLAGS, sys.platform, cpu_name(), cpu_features()])
    path = cache_root() / "native" / f"{key}.so"
    try:
        if not path.is_file():
            built = _compile()
            if isinstance(built, str):
                return None, built
            with atomic_writer(path, binary=True) as handle:
                handle.write(built)
        found = ctypes.CDLL(str(path))
    except (GroundupError, OSError) as error:
        return None, f"the compiled step cannot be kept or loaded: {error}"
    found.scratch_floats.restype = c_int64
    found.scratch_floats.argtypes = found.step.argtypes = (POINTER(_C.Model), POINTER(_C.Call))
    found.guess.argtypes = (*found.step.argtypes, POINTER(_C.Guesses))
    return found, None


def _compile() -> bytes | str:
    """The library's bytes, or why there are none."""
    names = (os.environ.get("CC"), "gcc", "cc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler found (install gcc, or name one in CC)"
    if sys.platform == "darwin":  # Apple's clang has no OpenMP library of its own: torch's
        folder = Path(torch.__file__).parent / "lib"
        threads = ["-Xclang", "-fopenmp", str(folder / "libomp.dylib"), f"-Wl,-rpath,{folder}"]
    else:  # libgomp, by a name under which torch's is loaded already: one pool of threads
        threads = ["-fopenmp"]
    with tempfile.TemporaryDirectory(prefix="groundup-") as name:
        text, built = Path(name) / "native.c", Path(name) / "native.so"
        text.write_text(_SOURCE, encoding="utf-8")
        result = subprocess.run(
            [compiler, *FLAGS, str(text), "-o", str(built), *threads, "-lm"],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if result.returncode == 0:
            return built.read_bytes()
        lines = result.stderr.strip().splitlines()
        wrong = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
        return f"{compiler} cannot compile the step: {wrong}"


class NativeStep:
    """Steps of one model over its cache, which `why_not` has nothing against; by torch's number of threads.

    Weights and cache are read and written where they are, so a change in place is seen by the next step (of norms and
    biases only where they are float32); tensors that are replaced by others are not.
    """

    def __init__(self, model: Transformer, cache: KVCache, threads: int | None = None) -> None:
        found, reason = library()
        if found is None:
            raise GroundupError(f"The native step cannot be used: {reason}.")
        self._library = found
        self._cache = cache
        self._threads = threads or torch.get_num_threads()
        self._kept: list[Any] = []
        self._model = self._describe(model)
        self._scratch, self._memory, self._room, self._laws = torch.empty(0), 0, 0, torch.empty(0)

    def __call__(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
        n_layers: int | None = None,
    ) -> Float32[Tensor, "wanted vocab"]:
        """Store the tokens' keys and values, and compute logits.

        Args:
            ids: N tokens, of any slots.
            slots: the slot of each.
            positions: where each stands in its slot's text; ascending within a slot.
            wanted: indexes among the N whose logits are returned; None: all.
            n_layers: the first so many layers only, then norm and head; None: all.

        Raises:
            IndexError: an id, slot, position or number of layers is out of range; nothing was computed.
        """
        lists = [
            array("i", values) for values in (ids, slots, positions, range(len(ids)) if wanted is None else wanted)
        ]
        call, logits = self._call(lists, n_layers)
        _hold(self._library.step(self._model, call))
        return logits

    def guess(
        self,
        lists: Sequence[Sequence[int]],
        most: Sequence[int],
        settings: Sequence[float],
        uniforms: Float64[Tensor, "texts most"],
        n_layers: int | None = None,
    ) -> tuple[list[list[int]], Float32[Tensor, "texts most vocab"] | None]:
        """Draw tokens one after the other behind some texts, storing all but the last.

        Args:
            lists: ids, slots, positions and wanted, as `__call__` has them; of each text its last is wanted.
            most: tokens of each text.
            settings: temperature, top_k, top_p and min_p of each.
            uniforms: a number of [0, 1) for each token.
            n_layers: as `__call__`.

        Returns:
            tokens: of each text.
            laws: what each token was drawn from, until the next call; None: all temperatures are 0.
        """
        arrays = [array("i", values) for values in lists]
        call, _logits = self._call(arrays, n_layers)  # both live until the call has ended
        length, laws = uniforms.shape[1], None
        if any(settings[::4]):
            size = len(most) * length * self._model.vocab_size
            if len(self._laws) < size:
                self._laws = torch.empty(size, dtype=torch.float32)
            laws = self._laws[:size].view(len(most), length, -1)
        wide, limits, tokens = array("f", settings), array("i", most), torch.empty(uniforms.shape, dtype=torch.int32)
        guesses = _C.Guesses(
            wide.buffer_info()[0], uniforms.data_ptr(), limits.buffer_info()[0], tokens.data_ptr(),
            None if laws is None else laws.data_ptr(), length,
        )  # fmt: skip
        _hold(self._library.guess(self._model, call, guesses))
        return [row[:n] for row, n in zip(tokens.tolist(), most, strict=True)], laws

    def _call(self, lists: Sequence[array[int]], n_layers: int | None) -> tuple[Any, Float32[Tensor, "wanted vocab"]]:
        """What the library is told, while `lists` and the result live."""
        n, n_wanted, table = len(lists[0]), len(lists[3]), self._cache.table
        assert n == len(lists[1]) == len(lists[2]), "as many ids as slots and positions are needed"
        logits = torch.empty(n_wanted, self._model.vocab_size, dtype=torch.float32)
        call = _C.Call(
            *(one.buffer_info()[0] for one in lists), table.data_ptr(), logits.data_ptr(), self._memory, n,
            n_wanted, table.shape[0], self._model.n_layers if n_layers is None else n_layers, self._threads,
        )  # fmt: skip
        if n > self._room:
            self._room = n
            self._scratch = torch.empty(self._library.scratch_floats(self._model, call) + 16, dtype=torch.float32)
            self._memory = call.memory = -(-self._scratch.data_ptr() // 64) * 64
        return call, logits

    def _describe(self, model: Transformer) -> Any:
        config, cache = model.config, self._cache
        reach = cache.length
        positions, scale, cos, sin = None, 1.0, None, None
        where = torch.arange(reach)
        if model.embed_positions is not None:
            reach = min(reach, config.context_length)
            positions = model.embed_positions.weight
        elif config.position == "sinusoidal":
            positions, scale = sinusoids(where, config.d_model), config.d_model**0.5
        elif config.position == "rope":
            cos, sin = rotation_table(where, config.rotated, config.rope_theta, torch.float32, config.rope_scaling)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        layers = (_C.Layer * config.n_layers)(
            *(self._layer(block, layer) for block, layer in zip(model.blocks, cache.layers, strict=True))
        )
        self._kept.append(layers)
        return _C.Model(
            layers=ctypes.addressof(layers),
            embedding=self._matrix(model.embed_tokens),
            head=self._matrix(head),
            norm=self._norm(model.norm),
            positions=self._vector(positions),
            cos=self._vector(cos),
            sin=self._vector(sin),
            slopes=self._vector(alibi_slopes(config.n_heads) if config.position == "alibi" else None),
            reach=reach,
            rotated=config.rotated,
            activation=_ACTIVATIONS.index(config.activation),
            is_layernorm=config.norm == "layernorm",
            is_post_norm=config.norm_placement == "post",
            has_qk_norm=config.qk_norm,
            table_width=cache.table.shape[1],
            embedding_scale=scale,
            attention_scale=model.blocks[0].self_attn.scale,
            attention_softcap=config.attention_softcap or 0.0,
            logit_softcap=config.logit_softcap or 0.0,
            eps=config.norm_eps,
            **{
                name: getattr(config, name)
                for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size")
            },
        )

    def _layer(self, block: Any, cache: LayerCache) -> Any:
        attention, feedforward, rule = block.self_attn, block.mlp, block.self_attn.rule
        self._kept.append(cache)
        return _C.Layer(
            **{name: self._matrix(getattr(attention, f"{name}_proj")) for name in "qkvo"},
            **{name: self._matrix(getattr(feedforward, f"{name}_proj")) for name in ("gate", "up", "down")},
            attention_norm=self._norm(block.input_layernorm),
            feedforward_norm=self._norm(block.post_attention_layernorm),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            key_scales=self._vector(cache.key_scales),
            value_scales=self._vector(cache.value_scales),
            cache_kind=_KINDS[cache.keys.dtype],
            n_blocks=cache.keys.shape[0],
            block_size=cache.block_size,
            ring=cache.ring,
            ring_sinks=cache.sinks,
            pattern=_PATTERNS.index(rule.pattern),
            window=rule.window,
            stride=rule.stride,
            summary=rule.summary,
            sink_tokens=rule.sink_tokens,
        )

    def _matrix(self, module: Any) -> Any:
        if module is None:
            return _C.Matrix()
        bias = self._vector(getattr(module, "bias", None))
        if not hasattr(module, "packed"):
            rows, cols = module.weight.shape
            self._kept.append(module.weight)
            return _C.Matrix(module.weight.data_ptr(), None, bias, _KINDS[module.weight.dtype], rows, cols, cols)
        packed, scales = module.packed, module.scales
        rows, cols = packed.shape[0], packed.shape[1] * (8 // module.bits)
        kind = _INT4 if module.bits == 4 else _INT8_GROUPS if scales.shape[1] > 1 else _KINDS[torch.int8]
        self._kept += [packed, scales]
        return _C.Matrix(packed.data_ptr(), scales.data_ptr(), bias, kind, rows, cols, cols // scales.shape[1])

    def _norm(self, module: Any) -> Any:
        if module is None:
            return _C.Norm()
        return _C.Norm(self._vector(module.weight), self._vector(getattr(module, "bias", None)))

    def _vector(self, values: Tensor | None) -> int | None:
        """The address of float32 numbers, or None."""
        if values is None:
            return None
        kept = values.detach().to(torch.float32).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _hold(fault: int) -> None:
    """Hold that the library found nothing wrong."""
    if fault:
        raise IndexError(f"{_FAULTS[fault]}.")
