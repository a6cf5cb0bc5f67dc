"""What is trained is what is served: one template, one tokenizer, one set of ids from the first stage to the last."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import dpo, merge, pt, sft
from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.chat.labels import IGNORED, Encoded, encode_chat, encode_chats, end_of_turn
from stages.chat.rendering import render
from stages.chat.template import install_template, template_names, template_text
from stages.data.source import Source, rows_of
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

SHARED = Path(__file__).parents[3] / "shared" / "data" / "LLaMA-Factory" / "glaive_toolcall_zh_demo.json"

# As SmolLM2's: a default system prompt under `loop.first`, and no mark of what the assistant says.
FOREIGN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT = {
    "description": "alpaca-lora's kind",
    "prompt_input": "问题：{instruction}\n{input}\n回答：",
    "prompt_no_input": "问题：{instruction}\n回答：",
    "response_split": "回答：",
}
ENDS = {
    "alpaca_zh": "</s>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "med": "</s>",
    "plain": "</s>",
    "qwen": "<|im_end|>",
    "prompt.json": "</s>",
    "foreign.jinja": "<|im_end|>",
}
SYSTEM = {"role": "system", "content": "你是一名医生。"}
TURNS = [
    {"role": "user", "content": "感冒了要不要吃抗生素？"},
    {"role": "assistant", "content": "不要。多休息，\n多喝水 😊"},
    {"role": "user", "content": "那  发烧呢"},
    {"role": "assistant", "content": "38.5℃ 以上可以服用退烧药。"},
]
TALKS = {
    "one turn": TURNS[:2],
    "several turns": TURNS,
    "one turn under a system prompt": [SYSTEM, *TURNS[:2]],
    "several turns under a system prompt": [SYSTEM, *TURNS],
}
TEMPLATES = pytest.mark.parametrize("template", ENDS)
TALKING = pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, **settings)["input_ids"]


@pytest.fixture
def tokenizer(tiny, template, tmp_path):
    """A tokenizer that a stage has given the template, as a user names it."""
    (tmp_path / "foreign.jinja").write_text(FOREIGN, encoding="utf-8")
    (tmp_path / "prompt.json").write_text(json.dumps(PROMPT), encoding="utf-8")
    named = template if "." not in template else str(tmp_path / template)
    made = tokenizer_of(tiny("llama", template=None))
    install_template(made, template_text(named))
    return made


def test_every_built_in_template_is_tried():
    assert [name for name in ENDS if "." not in name] == template_names()


@TEMPLATES
@TALKING
def test_a_conversation_is_tokenized_as_the_exported_tokenizer_does(tokenizer, messages):
    assert encode_chat(Encoder(tokenizer), messages)[0] == ids_of(tokenizer, messages)


@TEMPLATES
@TALKING
def test_the_loss_sees_the_answers_and_their_ends_and_nothing_else(tokenizer, template, messages):
    ids, labels = encode_chat(Encoder(tokenizer), messages)
    answers = [[]]
    for id_, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            assert label == id_
            answers[-1].append(label)
        elif answers[-1]:
            answers.append([])
    expected = [message["content"] + ENDS[template] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(answer) for answer in answers if answer] == expected


@TEMPLATES
@TALKING
def test_what_is_asked_when_serving_is_how_the_trained_row_begins(tokenizer, messages):
    ids = ids_of(tokenizer, messages)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = ids_of(tokenizer, messages[:number], add_generation_prompt=True)
            assert asked == ids[: len(asked)]


# Tools


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SCHEMA = {"type": "object", "properties": {"药": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "dose", "description": "剂量 <mg>", "parameters": SCHEMA}}]
CALLED = [
    {"role": "user", "content": "布洛芬吃多少？"},
    {"role": "assistant", "content": "", "tool_calls": [call("dose", 药="布洛芬")]},
    {"role": "tool", "content": "400 mg"},
    {"role": "assistant", "content": "每次 400 mg。"},
    {"role": "user", "content": "两种一起呢？"},
    {"role": "assistant", "content": "我查一下。", "tool_calls": [call("dose", 药="a<b"), call("dose", n=1, x=None)]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "不要。"},
]
HERMES = [
    '<tool_call>\n{"name": "dose", "arguments": {"药": "布洛芬"}}\n</tool_call><|im_end|>',
    "每次 400 mg。<|im_end|>",
    '我查一下。\n<tool_call>\n{"name": "dose", "arguments": {"药": "a<b"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "dose", "arguments": {"n": 1, "x": null}}\n</tool_call><|im_end|>',
    "不要。<|im_end|>",
]
LLAMA = [
    '{"name": "dose", "parameters": {"药": "布洛芬"}}<|eot_id|>',
    "每次 400 mg。<|eot_id|>",
    '我查一下。\n{"name": "dose", "parameters": {"药": "a<b"}}; {"name": "dose", "parameters": {"n": 1, "x": null}}'
    "<|eot_id|>",
    "不要。<|eot_id|>",
]
EXPECTED = {"chatml": HERMES, "qwen": HERMES, "llama3": LLAMA}
# Where a turn goes on, Qwen3's own template leaves out the empty thought that it wrote when the turn was the last.
THINKING = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{{- message['content'] -}}
{%- for call in message['tool_calls'] -%}
{{- '<tool_call>' + call['function']['name'] + (call['function']['arguments'] | tojson) + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{{- tools[0]['function']['name'] if tools -}}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def answers(tokenizer, ids, labels):
    """The stretches that are in the loss, as text."""
    found = [[]]
    for id_, label in zip(ids, labels, strict=True):
        assert label in (id_, IGNORED)
        if label != IGNORED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(answer) for answer in found if answer]


@pytest.mark.parametrize("template", EXPECTED)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_calls_and_answers_are_in_the_loss_and_what_tools_give_back_is_not(tokenizer, template, tools, before):
    messages = [*before, *CALLED]
    ids, labels = encode_chat(Encoder(tokenizer), messages, tools)
    assert ids == ids_of(tokenizer, messages, tools=tools)
    assert answers(tokenizer, ids, labels) == EXPECTED[template]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = ids_of(tokenizer, messages[:number], tools=tools, add_generation_prompt=True)
            assert asked == ids[: len(asked)]


@pytest.mark.parametrize(
    ("template", "begin"),
    [("chatml", "<|im_start|>system\n"), ("qwen", "<|im_start|>system\nYou are a helpful assistant.\n\n")],
)
def test_tools_stand_in_the_system_prompt(tokenizer, begin):
    expected = json.dumps(TOOLS[0], ensure_ascii=False)
    written = render(tokenizer, CALLED[:3], prompt=True, tools=TOOLS)
    assert written == (
        f"{begin}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{expected}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n布洛芬吃多少？<|im_end|>\n<|im_start|>assistant\n{HERMES[0]}\n"
        "<|im_start|>user\n<tool_response>\n400 mg\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    both = render(tokenizer, CALLED, tools=TOOLS)
    assert "user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n" in both


@pytest.mark.parametrize("template", ["llama3"])
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_tools_stand_in_the_first_question_of_llama3(tokenizer, before):
    expected = json.dumps(TOOLS[0], ensure_ascii=False, indent=4)
    system = f"\n\n{SYSTEM['content']}" * len(before)
    written = render(tokenizer, [*before, *CALLED[:3]], prompt=True, tools=TOOLS)
    assert written == (
        f"<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{expected}\n\n布洛芬吃多少？<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{LLAMA[0]}"
        "<|start_header_id|>ipython<|end_header_id|>\n\n400 mg<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("template", ["llama3"])
def test_llama3_writes_a_call_as_llama_3_1_s_own_template_does(tokenizer):
    """The published one, as TRL brings it: it also writes dates, and a tool's words as a JSON string."""
    import trl

    theirs = tokenizer_of(tokenizer.name_or_path)
    theirs.chat_template = (Path(trl.__file__).parent / "chat_templates" / "llama3_1.jinja").read_text(encoding="utf-8")
    written = theirs.apply_chat_template([SYSTEM, *CALLED[:4]], tools=TOOLS, tokenize=False, date_string="today")
    dates = "\nCutting Knowledge Date: December 2023\nToday Date: today\n\n"
    plain = written.replace(dates, "\n\n").replace('"400 mg"', "400 mg")
    assert plain == render(tokenizer, [SYSTEM, *CALLED[:4]], tools=TOOLS)


