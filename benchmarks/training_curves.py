"""The loss curves of benchmarks/training_speed.py: groundup's best form beside a plain loop in float32.

One model (GPT-2's shape, about a million parameters), the same initial weights, the same bytes of Shakespeare in the
same order, AdamW with the same settings. A second plain loop on another order of the text says what noise is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from record import spread, write_result

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "baselines"))
SHAPE = {"vocab": 1024, "layers": 4, "heads": 4, "width": 128, "length": 256}
ROWS, LAST = 16, 30


def curves(n_steps: int) -> None:
    """Train all three, write the result and the picture."""
    from training_step import groundup

    torch.set_num_threads(2)
    weights: dict[str, Any] = {}
    step = groundup({"model": "gpt", "precision": "bfloat16", "compile": True, "shape": SHAPE, "take": weights.update})
    found = {
        "groundup: bfloat16, compiled, sliced loss, fused optimizer": run(step, 0, n_steps),
        "plain loop, float32": run(plain(weights), 0, n_steps),
        "plain loop, float32, the text in another order": run(plain(weights), 1, n_steps),
    }
    ours, theirs, other = found.values()
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    summary = {
        "difference_of_each_step_nats": spread(apart),
        "last_steps_mean_nats": {name: sum(values[-LAST:]) / LAST for name, values in found.items()},
        "difference_nats": abs(sum(ours[-LAST:]) - sum(theirs[-LAST:])) / LAST,
        "noise_nats": abs(sum(other[-LAST:]) - sum(theirs[-LAST:])) / LAST,
    }
    print(summary)
    write_result("training_curves", {"shape": SHAPE, "rows": ROWS, "steps": n_steps, **summary, "losses": found})
    picture(found, HERE.parent / "docs" / "training_curves.svg")


def plain(weights: dict[str, torch.Tensor]) -> Any:
    """The plain loop with these weights of groundup's."""
    from training_step import PlainGPT, looped

    model = PlainGPT(SHAPE["vocab"], SHAPE["layers"], SHAPE["heads"], SHAPE["width"], SHAPE["length"])
    ours = {name: value.clone() for name, value in weights.items()}
    theirs = {"tokens.weight": ours["embed_tokens.weight"], "positions.weight": ours["embed_positions.weight"]}
    for layer in range(SHAPE["layers"]):
        mine, its = f"layers.{layer}", f"blocks.{layer}"
        parts = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "out": "self_attn.o_proj",
                 "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
        for kind in ("weight", "bias"):
            theirs |= {f"{its}.{to}.{kind}": ours[f"{mine}.{name}.{kind}"] for to, name in parts.items()}
            qkv = [ours[f"{mine}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            theirs[f"{its}.qkv.{kind}"] = torch.cat(qkv)
    theirs |= {"norm.weight": ours["norm.weight"], "norm.bias": ours["norm.bias"]}
    theirs["head.weight"] = theirs["tokens.weight"]
    model.load_state_dict(theirs)
    return looped(model, model, {"precision": "float32"})


def run(step: Any, order: int, n_steps: int) -> list[float]:
    """The losses of some steps."""
    text = (HERE.parent / "groundup" / "data" / "shakespeare.txt").read_bytes()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator, losses = torch.Generator().manual_seed(order), []
    for _ in range(n_steps):
        starts = torch.randint(0, len(ids) - SHAPE["length"] - 1, (ROWS,), generator=generator).tolist()
        rows = torch.stack([ids[start : start + SHAPE["length"] + 1] for start in starts])
        losses.append(step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return losses


def picture(found: dict[str, list[float]], path: Path) -> None:
    """All curves, and below them how far apart the first two are."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "groundup", "font.size": 9}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for (name, losses), style in zip(found.items(), ("-", "--", ":"), strict=True):
            above.plot(losses, style, label=name, linewidth=1)
        ours, theirs, _ = found.values()
        below.plot([a - b for a, b in zip(ours, theirs, strict=True)], linewidth=0.8)
        above.set_ylabel("loss, nats/byte")
        above.legend()
        below.set(xlabel="step", ylabel="first − second")
        below.axhline(0, color="0.6", linewidth=0.5)
        figure.savefig(path, metadata={"Date": None})
