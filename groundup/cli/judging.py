"""Commands that look at what models answer: `judge`, `safety` and `memorization`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from groundup.cli.options import JsonOption, QuietOption, print_json, print_table
from groundup.cli.talking import ModelOption, load_model

if TYPE_CHECKING:
    from groundup.evaluation.judge import Judge, Verdict
    from groundup.evaluation.metrics import Estimate

_PANEL = "Look at runs, recipes and this machine"
_WORKERS = 4  # requests to a server at the same time
PromptsOption = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE|SET",
        help='Records with a "prompt" (JSON lines, CSV), or groundup:talk, groundup:harm.',
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=2, help="Ask at most so many prompts.")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(
        rich_help_panel=_PANEL,
        epilog="Examples:  groundup judge runs/demo/dpo runs/demo/sft --prompts groundup:talk --judge "
        "my_judge.py:better  ·  groundup judge a/ b/ --prompts mine.jsonl --judge http://127.0.0.1:8000/v1",
    )(judge)
    app.command(
        rich_help_panel=_PANEL, epilog="Example:  groundup safety runs/demo runs/mine/safety --prompts mine.jsonl"
    )(safety)
    app.command(rich_help_panel=_PANEL, epilog="Example:  groundup memorization runs/demo --tokens 32")(memorization)


def judge(
    first: Annotated[Path, typer.Argument(metavar="MODEL", help="A stage of a run, or a model's folder.")],
    second: Annotated[Path, typer.Argument(metavar="MODEL", help="The model to compare it with.")],
    prompts: PromptsOption,
    by: Annotated[
        str, typer.Option("--judge", metavar="URL|FILE.py:NAME", help="An OpenAI-compatible server, or a function.")
    ],
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", metavar="NAME", help="The judge's model (default: the first).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="GROUNDUP_API_KEY", help="Key of the judge's server.")
    ] = None,
    seconds: Annotated[float, typer.Option("--timeout", min=0.1, help="Wait so many seconds for a reply.")] = 120.0,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Keeps the verdicts.")] = Path("judged"),
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = 128,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Win rate: two models answer the same prompts, and a judge says which is better, with the places swapped too.

    A function of yours, `better(prompt, first, second)`, gives a number above 0 where the first answer is better, below
    0 where the second is, 0 for a tie. Verdicts are kept as they come: the same command goes on where it stopped.
    """
    from groundup.console import Console
    from groundup.errors import DataError, GroundupError
    from groundup.evaluation.judge import Pair, by_url, judge_pairs, win_rate
    from groundup.evaluation.measure import to_plain
    from groundup.evaluation.prompts import read_prompts
    from groundup.evaluation.text_metrics import variety
    from groundup.user_code import function_fingerprint

    chosen: Judge
    if by.startswith(("http://", "https://")):
        (chosen, identity), workers = by_url(by, judge_model, api_key, seconds), _WORKERS
    else:
        chosen, identity, workers = _function(by), function_fingerprint(by, "--judge"), 1
    asked = [one.text for one in read_prompts(prompts, limit=limit)]
    answers = [_kept_answers(path, asked, out, max_tokens) for path in (first, second)]
    pairs = [Pair(*row) for row in zip(asked, *answers, strict=True)]
    with Console(quiet=quiet or as_json).bar("judge", len(pairs)) as bar:
        try:
            verdicts = judge_pairs(pairs, chosen, identity, out / "verdicts.jsonl", workers=workers, advance=bar.update)
        except GroundupError as error:
            kept = f"The verdicts so far stand in {out}, and the same command goes on."
            raise GroundupError(error.message, f"{error.fix} {kept}" if error.fix else kept) from error
    found = win_rate(verdicts)
    if found is None:
        raise DataError(f"--judge {by}: no pair has two verdicts.", f"What was judged stands in {out}.")
    texts = [variety(own) for own in answers]
    if as_json:
        print_json({**asdict(found), "first": to_plain(texts[0]), "second": to_plain(texts[1])})
        return
    verdict = ": no difference shown" if found.low < 0.5 < found.high else ""
    typer.echo(
        f"{first} over {second}: {found.value:.1%} [{found.low:.1%}, {found.high:.1%}] of {found.n:,} pairs "
        f"({found.wins:,} won, {found.losses:,} lost, {found.ties:,} tied){verdict}"
    )
    if found.n_without:
        typer.echo(f"{found.n_without:,} pairs are not counted: the judge's reply is no verdict.")
    if (place := found.first_place) is not None:
        typer.echo(f"the first place is preferred in {_say(place)} of {place.n:,} verdicts")
    names = [*dict.fromkeys([*texts[0], *texts[1]])]
    rows = [(name, *(_say(own[name]) if name in own else "" for own in texts)) for name in names]
    print_table(("answers", str(first), str(second)), rows)