LOST = {"declared": (TURNS, TOOLS, "the tools"), "called": (CALLED, None, "tool calls, the arguments of tool calls")}


@pytest.mark.parametrize("template", ["med", "alpaca_zh", "plain", "prompt.json", "foreign.jinja"])
@pytest.mark.parametrize(("messages", "tools", "lost"), LOST.values(), ids=LOST)
def test_a_template_that_would_leave_tools_out_is_refused(tokenizer, messages, tools, lost):
    with pytest.raises(StageError) as error:
        encode_chat(Encoder(tokenizer), messages, tools)
    assert str(error.value) == (
        f"the template does not write {lost}; choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"
    )
    encode_chat(Encoder(tokenizer), TURNS)


def test_a_thought_that_only_the_last_turn_has(tiny):
    tokenizer = tokenizer_of(tiny("llama", template=None))
    tokenizer.chat_template = THINKING
    messages = CALLED[:4]
    ids, labels = encode_chat(Encoder(tokenizer), messages[:2])
    thought = "<think>\n\n</think>\n\n"
    called = '<tool_call>dose{"药": "布洛芬"}</tool_call><|im_end|>'
    assert answers(tokenizer, ids, labels) == [thought + called]
    ids, labels = encode_chat(Encoder(tokenizer), messages)
    assert answers(tokenizer, ids, labels) == [called, f"{thought}每次 400 mg。<|im_end|>"]


