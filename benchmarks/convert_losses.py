"""`pipeline convert` against LLaMA-Factory: the first losses of a command, and those of the config that it becomes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/convert_losses.py LLAMAFACTORY_PYTHON [--only NAME] [--work FOLDER]

LLAMAFACTORY_PYTHON is the Python of an environment of its own with LLaMA-Factory 0.9.5. A tiny Llama with random
weights, two tokenizers (one begins texts with BOS) and a few rows are made. Each case is a YAML file of LLaMA-Factory:
`llamafactory-cli train` runs it, `pipeline convert` converts it, `pipeline run` runs the result. Both sides log each
step, and the losses are compared. A batch has all rows, so the order of rows does not matter. Cases with full
fine-tuning compare two steps, which also compares learning rate, optimizer and gradients; with LoRA it is one step,
since the matrices A are drawn at random. DPO also compares the log-probabilities of the answers.

A case either agrees within 0.001, or names the words of a note of `convert`, or of docs/coming_from.md, that tell the
user why not. Some of these cases are run a second time with the difference taken out of LLaMA-Factory (`without`), and
then must agree. The exit code is 1 if a case fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3
FIGURES = ("loss", "logps/chosen", "logps/rejected")
SPECIAL = (
    *("<|endoftext|>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<eos>"),
    *("<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>"),
    *(
        "<|assistant|>",
        "<|end|>",
        "<|im_sep|>",
        "<think>",
        "</think>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|observation|>",
    ),
)
LINE_END = "line end after the token that ends an answer"


@dataclass(frozen=True)
class Case:
    """One command of LLaMA-Factory."""

    name: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "plain"
    note: str = ""
    """Words of the note of `convert` about the difference; empty where the losses must agree."""
    without: str = ""
    """The difference that is taken out of LLaMA-Factory in a second run."""


FIRST: Any = {"note": "smaller in LLaMA-Factory", "without": "first tokens"}
FULL = {"finetuning_type": "full", "max_steps": 2, "learning_rate": 1e-3}
EXACT = ("llama3", "mistral", "phi4", "vicuna", "llama2", "glm4", "deepseek3")
LINES = ("qwen", "default", "gemma", "alpaca", "chatml", "qwen3", "phi")

CASES = (
    Case("packed, the default", "pt", {"cutoff_len": 32}, **FIRST),
    Case("packed, full, 2 steps", "pt", {"cutoff_len": 32, **FULL}, **FIRST),
    Case("not packed", "pt", {"packing": False, "cutoff_len": 512}, **FIRST),
    Case("not packed, cut", "pt", {"packing": False, "cutoff_len": 24}, note="leaves out the rest of a text"),
    Case("not packed, BOS", "pt", {"packing": False, "cutoff_len": 512}, "bos", note="begins texts with BOS"),
    Case("packed, BOS", "pt", {"cutoff_len": 32}, "bos", note="where a tokenizer begins texts with BOS"),
    Case("packed, template llama3", "pt", {"cutoff_len": 32, "template": "llama3"}, note="ends each text with"),
    *(Case(f"template {name}", "sft", {"template": name}) for name in EXACT),
    *(Case(f"template {name}", "sft", {"template": name}, note=LINE_END, without="line ends") for name in LINES),
    Case("no template", "sft", {}, note="takes the model's own", without="line ends"),
    Case("BOS", "sft", {"template": "llama3"}, "bos"),
    Case("full, 2 steps", "sft", {"template": "llama3", **FULL}),
    Case("full, 2 steps, accumulated", "sft", {"template": "llama3", **FULL, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "disable_shuffling": True}),
    Case("default_system", "sft", {"template": "llama3", "default_system": "Be brief."}),
    Case("system column", "sft", {"template": "llama3", "dataset": "system"}),
    Case("history column", "sft", {"template": "llama3", "dataset": "history"}),
    Case("sharegpt", "sft", {"template": "llama3", "dataset": "talks"}),
    Case("openai", "sft", {"template": "llama3", "dataset": "messages"}),
    Case("two data sets", "sft", {"template": "llama3", "dataset": "sft,system", "per_device_train_batch_size": 16}),
    Case("max_samples", "sft", {"template": "llama3", "max_samples": 3}),
    Case("cut answers", "sft", {"template": "llama3", "cutoff_len": 40, "dataset": "long_answers"}),
    Case("cut questions", "sft", {"template": "llama3", "cutoff_len": 40, "dataset": "long_questions"},
        note="cuts the question and the answer in proportion"),
    Case("neat_packing", "sft", {"template": "llama3", "neat_packing": True, "cutoff_len": 128}),
    Case("packing", "sft", {"template": "llama3", "packing": True, "cutoff_len": 128}, note="read one another"),
    Case("mask_history", "sft", {"template": "llama3", "dataset": "history", "mask_history": True},
        note="mask_history"),
    Case("train_on_prompt", "sft", {"template": "llama3", "train_on_prompt": True}, note="train_on_prompt"),
    Case("no thinking", "sft", {"template": "qwen3", "enable_thinking": False}, note=LINE_END, without="line ends"),
    Case("efficient_eos, one turn", "sft", {"template": "glm4"}),
    Case("efficient_eos, turns", "sft", {"template": "glm4", "dataset": "history"}, note="ends the last answer"),
    Case("sigmoid", "dpo", {"template": "llama3"}),
    Case("template qwen", "dpo", {"template": "qwen"}, note=LINE_END, without="line ends"),
    Case("full, 2 steps", "dpo", {"template": "llama3", **FULL, "pref_beta": 0.3}),
    Case("full, 2 steps, smoothing", "dpo", {"template": "llama3", **FULL, "dpo_label_smoothing": 0.2},
        note="label smoothing"),
    Case("full, 2 steps, pref_ftx", "dpo", {"template": "llama3", **FULL, "pref_ftx": 0.5},
        note="every token counts the same"),
    Case("full, 2 steps, pref_ftx, one row eight times", "dpo", {"template": "llama3", **FULL, "pref_ftx": 0.5,
        "dataset": "equal"}),
    Case("pref_bco_weight", "dpo", {"template": "llama3", "pref_bco_weight": 0.5}),
    Case("full, 2 steps, pref_bco_weight", "dpo", {"template": "llama3", **FULL, "pref_bco_weight": 0.5},
        note="running mean of the rewards"),
    Case("full, 2 steps, hinge", "dpo", {"template": "llama3", **FULL, "pref_loss": "hinge"}, note="whatever is asked"),
    Case("sharegpt", "dpo", {"template": "llama3", "dataset": "pairs"}),
    Case("cut answers", "dpo", {"template": "llama3", "cutoff_len": 40, "dataset": "long_pairs"}),
)  # fmt: skip


# What both sides read


def make(folder: Path) -> None:
    """Write models, tokenizers and rows."""
    made = rows()
    texts = [json.dumps(row, ensure_ascii=False) for each in made.values() for row in each]
    info: dict[str, Any] = {name: {"file_name": f"{name}.jsonl"} for name in made}
    info["pt"]["columns"] = {"prompt": "text"}
    info["system"]["columns"] = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    info["history"]["columns"] = {"prompt": "instruction", "response": "output", "history": "history"}
    info["talks"]["formatting"] = "sharegpt"
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    messages = {"columns": {"messages": "messages"}, "tags": tags | {"system_tag": "system"}}
    info["messages"] |= {"formatting": "sharegpt", **messages}
    pair = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    for name in ("dpo", "equal", "long_pairs"):
        info[name] |= {"ranking": True, "columns": pair}
    pairs = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info["pairs"] |= {"ranking": True, "formatting": "sharegpt", "columns": pairs}
    (folder / "data").mkdir(parents=True)
    tokenizer = models(folder, texts)
    made["pt"] = divisible(made["pt"], tokenizer, 32)
    for name, each in made.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in each]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def rows() -> dict[str, list[dict[str, Any]]]:
    """Eight rows of each form."""
    things = ("bridge", "map", "river", "letter", "harvest", "library", "train", "fox")
    some = [
        (f"Where is the {thing}?", f"The {thing} is {'very ' * i}near the harbour.") for i, thing in enumerate(things)
    ]
    long = " ".join(f"the {thing} of the old town" for thing in things)
    alpaca = [{"instruction": ask, "input": "", "output": answer} for ask, answer in some]
    turns = [(*some[i], *some[i - 1]) for i in range(len(some))]
    pairs = [{"instruction": ask, "chosen": answer, "rejected": f"I do not know{' at all' * (i % 3)}."}
             for i, (ask, answer) in enumerate(some)]  # fmt: skip
    names = ("user", "assistant", "user", "assistant")
    return {
        "pt": [{"text": f"{answer} Nobody saw {ask[9:-1]} before."} for ask, answer in some],
        "sft": [row | {"input": "In the morning." if i % 2 else ""} for i, row in enumerate(alpaca)],
        "system": [row | {"system": f"You know each {thing}."} for row, thing in zip(alpaca, things, strict=True)],
        "history": [{"instruction": c, "output": d, "history": [[a, b]]} for a, b, c, d in turns],
        "talks": [
            {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turn)]}
            for turn in turns
        ],
        "messages": [
            {
                "messages": [
                    {"role": "system", "content": "Answer."},
                    *({"role": role, "content": text} for role, text in zip(names, turn, strict=True)),
                ]
            }
            for turn in turns
        ],
        "long_answers": [{"instruction": "Where?", "input": "", "output": f"{answer} {long}"} for _, answer in some],
        "long_questions": [{"instruction": f"{ask} {long}", "input": "", "output": answer} for ask, answer in some],
        "dpo": pairs,
        "long_pairs": [row | {"instruction": "Where?", "chosen": f"{row['chosen']} {long}"} for row in pairs],
        "equal": [pairs[0]] * 8,
        "pairs": [
            {
                "conversations": [{"from": "human", "value": row["instruction"]}],
                "chosen": {"from": "gpt", "value": row["chosen"]},
                "rejected": {"from": "gpt", "value": row["rejected"]},
            }
            for row in pairs
        ],
    }


def models(folder: Path, texts: list[str]) -> Any:
    """A tiny Llama for each of two tokenizers; the tokenizer without BOS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from stages.chat.template import template_text

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    kept = None
    for name in ("plain", "bos"):
        if name == "bos":
            made.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
            )
        words = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
        more = {"add_bos_token": True} if name == "bos" else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **words, **more)
        tokenizer.chat_template = template_text("chatml")
        tokenizer.save_pretrained(folder / name)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.1, **sizes, **ids
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        kept = kept or PreTrainedTokenizerFast.from_pretrained(folder / name)
    return kept


