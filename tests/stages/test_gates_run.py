"""The gates of `configs/bloomz_med.yaml`: a healthy chain of tiny models passes them, and three broken ones do not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stages import evaluate, quantize
from stages.chat.encoder import Encoder
from stages.chat.labels import encode_chat
from stages.chat.template import install_template, template_text
from stages.measuring.calibration import calibration_rows, split
from stages.model.facts import read_facts
from stages.model.inputs import Inputs

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
TOLD = {
    "高血压": "少吃盐，按时量血压，坚持服药。",
    "糖尿病": "控制主食，监测血糖，多走路。",
    "感冒": "多喝温水，卧床休息，注意保暖。",
    "失眠": "睡前不喝咖啡，固定起床时间。",
    "胃炎": "少吃多餐，不吃辛辣，戒酒。",
    "湿疹": "少用热水烫洗，涂润肤霜。",
}
ASKED = ["{}怎么办？", "得了{}要注意什么？", "我有{}，请问怎么治？", "{}平时怎么护理？", "家里老人{}了，该如何处理？"]
GENERAL = ["长江发源于青藏高原，最后注入东海。", "春天到了，公园里的柳树发出嫩芽。", "火车穿过稻田，傍晚到达海边。"]


def talks(asked, shift=0):
    """Question and answer of every illness; `shift`: the answer of another one."""
    names = list(TOLD)
    for question in asked:
        for place, name in enumerate(names):
            answer = TOLD[names[(place + shift) % len(names)]]
            yield [{"role": "user", "content": question.format(name)}, {"role": "assistant", "content": answer}]


def write(folder):
    """Held-out rows: the last two ways to ask are never trained on."""
    held = list(talks(ASKED[3:]))
    pairs = [
        {"prompt": row[:1], "chosen": row[1:], "rejected": other[1:]}
        for row, other in zip(held, talks(ASKED[3:], 1), strict=True)
    ]
    rows = {
        "consult": [{"messages": row} for row in talks(ASKED[:3])],
        "consult_held": [{"messages": row} for row in held],
        "general_held": [{"text": text} for text in GENERAL],
        "prefer_held": pairs,
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def build(folder):
    """Every model of a chain and the broken ones, by plain torch."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*TOLD.values(), *GENERAL, *ASKED], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")
    install_template(tokenizer, template_text("med"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ends = {"vocab_size": 400, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ends))

    def save(name):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def train(texts, steps, rate=3e-3):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        width = max(len(ids) for ids, _ in texts)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in texts])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in texts])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts])
        for _ in range(steps):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    save("base")
    plain = [row[0]["content"] + "\n" + row[1]["content"] for row in talks(ASKED[:3])] + GENERAL
    train([(ids, ids) for ids in tokenizer(plain, add_special_tokens=False)["input_ids"]], 150)
    save("pt")
    for name, shift in (("shuffled", 1), ("sft", 0)):
        model = LlamaForCausalLM.from_pretrained(folder / "pt")
        train([encode_chat(Encoder(tokenizer), row) for row in talks(ASKED[:3], shift)], 60)
        save(name)
    prefer(model, tokenizer)
    save("dpo")
    shutil.copytree(folder / "dpo", folder / "merge")
    shutil.copytree(folder / "base", folder / "without_adapters")
    for name, bits in (("quantize", 4), ("two_bits", 2)):
        source = {"path": str(folder / "consult.jsonl"), "format": "messages"}
        calibration = {"data": [source], "samples": 8}
        (folder / name).mkdir()
        config = quantize.Config(model="merge", bits=bits, group_size=32, calibration=calibration)
        quantize._quantize(
            config, read_facts(folder / "merge"), folder / "merge", rows(config, folder / "merge"), folder / "work"
        )
        quantize._publish(folder / "merge", folder / "work/model", folder / name)
        shutil.rmtree(folder / "work")


def rows(config, folder):
    found = calibration_rows(config.calibration, lambda source: source, folder, config.seed)
    return split(found, config.calibration.samples, config.seed)[1]


def prefer(model, tokenizer):
    """Some steps of DPO: −log σ(β · (margin − that of the reference)), β 0.1."""
    import torch

    def margins():
        sums = []
        for shift in (0, 1):
            rows = [encode_chat(Encoder(tokenizer), row) for row in talks(ASKED[:3], shift)]
            sums.append(torch.stack([-model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * sum(
                label != -100 for label in labels) for ids, labels in rows]))  # fmt: skip
        return sums[0] - sums[1]

    with torch.no_grad():
        reference = margins()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(5):
        (-torch.nn.functional.logsigmoid(0.1 * (margins() - reference)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def judge(folder, models):
    """What the gates of `bloomz_med.yaml` say to a chain of these folders; those that say no by metric and stage."""
    given = yaml.safe_load((ROOT / "configs/bloomz_med.yaml").read_text(encoding="utf-8"))["stages"]["evaluate"]
    formats = {"consult_held": "messages", "general_held": "text", "prefer_held": "preference"}
    assert given["data"] == list(formats)
    data = {name: {"path": str(folder / f"{name}.jsonl"), "format": form} for name, form in formats.items()}
    compare = {name: [str(folder / made)] for name, made in models.items()}
    gates = [gate for gate in given["gates"] if {gate["stage"], gate["versus"]} <= models.keys()]
    out = folder / ("-".join(models.values()) + ".out")
    out.mkdir()
    config = evaluate.Config(compare=list(compare), data=data, gates=gates, template=template_text("med"))
    evaluate.run(config, Inputs(compared=compare), out)
    said = evaluate.verdicts(config, out)
    names = [f"{gate['metric']} of {gate['stage']}" for gate in gates]
    return SimpleNamespace(
        gates=len(said), no={name: v.text for name, v in zip(names, said, strict=True) if not v.passed}
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory, apart):
    """`judge` in a process of its own."""
    folder = tmp_path_factory.mktemp("chain")
    write(folder)
    apart(build, folder)
    return lambda **models: apart(judge, folder, models)


def test_a_healthy_chain_passes(chain):
    models = {name: name for name in ("base", "pt", "sft", "dpo", "merge", "quantize")}
    said = chain(**models)
    assert (said.gates, said.no) == (6, {})


def test_answers_of_other_questions_are_caught(chain):
    said = chain(pt="pt", sft="shuffled")
    assert said.gates == 2
    assert list(said.no) == ["answer_margin of sft"]  # its perplexity may well be fine
    assert "at most 10% decrease is allowed" in said.no["answer_margin of sft"]


def test_a_merge_without_its_adapters_is_caught(chain):
    said = chain(dpo="dpo", merge="without_adapters")
    assert (said.gates, list(said.no)) == (1, ["perplexity of merge"])


def test_an_export_to_two_bits_is_caught(chain):
    said = chain(merge="merge", quantize="two_bits")
    assert (said.gates, list(said.no)) == (1, ["perplexity of quantize"])
    assert "at most 6% increase is allowed" in said.no["perplexity of quantize"]
