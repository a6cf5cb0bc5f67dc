"""What the converted templates train: the answers and their ends, and nothing else."""

import pytest

from pipeline.tools.convert_templates import FORMS, chat_template
from stages.chat.encoder import Encoder
from stages.chat.labels import IGNORED, encode_chat
from stages.chat.template import install_template

pytestmark = pytest.mark.train

TALK = [
    {"role": "system", "content": "你是一名医生。"},
    {"role": "user", "content": "感冒了要不要吃抗生素？"},
    {"role": "assistant", "content": "不要。多休息。"},
    {"role": "user", "content": "那发烧呢"},
    {"role": "assistant", "content": "可以服用退烧药。"},
]
ENDED_BY_EOS = sorted(
    name for name, form in FORMS.items() if form.answer.strip().endswith("{eos}") and not form.thought
)


@pytest.mark.parametrize("name", ENDED_BY_EOS)
def test_a_converted_template_trains_the_answers_and_their_ends(tiny, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    install_template(tokenizer, chat_template(name)[1])
    ids, labels = encode_chat(Encoder(tokenizer), TALK)
    trained = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    text = tokenizer.decode(trained)
    assert text.replace(" ", "").replace("\n", "") == "不要。多休息。</s>可以服用退烧药。</s>"
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