def divisible(texts: list[dict[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """The texts with marks after the last one, so that all tokens together are a multiple of `length`.

    LLaMA-Factory drops the tokens of the last, shorter block.
    """
    tokens = sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) + 1 for row in texts)
    last = dict(texts[-1])
    while tokens % length:
        last["text"] += " 7"[tokens % 2]
        now = [*texts[:-1], last]
        tokens = sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) + 1 for row in now)
    return [*texts[:-1], last]


def command(case: Case, folder: Path, out: Path) -> dict[str, Any]:
    """The YAML of LLaMA-Factory."""
    basic = {"model_name_or_path": str(folder / case.model), "stage": case.stage, "do_train": True, "seed": 42}
    basic |= {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "lora_dropout": 0}
    basic |= {"dataset_dir": str(folder / "data"), "dataset": case.stage, "cutoff_len": 256, "output_dir": str(out)}
    basic |= {"per_device_train_batch_size": 16 if case.stage == "pt" else 8, "max_steps": 1, "logging_steps": 1}
    return (
        basic | {"save_strategy": "no", "report_to": "none", "val_size": 0.0, "overwrite_cache": True} | case.settings
    )


# LLaMA-Factory's side, run by its own Python


def theirs(folder: Path) -> None:
    """Run `llamafactory-cli train` for each YAML file: every one in a process of its own, forked after the imports."""
    import llamafactory.train.tuner  # noqa: F401
    from llamafactory.cli import main

    for file in sorted(folder.glob("*.yaml")):
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            if file.stem.endswith("-without"):
                leave_out_line_ends()
                leave_out_first_tokens()
            sys.argv = ["llamafactory-cli", "train", str(file)]
            main()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(0)


