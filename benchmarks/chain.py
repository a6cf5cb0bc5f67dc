"""The chain PT → SFT → DPO → merge, as one `pipeline run` and as LLaMA-Factory's commands, in turn.

    python benchmarks/chain.py [--rounds 3] [--threads 2] [--llamafactory CLI] [--steps 100 100 50] [--work FOLDER]

Both sides train the same tiny Llama with random weights on the same rows, with the same number of steps, batch, length,
LoRA and rates, and start with empty caches. CLI is `llamafactory-cli` of an environment of its own, also
LLAMAFACTORY_CLI; without it only this project runs. LLaMA-Factory runs in two ways: `merged` merges the adapter after
each stage, so that the reference of DPO is the SFT model, as it is here; `adapter` hands one adapter on, and its
reference is then the base.

The first table has seconds of the clock, medians of the rounds, and the ratio of ours to each of theirs, the second one
the first and last losses, which differ by the order of the rows, and the third one where our seconds go.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

WORDS = {
    "who": ("the engineer", "a teacher", "our nurse", "the old captain", "a young painter", "the gardener"),
    "does": ("measures", "repairs", "describes", "carries", "remembers", "compares", "collects"),
    "what": ("the bridge", "seven coins", "an early map", "a long letter", "the winter harvest", "a clean bandage"),
    "where": ("near the harbour", "under the hill", "before the storm", "at the edge of town", "during the night"),
}
STAGES = ("pt", "sft", "dpo")
RATES = {"pt": 1e-3, "sft": 1e-3, "dpo": 1e-4}
CONFIG = """\
model: model
data:
  books: {{path: pt.jsonl, format: text}}
  questions: {{path: sft.jsonl, format: alpaca}}
  pairs: {{path: dpo.jsonl, format: preference}}
stages:
  pt: {{data: books, lora: {lora}, trainer: {pt}}}
  sft: {{data: questions, lora: {lora}, trainer: {sft}}}
  dpo: {{data: pairs, lora: {lora}, trainer: {dpo}}}
  merge: {{}}
"""
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both sides; unset by default")
    parser.add_argument("--steps", type=int, nargs=3, default=[100, 100, 50], metavar=("PT", "SFT", "DPO"))
    parser.add_argument("--llamafactory", default=os.environ.get("LLAMAFACTORY_CLI"))
    parser.add_argument("--work", type=Path, help="where files go; a folder that is removed by default")
    asked = parser.parse_args()
    steps = dict(zip(STAGES, asked.steps, strict=True))
    work = asked.work or Path(tempfile.mkdtemp(prefix="chain-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        make(work, steps)
        compare(work, steps, asked)
    finally:
        if asked.work is None:
            shutil.rmtree(work)


def compare(work: Path, steps: Mapping[str, int], asked: argparse.Namespace) -> None:
    """Run the sides in turn, forwards and backwards, and print the tables."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if asked.threads:
        environment["OMP_NUM_THREADS"] = str(asked.threads)
    sides = {"ours": lambda: ours(work, environment)}
    if asked.llamafactory:
        cli = str(Path(asked.llamafactory).absolute())
        sides["merged"] = lambda: theirs(work, cli, steps, environment, merged=True)
        sides["adapter"] = lambda: theirs(work, cli, steps, environment, merged=False)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(asked.rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            seconds[name].append(sides[name]())
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    print("\n| side | seconds, median | rounds | ours as a share, median | rounds |\n|---|---|---|---|---|")
    for name, figures in seconds.items():
        shares = [left / right for left, right in zip(seconds["ours"], figures, strict=True)]
        cells = f"{statistics.median(figures):.1f} | {listed(figures)} | {statistics.median(shares):.2f}"
        print(f"| {name} | {cells} | {listed(shares, 2)} |")
    print("\n| stage | ours, first → last loss | LLaMA-Factory merged |\n|---|---|---|")
    for stage in STAGES:
        print(f"| {stage} | {our_losses(work, stage)} | {their_losses(work, stage)} |")
    print("\n| our seconds, last round | |\n|---|---|")
    for what, count in breakdown(work).items():
        print(f"| {what} | {count:.2f} |")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}, ", end="")
    print(f"threads {asked.threads or 'unset'}, steps {list(steps.values())}")


def listed(figures: list[float], digits: int = 1) -> str:
    """Figures as text."""
    return ", ".join(f"{figure:.{digits}f}" for figure in figures)


# What both sides read