def _function(spec: str) -> Judge:
    """The user's own judge."""
    from groundup.errors import DataError
    from groundup.user_code import in_words, load_function

    function = load_function(spec, "--judge", "def {name}(prompt, first, second): return len(second) - len(first)")

    def better(prompt: str, first: str, second: str) -> Verdict:
        try:
            value = function(prompt, first, second)
            return None if value is None or math.isnan(value) else float(value)
        except Exception as error:
            raise DataError(f"--judge {spec}: fails ({in_words(error)}).", "It gives a number, or None.") from error

    return better


def _kept_answers(path: Path, asked: Sequence[str], out: Path, max_tokens: int) -> list[str]:
    """A model's answers, made once."""
    from groundup.evaluation.prompts import answer_prompts
    from groundup.files import read_json, value_digest, write_json
    from groundup.stage import model_digest

    model, tokenizer, folder = load_model(path, None, to_chat=True)
    place = out / f"answers-{value_digest([model_digest(folder), asked, max_tokens])[:16]}.json"
    if not place.is_file():
        out.mkdir(parents=True, exist_ok=True)
        answers = answer_prompts(model, tokenizer, asked, max_tokens)
        write_json(place, {"model": str(folder), "answers": answers})
    return list(read_json(place)["answers"])


def safety(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder, or a model's folder.")],
    classifier: Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="The folder of a classify stage.")],
    prompts: PromptsOption = "groundup:harm",
    stage: ModelOption = None,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = 128,
    as_json: JsonOption = False,
) -> None:
    """Toxicity, refusal of harmful requests and of harmless ones, by a classifier that safety = true trains.

    Prompts say what they are: {"prompt": "…", "harmful": true}.
    """
    from groundup.alignment import Classifier
    from groundup.errors import ArtifactError
    from groundup.evaluation.measure import to_plain
    from groundup.evaluation.metrics import wilson
    from groundup.evaluation.prompts import answer_prompts, read_prompts
    from groundup.evaluation.safety import LABELS, safety_figures

    by = Classifier.load(classifier)
    fix = "Train one: a stage that classifies, with safety = true."
    if missing := sorted({*LABELS} - {*by.labels}):
        raise ArtifactError(f"{classifier}: a classifier of {', '.join(by.labels)}, not of {', '.join(missing)}.", fix)
    if not by.held_out:
        raise ArtifactError(f"{classifier}: nothing says how often this classifier is right.", fix)
    asked = read_prompts(prompts, limit=limit)
    network, tokenizer, _ = load_model(model, stage, to_chat=True)
    answers = answer_prompts(network, tokenizer, [one.text for one in asked], max_tokens)
    labels = by.classify(answers)
    figures = safety_figures(asked, labels)
    if as_json:
        rows = [{"prompt": one.text, "answer": answer, "label": label}
                for one, answer, label in zip(asked, answers, labels, strict=True)]  # fmt: skip
        print_json({**to_plain(figures), "classifier": by.held_out, "answers": rows})
        return
    _print_figures(figures)
    right, n = by.held_out["accuracy"], int(by.held_out["accuracy_n"])
    low, high = wilson(right, n)
    typer.echo(
        f"by a classifier that is right in {right:.1%} [{low:.1%}, {high:.1%}] of {n:,} held-out texts "
        f"(always saying the most frequent label: {by.held_out['majority_accuracy']:.1%})"
    )


def memorization(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, with its corpus.")],
    stage: ModelOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to give, and to compare after.")] = 50,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many documents a split.")] = 500,
    as_json: JsonOption = False,
) -> None:
    """How much of its training text a model continues word for word, beside text that it was not trained on."""
    from groundup.corpus import stream_documents
    from groundup.evaluation.measure import to_plain
    from groundup.evaluation.text_metrics import memorization as measure
    from groundup.run import Run

    Run.existing(run)
    network, tokenizer, _ = load_model(run, stage, to_chat=False)
    figures: dict[str, Estimate] = {}
    for split in ("train", "validation"):
        texts = (document.text for document in stream_documents(run / "corpus", split))
        found = measure(network, tokenizer, texts, k=tokens, limit=limit)
        figures |= {f"{name}_{split}": figure for name, figure in found.items()}
    print_json(to_plain(figures)) if as_json else _print_figures(figures)


def _print_figures(figures: Mapping[str, Estimate]) -> None:
    rows = [(name, _say(figure), f"{figure.n:,} {figure.unit}") for name, figure in figures.items()]
    print_table(("figure", "value", "n"), rows)


def _say(figure: Estimate) -> str:
    return f"{figure.value:.1%} ± {figure.stderr:.1%}"
