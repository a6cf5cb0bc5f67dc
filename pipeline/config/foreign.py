"""Config files of other programs, recognised by their keys."""

from collections.abc import Collection

NAMES = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL or alignment-handbook"}
"""Program → its name for people."""
MODELS = {"axolotl": "base_model", "llamafactory": "model_name_or_path", "trl": "model_name_or_path"}
"""Program → the key that its files have for the model."""
MARKS = {
    "axolotl": ("base_model", "sequence_len", "micro_batch_size", "num_epochs"),
    "llamafactory": ("stage", "finetuning_type", "export_dir", "template", "infer_backend", "task", "lora_rank"),
    "trl": (
        *("dataset_mixer", "dataset_mixture", "dataset_name", "use_peft", "lora_r", "datasets", "max_seq_length"),
        *("beta", "max_length", "learning_rate"),
    ),
}
"""Program → keys of which its files have one or more; in the order in which they are tried."""


def is_new_llamafactory(keys: Collection[str]) -> bool:
    """Whether a config with these keys is for LLaMA-Factory's new code, which it reads with `USE_V1=1`."""
    return "model" in keys and "stages" not in keys and bool({"train_dataset", "peft_config", "dist_config"} & {*keys})


def program_of(keys: Collection[str]) -> str | None:
    """The program that a config with these keys is for; None if it is none of those that are known."""
    if is_new_llamafactory(keys):
        return "llamafactory"
    known = (program for program, marks in MARKS.items() if MODELS[program] in keys and {*marks} & {*keys})
    return next(known, None)
