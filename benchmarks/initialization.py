"""What each initialization does to signals before training, layer by layer, forward and backward, and drawn.

Measured on random tokens, for every initialization and both placements of norms, and predicted from the table of
`groundup/model/initialization.py` by mean-field theory (`groundup/reference/initialization.py`). The gradient is
that of random numbers behind the last block, so that the loss does not matter. Also: every parameter's standard
deviation beside the table's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from record import write_result

from groundup.model import ModelConfig, Transformer
from groundup.model.initialization import standard_deviation
from groundup.reference.initialization import Blocks, predicted_variances
from groundup.reference.transformer import ACTIVATIONS

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "initialization.svg"
COLOURS = {"gpt2": "#c2410c", "scaled": "#1d4ed8"}
PARTS = ("v", "o", "gate", "up", "down")


def main() -> None:
    """Measure all four, write the figures and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    rows = []
    for initialization, placement in itertools.product(("gpt2", "scaled"), ("pre", "post")):
        config = shape(initialization, placement, arguments.layers, arguments.width, arguments.length)
        forward, backward = measure(config, range(1, arguments.seeds + 1))
        predicted_forward, predicted_backward = predicted_variances(blocks(config), 2 * 0.02**2, arguments.length)
        worst = worst_error(forward, predicted_forward), worst_error(backward, predicted_backward)
        rows.append(
            {
                "initialization": initialization,
                "norm_placement": placement,
                "forward": {"measured": forward, "predicted": predicted_forward, "worst_error": worst[0]},
                "backward": {"measured": backward, "predicted": predicted_backward, "worst_error": worst[1]},
                "parameters": deviations(config),
            }
        )
    write_result("initialization", {**vars(arguments), "n": arguments.seeds, "rows": rows})
    draw(rows, PICTURE)


def shape(initialization: str, placement: str, n_layers: int, width: int, length: int) -> ModelConfig:
    """GPT-2's parts at a size of one's own; dense, so that each feature is a sum of many."""
    return ModelConfig(
        vocab_size=4096,
        context_length=length,
        n_layers=n_layers,
        n_heads=width // 32,
        n_kv_heads=width // 32,
        head_dim=32,
        d_model=width,
        d_ff=4 * width,
        norm="layernorm",
        norm_placement=placement,
        norm_eps=1e-8,
        qk_norm=False,
        position="learned",
        activation="gelu_tanh",
        initialization=initialization,
    )


def blocks(config: ModelConfig) -> Blocks:
    """What the prediction needs of a model: its widths, and the table's standard deviations."""
    model = Transformer(config, device="meta")
    names = {name.split(".")[-2].removesuffix("_proj"): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    found = {
        part: standard_deviation(*names[part], config.initialization, config.n_layers)
        for part in PARTS
        if part in names
    }
    return Blocks(
        n_layers=config.n_layers,
        d_model=config.d_model,
        d_attention=config.n_heads * config.head_dim,
        d_ff=config.d_ff,
        deviations={part: value for part, value in found.items() if value is not None},
        activation=ACTIVATIONS[config.activation],
        is_post_norm=config.norm_placement == "post",
    )


def measure(config: ModelConfig, seeds: range, rows: int = 4) -> tuple[list[float], list[float]]:
    """Mean squares of the stream, and of its gradient, before the first block and behind each; means over seeds."""
    forward, backward = [], []
    for seed in seeds:
        model, generator = Transformer(config, seed=seed), torch.Generator().manual_seed(seed)
        stream: list[torch.Tensor] = []
        for block in model.layers:
            block.register_forward_pre_hook(lambda _, inputs, stream=stream: stream.append(inputs[0]))
        model.layers[-1].register_forward_hook(lambda _, __, output, stream=stream: stream.append(output))
        model(torch.randint(0, config.vocab_size, (rows, config.context_length), generator=generator))
        noise = torch.randn(stream[-1].shape, generator=generator)
        gradients = torch.autograd.grad(stream[-1], stream, noise)
        forward.append([float(x.detach().square().mean()) for x in stream])
        backward.append([float(x.square().mean()) for x in gradients])
    return tuple([statistics.mean(place) for place in zip(*values, strict=True)] for values in (forward, backward))


def deviations(config: ModelConfig) -> list[dict[str, object]]:
    """The standard deviation of every matrix beside the table's."""
    return [
        {
            "name": name,
            "measured": parameter.std().item(),
            "table": standard_deviation(name, tuple(parameter.shape), config.initialization, config.n_layers),
        }
        for name, parameter in Transformer(config).named_parameters()
        if parameter.ndim > 1
    ]


def worst_error(measured: list[float], predicted: list[float]) -> float:
    """The largest relative error."""
    return max(abs(one / other - 1) for one, other in zip(measured, predicted, strict=True))


def draw(rows: list[dict], path: Path) -> None:
    """Dots for what was measured, lines for what the table predicts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "groundup", "font.size": 10}):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained", facecolor="white")
        panels = figure.subplots(1, 2)
        titles = ("forward: mean square of the stream", "backward: mean square of its gradient")
        for panel, direction, title in zip(panels, ("forward", "backward"), titles, strict=True):
            for row in rows:
                name, is_pre = row["initialization"], row["norm_placement"] == "pre"
                places = range(len(row[direction]["measured"]))
                colour, line = COLOURS[name], "-" if is_pre else (0, (4, 2))
                panel.plot(places, row[direction]["predicted"], color=colour, linestyle=line, linewidth=1.3)
                panel.plot(
                    places,
                    row[direction]["measured"],
                    color=colour,
                    linestyle="none",
                    marker="o" if is_pre else "s",
                    markersize=8 if name == "gpt2" else 4,
                    markerfacecolor=colour if is_pre else "white",
                    label=f"{name}, {'pre' if is_pre else 'post'}-norm",
                )
            panel.set(yscale="log", title=title, xlabel="behind block (0: embedding)", xticks=range(0, len(places), 2))
            panel.grid(axis="y", color="#dddddd", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})
    print(f"written: {path.relative_to(PICTURE.parent.parent)}")


if __name__ == "__main__":
    main()
