"""Puts measured figures into the README and the manual, from `benchmarks/results/*.json`; nothing is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a figure inside a sentence between
`<!-- figure: NAME PATH FORMAT -->` and `<!-- end -->`: PATH leads to the value through the result, its steps parted
by colons; FORMAT is Python's. `--check` says which pages are out of date.

Examples:
    python benchmarks/tables.py
    python benchmarks/tables.py --check
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
COMMANDS = {"demo_full": "demo.py --recipe demo-full --seeds 1 2 3"}
"""Of results that are not written by the script of their name alone."""
FIGURE = re.compile(r"(<!-- figure: (\w+) ([^>]+?) (\S+) -->).*?<!-- end -->")


def main() -> None:
    """Write or check every table of every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    arguments = parser.parse_args()
    old = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in old:
        print(f"{page.relative_to(ROOT)}: {'out of date' if arguments.check else 'written'}")
        if not arguments.check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(bool(old) and arguments.check)


def pages() -> list[Path]:
    """Every page that may have tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "manual").glob("*.md"))]


def filled(page: str) -> str:
    """The page with the tables and figures of today's results."""
    page = MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{table(found[1])}\n<!-- end -->", page)
    return FIGURE.sub(lambda found: f"{found[1]}{figure(found[2], found[3], found[4])}<!-- end -->", page)


def figure(name: str, path: str, form: str) -> str:
    """One value of a result."""
    value = read(name)
    for step in path.split(":"):
        value = value[int(step) if isinstance(value, list) else step]
    return format(value, form)


def read(name: str) -> Any:
    """A result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(name: str) -> str:
    """One table, with where and when it was measured."""
    if not (RESULTS / f"{name}.json").is_file():
        return f"Not measured yet: `python benchmarks/{name}.py`."
    result = read(name)
    machine, shown = result["environment"], TABLES[name](result)
    script = f"`benchmarks/{COMMANDS.get(name, f'{name}.py')}`"
    if "measured on" in shown:  # each row has its machine
        return f"{shown}\n\n{script}."
    where = f"{machine['cores']} cores of an {machine['cpu']}, {result['date']}"
    spread = "; median (least … most) of n" if " … " in shown else ""
    return f"{shown}\n\n{script}, {where}{spread}."


def rows_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def amount(values: dict[str, float], digits: int = 0) -> str:
    """A median with its spread."""
    low, high = f"{values['min']:,.{digits}f}", f"{values['max']:,.{digits}f}"
    return f"{values['median']:,.{digits}f} ({low} … {high}), n = {values['n']:g}"


def demo(result: dict[str, Any]) -> str:
    """What each model of the demo reaches, and what it takes."""
    stages = {name: stage["summary"] for name, stage in result["stages"].items()}
    base, tuned = stages["evaluate/pretrain"], stages["evaluate/sft"]
    cells = {(named(row), row["model"]): with_error(row) for row in result["rows"]}
    cells |= {(named(row), "n"): f"{row['after']['n']:,} {row['after']['unit']}" for row in result["rows"]}
    parts = ", ".join(f"{name} {stage['seconds']:.0f}" for name, stage in result["stages"].items() if "/" not in name)
    lines = (
        f"A model of {stages['pretrain']['parameters'] / 1e6:.1f} M parameters; {stages['corpus']['documents_kept']} "
        f"of {stages['corpus']['documents_in']} documents kept, {stages['tokenizer']['bytes_per_token']:.2f} bytes per "
        f"token, {stages['pretrain']['tokens_per_second']:,.0f} tokens/s in pretraining; fine-tuning costs "
        f"{tuned['bits_per_byte'] - base['bits_per_byte']:.2f} bits per byte of plain text. "
        f"{result['seconds'] / 60:.1f} minutes and {result['peak_memory_bytes'] / 2**30:.1f} GiB in all "
        f"({parts} s), {stages['pretrain']['precision']}, one run, seed 1."
    )
    return f"{across('on held-out data', cells)}\n\n{lines}"


def demo_full(result: dict[str, Any]) -> str:
    """Means over seeds with 95 % intervals, the controls beside what they control."""
    of_training = ("val_loss", "val_bits_per_byte", "val_accuracy", "final_loss", "length_correlation")
    rows = [row for row in result["table"] if row["key"] not in of_training]
    cells = {(named(row), row["model"]): over_seeds(row) for row in rows}
    minutes = ", ".join(f"{run['seconds'] / 60:.1f}" for run in result["runs"])
    gates = [gate for run in result["runs"] for gate in run["gates"]]
    lines = (
        f"Means of {len(result['runs'])} seeds, 95 % interval of Student's t; {minutes} minutes "
        f"(load average {result['load_average'][2]:.1f} on {result['environment']['cores']} cores); "
        f"{sum(gate['passed'] for gate in gates)} of {len(gates)} gates held."
    )
    return f"{across('mean over seeds', cells)}\n\n{lines}"


def across(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """Figures down, models across."""
    models = list(dict.fromkeys(model for _, model in cells))
    labels = dict.fromkeys(label for label, _ in cells)
    return rows_of(
        [corner, *models], ([label, *(cells.get((label, model), "") for model in models)] for label in labels)
    )


def named(row: dict[str, Any]) -> str:
    """A figure's name, without its model."""
    return str(row["label"]).removesuffix(" (control)").removesuffix(f", {row['model']}").replace("_", " ")


