"""Commands that compare models and look at what they answer: `compare`, `judge`, `safety` and `memorization`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.output import print_json, print_table
from groundup.cli.talking import load_model
from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.files import read_json, value_digest, write_json
from groundup.user_code import function_fingerprint, in_words, load_function

if TYPE_CHECKING:
    from groundup.console import Console
    from groundup.evaluation.judge import Judge, Verdict
    from groundup.evaluation.metrics import Estimate
    from groundup.model import Transformer
    from groundup.tokenizer import Tokenizer

_WORKERS = 4  # requests to a server at the same time
Prompts = Annotated[
    str, Option(metavar="FILE|SET", help='Records with a "prompt" (JSON lines, CSV), or groundup:talk, groundup:harm.')
]
Limit = Annotated[int | None, Option(min=2, help="Ask at most so many prompts.")]
MaxTokens = Annotated[int, Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")]
app = typer.Typer()


@app.command(
    rich_help_panel=options.LOOK,
    epilog="Examples:  groundup compare runs/demo/pretrain runs/demo/sft  ·  groundup compare runs/a runs/b runs/c"
    "  ·  groundup compare runs/a-seeds runs/b-seeds  ·  groundup compare --html ab.html runs/a runs/b",
)
def compare(
    scores: Annotated[
        list[Path],
        Argument(metavar="A B…", help="Runs, their stages, folders with scores.json, or of `groundup build --seeds`."),
    ],
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page of these runs side by side.")] = None,
    as_json: options.Json = False,
) -> None:
    """Compare models: the first with each other one, with intervals, corrected for how many are looked at.

    Where two answered the same items, these are compared one by one; repeated runs are compared over their seeds.
    """
    from groundup.evaluation.comparison import compare_cards
    from groundup.run import Run

    if len(scores) < 2:
        raise DataError(f"{scores[0]}: there is nothing to compare it with.", "Name two or more.")
    runs = [] if html is None else [Run.existing(path) for path in scores]
    try:
        found = compare_cards(*scores)
    except DataError:
        if html is None:
            raise
        found = []  # they share no scores: there is the rest to see
    if html is not None:
        from groundup.report.versus import write_versus

        write_versus(runs, html, found)
        typer.echo(html, err=as_json)
    if as_json:
        print_json([asdict(one) for one in found])
    elif html is None:
        rows = [
            [
                one.benchmark, one.other, f"{one.first:.3f}", f"{one.second:.3f}",
                f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
                f"{one.p:.3f}" if one.p >= 0.0005 else "<0.001", one.verdict,
            ]
            for one in found
        ]  # fmt: skip
        titles = ["benchmark", "with", "first", "other", "difference (95 %)", "p", "verdict"]
        if len(scores) == 2:
            titles, *rows = (line[:1] + line[2:] for line in (titles, *rows))
        print_table(titles, rows)


@app.command(
    rich_help_panel=options.LOOK,
    epilog="Examples:  groundup judge runs/demo/dpo runs/demo/sft --prompts groundup:talk --judge "
    "my_judge.py:better  ·  groundup judge a/ b/ --prompts mine.jsonl --judge http://127.0.0.1:8000/v1",
)
def judge(
    first: Annotated[Path, Argument(metavar="MODEL", help="A stage of a run, or a model's folder.")],
    second: Annotated[Path, Argument(metavar="MODEL", help="The model to compare it with.")],
    prompts: Prompts,
    by: Annotated[
        str, Option("--judge", metavar="URL|FILE.py:NAME", help="An OpenAI-compatible server, or a function.")
    ],
    judge_model: Annotated[str | None, Option(metavar="NAME", help="The judge's model (default: the first).")] = None,
    api_key: Annotated[str | None, Option(envvar="GROUNDUP_API_KEY", help="Key of the judge's server.")] = None,
    timeout: Annotated[float, Option(min=0.1, help="Wait so many seconds for a reply.")] = 120.0,
    out: Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Keeps the verdicts.")] = Path("judged"),
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Win rate: two models answer the same prompts, and a judge says which is better, with the places swapped too.

    A function of yours, `better(prompt, first, second)`, gives a number above 0 where the first answer is better, below
    0 where the second is, 0 for a tie. Verdicts are kept as they come: the same command goes on where it stopped.
    """
    from groundup.console import Console
    from groundup.evaluation.judge import Pair, by_url, judge_pairs, win_rate
    from groundup.evaluation.measure import to_plain
    from groundup.evaluation.prompts import read_prompts
    from groundup.evaluation.text_metrics import variety

    chosen: Judge
    if by.startswith(("http://", "https://")):
        (chosen, identity), workers = by_url(by, judge_model, api_key, timeout), _WORKERS
    else:
        chosen, identity, workers = _function(by), function_fingerprint(by, "--judge"), 1
    asked = [one.text for one in read_prompts(prompts, limit=limit)]
    console = Console(quiet=quiet or as_json)
    answers = [_kept_answers(path, asked, out, max_tokens, console) for path in (first, second)]
    pairs = [Pair(*row) for row in zip(asked, *answers, strict=True)]
    with console.bar("judge", len(pairs)) as bar:
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
    function = load_function(spec, "--judge", "def {name}(prompt, first, second): return len(second) - len(first)")

    def better(prompt: str, first: str, second: str) -> Verdict:
        try:
            value = function(prompt, first, second)
            return None if value is None or math.isnan(value) else float(value)
        except Exception as error:
            raise DataError(f"--judge {spec}: fails ({in_words(error)}).", "It gives a number, or None.") from error

    return better


