"""Templates of public models, tried with every kind of conversation: docs/templates.md has the table.

Those of TRL's package are the models' own (its folder `chat_templates`, Apache-2.0). Those in `templates/` are written
for this project in the shape of the models' templates. `python tests/chat/test_official.py` prints the table.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from stages.chat.trial import Trial

ROOT = Path(__file__).parents[2]
OURS = Path(__file__).parent / "templates"
MODELS = {
    "Qwen2.5": "qwen2_5",
    "Qwen3": "qwen3",
    "Qwen3-Instruct-2507": "qwen3_instruct_2507",
    "Qwen3.5, 4B and larger": "qwen3_5_think",
    "Qwen3.5, 2B and smaller": "qwen3_5_nothink",
    "QwQ": "qwq",
    "DeepSeek-R1-Distill": "deepseek_r1_distill",
    "Llama 3": "llama3",
    "Llama 3.1": "llama3_1",
    "Llama 3.2": "llama3_2",
    "Gemma, Gemma 2": "gemma",
    "Gemma 3": "gemma3",
    "Mistral-7B-Instruct, first": "mistral_v1",
    "Mistral-7B-Instruct-v0.3": "mistral_v3",
    "gpt-oss": "gptoss",
    "SmolLM2": "smollm2",
    "Phi-3": "phi3",
    "Phi-3.5": "phi3_5",
    "phi-4": "phi4",
    "Yi-1.5": "yi",
    "GLM-4": "glm4",
    "GLM-4.5": "glm4moe",
}
KINDS = {
    "question and answer": "u a",
    "system turn": "s u a",
    "several turns": "u a u a",
    "system turn, several turns": "s u a u a",
    "thought in the words": "u ak",
    "thought in `reasoning_content`": "u ar",
    "thoughts in several turns": "u ak u ak",
    "the same, only the last trained": "u ak0 u ak",
    "tool call": "T u ac t a",
    "two calls at once": "T u acc t t a",
}


def text_of(name):
    """The template of a model."""
    if (OURS / f"{name}.jinja").is_file():
        return (OURS / f"{name}.jinja").read_text(encoding="utf-8")
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations  # TRL is not imported
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def trial(name):
    """The template with a tokenizer that has every special token that it writes."""
    return Trial(text_of(name), {"bos_token": "<bos>", "eos_token": "</s>"}, lambda token: True)


def reason(name, shape):
    """Why a template cannot be used for a shape, without the numbers of messages and their roles; None if it can."""
    text = trial(name).refusal(shape)
    if text is None:
        return None
    return re.sub(r"the roles [a-z, ]+:", "the roles …:", re.sub(r"message \d+", "message N", text)).replace("|", "\\|")


def table():
    """The table of docs/templates.md, and under it the reasons."""
    reasons: dict[str, str] = {}
    lines = [f"| model | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for model, name in MODELS.items():
        cells = []
        for shape in KINDS.values():
            why = reason(name, shape)
            cells.append("works" if why is None else f"({reasons.setdefault(why, str(len(reasons) + 1))})")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", "| | what `plan` says |", "|---|---|"]
    return "\n".join(lines + [f"| ({number}) | {why} |" for why, number in reasons.items()])


def test_the_table_of_the_page_is_what_happens():
    assert table() in (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")


def test_every_template_of_this_folder_is_in_the_table():
    assert {path.stem for path in OURS.glob("*.jinja")} <= set(MODELS.values())


WRITTEN = {
    ("qwen3", "u ar"): "<|im_start|>assistant\n[<think>\nthought-1.\n</think>\n\nwords-1.<|im_end|>]\n",
    ("qwen3", "u a"): "<|im_start|>assistant\n[<think>\n\n</think>\n\nwords-1.<|im_end|>]\n",
    ("qwen3_5_think", "u ak"): "<|im_start|>assistant\n<think>\n[thought-1.\n</think>\n\nwords-1.<|im_end|>]\n",
    ("deepseek_r1_distill", "u ak"): "<｜Assistant｜><think>\n[thought-1.\n</think>\n\nwords-1.<｜end▁of▁sentence｜>]",
    ("deepseek_r1_distill", "u ar"): "<｜Assistant｜><think>\n[thought-1.\n</think>\n\nwords-1.<｜end▁of▁sentence｜>]",
    ("deepseek_r1_distill", "u ak0 u ak"): (
        "<｜Assistant｜>\n\nwords-1.<｜end▁of▁sentence｜><｜User｜>words-2.<｜Assistant｜><think>\n"
        "[thought-3.\n</think>\n\nwords-3.<｜end▁of▁sentence｜>]"
    ),
    ("gptoss", "u ar"): (
        "<|start|>assistant[<|channel|>analysis<|message|>thought-1.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>words-1.<|return|>]"
    ),
    ("mistral_v3", "s u a"): "<bos>[INST] words-0.\n\nwords-1.[/INST][ words-2.</s>]",
    ("phi3", "u a"): "<|assistant|>\n[words-1.<|end|>]\n</s>",
}


@pytest.mark.parametrize(("name", "shape"), WRITTEN)
def test_what_is_trained_after_which_prompt(name, shape):
    from stages.chat.shapes import probe
    from stages.chat.writing import write

    tried = trial(name)
    found = write(tried.render, tried.find_marks, probe(shape))
    text = found.text
    for turn in reversed(found.turns):
        stop = found.marks[turn.end].end()
        text = f"{text[: turn.begin]}[{text[turn.begin : stop]}]{text[stop:]}"
    assert text.endswith(WRITTEN[name, shape])


if __name__ == "__main__":
    print(table())