def with_error(row: dict[str, Any]) -> str:
    """One figure of one model, with its standard error."""
    form, scale, digits = scale_of(row["key"])
    return f"{row['after']['value']:{form}} ± {scale * row['after']['stderr']:.{digits}f}"


def over_seeds(row: dict[str, Any]) -> str:
    """A mean over seeds, with half the width of its interval."""
    form, scale, digits = scale_of(row["key"])
    return f"{row['mean']:{form}} ± {scale * (row['high'] - row['mean']):.{digits}f}"


def scale_of(key: str) -> tuple[str, int, int]:
    """How a figure is written: as a percentage or as it is; its factor; digits of its error."""
    is_share = key.startswith("exact_match") or key.endswith(("share", "rate", "accuracy", "right"))
    return (".1%", 100, 1) if is_share else (".2f", 1, 2)


def shakespeare(_: dict[str, Any]) -> str:
    """Both recipes of one character a token, each with its machine."""
    rows = []
    for result in (read("shakespeare"), read("shakespeare_long")):
        curve, machine = result["curves"][0], result["environment"]
        rows.append(
            [
                f"`groundup build {result['recipe']}`",
                f"{curve['points'][-1]['seconds']:.0f} s",
                f"{curve['best']:.3f} nats/char",
                f"{machine['cores']} cores of an {machine['cpu']}, {result['date']}",
            ]
        )
    return rows_of(["Shakespeare, one character a token", "time", "validation loss", "measured on"], rows)


def initialization(result: dict[str, Any]) -> str:
    """Both ends of each curve, and how far the prediction is off at worst."""
    rows = []
    for row in result["rows"]:
        forward, backward = row["forward"]["measured"], row["backward"]["measured"]
        rows.append(
            [
                f"`{row['initialization']}`",
                row["norm_placement"],
                f"{forward[0]:.5f} → {forward[-1]:.5f}",
                f"{backward[-1]:.2f} → {backward[0]:,.2f}",
                f"{max(row['forward']['worst_error'], row['backward']['worst_error']):.1%}",
            ]
        )
    head = ["initialization", "norms", "stream: embedding → end", "gradient: end → embedding",
            "prediction off by at most"]  # fmt: skip
    return rows_of(head, rows)


def extraction(result: dict[str, Any]) -> str:
    """Speed and accuracy of both extractors."""
    rows = (
        [
            row["extractor"],
            amount(row["pages_per_cpu_second"]),
            amount(row["library_alone_pages_per_cpu_second"]),
            f"{row['article_extraction_benchmark']['f1']:.3f}",
            f"{row['mozilla_readability_words']['f1']:.3f}",
        ]
        for row in result["rows"]
    )
    head = ["extractor", "pages per CPU-second", "the library alone", "F1, article extraction", "F1, Mozilla's pages"]
    return rows_of(head, rows)


def minhash(result: dict[str, Any]) -> str:
    """Speed of the signatures, and what is found of planted pairs."""
    speeds = ([name, f"{amount(speed)} MB/cpu-s"] for name, speed in result["megabytes_per_cpu_second"].items())
    planted = (
        [
            one["similarities"],
            f"{one['min_agreement']:g}",
            f"{one['recall_from_0.8']:.3f}",
            f"{one['precision_from_0.7']:.3f}",
        ]
        for one in result["planted"]
    )
    head = ["planted pairs", "`min_agreement`", "recall, similarity ≥ 0.8", "precision, similarity ≥ 0.7"]
    return f"{rows_of(['step', 'speed'], speeds)}\n\n{rows_of(head, planted)}"


