"""LLaMA-Factory's templates by their names: what each writes around a turn, and the chat template that writes the same.

Facts of its `data/template.py` (version 0.9.5), text only. Where a built-in template of this project writes the same,
its name is used; otherwise a `.jinja` file is made. What it calls `efficient_eos` ends the last answer alone; here
every answer ends.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from pipeline.tools.convert_parts import by_name
from stages.chat.template import template_names, template_text
from stages.chat.trial import compile_template
from stages.runtime.errors import nearest


@dataclass(frozen=True)
class Form:
    """The text of each turn. `{content}`, `{bos}` and `{eos}` stand for the message and the special tokens."""

    user: str
    answer: str = "{content}{eos}"
    system: str = "{content}"
    first: str = ""
    """What stands before everything else."""
    default: str = ""
    """The system prompt of a conversation that has none."""
    inside: bool = False
    """Whether the system prompt stands inside the first question."""
    thought: tuple[str, str] | None = None
    """The words around a thought, of a reasoning model."""


CHATML = Form(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    answer="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
)
HELPFUL = "You are a helpful assistant."
THINK = ("<think>\n", "\n</think>\n\n")
BARE = ("<think>", "</think>")
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_CODER = (
    "{who}, and you only answer questions related to computer science. For politically sensitive questions, "
    "security and privacy issues, and other non-computer science questions, you will refuse to answer.\n"
)
_IN = "\n- InternLM (书生·浦语) "
INTERN = (
    f"You are an AI assistant whose name is InternLM (书生·浦语).{_IN}is a conversational language model that "
    "is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless."
    f"{_IN}can understand and communicate fluently in the language chosen by the user such as English and 中文."
)
LLAMA2 = Form("{bos}[INST] {content} [/INST]", system="<<SYS>>\n{content}\n<</SYS>>\n\n", inside=True)
LLAMA3 = Form(
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{content}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    first="{bos}",
)
GEMMA = Form(
    user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    answer="{content}<end_of_turn>\n",
    system="{content}\n\n",
    first="{bos}",
    inside=True,
)
GLM = Form("<|user|>\n{content}<|assistant|>", "\n{content}{eos}", "<|system|>\n{content}", "[gMASK]<sop>")
GRANITE = Form(
    user="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    answer="{content}<|end_of_text|>\n",
    system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
)
MISTRAL = Form("[INST] {content}[/INST]", " {content}{eos}", "{content}\n\n", "{bos}", inside=True)
MISTRAL_CLOSE = Form("[INST]{content}[/INST]", system="{content}\n\n", first="{bos}", inside=True)
PHI = Form("<|user|>\n{content}<|end|>\n<|assistant|>\n", "{content}<|end|>\n", "<|system|>\n{content}<|end|>\n")
SEED = Form("{bos}user\n{content}{eos}{bos}assistant\n", system="{bos}system\n{content}{eos}")
DEEPSEEK3 = Form("<｜User｜>{content}<｜Assistant｜>", first="{bos}")
KIMI = Form(
    user="<|im_user|>user<|im_middle|>{content}<|im_end|><|im_assistant|>assistant<|im_middle|>",
    answer="{content}<|im_end|>",
    system="<|im_system|>system<|im_middle|>{content}<|im_end|>",
)

FORMS: Mapping[str, Form] = {
    "alpaca": Form(
        "### Instruction:\n{content}\n\n### Response:\n",
        "{content}{eos}\n\n",
        default="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n",
    ),
    "bailing": Form("<role>HUMAN</role>{content}<role>ASSISTANT</role>", system="<role>SYSTEM</role>{content}"),
    "bailing_v2": Form(
        "<role>HUMAN</role>{content}<|role_end|><role>ASSISTANT</role>",
        "{content}<|role_end|>",
        "<role>SYSTEM</role>{content}<|role_end|>",
    ),
    "breeze": Form("[INST] {content} [/INST] ", first="{bos}"),
    "chatglm3": Form("<|user|>\n{content}<|assistant|>", "\n{content}{eos}", "<|system|>\n{content}", "[gMASK]sop"),
    **dict.fromkeys(("chatml", "qwen3_nothink", "qwen3_5_nothink", "smollm", "yi"), CHATML),
    "chatml_de": replace(CHATML, default="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "cohere": Form(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        first="{bos}",
    ),
    **dict.fromkeys(("cpm4", "falcon_h1", "intern_s1"), replace(CHATML, first="{bos}")),
    "deepseek": Form("User: {content}\n\nAssistant:", system="{content}\n\n", first="{bos}"),
    "deepseek3": DEEPSEEK3,
    "deepseekr1": replace(DEEPSEEK3, thought=THINK),
    "deepseekcoder": Form(
        "### Instruction:\n{content}\n### Response:",
        "\n{content}\n<|EOT|>\n",
        first="{bos}",
        default=_CODER.format(
            who="You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company"
        ),
    ),
    "default": Form("Human: {content}{eos}\nAssistant:", "{content}{eos}\n", "System: {content}{eos}\n"),
    "ernie": Form(
        "<|im_start|>user\n{content}<|im_end|>\n\n<|im_start|>assistant\n",
        "{content}<|im_end|>\n\n",
        "<|im_start|>system\n{content}<|im_end|>\n\n",
        default="<global_setting>\nthink_mode=True\n</global_setting>",
    ),
    "ernie_nothink": Form(
        "User: {content}\nAssistant: ", "{content}<|end_of_sentence|>", "{content}\n", "<|begin_of_sentence|>"
    ),
    "exaone": Form("[|user|]{content}\n[|assistant|]", "{content}{eos}\n", "[|system|]{content}[|endofturn|]\n"),
    "falcon": Form("User: {content}\nFalcon:", "{content}{eos}\n"),
    "fewshot": Form("{content}", "{content}{eos}\n\n"),
    **dict.fromkeys(("gemma", "gemma2"), GEMMA),
    "glm4": GLM,
    **dict.fromkeys(("glm4_moe", "glmz1"), replace(GLM, thought=THINK)),
    "granite3": GRANITE,
    "granite4": replace(GRANITE, default="You are Granite, developed by IBM. You are a helpful AI assistant."),
    "hunyuan": Form("{content}<|extra_0|>", "{content}<|eos|>", "{content}<|extra_4|>", "<|startoftext|>"),
    "hunyuan_small": Form(
        "<｜hy_User｜>{content}<｜hy_place▁holder▁no▁8｜>",
        "{content}<｜hy_place▁holder▁no▁2｜>",
        "{content}<｜hy_place▁holder▁no▁3｜>",
        "<｜hy_begin▁of▁sentence｜>",
    ),
    "hy3": Form("<｜hy_User｜>{content}<｜hy_Assistant｜>", "{content}<｜hy_eos｜>", first="{bos}", thought=BARE),
    "index": Form("reserved_0{content}reserved_1", system="<unk>{content}"),
    "intern2": replace(CHATML, first="{bos}", default=INTERN),
    "lfm2": replace(CHATML, default="You are a helpful AI assistant."),
    "llama2": LLAMA2,
    "llama2_zh": replace(LLAMA2, default=f"{HELPFUL} 你是一个乐于助人的助手。"),
    "llama3": LLAMA3,
    "llama4": Form(
        "<|header_start|>user<|header_end|>\n\n{content}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        "{content}<|eot|>",
        "<|header_start|>system<|header_end|>\n\n{content}<|eot|>",
        "{bos}",
    ),
    "mimo": replace(CHATML, default=HELPFUL, thought=THINK),
    "mimo_v2": replace(CHATML, default="You are MiMo, a helpful AI assistant engineered by Xiaomi.", thought=BARE),
    "minimax1": Form(
        "<beginning_of_sentence>user name=user\n{content}<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
        "{content}<end_of_sentence>\n",
        "<beginning_of_sentence>system ai_setting=assistant\n{content}<end_of_sentence>\n",
        default=HELPFUL,
    ),
    "minimax2": Form(
        "]~b]user\n{content}[e~[\n]~b]ai\n",
        "{content}[e~[\n",
        "]~!b[]~b]system\n{content}[e~[\n",
        default=f"{HELPFUL} Your name is MiniMax-M2.1 and is built by MiniMax.",
        thought=THINK,
    ),
    **dict.fromkeys(("ministral", "ministral3"), MISTRAL_CLOSE),
    "mistral": MISTRAL,
    "mistral_small": Form("[INST]{content}[/INST]", system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", first="{bos}"),
    "moonlight": replace(KIMI, default="You are a helpful assistant provided by Moonshot-AI."),
    "olmo": Form("<|user|>\n{content}<|assistant|>\n", first="{eos}"),
    "openchat": Form("GPT4 Correct User: {content}{eos}GPT4 Correct Assistant:", first="{bos}"),
    "openchat-3.6": Form(
        LLAMA3.user.replace("user<", "GPT4 Correct User<").replace("assistant<", "GPT4 Correct Assistant<"),
        first="{bos}",
    ),
    "opencoder": replace(CHATML, default="You are OpenCoder, created by OpenCoder Team."),
    "phi": PHI,
    "phi_small": replace(PHI, first="<|endoftext|>"),
    "phi4": Form(
        "<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        "{content}<|im_end|>",
        "<|im_start|>system<|im_sep|>{content}<|im_end|>",
    ),
    "phi4_mini": Form("<|user|>{content}<|end|><|assistant|>", "{content}<|end|>", "<|system|>{content}<|end|>"),
    "qwen": replace(CHATML, default=f"You are Qwen, created by Alibaba Cloud. {HELPFUL}"),
    **dict.fromkeys(("qwen3", "qwen3_5", "qwen3_6"), replace(CHATML, thought=THINK)),
    "sailor": Form(
        "<|im_start|>question\n{content}<|im_end|>\n<|im_start|>answer\n",
        CHATML.answer,
        CHATML.system,
        default="You are an AI assistant named Sailor created by Sea AI Lab. Your answer should be friendly, unbiased, "
        "faithful, informative and detailed.",
    ),
    "seed_coder": replace(
        SEED,
        default=_CODER.format(
            who="You are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed"
        )
        + "\n",
    ),
    "seed_oss": replace(SEED, thought=("<seed:think>", "</seed:think>")),
    "smollm2": replace(CHATML, default="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": Form("### User:\n{content}\n\n### Assistant:\n", system="### System:\n{content}\n\n"),
    "starchat": Form(
        "<|user|>\n{content}<|end|>\n<|assistant|>", "{content}<|end|>\n", "<|system|>\n{content}<|end|>\n"
    ),
    "telechat2": Form(
        "<_user>{content}<_bot>",
        system="<_system>{content}",
        default="你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）"
        "研发的人工智能助手。",
    ),
    "vicuna": Form("USER: {content} ASSISTANT:", default=CURIOUS),
    "xuanyuan": Form(
        "Human: {content} Assistant:",
        default="以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给出有帮助、"
        "高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\n",
    ),
    "yuan": Form("{content}<sep>", "{content}<eod>\n"),
    "youtu": Form("<|User|>{content}<|Assistant|>", "{content}<|end_of_text|>", first="{bos}", thought=THINK),
    "zephyr": Form(
        "<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default="You are Zephyr, a helpful assistant.",
    ),
}
"""LLaMA-Factory's name of a template → what it writes."""