def make(work: Path, steps: Mapping[str, int]) -> None:
    """Write the model, the rows, our config and the configs of LLaMA-Factory."""
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(words) for words in WORDS.values()).capitalize() + "."

    rows = {"pt": [{"text": " ".join(sentence() for _ in range(draw.randint(5, 14)))} for _ in range(1500)]}
    told = [sentence() for _ in range(1200)]
    rows["sft"] = [{"instruction": "Write about it.", "input": one.split()[1], "output": one} for one in told[:800]]
    rows["dpo"] = [
        {"instruction": "Write one sentence.", "input": "", "chosen": one, "rejected": f"{one} {sentence().lower()}"}
        for one in told[800:]
    ]
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    info: dict[str, dict[str, object]] = {name: {"file_name": f"{name}.jsonl"} for name in STAGES}
    info["pt"]["columns"] = {"prompt": "text"}
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info["dpo"] |= {"ranking": True, "columns": columns}
    (work / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    if not (work / "model").is_dir():
        subprocess.run([sys.executable, __file__, "--make-model", str(work)], check=True)
    trainers = {stage: json.dumps(trainer(stage, steps[stage])) for stage in STAGES}
    (work / "chain.yaml").write_text(CONFIG.format(lora=json.dumps(LORA), **trainers), encoding="utf-8")
    for stage in STAGES:
        (work / f"{stage}.yaml").write_text(json.dumps(command(stage, steps[stage])), encoding="utf-8")


def make_model(work: Path) -> None:
    """A Llama of 2 layers of width 64 with random weights, by the stage `init`."""
    from stages import init
    from stages.data.source import Source
    from stages.model.inputs import Inputs

    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rows = Source(path=str(work / "pt.jsonl"), format="text")
    config = init.Config(architecture="llama", data=[rows], template=chatml, vocab_size=600, **sizes)
    (work / "model").mkdir()
    init.run(config, Inputs(), work / "model")


def trainer(stage: str, steps: int) -> dict[str, object]:
    """Our settings under `trainer`."""
    return {
        **{"max_length": 256, "per_device_train_batch_size": 8, "max_steps": steps, "learning_rate": RATES[stage]},
        **{
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 10,
            "logging_steps": min(10, steps),
            "save_steps": 50,
        },
        **({"beta": 0.1} if stage == "dpo" else {}),
    }


def command(stage: str, steps: int) -> dict[str, object]:
    """The settings of LLaMA-Factory for the same stage."""
    return {
        **{"stage": stage, "do_train": True, "model_name_or_path": "model", "dataset": stage, "dataset_dir": "."},
        **{"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "cutoff_len": 256},
        **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": steps, "bf16": False},
        **{"learning_rate": RATES[stage], "lr_scheduler_type": "cosine", "warmup_steps": steps // 10, "seed": 42},
        **{
            "logging_steps": min(10, steps),
            "save_steps": 50,
            "report_to": "none",
            "overwrite_output_dir": True,
            "plot_loss": True,
        },
        **({} if stage == "pt" else {"template": "qwen"}),
        **({"pref_beta": 0.1, "pref_loss": "sigmoid"} if stage == "dpo" else {}),
    }


# The sides


def ours(work: Path, environment: Mapping[str, str]) -> float:
    """Seconds of `pipeline run`, from empty `saves`."""
    shutil.rmtree(work / "saves", ignore_errors=True)
    began = time.time()
    seconds = timed([sys.executable, "-m", "pipeline.cli", "run", "chain.yaml"], work, environment)
    (work / "times.json").write_text(json.dumps([began, time.time()]), encoding="utf-8")
    return seconds


def theirs(work: Path, cli: str, steps: Mapping[str, int], environment: Mapping[str, str], *, merged: bool) -> float:
    """Seconds of LLaMA-Factory's commands: three to train, and one or three to merge."""
    cache = work / "cache"
    for folder in (cache, work / "theirs"):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {**environment, "HF_DATASETS_CACHE": str(cache)}
    total, model, adapter = 0.0, "model", ""
    for stage in STAGES:
        out = f"theirs/{stage}"
        given = [f"model_name_or_path={model}", f"output_dir={out}"]
        given += [f"adapter_name_or_path={adapter}"] if adapter else []
        total += timed([cli, "train", f"{stage}.yaml", *given], work, environment)
        if merged or stage == "dpo":
            total += timed([cli, "export", *exported(work, model, out)], work, environment)
        model, adapter = (f"{out}-merged", "") if merged else (model, out)
    return total


def exported(work: Path, model: str, adapter: str) -> list[str]:
    """The arguments of `llamafactory-cli export`."""
    asked = {
        **{"model_name_or_path": model, "adapter_name_or_path": adapter, "export_dir": f"{adapter}-merged"},
        **{"template": "qwen", "export_size": 5, "export_device": "cpu", "export_legacy_format": False},
    }
    (work / "export.yaml").write_text(json.dumps(asked), encoding="utf-8")
    return ["export.yaml"]


def timed(words: list[str], work: Path, environment: Mapping[str, str]) -> float:
    """Seconds of a command by the clock.

    Raises:
        SystemExit: it failed; with the end of its output.
    """
    begin = time.monotonic()
    done = subprocess.run(
        words, cwd=work, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.monotonic() - begin


# What they did


def our_losses(work: Path, stage: str) -> str:
    metrics = json.loads((work / "saves/chain" / stage / "record.json").read_text(encoding="utf-8"))["metrics"]
    return f"{metrics['loss_first']:.4f} → {metrics['loss_last']:.4f}"


def their_losses(work: Path, stage: str) -> str:
    file = work / "theirs" / stage / "trainer_state.json"
    if not file.is_file():
        return "–"
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return f"{losses[0]:.4f} → {losses[-1]:.4f}"


def breakdown(work: Path) -> dict[str, float]:
    """What → seconds of the last run of ours, from the events of its stages."""
    found: dict[str, float] = {}
    last, ended = json.loads((work / "times.json").read_text(encoding="utf-8"))
    for stage in (*STAGES, "merge"):
        folder = work / "saves/chain" / stage
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        times = {
            kind: [event["time"] for event in events if event["kind"] == kind]
            for kind in ("start", "total", "step", "done")
        }
        start, done = times["start"][0], times["done"][-1]
        what = "plan and imports, before `pt`" if stage == "pt" else f"before `{stage}`"
        found[what] = start - last
        if times["step"]:
            found[f"`{stage}`: rows, model and trainer"] = times["total"][0] - start
            found[f"`{stage}`: its steps"] = times["step"][-1] - times["total"][0]
            found[f"`{stage}`: saves and ends"] = done - times["step"][-1]
        else:
            found[f"`{stage}`"] = done - start
        last = done
    return found | {"after `merge`": ended - last}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make-model"]:
        make_model(Path(sys.argv[2]))
    else:
        main()