def _answers(
    model: Transformer, tokenizer: Tokenizer, asked: Sequence[str], max_tokens: int, console: Console
) -> list[str]:
    """A model's answers, and a bar meanwhile."""
    from groundup.evaluation.prompts import answer_prompts

    with console.bar("answers") as bar:
        answers = answer_prompts(model, tokenizer, asked, max_tokens)
        bar.finish(f"{len(answers):,}")
    return answers


def _kept_answers(path: Path, asked: Sequence[str], out: Path, max_tokens: int, console: Console) -> list[str]:
    """A model's answers, made once."""
    from groundup.stage import model_digest

    model, tokenizer, folder = load_model(path, None, to_chat=True)
    place = out / f"answers-{value_digest([model_digest(folder), asked, max_tokens])[:16]}.json"
    if not place.is_file():
        out.mkdir(parents=True, exist_ok=True)
        answers = _answers(model, tokenizer, asked, max_tokens, console)
        write_json(place, {"model": str(folder), "answers": answers})
    return list(read_json(place)["answers"])


@app.command(
    rich_help_panel=options.LOOK, epilog="Example:  groundup safety runs/demo runs/mine/safety --prompts mine.jsonl"
)
def safety(
    model: options.Model,
    classifier: Annotated[Path, Argument(metavar="CLASSIFIER", help="The folder of a classify stage.")],
    prompts: Prompts = "groundup:harm",
    stage: options.Stage = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    as_json: options.Json = False,
) -> None:
    """Toxicity, refusal of harmful requests and of harmless ones, by a classifier that safety = true trains.

    Prompts say what they are: {"prompt": "…", "harmful": true}.
    """
    from groundup.alignment import Classifier
    from groundup.console import Console
    from groundup.evaluation.measure import to_plain
    from groundup.evaluation.metrics import wilson
    from groundup.evaluation.prompts import read_prompts
    from groundup.evaluation.safety import LABELS, safety_figures

    by = Classifier.load(classifier)
    fix = "Train one: a stage that classifies, with safety = true."
    if missing := sorted({*LABELS} - {*by.labels}):
        raise ArtifactError(f"{classifier}: a classifier of {', '.join(by.labels)}, not of {', '.join(missing)}.", fix)
    if not by.held_out:
        raise ArtifactError(f"{classifier}: nothing says how often this classifier is right.", fix)
    asked = read_prompts(prompts, limit=limit)
    network, tokenizer, _ = load_model(model, stage, to_chat=True)
    answers = _answers(network, tokenizer, [one.text for one in asked], max_tokens, Console(quiet=as_json))
    labels = by.classify(answers)
    figures = safety_figures(asked, labels)
    if as_json:
        rows = [
            {"prompt": one.text, "answer": answer, "label": label}
            for one, answer, label in zip(asked, answers, labels, strict=True)
        ]
        print_json({**to_plain(figures), "classifier": by.held_out, "answers": rows})
        return
    _print_figures(figures)
    right, n = by.held_out["accuracy"], int(by.held_out["accuracy_n"])
    low, high = wilson(right, n)
    typer.echo(
        f"by a classifier that is right in {right:.1%} [{low:.1%}, {high:.1%}] of {n:,} held-out texts "
        f"(always saying the most frequent label: {by.held_out['majority_accuracy']:.1%})"
    )


@app.command(rich_help_panel=options.LOOK, epilog="Example:  groundup memorization runs/demo --tokens 32")
def memorization(
    run: Annotated[Path, Argument(metavar="RUN", help="A run's folder, with its corpus.")],
    stage: options.Stage = None,
    tokens: Annotated[int, Option(min=1, help="Tokens to give, and to compare after.")] = 50,
    limit: Annotated[int, Option(min=1, help="At most so many documents a split.")] = 500,
    as_json: options.Json = False,
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
