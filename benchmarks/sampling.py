"""What drawing a token costs: groundup's sampler beside plain torch and transformers' warpers, in CPU µs a token.

Logits are normal with a standard deviation of 4 (a trained model: some hundred tokens hold nine tenths) or 1 (an
untrained one: half the vocabulary does). All variants run one after the other in every round, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from record import spread, write_result
from transformers.generation import logits_process as theirs

from groundup.generation import Constraint, SamplingParams
from groundup.generation.sampling import History, sample
from groundup.tokenizer import Tokenizer

FILTERS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(top_k=50),
    "top-p": SamplingParams(top_p=0.9),
    "min-p": SamplingParams(min_p=0.05),
    "typical": SamplingParams(typical_p=0.9),
    "penalties": SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.5),
}
WARPERS = {
    "temperature": theirs.TemperatureLogitsWarper(0.8),
    "top-k": theirs.TopKLogitsWarper(50),
    "top-p": theirs.TopPLogitsWarper(0.9),
    "min-p": theirs.MinPLogitsWarper(0.05),
    "typical": theirs.TypicalLogitsWarper(0.9),
    "penalties": theirs.RepetitionPenaltyLogitsProcessor(1.2),
}
SCHEMA = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}}


def main() -> None:
    """Measure all variants, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="of each variant in a round")
    parser.add_argument("--history", type=int, default=256, help="tokens that penalties look back on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocab_size, batch, deviation in itertools.product((32_000, 2_048), (1, 8), (4.0, 1.0)):
        functions = variants(vocab_size, batch, deviation, arguments.history)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(arguments.rounds):
            for name, function in functions.items():
                function()
                started = time.process_time()
                for _ in range(arguments.calls):
                    function()
                times[name].append((time.process_time() - started) / arguments.calls / batch * 1e6)
        for name, values in times.items():
            rows.append({"vocab_size": vocab_size, "batch": batch, "deviation": deviation, "variant": name})
            rows[-1] |= {"us_per_token": spread(values)}
        print(table(vocab_size, batch, deviation, times))
    write_result("sampling", {**vars(arguments), "n": arguments.rounds, "threads": 1, "rows": rows})


def variants(vocab_size: int, batch: int, deviation: float, n_history: int) -> dict[str, Callable[[], object]]:
    """Functions that draw one token for each row, by name: `groundup X`, `transformers X`, `torch X`."""
    logits = torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0)) * deviation
    seeds, positions = list(range(batch)), [5] * batch
    seen = torch.randint(0, vocab_size, (batch, n_history), generator=torch.Generator().manual_seed(1))
    histories = [History() for _ in range(batch)]
    for history, tokens in zip(histories, seen.tolist(), strict=True):
        for token in tokens:
            history.add(token)
    matcher = Constraint.json_schema(SCHEMA).compile(letters(), vocab_size)

    def ours(params: SamplingParams) -> Callable[[], object]:
        return lambda: sample(logits, [params] * batch, seeds, positions, histories)

    def warped(warper: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: warper(seen, logits).softmax(dim=-1).multinomial(1)

    def sorted_top_p() -> object:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        probabilities[probabilities.cumsum(dim=-1) - probabilities > 0.9] = 0
        return order.gather(-1, probabilities.multinomial(1))

    def grammar() -> object:
        return sample(logits, SamplingParams(), seeds, positions, masks=[matcher.mask() for _ in range(batch)])

    return {
        **{f"groundup {name}": ours(params) for name, params in FILTERS.items()},
        "groundup grammar": grammar,
        **{f"transformers {name}": warped(warper) for name, warper in WARPERS.items()},
        "torch greedy": lambda: logits.argmax(dim=-1),
        "torch temperature": lambda: (logits / 0.8).softmax(dim=-1).multinomial(1),
        "torch top-p": sorted_top_p,
    }


def letters() -> Tokenizer:
    """A small vocabulary for the grammar; the rest of the model's rows stand for no token."""
    text = " ".join(map(chr, range(33, 127)))
    return Tokenizer.train([text + ' [{"name": "word"}, {"name": "another"}]'], vocab_size=400)


def table(vocab_size: int, batch: int, deviation: float, times: dict[str, list[float]]) -> str:
    """Median µs a token, one line a method."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    names = dict.fromkeys(name.split(" ", 1)[1] for name in medians)
    makers = ("groundup", "transformers", "torch")
    lines = [
        f"\nvocabulary {vocab_size:,}, batch {batch}, deviation {deviation}: µs a token",
        "| method | " + " | ".join(makers) + " |",
    ]
    for name in names:
        cells = [f"{medians[f'{maker} {name}']:.0f}" if f"{maker} {name}" in medians else "" for maker in makers]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