ENDS_ONCE = frozenset(
    ["bailing", "bailing_v2", "falcon", "fewshot", "gemma2", "glm4", "glm4_moe", "glmz1", "index", "solar"]
)
"""Names whose `efficient_eos` ends the last answer of a conversation alone."""

REFUSED: Mapping[str, str] = by_name(
    {
        "it writes no end of the answer, so a model would not learn to stop; choose a template": "empty",
        "it is for images, video or audio, and only text is supported": ""
        "dots_ocr ernie_vl gemma3 gemma3n gemma4 gemma4n glm4v glm4_5v glm_ocr granite3_vision intern_vl "
        "keye_vl kimi_vl lfm2_vl llava llava_next llava_next_llama3 llava_next_mistral llava_next_qwen "
        "llava_next_yi llava_next_video llava_next_video_mistral llava_next_video_yi mimo_vl minicpm_v "
        "minicpm_v_4_6 minicpm_o mllama paligemma paligemma_chat pixtral qwen2_audio qwen2_omni qwen3_omni "
        "qwen3_omni_nothink qwen2_vl qwen3_vl qwen3_vl_nothink video_llava yi_vl youtu_vl",
        "it has a form of its own for thoughts; write a .jinja file for it": "aeva glm4_7 gpt_oss",
        "it is `chatml` with a system prompt of a page; use `chatml`, and put the prompt into the rows": "dbrx",
    }
)
"""Names that become no template, and why."""