@pytest.mark.skipif(not SHARED.is_file(), reason="the public file is not here")
@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_all_of_a_public_file_of_tool_calls_is_tokenized(tokenizer, template):
    for row in rows_of(Source(path=str(SHARED), format="sharegpt")):
        ids, labels = encode_chat(Encoder(tokenizer), row["messages"], row.get("tools"))
        said = [turn for turn in row["messages"] if turn["role"] == "assistant"]
        expected = answers(tokenizer, ids, labels)
        assert len(expected) == len(said)
        for text, turn in zip(expected, said, strict=True):
            assert text.endswith(ENDS[template])
            assert turn["content"].strip() in text
            assert all(f'"name": "{call["function"]["name"]}"' in text for call in turn.get("tool_calls", []))


def test_pairs_with_calls_reach_the_trainer_whole(tiny, train, tmp_path):
    other = [{**CALLED[1], "tool_calls": [call("dose", 药="阿司匹林")]}]
    pair = {"prompt": CALLED[:1], "chosen": CALLED[1:2], "rejected": other, "tools": TOOLS}
    plain = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": TURNS[3:]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [pair, plain])), encoding="utf-8")
    source = Source(path=str(path), format="preference")
    model, template = [tiny("llama", template=None)], template_text("chatml")
    done = train(dpo, model, source, template=template, trainer={"max_steps": 1, "max_length": 1000})
    first, second = (done.trainer.train_dataset[number] for number in (0, 1))
    tokenizer = done.trainer.processing_class
    assert first["prompt_ids"] == ids_of(tokenizer, CALLED[:1], tools=TOOLS, add_generation_prompt=True)
    assert tokenizer.decode(first["chosen_ids"]) == HERMES[0]
    assert tokenizer.decode(first["rejected_ids"]) == HERMES[0].replace("布洛芬", "阿司匹林")
    assert second["prompt_ids"] == ids_of(tokenizer, TURNS[:1], add_generation_prompt=True)
    with pytest.raises(
        StageError, match=r"^the chat template cannot be used for 1 of 2 rows, .* the template does not write the tools"
    ):
        train(dpo, model, source, template=template_text("med"), trainer={"max_steps": 1})


@TEMPLATES
def test_a_tokenizer_that_starts_text_with_bos_starts_a_conversation_with_one_too(tiny, template, tokenizer):
    from tokenizers.processors import TemplateProcessing

    text, bos = tokenizer.chat_template, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("感冒")["input_ids"][0] == bos
    install_template(tokenizer, text)
    ids, _ = encode_chat(Encoder(tokenizer), TURNS)
    assert ids == ids_of(tokenizer, TURNS)
    assert ids[0] == bos
    assert ids.count(bos) == 1


@pytest.mark.parametrize(
    "text", ["感冒了😷，体温 38.5℃！", "  两个  空格\t和\n\n换行 \r\n", "ａＡ①½ é é 👩‍⚕️ 𠮷", "<b>it's</b> 50 %"]
)
def test_decoding_gives_back_every_character(tiny, text):
    tokenizer = tokenizer_of(tiny("bloom"))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_decoding_gives_back_every_row_of_the_data(tiny, rows):
    tokenizer = tokenizer_of(tiny("qwen3"))
    for row in rows_of(rows("text", 114)):
        assert tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