def data_chain(result: dict[str, Any]) -> str:
    """The chain beside datatrove, corpus by corpus."""
    parts = []
    for corpus in result["corpora"]:
        rows = (
            [
                name,
                amount(row["megabytes_per_cpu_second"], 2),
                f"{row['wall_seconds']['median']:.1f}",
                f"{row['peak_mib']:.0f} / {row['children_peak_mib']:.0f}",
                f"{row['documents_kept']:,}",
            ]
            for name, row in corpus["rows"].items()
        )
        title = f"**{corpus['corpus']}**: {corpus['megabytes']:.0f} MB, {corpus['documents']:,} documents"
        head = ["", "MB per CPU-second", "wall s", "peak MiB, process / child", "kept"]
        found = corpus["ratios"]
        over = "; ".join(
            f"{name}: {value:.{1 if value > 2 else 2}f}×" for name, value in found.items() if "whole" not in name
        )
        parts.append(f"{title}\n\n{rows_of(head, rows)}\n\n{over}.")
    return "\n\n".join(parts)


def data_memory(result: dict[str, Any]) -> str:
    """Peak memory by size of the corpus."""
    rows = (
        [
            f"{row['megabytes']:,.0f} MB",
            f"{row['workers']}",
            row["stage"],
            f"{row['process_mib']:.0f}",
            f"{row['worker_mib']:.0f}" if row["workers"] > 1 else "",
        ]
        for row in result["rows"]
    )
    return rows_of(["corpus", "workers", "stage", "first process, MiB", "largest worker, MiB"], rows)


def tokenization(result: dict[str, Any]) -> str:
    """Engines and trainers."""
    engines = (
        [
            name,
            amount(row["mb_per_cpu_second"], 1),
            f"{row['mb_per_cpu_second_again']['median']:.1f}",
            f"{row['peak_mib']:.0f}",
        ]
        for name, row in result["engines"].items()
    )
    return rows_of(["engine", "MB per CPU-second", "the same text again", "peak MiB"], engines)


def loader(result: dict[str, Any]) -> str:
    """Orders of reading."""
    rows = ([name, amount(row["million_tokens_per_cpu_second"])] for name, row in result["rows"].items())
    return rows_of(["order", "million tokens per CPU-second"], rows)


def quality(result: dict[str, Any]) -> str:
    """Tokens to the same loss, and what each change from the baseline to the defaults pays."""
    rows = (
        [
            corpus,
            f"{found['tokens'] / 1e6:g} M",
            f"{found['rates']['best']:g}",
            amount(found["target_loss"], 3),
            amount(found["share"], 2) if found["share"] else "not reached",
            f"{found['smaller_batch']['best']['val_loss']:.3f}",
            f"{found['smaller_batch']['share']:.2f}" if found["smaller_batch"]["share"] else "not reached",
        ]
        for corpus, found in result["corpora"].items()
    )
    head = [
        "text",
        "T, tokens",
        "baseline's best rate",
        "its validation loss at T",
        "the defaults reach it after, of T",
        "with a quarter of the batch, seed 1",
        "reached after, of T",
    ]
    ladders = {corpus: found["ladder"] for corpus, found in result["corpora"].items()}
    rungs = (
        [runs[0]["variant"].partition(",")[0], *(f"{run['val_loss']:.3f}" for run in runs)]
        for runs in zip(*ladders.values(), strict=True)
    )
    steps = rows_of([f"after {next(iter(ladders.values()))[0]['share']:g} T, seed 1", *ladders], rungs)
    return f"{rows_of(head, rows)}\n\n{steps}"


def training_speed(result: dict[str, Any]) -> str:
    """Tokens per second beside the peers, and what comes of it."""
    head = ["size", "contestant", "tokens per second", "of peak bfloat16", "peak MiB"]
    rows = []
    for size in result["sizes"]:
        for row in size["rows"]:
            name = row["contestant"] + (", beside the defaults" if row.get("beside_defaults") else "")
            share, peak = f"{row['share_of_bfloat16_ceiling']:.0%}", f"{row['peak_mib']:,.0f}"
            rows.append([size["size"], name, amount(row["tokens_per_second"]), share, peak])
    ratios = rows_of(
        ["size", "over the best peer", "GPT-2's shape over the plain loop", "Llama's over the best Llama",
         "over the best default", "peak over the leanest peer"],
        (
            [
                size["size"],
                *(
                    f"{size[key]:.2f}×" if key in size else "–"
                    for key in ("over_the_best_peer", "over_the_best_peer_of_GPT-2_shape",
                                "over_the_best_peer_of_Llama_shape", "over_the_best_default",
                                "peak_over_the_leanest_peer")
                ),
            ]
            for size in result["sizes"]
        ),
    )  # fmt: skip
    return f"{ratios}\n\n{rows_of(head, rows)}"


