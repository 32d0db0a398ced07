"""torch.compile for the blocks, tried once on a run's first micro-batch; and activation checkpointing.

A run that is over before a compiler is done is not compiled, nor one whose rows differ in length, for which the
compiler would begin again and again. What was decided is part of a run's checkpoints, as compiled arithmetic rounds
otherwise. Only what is trained is compiled: validation, with rows of other lengths, and generation run as they are.

A compiler that is killed can leave a truncated object in its cache, and then every later compile of that graph fails,
or any compile. So truncated objects are removed before the first one. What fails costs one line and the speed, not the
run.

Activation checkpointing (arXiv:1604.06174) computes again what the backward pass needs instead of keeping it:

    none        everything is kept: fastest
    selective   a block keeps the outputs of its matrix products, those of adapters aside, and computes what is cheap
                between them again (arXiv:2205.05198, section 5: most of the memory for a few percent of the work)
    full        a block keeps its input only: least memory for one more forward pass, a third more work

Losses and gradients stay the same: the same operations on the same numbers, dropout's included.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from groundup.console import Console
from groundup.distributed import World
from groundup.measured import cache_root, recall, remember
from groundup.model import ModelConfig, Transformer
from groundup.model.transformer import Block
from groundup.training.checkpoint import TrainingState
from groundup.training.job import OnPolicySource, TrainingJob
from groundup.training.objective import weighted_sum
from groundup.training.throughput import timed

TRIED_FROM_FLOPS = {"cpu": 1e13, "cuda": 3e16}
"""Of a whole run: about a minute, on two cores or on one large GPU."""
LEAST_GAIN = 1.03
"""Times as fast, for the forward and backward pass."""
_REPEATS = 3


@dataclass(frozen=True)
class Choice:
    """Whether a run is compiled, and why, for the console and the manifest."""

    compiled: bool
    reason: str


def choose_compilation(
    job: TrainingJob, state: TrainingState, decided: bool | None, world: World, console: Console
) -> Choice:
    """Whether a run's blocks are compiled; if so, they are when this returns. A checkpoint says what was `decided`."""
    settings, model, config = job.settings, job.model, job.model.config
    if decided is not None:
        choice: Choice | None = Choice(decided, "as before it was interrupted")
    else:
        n_flops = job.n_rows * job.objective.flops(config, [job.row_length or config.context_length])
        choice = choose_without_trial(
            settings.compile, world.device.type, n_flops, world.size, rows_are_alike=job.row_length is not None
        )
    if choice is not None or isinstance(job.source, OnPolicySource):
        choice = choice or Choice(False, "there are no rows yet to try it on: only with compile = true")
        if choice.compiled:
            CompiledBlocks(model, console)
        return choice
    batch = {name: tensor.to(world.device) for name, tensor in job.source.rows(0, job.micro_rows).items()}

    def run() -> None:
        terms = job.objective.terms(job.all_modules, batch)
        weighted_sum(terms, dict.fromkeys(terms, 1.0)).backward()  # type: ignore[no-untyped-call]
        state.optimizers.forget_gradients()

    dtype = str(model.compute_dtype).removeprefix("torch.")
    key = trial_key(config, batch["ids"].shape, dtype, settings.activation_checkpointing)
    model.train()
    choice = choose_by_trial(model, run, key, world.device, console)
    decision, repeated = ("compiled", "true") if choice.compiled else ("not compiled", "false")
    console.note(f"{job.name}: {decision} ({choice.reason}; to repeat it on any machine: compile = {repeated})")
    return choice


def choose_without_trial(
    setting: bool | Literal["auto"], device_type: str, n_flops: float, n_processes: int, *, rows_are_alike: bool
) -> Choice | None:
    """What needs no trial; None: try.

    Args:
        setting: the recipe's.
        device_type: "cpu" or "cuda".
        n_flops: of the whole run, all processes together.
        n_processes: that share it.
        rows_are_alike: every row has the same length.
    """
    if setting != "auto":
        return Choice(setting, "as the recipe says")
    if device_type not in TRIED_FROM_FLOPS:
        return Choice(False, f"not tried on {device_type}")
    if not rows_are_alike:
        return Choice(False, "rows differ in length")
    if n_flops < TRIED_FROM_FLOPS[device_type]:
        return Choice(False, "the run is too short for it to pay")
    if n_processes > 1:
        return Choice(False, "with several processes only as the recipe says: compile = true")
    if device_type == "cpu" and find_compiler() is None:
        return Choice(False, "no C++ compiler here")
    return None


def trial_key(config: ModelConfig, shape: Sequence[int], dtype: str, recomputed: str) -> dict[str, Any]:
    """What decides how long a forward and backward pass of (rows, tokens) takes, as `choose_by_trial` remembers it."""
    return {"model": config.to_dict(), "shape": list(shape), "precision": dtype, "recomputed": recomputed}


def choose_by_trial(
    model: Transformer, run: Callable[[], None], key: Mapping[str, Any], device: torch.device, console: Console
) -> Choice:
    """What was found on this machine, now or before. If compiling pays, the blocks are compiled when this returns.

    Args:
        model: not compiled yet.
        run: forward and backward of one micro-batch; leaves no trace.
        key: plain values that decide how long that takes.
        device: where.
        console: is told before the compiler begins.
    """
    found = recall("compile", key, device)
    if found is None:
        console.note("Trying torch.compile on the first batch (once on this machine for a model of this shape) …")
        found = _tried(model, run, device, console)
        if found["failure"] is None:  # a compiler may be there tomorrow
            remember("compile", key, device, found)
    elif found["pays"]:
        CompiledBlocks(model, console)
    if found["failure"] is not None:
        return Choice(False, f"the compiler failed: {found['failure']:.80}")
    gain = found["eager_seconds"] / found["compiled_seconds"]
    times = f"forward and backward {gain:.2f}× as fast, measured here"
    return Choice(found["pays"], times if found["pays"] else f"{times}: not worth it")


