"""LLaMA-Factory's templates: what each writes, and which of them are templates of this project."""

from pathlib import Path

import pytest
from converted import notes, written

from pipeline.tools.convert_templates import FORMS, REFUSED, chat_template
from stages.chat.template import template_text
from stages.chat.trial import compile_template

SYSTEM = {"role": "system", "content": "S"}
TALK = [
    *({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}),
    *({"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}),
]


def shown(name, messages, **options):
    prompt = messages[-1]["role"] == "user"
    compiled = compile_template(chat_template(name, **options)[1])
    return compiled.render(
        messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", tools=None
    )


IM = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
L3 = "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA = "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
ONE = {  # a question and its answer, as LLaMA-Factory 0.9.5 encodes them; bos_token is <s>, eos_token is </s>
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n",
    "chatml": f"{IM}A<|im_end|>\n",
    "cohere": "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
    "<|CHATBOT_TOKEN|>A</s>",
    "cpm4": f"<s>{IM}A<|im_end|>\n",
    "deepseek": "<s>User: Q\n\nAssistant:A</s>",
    "deepseek3": "<s><｜User｜>Q<｜Assistant｜>A</s>",
    "deepseekr1": "<s><｜User｜>Q<｜Assistant｜><think>\n\n</think>\n\nA</s>",
    "default": "Human: Q</s>\nAssistant:A</s>\n",
    "exaone": "[|user|]Q\n[|assistant|]A</s>\n",
    "falcon": "User: Q\nFalcon:A</s>\n",
    "gemma": f"<s>{GEMMA}A<end_of_turn>\n",
    "gemma2": f"<s>{GEMMA}A<end_of_turn>\n",
    "glm4": "[gMASK]<sop><|user|>\nQ<|assistant|>\nA</s>",
    "granite3": "<|start_of_role|>user<|end_of_role|>Q<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    "A<|end_of_text|>\n",
    "hunyuan": "<|startoftext|>Q<|extra_0|>A<|eos|>",
    "llama2": "<s>[INST] Q [/INST]A</s>",
    "llama3": f"<s>{L3}A<|eot_id|>",
    "llama4": "<s><|header_start|>user<|header_end|>\n\nQ<|eot|><|header_start|>assistant<|header_end|>\n\nA<|eot|>",
    "mimo": f"{HELPFUL}{IM}<think>\n\n</think>\n\nA<|im_end|>\n",
    "ministral": "<s>[INST]Q[/INST]A</s>",
    "mistral": "<s>[INST] Q[/INST] A</s>",
    "mistral_small": "<s>[INST]Q[/INST]A</s>",
    "olmo": "</s><|user|>\nQ<|assistant|>\nA</s>",
    "openchat": "<s>GPT4 Correct User: Q</s>GPT4 Correct Assistant:A</s>",
    "phi": "<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "phi4": "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>",
    "phi4_mini": "<|user|>Q<|end|><|assistant|>A<|end|>",
    "qwen": f"{QWEN}{IM}A<|im_end|>\n",
    "qwen3": f"{IM}<think>\n\n</think>\n\nA<|im_end|>\n",
    "qwen3_nothink": f"{IM}A<|im_end|>\n",
    "seed_oss": "<s>user\nQ</s><s>assistant\n<seed:think></seed:think>A</s>",
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face.<|im_end|>\n"
    f"{IM}A<|im_end|>\n",
    "solar": "### User:\nQ\n\n### Assistant:\nA</s>",
    "starchat": "<|user|>\nQ<|end|>\n<|assistant|>A<|end|>\n",
    "vicuna": f"{VICUNA}USER: Q ASSISTANT:A</s>",
    "yi": f"{IM}A<|im_end|>\n",
    "yuan": "Q<sep>A<eod>\n",
    "zephyr": "<|system|>\nYou are Zephyr, a helpful assistant.</s><|user|>\nQ</s><|assistant|>\nA</s>",
}


@pytest.mark.parametrize("name", ONE)
def test_a_question_and_its_answer(name):
    assert shown(name, TALK[:2]) == ONE[name]


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_is_how_the_conversation_begins_and_every_answer_has_its_end(name):
    for system in ([], [SYSTEM]):
        whole = shown(name, [*system, *TALK])
        for turns in (1, 3):
            assert whole.startswith(shown(name, [*system, *TALK[:turns]]))
    assert shown(name, TALK).count("A") >= 1
    assert shown(name, [SYSTEM, *TALK]) != shown(name, TALK)


def test_where_a_system_prompt_stands():
    assert shown("llama2", [SYSTEM, *TALK[:1]]) == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    assert shown("llama2", [SYSTEM, *TALK]).count("S\n<</SYS>>") == 1
    assert shown("gemma", [SYSTEM, *TALK[:1]]) == "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n"
    assert shown("qwen", [SYSTEM, *TALK[:1]]) == f"<|im_start|>system\nS<|im_end|>\n{IM}"
    assert shown("default", [SYSTEM, *TALK[:1]]) == "System: S</s>\nHuman: Q</s>\nAssistant:"
    assert shown("qwen3_nothink", TALK[:1], default="Be kind.") == f"<|im_start|>system\nBe kind.<|im_end|>\n{IM}"


def test_thoughts():
    thought = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]
    assert shown("qwen3", thought) == f"{IM}<think>\nhm\n</think>\n\nA<|im_end|>\n"
    assert shown("qwen3", TALK[:1]) == IM
    assert shown("qwen3", TALK[:1], thinking=False) == f"{IM}<think>\n\n</think>\n\n"
    assert shown("qwen3", thought, thinking=False) == f"{IM}<think>\n\n</think>\n\nA<|im_end|>\n"


def test_templates_that_write_the_same_are_ours():
    ours = {name: own for name in FORMS if (own := chat_template(name)[0])}
    assert ours == {
        **dict.fromkeys(("chatml", "qwen3_nothink", "qwen3_5_nothink", "smollm", "yi"), "chatml"),
        "llama3": "llama3",
    }
    assert chat_template("qwen3_nothink", default="You are a helpful assistant.")[0] == "qwen"


def test_a_template_of_qwens_kind_writes_tools():
    assert chat_template("qwen")[1] == template_text("qwen").replace(
        "You are a helpful assistant.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )


def test_names_without_a_template():
    for name in REFUSED:
        with pytest.raises(ValueError, match=r"\w"):
            chat_template(name)
    with pytest.raises(ValueError, match=r"it is not known here; did you mean `llama3`\?"):
        chat_template("llama33")
    assert not REFUSED.keys() & FORMS.keys()
    assert len(FORMS) + len(REFUSED) == 121  # as many as LLaMA-Factory 0.9.5 has


def test_an_unknown_template_is_something_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "llamafactory-cli train --do_train --model_name_or_path org/m --dataset a --template {}"
    found, _ = written(command.format("llama33"))
    text = "it is not known here; did you mean `llama3`?; the model keeps its own template"
    assert f"`template: llama33`: {text}" in notes(found, "to do")
    found, _ = written(command.format("qwen"))
    assert list(found.files) == [Path("qwen.jinja")]
    found, _ = written(command.format("empty"))
    assert "`template: empty`: it writes no end of the answer, so a model would not learn to stop; choose a " \
        "template; the model keeps its own template" in notes(found, "to do")  # fmt: skip