def cpu_ladder(result: dict[str, Any]) -> str:
    """What each trick pays."""
    head = ["one change a row", *(f"{size['size']}, ms a step | over the first" for size in result["sizes"])]
    names = [row["row"] for row in result["sizes"][0]["rows"]]
    rows = (
        [
            name,
            *(
                f"{1000 * row['seconds_per_step']['median']:.0f} ({1000 * row['seconds_per_step']['min']:.0f} … "
                f"{1000 * row['seconds_per_step']['max']:.0f}) | {row['speed_over_first']:.2f}×"
                for row in (size["rows"][index] for size in result["sizes"])
            ),
        ]
        for index, name in enumerate(names)
    )
    lines = rows_of(head, rows).splitlines()
    lines[1] = "| --- " * (1 + 2 * len(result["sizes"])) + "|"
    return "\n".join(lines)


def plan(result: dict[str, Any]) -> str:
    """What was planned beside what happened."""
    rows = []
    for row in result["rows"]:
        settings = ", ".join(str(value) for value in row["settings"].values())
        time, memory = row["seconds"], row["bytes"]
        rows.append(
            [
                f"{row['run'].partition(':')[0]}: {settings}",
                *(f"{time[name]:.1f}" for name in ("plan", "real")),
                f"{time['error']:+.0%}",
                *(f"{memory[name] / 2**20:,.0f}" for name in ("plan", "real")),
                f"{memory['error']:+.0%}",
            ]
        )
    return rows_of(["run", "seconds: plan", "real", "off by", "MiB: plan", "real", "off by"], rows)


def scaling(result: dict[str, Any]) -> str:
    """The law's coefficients, and a run that it has not seen."""
    intervals, check = result["intervals"], result["check"]
    rows = (
        [name, f"{result[name]:.3g}", f"{intervals[name][0]:.3g} to {intervals[name][1]:.3g}"]
        for name in ("e", "a", "alpha", "b", "beta")
    )
    said = check["predicted"]
    lines = (
        f"{result['n']} runs in {result['seconds'] / 60:.0f} minutes; scatter {result['noise']:.2%}, left out "
        f"{result['left_out_error']:.2%}. A run of {check['n_parameters']:,} parameters that the law has not seen: "
        f"predicted {said['loss']:.3f} ({said['low']:.3f} to {said['high']:.3f}), measured {check['loss']:.3f}."
    )
    return f"{rows_of(['coefficient', 'value', '90 %'], rows)}\n\n{lines}"


def llama_cpp(result: dict[str, Any]) -> str:
    """What a type of weights costs, measured by llama.cpp."""
    stored = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}
    rows = (
        [
            f"`{row['dtype']}`",
            f"{stored[row['dtype']]:g}",
            f"{row['bits_per_token']:.3f}",
            f"{abs(row['mean_divergence']):.4f}",
            f"{row['same_best_token']:.1%}",
        ]
        for row in result["types"]
    )
    return rows_of(["`--dtype`", "bits a weight", "bits per token", "divergence from ours", "same best token"], rows)


def alignment(result: dict[str, Any]) -> str:
    """Steps beside TRL's, packed rows beside padded ones, and the memory of adapters."""
    steps = [
        [
            f"{race['method'].upper()}, {race['size'].upper()}",
            row["contestant"],
            amount(
                {name: 1000 * value if name != "n" else value for name, value in row["seconds_per_step"].items()}, 1
            ),
            f"{row['times_as_fast']:.2f}×" if "times_as_fast" in row else "",
        ]
        for race in result["steps"]
        for row in race["rows"]
    ]
    packed = ", ".join(
        f"{row['times_as_fast']:.2f} times as fast on {row['lengths']}'s lengths "
        f"({row['packed']['packing_efficiency']:.0%} of the positions filled)"
        for row in result["rows"]
    )
    memory = (
        [
            f"{row['size'].upper()}, {row['precision']}",
            *(cell for what in ("tensors", "process") for cell in (f"{row['full'][what] / 2**20:,.0f}",
              f"{row['lora'][what] / 2**20:,.0f}", f"{row['share'][what]:.0%}")),
        ]
        for row in result["memory"]["rows"]
    )  # fmt: skip
    head = ["", "", "ms a step", "as fast as TRL's of the same kind"]
    sides = ["MiB, all weights", "with LoRA", "share"]
    return (
        f"{rows_of(head, steps)}\n\nPacked rows, an epoch: {packed}.\n\nMemory of DPO, two pairs, rank 8: all tensors "
        "together at the fullest moment, and the process above what it held before the model was loaded.\n\n"
        + rows_of(["", *(f"{what}: {side}" for what in ("tensors", "process") for side in sides)], memory)
    )


