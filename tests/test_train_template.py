"""What is trained is what is served: one template, one tokenizer, one set of ids from the first stage to the last."""

import json
from types import SimpleNamespace

import pytest

from pipeline.errors import StageError
from stages import _rows, _template, dpo, merge, pt, sft

pytestmark = pytest.mark.train

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
    _template.install(made, _template.text(named))
    return made


def test_every_built_in_template_is_tried():
    assert [name for name in ENDS if "." not in name] == _template.names()


@TEMPLATES
@TALKING
def test_a_conversation_is_tokenized_as_the_exported_tokenizer_does(tokenizer, messages):
    assert _template.encode(tokenizer, messages)[0] == ids_of(tokenizer, messages)


@TEMPLATES
@TALKING
def test_the_loss_sees_the_answers_and_their_ends_and_nothing_else(tokenizer, template, messages):
    ids, labels = _template.encode(tokenizer, messages)
    answers = [[]]
    for id_, label in zip(ids, labels, strict=True):
        if label != _template.IGNORED:
            assert label == id_
            answers[-1].append(label)
        elif answers[-1]:
            answers.append([])
    told = [message["content"] + ENDS[template] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(answer) for answer in answers if answer] == told


@TEMPLATES
@TALKING
def test_what_is_asked_when_serving_is_how_the_trained_row_begins(tokenizer, messages):
    ids = ids_of(tokenizer, messages)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = ids_of(tokenizer, messages[:number], add_generation_prompt=True)
            assert asked == ids[: len(asked)]


@TEMPLATES
def test_a_tokenizer_that_starts_text_with_bos_starts_a_conversation_with_one_too(tiny, template, tokenizer):
    from tokenizers.processors import TemplateProcessing

    text, bos = tokenizer.chat_template, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("感冒")["input_ids"][0] == bos
    _template.install(tokenizer, text)
    ids, _ = _template.encode(tokenizer, TURNS)
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
    for row in _rows.examples(rows("text", 114)):
        assert tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


WRONG = {
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}",
        "the chat template does not end the assistant's turn with a special token, so the model could not learn "
        "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`",
    ),
    "a start that changes": (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "the chat template writes the start of a conversation differently once it goes on, so what is trained "
        "would not be what is served; choose a built-in `template:`",
    ),
    "a role it refuses": (
        "{{ raise_exception('no system prompt, please') }}",
        "the chat template cannot render the roles user, assistant, user, assistant: no system prompt, please",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_template_that_could_not_be_served_is_refused(tiny, text, message):
    tokenizer = tokenizer_of(tiny("llama"))
    _template.install(tokenizer, text)
    with pytest.raises(StageError) as caught:
        _template.encode(tokenizer, TURNS)
    assert str(caught.value) == message


# The whole chain: every folder that it leaves must tokenize as the stages trained.


@pytest.fixture(
    scope="module",
    params=[("bloom", True, "med"), ("qwen3", True, "chatml"), ("llama", False, "llama3")],
    ids=["bloom med", "qwen3 chatml", "llama llama3"],
)
def chain(request, tiny, train, rows, tmp_path_factory):
    architecture, tied, template = request.param
    text = _template.text(template)
    folders, done = [tiny(architecture, tied=tied, template=None)], {}
    for stage, kind in ((pt, "text"), (sft, "alpaca"), (dpo, "preference")):
        done[stage] = train(stage, folders, rows(kind, 4), template=text)
        folders.append(done[stage].out)
    merged = tmp_path_factory.mktemp("merge")
    merge.run(merge.Config(model=list(map(str, folders))), merged)
    return SimpleNamespace(template=template, text=text, done=done, folders=[*folders[1:], merged])


def test_sft_trains_on_the_ids_that_every_folder_gives(chain, rows):
    trained = chain.done[sft].trainer.train_dataset["input_ids"]
    for folder in chain.folders:
        tokenizer = tokenizer_of(folder)
        assert [ids_of(tokenizer, row["messages"]) for row in _rows.examples(rows("alpaca", 4))] == list(trained)


def test_dpo_trains_on_the_ids_that_every_folder_gives(chain, rows):
    trained = list(chain.done[dpo].trainer.train_dataset)
    for folder in chain.folders:
        tokenizer = tokenizer_of(folder)
        for row, got in zip(_rows.examples(rows("preference", 4)), trained, strict=True):
            assert got["prompt_ids"] == ids_of(tokenizer, row["prompt"], add_generation_prompt=True)
            assert got["prompt_ids"] + got["chosen_ids"] == ids_of(tokenizer, row["prompt"] + row["chosen"])
            assert got["prompt_ids"] + got["rejected_ids"] == ids_of(tokenizer, row["prompt"] + row["rejected"])


def test_every_folder_carries_the_same_template_and_tokenizer(chain):
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert len({(folder / name).read_bytes() for folder in chain.folders}) == 1
    assert (chain.folders[-1] / "chat_template.jinja").read_text(encoding="utf-8") == chain.text


def test_every_folder_stops_at_the_end_of_a_turn(chain):
    end = tokenizer_of(chain.folders[-1]).convert_tokens_to_ids(ENDS[chain.template])
    for folder in chain.folders:
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert end in (stops if isinstance(stops, list) else [stops])