def leave_out_first_tokens() -> None:
    """Divide the loss by the count of the tokens that are predicted, as transformers does in later versions."""
    from transformers import Trainer

    before = Trainer._get_num_items_in_batch

    def counted(self: Any, batches: list[Any], device: Any) -> Any:
        return before(self, [{**batch, "labels": batch["labels"][..., 1:]} for batch in batches], device)

    Trainer._get_num_items_in_batch = counted


def leave_out_line_ends() -> None:
    """Take the text after the token that ends an answer out of LLaMA-Factory's loss."""
    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor

    def masked(tokenizer: Any, labels: list[int]) -> list[int]:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        kept = list(labels)
        for at in range(1, len(labels)):
            if labels[at] != -100 and labels[at] not in special and kept[at - 1] in (special | {-1}):
                text = tokenizer.decode(labels[at])
                thought = tokenizer.decode(labels[at - 1]) in ("<think>", "</think>")
                kept[at] = -1 if not text.strip("\n") and not thought else labels[at]
        return [-100 if label == -1 else label for label in kept]

    one, two = SupervisedDatasetProcessor._encode_data_example, PairwiseDatasetProcessor._encode_data_example

    def supervised(self: Any, *args: Any, **more: Any) -> tuple[list[int], list[int]]:
        ids, labels = one(self, *args, **more)
        return ids, masked(self.tokenizer, labels)

    def pairwise(self: Any, *args: Any, **more: Any) -> tuple[list[int], ...]:
        ids, labels, others, other_labels = two(self, *args, **more)
        return ids, masked(self.tokenizer, labels), others, masked(self.tokenizer, other_labels)

    SupervisedDatasetProcessor._encode_data_example = supervised
    PairwiseDatasetProcessor._encode_data_example = pairwise