def engine(result: dict[str, Any]) -> str:
    """The engine beside transformers and beside itself, and the demo's ladder."""
    head = ["", "", "tokens per second", "beside", "tokens per second", "ratio", "wanted"]
    parts = result["parts"]
    rows = (comparison(row) for part in ("one", "eight", "rollouts", "mixed") for row in parts[part])
    prefix = (comparison(row, 4) for row in parts["prefix"])
    cold = ([row["name"], amount(row["value"], 2)] for row in parts["cold"])
    steps = ([row["name"], amount(row["value"]), f"{row['ratio']['median']:.1f}×"] for row in parts["ladder"])
    return "\n\n".join(
        [
            rows_of(head, rows),
            rows_of(["", "", "s", "beside", "s", "ratio", "wanted"], prefix),
            rows_of(["a process of its own", "s"], cold),
            rows_of(["the demo's model", "tokens per second", "over the first"], steps),
        ]
    )


def speculation(result: dict[str, Any]) -> str:
    """Where guesses pay."""
    rows = (
        [
            *comparison(row),
            f"{row['accepted']:.0%}" if "accepted" in row else "–",
            f"{row['tokens_a_step']:.2f}",
            f"{row['right']:.0%}" if "right" in row else "–",
        ]
        for row in result["rows"]
    )
    head = ["texts", "guesses of", "tokens per second", "beside", "tokens per second", "ratio", "wanted",
            "kept", "tokens a step", "answers right"]  # fmt: skip
    return rows_of(head, rows)


def comparison(row: dict[str, Any], digits: int = 0) -> list[str]:
    """One comparison of the engine's."""
    wanted = row["wanted"]
    least = "–" if wanted is None else f"{'≤' if wanted < 0.9 else '≥'} {wanted:g}×"
    values = (amount(row["value"], digits), row["beside"], f"{row['beside_value']['median']:,.{digits}f}")
    return [row["what"], row["name"], *values, f"{row['ratio']['median']:.2f}×", least]


def decode_2_threads(result: dict[str, Any]) -> str:
    """Steps of one token, and of eight texts, beside transformers and llama.cpp; then what checking guesses costs."""
    rows, verified = [], []
    for shape in (name for name in ("demo", "26M", "125M") if name in result):
        part = result[shape]
        decode, batch = part["decode"], part["batch"]
        for kind in ("f32", "bf16", "int8", "int4"):
            own, engine = decode[f"step {kind}"], decode[f"engine {kind}"]["seconds"]["median"]
            cells = [shape, kind, f"{engine * 1e3:.3f}"]
            cells.append(f"{decode['transformers f32']['seconds']['median'] / engine:.1f}×")
            theirs = decode.get(f"llama.cpp {kind}")
            cells.append("–" if theirs is None else f"{theirs['seconds']['median'] / own['seconds']['median']:.2f}×")
            if kind in ("f32", "bf16"):
                eight = batch[f"engine {kind}"]["seconds"]["median"]
                cells.append(f"{batch[f'transformers {kind}']['seconds']['median'] / eight:.2f}×")
            else:
                cells.append("–")
            rows.append(cells)
            verify = part["verify"][f"step {kind}"]
            verified.append([shape, kind, *(f"{verify[n]:.2f}" for n in sorted(verify, key=int))])
    numbers = sorted(next(iter(result[rows[0][0]]["verify"].values())), key=int)
    head = ["model", "weights", "ms a token", "beside transformers, f32", "beside llama.cpp, same bits",
            "eight texts beside transformers, same bits"]  # fmt: skip
    cost = rows_of(["a step of so many tokens over one", "", *numbers], verified)
    return f"{rows_of(head, rows)}\n\n{cost}"