def chat_template(name: str, *, default: str | None = None, thinking: bool = True) -> tuple[str | None, str]:
    """A built-in template's name and its text, or None and the text of a new file.

    `default` replaces the default system prompt. `thinking` off: no thought is trained, and prompts have an empty one.

    Raises:
        ValueError: there is no such template, or it cannot be written; the message is a clause.
    """
    if name in REFUSED:
        raise ValueError(REFUSED[name])
    if name not in FORMS:
        raise ValueError(f"it is not known here{nearest(name, FORMS)}")
    form = FORMS[name] if default is None else replace(FORMS[name], default=default)
    text = jinja(form, thinking=thinking)
    for built_in in template_names():
        if agree(text, template_text(built_in)):
            return built_in, template_text(built_in)
    with_tools = template_text("qwen").replace(HELPFUL, form.default.replace("'", "\\'").replace("\n", "\\n"))
    return None, with_tools if form.default and agree(text, with_tools) else text


def differences(name: str) -> list[str]:
    """What LLaMA-Factory trains otherwise with this template, as sentences for the user."""
    found, answer = [], FORMS[name].answer
    if answer != answer.rstrip():
        text = "is in the loss of LLaMA-Factory and not in the loss here"
        found.append(f"`template: {name}`: the line end after the token that ends an answer {text}")
    if name in ENDS_ONCE:
        text = "LLaMA-Factory ends the last answer of a conversation alone, here every answer ends"
        found.append(f"`template: {name}`: {text}")
    return found