def _tried(model: Transformer, run: Callable[[], None], device: torch.device, console: Console) -> dict[str, Any]:
    run()  # kernels and buffers of the first time
    eager = min(timed(run, device) for _ in range(_REPEATS))
    blocks = CompiledBlocks(model, console)
    first = timed(run, device)
    compiled = min(timed(run, device) for _ in range(_REPEATS))
    pays = blocks.failure is None and eager / compiled >= LEAST_GAIN
    if not pays:
        blocks.undo()
    return {
        "pays": pays, "eager_seconds": eager, "compiled_seconds": compiled, "compile_seconds": first - compiled,
        "failure": blocks.failure,
    }  # fmt: skip


_CACHE = "TORCHINDUCTOR_CACHE_DIR"

MEMORY_SHARE = 0.97
"""Of what the compiler would keep for the backward pass, what it may: casts of weights and activations are computed
again. From `WIDE` on that costs no time that can be measured, and saves a tenth of the peak."""
WIDE = 256


class CompiledBlocks:
    """A model whose blocks are compiled, each at its first use in training.

    Args:
        model: its blocks' `compute` is replaced.
        console: where a failure is told, once.

    Attributes:
        failure: what the compiler said, or None.
    """

    def __init__(self, model: Transformer, console: Console) -> None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Our own cache, unless somebody has chosen another; torch notes its default here when it is first asked.
        if os.environ.get(_CACHE) in (None, default_cache_dir()):
            os.environ[_CACHE] = str(cache_folder())
        self.failure: str | None = None
        self._console, self._blocks = console, model.blocks
        # A budget of 1 is the compiler's own: what it would keep.
        self._budget = MEMORY_SHARE if model.config.d_model >= WIDE else 1.0
        cache = cache_folder()
        removed = remove_truncated(cache) if os.environ[_CACHE] == str(cache) else []
        if removed:
            console.note(f"{len(removed)} truncated objects of a killed compiler are removed: {removed[0].parent}")
        for block in self._blocks:
            block.compute = self._with_a_way_back(block)

    def undo(self) -> None:
        """Have the blocks compute as they are."""
        for block in self._blocks:
            block.compute = block.eager

    def _with_a_way_back(self, block: Block) -> Callable[..., Any]:
        from torch._functorch import config

        plain = block.eager
        compiled: Callable[..., Any] = torch.compile(plain)

        def run(x: Any, rotation: Any, mask: Any = None, cached: Any = None) -> Any:
            if self.failure is not None or cached is not None or not torch.is_grad_enabled():
                return plain(x, rotation, mask, cached)
            try:
                with config.patch(activation_memory_budget=self._budget):
                    return compiled(x, rotation, mask)
            except Exception as error:  # whatever a compiler may raise
                # Only what the compiler raised, and not the model.
                of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
                if not of_compiler and not isinstance(error, ImportError):
                    raise
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                self.failure = " ".join(lines[:2]) or type(error).__name__
                self._console.warn(f"torch.compile failed ({self.failure:.200}); training goes on without it.")
            return plain(x, rotation, mask)

        return run


def cache_folder() -> Path:
    """Where compiled code is kept: `groundup/compiled` in the user's cache, by version of torch."""
    return cache_root() / "compiled" / str(torch.__version__)


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would call for a CPU, or None."""
    return shutil.which(os.environ.get("CXX") or "") or next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def remove_truncated(cache: Path) -> list[Path]:
    """Remove the shared objects (ELF, 64 bits) under a folder that end before their table of sections; return them."""
    found = [path for path in cache.rglob("*.so") if _is_truncated(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _is_truncated(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            head, size = handle.read(64), os.fstat(handle.fileno()).st_size
    except OSError:
        return False
    if len(head) < 64:
        return True
    if head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian: all others are left alone
        return False
    (table,), (entry_size, n_entries) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(size < table + entry_size * n_entries)


Checkpointing = Literal["none", "selective", "full"]

# The outputs of matrix products are kept, everything else is computed again.
_PRODUCTS = [
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
                 "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
                 "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable")
]  # fmt: skip


def set_checkpointing(model: Transformer, kind: Checkpointing) -> None:
    """Make every block keep as much as `kind` says, in training."""
    ranks = frozenset(each.shape[0] for name, each in model.named_parameters() if name.endswith("lora_A"))
    selective = partial(create_selective_checkpoint_contexts, partial(_selected, ranks))
    ways: dict[Checkpointing, Callable[..., Tensor] | None] = {
        "none": None,
        "selective": partial(checkpoint, use_reentrant=False, context_fn=selective),
        "full": partial(checkpoint, use_reentrant=False),
    }
    for block in model.blocks:
        block.recompute = ways[kind]


def _selected(ranks: frozenset[int], _: object, operation: object, *arguments: Any, **__: object) -> CheckpointPolicy:
    is_kept = operation in _PRODUCTS
    if operation is torch.ops.aten.mm.default:  # (tokens, inner) × (inner, width): an adapter costs next to nothing
        is_kept = arguments[0].shape[1] not in ranks
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
