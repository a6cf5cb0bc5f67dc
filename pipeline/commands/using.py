"""The commands that use a model: a chat, answers to a file of questions, a server."""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pipeline.commands.app import (
    SAVES,
    AsJson,
    Assignments,
    Saves,
    argument,
    command,
    option,
    planned_steps,
    print_json,
    refuse_assignment,
    stage_option,
)
from pipeline.views import tables
from pipeline.views.correction import EXAMPLE

if TYPE_CHECKING:
    from pipeline.plan.step import Plan
    from pipeline.serve.models import Served
    from stages.model.live import Sampling

Model = Annotated[
    Path,
    argument(
        metavar="CONFIG", help="A YAML file, a stage's folder or the folder of a model.", callback=refuse_assignment
    ),
]
Stage = Annotated[str | None, option("--stage", help="The model after this stage (default: the last).", **stage_option)]
Versus = Annotated[
    str | None,
    option("--versus", help="A second model: a stage, or `base` for the one before training.", **stage_option),
]
MaxTokens = Annotated[int, option("--max-tokens", metavar="N", min=1, help="Tokens of an answer (default: 512).")]
Temperature = Annotated[
    float, option("--temperature", metavar="T", min=0, help="Of sampling (default: 0, the likeliest tokens).")
]
TopP = Annotated[float | None, option("--top-p", metavar="P", min=0, max=1, help="Of sampling.")]
Seed = Annotated[int | None, option("--seed", metavar="N", help="Of sampling.")]
System = Annotated[str | None, option("--system", metavar="TEXT", help="A system prompt.")]


def _located(
    config: Path, saves: Path, assignments: list[str] | None, *stages: str | None
) -> "tuple[Plan | None, list[Served]]":
    """The models after these stages; the plan is None for a folder."""
    from pipeline.errors import ConfigError
    from pipeline.serve import models

    if not config.is_dir():
        plan = planned_steps(config, saves, assignments, None)
        found = [models.of_plan(plan, stage) for stage in stages]
        if len({model.name for model in found}) < len(found):
            raise ConfigError([f"--versus {found[-1].name}: is the same model; name another stage, or `base`"])
        return plan, found
    if assignments or any(stages):
        raise ConfigError([f"{config}: is a folder with one model; `--stage`, `--versus` and `--set` need a YAML file"])
    return None, [models.of_folder(config)]


def _sampling(temperature: float, top_p: float | None, seed: int | None) -> "Sampling":
    """The settings of sampling of a command line. Raises ConfigError for one that is out of bounds."""
    from pipeline.errors import ConfigError
    from pipeline.serve.requests import sampling

    try:
        return sampling({"temperature": temperature, "top_p": top_p, "seed": seed})
    except ValueError as error:
        raise ConfigError([f"{error} (of `--temperature`, `--top-p` and `--seed`)"]) from None


def _quiet() -> None:
    """No warnings of libraries between the lines of a chat."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


@command("Use", f"chat {EXAMPLE} --stage dpo --versus base")
def chat(
    config: Model,
    saves: Saves = SAVES,
    stage: Stage = None,
    versus: Versus = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = None,
    seed: Seed = None,
    assignments: Assignments = None,
) -> int:
    """Talk to a model in the terminal, or to two side by side."""
    from pipeline.serve import models
    from pipeline.serve.chat import Chat, questions

    sampling = _sampling(temperature, top_p, seed)
    wanted = (stage,) if versus is None else (stage, versus)
    _, served = _located(config, saves, assignments, *wanted)
    _quiet()
    with models.loaded(served) as engines:
        talk = Chat(engines, tables.console(), sampling, max_tokens, system)
        if sys.stdin.isatty():
            print(f"{' and '.join(engines)}: ask something; /help shows the commands, Ctrl-D leaves")
        for line in questions():
            if not talk.take(line):
                break
    return 0


@command("Use", f"predict {EXAMPLE} --input q.json --output a.jsonl")
def predict(
    config: Model,
    source: Annotated[
        str,
        option("--input", metavar="FILE", help="A file of questions, or the name of a data set."),
    ],
    output: Annotated[Path, option("--output", metavar="FILE", help="Answers, one line of JSON a question.")],
    saves: Saves = SAVES,
    stage: Stage = None,
    column: Annotated[str | None, option("--column", metavar="NAME", help="The column with the question.")] = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = None,
    seed: Seed = None,
    overwrite: Annotated[bool, option("--overwrite", help="Replace the output of another run.")] = False,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> int:
    """Answer every question of a file; after a stop, run it again to go on."""
    from pipeline.serve import models
    from pipeline.serve import predict as prediction
    from pipeline.serve.asked import read_questions

    _sampling(temperature, top_p, seed)
    prediction.check_output(output)
    plan, (served,) = _located(config, saves, assignments, stage)
    declared = None if plan is None or Path(source).exists() else plan.pipeline.data.get(source)
    settings = prediction.Settings(max_tokens, temperature, top_p, seed or 0, system)
    with prediction.claimed(output, lambda text: print(f"note: {text}", file=sys.stderr)) as part:
        rows = read_questions(source, declared, column, output.parent)
        _quiet()
        with served.in_use(), tables.counting(silent=as_json) as report:
            engine, identity = models.load(served), served.identity()
            result = prediction.answer_file(
                engine, rows, output, settings, identity, part, overwrite=overwrite, report=report
            )
    if as_json:
        return print_json({"model": served.name, "output": str(output), **vars(result)})
    kept = f", {result.kept} kept from before" if result.kept else ""
    failed = f"; {result.failed} rows have no answer, see `error` in {output}" if result.failed else ""
    print(f"{output}: {result.answered} of {result.rows} questions answered{kept}{failed}")
    for name, figure in result.figures.items():
        print(f"{name:16}{figure['value']:8.3g}  n={figure['n']}")
    return 0


@command("Use", f"serve {EXAMPLE} --stage quantize")
def serve(
    config: Model,
    saves: Saves = SAVES,
    stage: Stage = None,
    versus: Versus = None,
    host: Annotated[str, option("--host", metavar="ADDRESS", help="Another address needs a key.")] = "127.0.0.1",
    port: Annotated[int, option("--port", metavar="N", min=0, max=65535, help="(default: 8000)")] = 8000,
    queue: Annotated[int, option("--queue", metavar="N", min=1, help="Requests that may wait (default: 64).")] = 64,
    batch: Annotated[int, option("--batch", metavar="N", min=1, help="Answers generated together (default: 8).")] = 8,
    max_tokens: MaxTokens = 1024,
    max_length: Annotated[
        int, option("--max-length", metavar="N", min=2, help="Tokens of prompt and answer (default: 8192).")
    ] = 8192,
    timeout: Annotated[float, option("--timeout", metavar="S", min=1, help="Seconds for a request.")] = 300,
    engine: Annotated[str, option("--engine", metavar="NAME", help="`own`, or `vllm` where it is installed.")] = "own",
    assignments: Assignments = None,
) -> int:
    """Serve a model with OpenAI's API and a page for people; the key is in STAGEWISE_API_KEY."""
    from pipeline.serve import server

    wanted = (stage,) if versus is None else (stage, versus)
    _, served = _located(config, saves, assignments, *wanted)
    bounds: dict[str, Any] = {"tokens": max_tokens, "length": max_length, "seconds": timeout}
    if engine != "own":
        server.start_other(engine, served, host, port, print)
        return 0
    say = partial(print, flush=True)
    return server.serve(served, host=host, port=port, queue=queue, batch=batch, bounds=bounds, say=say)