def quantize(result: dict[str, Any]) -> str:
    """What fewer bits cost a model."""
    rows = [
        [
            name,
            f"{one['bits_per_byte_change']:+.5f} ± {one['stderr']:.5f}",
            f"{one['kl_mean']:.1e}",
            f"{one['same_top_1']:.1%}",
        ]
        for name, one in result["quality"].items()
    ]
    head = [f"a model of {result['parameters'] / 1e6:.1f}M, {result['bits_per_byte']:.4f} bits per byte", "change",
            "mean divergence", "same best token"]  # fmt: skip
    return rows_of(head, rows)


def sampling(result: dict[str, Any]) -> str:
    """Microseconds a token, of logits whose standard deviation is 4 (few tokens matter) and 1 (many do)."""
    found = {
        (row["deviation"], *row["variant"].split(" ", 1)): amount(row["us_per_token"])
        for row in result["rows"]
        if (row["vocab_size"], row["batch"]) == (32_000, 1)
    }
    kinds = [kind for deviation, who, kind in found if (deviation, who) == (4.0, "groundup")]
    whose = [(deviation, who) for deviation in (4.0, 1.0) for who in ("groundup", "torch", "transformers")]
    rows = [[kind, *(found.get((*column, kind), "–") for column in whose)] for kind in kinds]
    head = [f"{who}, deviation {deviation:g}" for deviation, who in whose]
    return rows_of(["µs a token, vocabulary 32,000", *head], rows)


def serving(result: dict[str, Any]) -> str:
    """What HTTP costs, and llama.cpp's server beside ours."""
    own = (
        [
            f"{row['streams']}", amount(row["http"]), amount(row["engine"]), f"{row['ratio']:.2f}",
            amount(row["microseconds_per_token"]),
        ]
        for row in result["own"]
    )  # fmt: skip
    head = ["streams", "tokens per second over HTTP", "by the engine alone", "ratio (wanted: ≥ 0.9)",
            "server's µs of CPU a token (wanted: ≤ 50)"]  # fmt: skip
    shown = rows_of(head, own)
    if "beside_llama_cpp" not in result:
        return shown
    whose = ("groundup", "llama.cpp")
    beside = (
        [f"{row['streams']}", *(amount(row[who]["tokens_per_second"]) for who in whose),
         *(amount({**{key: 1000 * row[who]["first_token_seconds"][key] for key in ("median", "min", "max")},
                   "n": row[who]["first_token_seconds"]["n"]}) for who in whose)]
        for row in result["beside_llama_cpp"]
    )  # fmt: skip
    head = ["streams", *(f"{who}, tokens per second" for who in whose), *(f"{who}, ms to the first" for who in whose)]
    return f"{shown}\n\n{rows_of(head, beside)}"


def soak(result: dict[str, Any]) -> str:
    """What clients did, and what became of it."""
    head = ["clients", "minutes", "right answers", "other requests", "wrong answers or codes", "MiB early", "MiB late"]
    seen, memory = result["seen"], result["memory_mib"]
    n_right = seen.get("whole", 0) + seen.get("streamed", 0)
    cells = [result["clients"], result["minutes"], n_right, sum(seen.values()) - n_right, result["n_wrong"]]
    return rows_of(head, [[*(f"{cell:,g}" for cell in cells), f"{memory['early']:.0f}", f"{memory['late']:.0f}"]])


def evaluation(result: dict[str, Any]) -> str:
    """How many times as fast benchmarks are as in lm-evaluation-harness, by the clock and in CPU seconds."""
    head = ["parameters", "benchmark", "worked examples", "items", "times as fast", "CPU seconds: times fewer"]
    return rows_of(head, [
        [row["shape"], f"`{row['task']}`", str(row["shots"]), str(row["items"]), amount(row["ratio"], 1),
         amount(row["cpu_ratio"], 1)]
        for row in result["rows"]
    ])  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    function.__name__: function
    for function in (
        demo,
        demo_full,
        alignment,
        shakespeare,
        initialization,
        extraction,
        minhash,
        data_chain,
        data_memory,
        tokenization,
        loader,
        quality,
        training_speed,
        cpu_ladder,
        plan,
        scaling,
        llama_cpp,
        engine,
        speculation,
        sampling,
        decode_2_threads,
        quantize,
        serving,
        soak,
        evaluation,
    )
}


if __name__ == "__main__":
    main()