WRONG = {
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}",
        "the chat template does not end the assistant's turn with a special token, so the model could not learn "
        "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`",
    ),
    "a start that changes": (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "the prompt that the chat template writes for message 4 is not how the whole conversation begins",
    ),
    "a role it refuses": (
        "{{ raise_exception('no system prompt, please') }}",
        "the chat template cannot render the roles user, assistant, user, assistant: no system prompt, please",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_template_that_could_not_be_served_is_refused(tiny, text, message):
    tokenizer = tokenizer_of(tiny("llama"))
    install_template(tokenizer, text)
    with pytest.raises(StageError) as caught:
        encode_chat(Encoder(tokenizer), TURNS)
    assert str(caught.value) == message


# Prompt and answer as a server would see them


@pytest.fixture(scope="module")
def joining(tmp_path_factory):
    """A tokenizer of bytes that joins two line ends, as Qwen's and Llama 3's do; and one that adds a blank in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocab = {token: number for number, token in enumerate([*letters, "ĊĊ", "Ġa", "▁"])}

    def made(add_prefix_space):
        backend = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ"), ("Ġ", "a")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(marks)
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    return made


@pytest.mark.parametrize("front", [False, True], ids=["", "with a blank in front"])
@pytest.mark.parametrize("answer", ["\n根据", "\n\n\na", "a\n", "\n"])
def test_no_answer_is_refused_for_how_it_begins(joining, front, answer):
    tokenizer = joining(front)
    install_template(tokenizer, template_text("chatml"))
    talk = [TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:]]
    ids, labels = encode_chat(Encoder(tokenizer), talk)
    asked = ids_of(tokenizer, talk[:1], add_generation_prompt=True)
    assert ids[: len(asked)] == asked
    assert tokenizer.decode(ids).replace(" ", "") == render(tokenizer, talk).replace(" ", "")
    answered = [answer + "<|im_end|>", TURNS[3]["content"] + "<|im_end|>"]
    assert [text.replace(" ", "") for text in answers(tokenizer, ids, labels)] == [
        text.replace(" ", "") for text in answered
    ]
    joined = ids_of(tokenizer, talk)
    assert (ids == joined) == (not answer.startswith("\n"))


def test_the_prompt_of_a_pair_is_what_a_server_sends(joining):
    tokenizer = joining(False)
    install_template(tokenizer, template_text("chatml"))
    before = [TURNS[0], {"role": "assistant", "content": "\n\na"}, TURNS[2]]
    pair = {"prompt": before, "chosen": [{"role": "assistant", "content": "\nb"}], "rejected": [TURNS[3]]}
    ((chosen, rejected),) = encoding.encode(Encoder(tokenizer), [pair])
    asked = ids_of(tokenizer, before, add_generation_prompt=True)
    assert chosen.trained == [(len(asked), len(chosen.ids))]
    assert rejected.trained == [(len(asked), len(rejected.ids))]
    assert chosen.ids[: len(asked)] == rejected.ids[: len(asked)] == asked
    assert tokenizer.decode(chosen.ids[len(asked) :]) == "\nb<|im_end|>"


# As DeepSeek-R1-Distill's: the prompt opens a thought, and a finished answer has none.
OPENS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)
THOUGHT = "<think>\n先想。\n</think>\n\n好。"


@pytest.mark.parametrize(
    "answer",
    [
        {"content": THOUGHT},
        {"content": THOUGHT.removeprefix("<think>\n")},
        {"content": "好。", "reasoning_content": "先想。"},
    ],
    ids=["in the words", "as the model says it", "apart"],
)
def test_a_thought_that_the_prompt_opens_is_trained_after_it(joining, answer):
    tokenizer = joining(False)
    install_template(tokenizer, OPENS)
    earlier = {"role": "assistant", "content": THOUGHT, "weight": 0}
    talk = [TURNS[0], earlier, TURNS[2], {"role": "assistant", **answer}]
    ids, labels = encode_chat(Encoder(tokenizer), talk)
    asked = ids_of(tokenizer, talk[:3], add_generation_prompt=True)
    assert tokenizer.decode(asked).endswith("<|im_end|><|im_start|>assistant\n<think>\n")
    assert ids[: len(asked)] == asked
    assert answers(tokenizer, ids, labels) == ["先想。\n</think>\n\n好。<|im_end|>"]
    assert end_of_turn(Encoder(tokenizer)) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_without_the_thought_that_the_prompt_opens_is_refused(joining):
    tokenizer = joining(False)
    install_template(tokenizer, OPENS)
    first, second = encode_chats(
        Encoder(tokenizer), [(TURNS[:2], None), ([TURNS[0], {**TURNS[1], "content": THOUGHT}], None)]
    )
    assert str(first) == (
        "the chat template's prompt opens a thought with `<think>`, and the answer has none; write the thought before "
        "the answer, as `<think>…</think>`"
    )
    assert isinstance(second, Encoded)  # the other rows are used


# As gpt-oss's: a channel is named before the words.
CHANNEL = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + ('<s>final' if m.role == 'assistant' else '') }}"
    "{{ '<s>' + m.content + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant' }}{%- endif -%}"
)


@pytest.mark.parametrize("answer", ["a", "l", "final", "s>", "n"])
def test_a_short_answer_is_not_found_in_the_words_of_the_template(joining, answer):
    tokenizer = joining(False)
    install_template(tokenizer, CHANNEL)
    ids, labels = encode_chat(Encoder(tokenizer), [TURNS[0], {"role": "assistant", "content": answer}])
    assert answers(tokenizer, ids, labels) == [f"<s>final<s>{answer}<|im_end|>"]


def test_the_ids_of_one_day_are_those_of_every_day(joining):
    tokenizer = joining(False)
    install_template(tokenizer, "{{- strftime_now('%d %b %Y') -}}" + template_text("chatml"))
    assert tokenizer.decode(encode_chat(Encoder(tokenizer), TURNS[:2])[0]).startswith("26 Jul 2024<|im_start|>user")
    assert ids_of(tokenizer, TURNS[:2]) == encode_chat(Encoder(tokenizer), TURNS[:2])[0]  # as the exported one
    tokenizer.chat_template = "{{- strftime_now('%Y') -}}" + template_text("chatml")
    install_template(tokenizer, None)
    assert render(tokenizer, TURNS[:2]).startswith("2024<|im_start|>user")


# The whole chain: every folder that it leaves must tokenize as the stages trained.


@pytest.fixture(
    scope="module",
    params=[("bloom", True, "med"), ("qwen3", True, "chatml"), ("llama", False, "llama3")],
    ids=["bloom med", "qwen3 chatml", "llama llama3"],
)
def chain(request, tiny, train, rows, tmp_path_factory):
    architecture, tied, template = request.param
    text = template_text(template)
    folders, done = [tiny(architecture, tied=tied, template=None)], {}
    for stage, kind in ((pt, "text"), (sft, "alpaca"), (dpo, "preference")):
        done[stage] = train(stage, folders, rows(kind, 4), template=text)
        folders.append(done[stage].out)
    merged = tmp_path_factory.mktemp("merge")
    merge.run(merge.Config(model="chain"), Inputs(model=list(map(str, folders))), merged)
    return SimpleNamespace(template=template, text=text, done=done, folders=[*folders[1:], merged])


def test_sft_trains_on_the_ids_that_every_folder_gives(chain, rows):
    trained = chain.done[sft].trainer.train_dataset["input_ids"]
    for folder in chain.folders:
        tokenizer = tokenizer_of(folder)
        assert [ids_of(tokenizer, row["messages"]) for row in rows_of(rows("alpaca", 4))] == list(trained)


def test_dpo_trains_on_the_ids_that_every_folder_gives(chain, rows):
    trained = list(chain.done[dpo].trainer.train_dataset)
    for folder in chain.folders:
        tokenizer = tokenizer_of(folder)
        for row, got in zip(rows_of(rows("preference", 4)), trained, strict=True):
            assert got["prompt_ids"] == ids_of(tokenizer, row["prompt"], add_generation_prompt=True)
            for answer in ("chosen", "rejected"):  # up to the end of turn: what follows is not the model's to say
                whole = ids_of(tokenizer, row["prompt"] + row[answer])
                ends = len(got["prompt_ids"] + got[f"{answer}_ids"])
                assert got["prompt_ids"] + got[f"{answer}_ids"] == whole[:ends]
                assert got[f"{answer}_ids"][-1] == end_of_turn(Encoder(tokenizer))
                assert not tokenizer.decode(whole[ends:]).strip()


def test_every_folder_carries_the_same_template_and_tokenizer(chain):
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert len({(folder / name).read_bytes() for folder in chain.folders}) == 1
    assert (chain.folders[-1] / "chat_template.jinja").read_text(encoding="utf-8") == chain.text


def test_every_folder_stops_at_the_end_of_a_turn(chain):
    end = tokenizer_of(chain.folders[-1]).convert_tokens_to_ids(ENDS[chain.template])
    for folder in chain.folders:
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert end in (stops if isinstance(stops, list) else [stops])