def jinja(form: Form, *, thinking: bool = True) -> str:
    """The chat template that writes this form."""
    lines = []
    default = json.dumps(form.default, ensure_ascii=False)
    lines.append(f"set system = messages[0]['content'] if messages[0]['role'] == 'system' else {default}")
    if form.first:
        lines.append(f"={_joined(form.first)}")
    if not form.inside:
        lines += ["if system", f"={_joined(form.system, 'system')}", "endif"]
    lines += ["for message in messages", "set content = message['content']", "if message['role'] == 'user'"]
    if form.inside:
        asked = "(1 if messages[0]['role'] == 'system' else 0)"
        lines += [f"if system and loop.index0 == {asked}", f"set content = {_joined(form.system, 'system')} + content"]
        lines += ["endif"]
    lines += [f"={_joined(form.user)}", "elif message['role'] == 'assistant'"]
    lines += _thought(form.thought, thinking) if form.thought else []
    lines += [f"={_joined(form.answer)}", "endif", "endfor"]
    if form.thought and not thinking:
        lines += ["if add_generation_prompt", f"={json.dumps(''.join(form.thought), ensure_ascii=False)}", "endif"]
    return "".join(f"{{{{- {line[1:]} -}}}}\n" if line[0] == "=" else f"{{%- {line} -%}}\n" for line in lines)


def _thought(words: tuple[str, str], thinking: bool) -> list[str]:
    """An answer without a thought gets an empty one; with thinking off it also loses its own."""
    start, end = (json.dumps(word.strip(), ensure_ascii=False) for word in words)
    empty = json.dumps("".join(words), ensure_ascii=False)
    if thinking:
        test = f"{start} not in content and {end} not in content"
        return [f"if {test}", f"set content = {empty} + content", "endif"]
    return [f"set content = {empty} + content.split({end})[-1].lstrip('\\n')"]


def _joined(form: str, content: str = "content") -> str:
    """The form as an expression of Jinja."""
    names = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
    parts = [form]
    for mark in names:
        parts = [piece for part in parts for piece in _split(part, mark, names)]
    return " + ".join(names.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)


def _split(part: str, mark: str, names: Mapping[str, str]) -> list[str]:
    if part in names:
        return [part]
    pieces = part.split(mark)
    return [piece for piece in [pieces[0], *(one for after in pieces[1:] for one in (mark, after))] if piece]


# Whether two templates write the same


_SAID = [
    ("user", "A question, 问题？"),
    ("assistant", "An answer.\n\n- 答案"),
    ("user", "Another?"),
    ("assistant", "Yes."),
]
_SYSTEM = ("system", "A system prompt.")


@cache
def _written(template: str) -> tuple[str, ...]:
    """What a template writes of one and two turns, with and without a system prompt, and of prompts."""
    compiled = compile_template(template)
    special = {"bos_token": "<BOS>", "eos_token": "<EOS>", "tools": None}
    found = []
    for said in (_SAID[:1], _SAID[:2], _SAID[:3], _SAID):
        for turns in (said, [_SYSTEM, *said]):
            messages = [{"role": role, "content": content} for role, content in turns]
            asked = said[-1][0] == "user"
            found.append(compiled.render(messages=messages, add_generation_prompt=asked, **special))
    return tuple(found)


def agree(first: str, second: str) -> bool:
    """Whether two templates write the same, of contents without blanks around them."""
    return _written(first) == _written(second)


def described() -> dict[str, str]:
    """Each name → the template that it becomes, or why it becomes none, in words for the documentation."""
    made = {name: chat_template(name)[0] for name in FORMS}
    return {name: f"`{own}`" if own else "a .jinja file" for name, own in made.items()} | dict(REFUSED)