# Both sides


def figures(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each step that was logged, the figures that are compared."""
    return [{name: line[name] for name in FIGURES if name in line} for line in lines if "loss" in line]


def ours(file: Path, work: Path) -> tuple[list[dict[str, float]], list[str]]:
    """Convert and run one YAML file: the figures of each step, and the notes of `convert`."""
    import yaml

    from pipeline.cli import main
    from pipeline.tools.convert import convert

    out = work / f"{file.stem}.yaml"
    found = convert([str(file)], out, commit_of=lambda kind, name: None)
    out.write_text(found.text, encoding="utf-8")
    for path, text in found.files.items():
        path.write_text(text, encoding="utf-8")
    code = main(["run", str(out), "--saves", str(work / "saves")])
    if code:
        print(f"{file.stem}: `pipeline run` ended with {code}")
        return [], [str(note) for note in found.notes]
    (stage,) = yaml.safe_load(found.text)["stages"]
    lines = (work / "saves" / out.stem / stage / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return figures([event | event.get("metrics", {}) for event in events]), [str(note) for note in found.notes]


def difference(first: list[dict[str, float]], second: list[dict[str, float]]) -> float:
    """The largest difference of a figure; infinite where steps or figures are missing."""
    if not first or len(first) != len(second):
        return float("inf")
    if any(one.keys() != two.keys() for one, two in zip(first, second, strict=True)):
        return float("inf")
    return max(abs(one[name] - two[name]) for one, two in zip(first, second, strict=True) for name in one)


def compare(python: str, only: str, work: Path) -> int:
    """Run all cases; the number of those that fail."""
    import yaml

    documented = " ".join(Path(__file__).parents[1].joinpath("docs/coming_from.md").read_text(encoding="utf-8").split())
    cases = [case for case in CASES if only in f"{case.stage} {case.name}"]
    make(work)
    yamls = work / "theirs"
    yamls.mkdir()
    for number, case in enumerate(cases):
        for tail in ("", "-without") if case.without else ("",):
            name = f"{case.stage}{number:02}{tail}"
            text = yaml.safe_dump(command(case, work, work / "out" / name), sort_keys=False)
            (yamls / f"{name}.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, __file__, "--theirs", str(yamls)], env=environment, check=True)
    failed, table = 0, ["| stage | case | LLaMA-Factory | here | difference | |", "|---|---|---|---|---|---|"]
    (work / "ours").mkdir()
    for number, case in enumerate(cases):
        name = f"{case.stage}{number:02}"
        found, notes = ours(yamls / f"{name}.yaml", work / "ours")
        for tail in ("", "-without") if case.without else ("",):
            log = work / "out" / f"{name}{tail}" / "trainer_state.json"
            known = figures(json.loads(log.read_text(encoding="utf-8"))["log_history"]) if log.exists() else []
            apart = difference(known, found)
            noted = bool(case.note) and not tail and any(case.note in note for note in [*notes, documented])
            good = (apart > TOLERANCE and noted) if case.note and not tail else apart < TOLERANCE
            failed += not good
            word = "" if good and not noted else "documented" if good else "FAILED"
            words = f"{case.name}, without {case.without}" if tail else case.name
            table.append(f"| {case.stage} | {words} | {shown(known)} | {shown(found)} | {apart:.1e} | {word} |")
    print("\n".join(table))
    print(f"{len(table) - 2 - failed} of {len(table) - 2} as they should be")
    return failed


def shown(steps: list[dict[str, float]]) -> str:
    """Losses, and log-probabilities where there are any."""
    return " → ".join(" ".join(f"{value:.4f}" for value in step.values()) for step in steps) or "—"


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--theirs"]:
        return theirs(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="the Python of an environment with LLaMA-Factory 0.9.5")
    parser.add_argument("--only", default="", help="cases whose stage and name contain this")
    parser.add_argument("--work", type=Path, help="an empty folder; the default is a temporary one")
    given = parser.parse_args()
    if given.work is not None:
        sys.exit(compare(given.python, given.only, given.work.resolve()) > 0)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare(given.python, given.only, Path(folder)) > 0)


if __name__ == "__main__":
    main()
