"""Tiny models are trained for a moment, quantized as a run would do it, and tried as a stranger would."""

import hashlib
import json
import math
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from stages import quantize
from stages.measuring.calibration import calibration_rows, split
from stages.model import gptq
from stages.model.facts import Facts, Needs, read_facts
from stages.model.folder import carried_files
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

ASKED = ["高血压", "糖尿病", "感冒", "发烧", "失眠", "胃炎", "贫血", "哮喘", "肺炎", "湿疹"]
TOLD = [
    "少盐少油",
    "多喝水",
    "注意休息",
    "按时吃药",
    "适量运动",
    "清淡饮食",
    "保持心情",
    "定期复查",
    "戒烟限酒",
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + '：' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant：{% endif %}"
)


def conversations(count):
    for number in range(count):
        told = "，".join(TOLD[(number * step + number // 9) % 9] for step in (1, 2, 4))
        question = f"{ASKED[number % 10]}患者第{number}天应该注意什么？"
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": f"{told}。"}]


def write_rows(path, count):
    rows = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations(count)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"path": str(path), "format": "messages"}


def save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([message["content"] for row in conversations(50) for message in row], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(kind, folder, steps=40):
    import torch
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, **ends))
    else:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        tied = kind == "tied"
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied, **ends))
    tokenizer = save_tokenizer(folder)
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in conversations(64)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(folder)
    return folder


def sha256(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def notes(out):
    events = out / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "note"]


def config(model, data, samples=32, **settings):
    calibration = {"data": [data], "samples": samples, "max_length": 40}
    own = {name: settings.pop(name) for name in tuple(settings) if name in quantize.Config.model_fields}
    named = {"group_size": 32, "seed": 7, "mse": 0, **own, "gptq": settings}
    return quantize.Config(model=str(model), calibration=calibration, **named)


def run(asked, out):
    return quantize.run(asked, Inputs(model=[asked.model]), out)


def encode(asked, folder):
    return calibration_rows(asked.calibration, lambda source: source, folder, asked.seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 120)


@pytest.fixture(scope="module")
def models(tmp_path_factory, apart):
    made = {}

    def model(kind, *steps):
        if kind not in made:
            made[kind] = apart(build, kind, tmp_path_factory.mktemp(kind), *steps)
        return made[kind]

    return model


@pytest.fixture(scope="module")
def done(tmp_path_factory, apart, models, data):
    """The result of a whole run of a kind of model, made once."""
    made = {}

    def quantized(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(f"{kind}-out")
            asked = config(models(kind), data)
            made[kind] = SimpleNamespace(config=asked, out=out, metrics=apart(run, asked, out))
        return made[kind]

    return quantized


KINDS = pytest.mark.parametrize("kind", ["bloom", "tied", "untied"])


@pytest.mark.train
@KINDS
def test_perplexity_stays_near_and_bytes_shrink(done, kind):
    metrics = done(kind).metrics
    assert metrics["perplexity_before"] < 30
    assert metrics["perplexity_after"] == pytest.approx(metrics["perplexity_before"], rel=0.15)
    quantized, rounded = metrics["quantized"], metrics["rounded"]
    assert quantized["perplexity"] == metrics["perplexity_after"]
    assert quantized["ratio"] == pytest.approx(metrics["perplexity_after"] / metrics["perplexity_before"])
    assert quantized["ratio_ci"][0] < quantized["ratio"] < quantized["ratio_ci"][1]
    assert 0 < quantized["kl"] < rounded["kl"] < 0.5
    assert 0.8 < quantized["top1_agreement"] <= 1
    assert len(quantized["layer_errors"]) == len(rounded["layer_errors"]) == 2
    assert all(0 < error < 0.2 for error in quantized["layer_errors"])
    assert metrics["bytes_before"] > 2.5 * metrics["bytes_after"]
    assert metrics["modules"] == (8 if kind == "bloom" else 14)
    assert metrics["fallback"] == []
    assert (metrics["calibration_rows"], metrics["perplexity_rows"]) == (32, 64)
    assert 32 * 20 < metrics["calibration_tokens"] <= 32 * 40
    assert metrics["answer"]
    assert math.isfinite(metrics["loss_max"])
    assert "times smaller, perplexity" in quantize.headline(metrics)
    json.dumps(metrics, allow_nan=False)


@pytest.mark.train
@KINDS
def test_it_takes_what_was_said_and_little_more(done, models, kind):
    needs = quantize.needs(done(kind).config, read_facts(models(kind)))
    metrics = done(kind).metrics
    assert 0.6 * metrics["bytes_after"] <= needs.disk <= metrics["bytes_after"]
    assert 0.6 * metrics["bytes_before"] <= needs.memory <= metrics["bytes_before"]
    assert quantize.facts_after_quantizing(done(kind).config, read_facts(models(kind))).stored == needs.disk


@pytest.mark.train
@KINDS
def test_every_inner_layer_is_quantized_and_the_rest_is_whole(done, models, kind):
    before = read_facts(models(kind)).weights
    after = read_facts(done(kind).out).weights
    inner = {name for name, shape in before.items() if quantize.LAYER.search(name) and len(shape) == 2}
    assert {name.removesuffix("qweight") + "weight" for name in after if name.endswith("qweight")} == inner
    assert before.keys() - inner == {name for name in after if name.endswith((".weight", ".bias"))} & before.keys()


@pytest.mark.train
@KINDS
def test_the_folder_holds_the_model_and_nothing_else(done, models, kind):
    source, out = models(kind), done(kind).out
    own = {"config.json", "quantize_config.json", "model.safetensors"}
    carried = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
    assert "tokenizer.json" in carried
    assert "chat_template.jinja" in carried
    assert "generation_config.json" in carried
    assert {path.name for path in out.iterdir()} - {"events.jsonl"} == own | carried
    for name in carried:
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.train
@KINDS
def test_config_says_how_it_was_quantized_and_no_more(done, models, kind):
    written = json.loads((done(kind).out / "config.json").read_text(encoding="utf-8"))
    source = json.loads((models(kind) / "config.json").read_text(encoding="utf-8"))
    quantization = written.pop("quantization_config")
    assert written == {**source, "dtype": "bfloat16"}
    assert (quantization["quant_method"], quantization["checkpoint_format"]) == ("gptq", "gptq")
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    assert set(quantization["meta"]) == set(quantize.META)
    assert len(json.dumps(quantization)) < 600
    assert json.loads((done(kind).out / "quantize_config.json").read_text(encoding="utf-8")) == quantization


def same_weights(asked, folder, out):
    held_out, calibration = split(encode(asked, folder), asked.calibration.samples, asked.seed)
    assert not {*map(tuple, held_out)} & {*map(tuple, calibration)}
    quantize._quantize(asked, read_facts(folder), folder, calibration, out)
    return sha256(out / "model")


@pytest.mark.train
def test_the_same_seed_gives_the_same_weights_and_another_does_not(done, models, apart, data, tmp_path):
    first, folder = done("tied"), models("tied")
    again = apart(same_weights, first.config, folder, tmp_path / "again")
    other = apart(same_weights, config(folder, data, seed=8), folder, tmp_path / "other")
    assert again == sha256(first.out)
    assert other != again


@pytest.mark.train
def test_memory_or_disk_gives_the_same_weights(done, models, apart, data, tmp_path):
    asked = config(models("bloom"), data, offload_to_disk=True)
    assert apart(same_weights, asked, models("bloom"), tmp_path / "disk") == sha256(done("bloom").out)


def losses(asked, folder, work, out):
    _, calibration = split(encode(asked, folder), asked.calibration.samples, asked.seed)
    return quantize._summary(quantize._quantize(asked, read_facts(folder), folder, calibration, work), out)


@pytest.mark.train
def test_modules_that_were_only_rounded_are_named(models, apart, data, tmp_path):
    asked = config(models("bloom"), data, fallback={"threshold": 10**6})
    found = apart(losses, asked, models("bloom"), tmp_path / "work", tmp_path)
    parts = [
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        "self_attention.dense",
        "self_attention.query_key_value",
    ]
    assert found["fallback"] == [f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert (found["modules"], found["loss_max"]) == (8, None)
    assert notes(tmp_path) == [
        "8 of 8 modules could not be calibrated and were only rounded: " + ", ".join(found["fallback"][:5]) + ", …"
    ]


@pytest.mark.train
def test_a_whole_row_as_one_group(models, apart, data, tmp_path):
    asked = config(models("bloom"), data, group_size=-1)
    assert apart(losses, asked, models("bloom"), tmp_path / "work", tmp_path)["fallback"] == []


@pytest.mark.train
def test_float16_stays_float16(models, apart, data, tmp_path):
    folder = apart(halve, models("tied"), tmp_path / "half")
    apart(losses, config(folder, data), folder, tmp_path / "work", tmp_path)
    written = json.loads((tmp_path / "work" / "model" / "config.json").read_text(encoding="utf-8"))
    assert written["dtype"] == "float16"


def halve(folder, out):
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(out)
    for path in carried_files(folder):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def poison(folder, out):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.transformer.h[0].mlp.dense_h_to_4h.weight, math.nan)
    model.save_pretrained(out)
    for path in carried_files(folder):
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.train
def test_broken_weights_are_refused_before_anything_is_quantized(models, apart, data, tmp_path):
    folder = apart(poison, models("bloom"), tmp_path / "nan")
    with pytest.raises(StageError) as caught:
        apart(run, config(folder, data), tmp_path)
    assert str(caught.value) == (f"the perplexity of `{folder}` is nan before quantization; check the stage before")


@pytest.mark.train
def test_too_few_rows(models, apart, tmp_path):
    with pytest.raises(StageError) as caught:
        apart(run, config(models("bloom"), write_rows(tmp_path / "few.jsonl", 11)), tmp_path)
    assert str(caught.value) == (
        "the calibration data has 11 different rows, and at least 16 are needed: 8 to calibrate with and 8 to "
        "measure perplexity on; add data"
    )


@pytest.mark.train
def test_conversations_without_a_template(models, apart, data, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in models("bloom").iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StageError) as caught:
        apart(run, config(folder, data), tmp_path)
    assert str(caught.value) == (
        f"the calibration data holds conversations, and `{folder}` has no chat template; calibrate with "
        "data of `format: text`, or set `template:` at the top"
    )


def test_an_interface_of_gptqmodel_that_is_gone_stops_the_stage_before_it_works(tmp_path, monkeypatch):
    used = (("quantization/quantizer.py", "Quantizer.find_params", ("axis",)),)
    monkeypatch.setattr(gptq, "USED", used)
    with pytest.raises(StageError) as caught:
        run(config(tmp_path / "none", {"path": "none.jsonl", "format": "text"}), tmp_path)
    assert str(caught.value) == (
        f"gptqmodel {version('gptqmodel')} has no `Quantizer.find_params.axis`, which this stage needs; "
        "gptqmodel 7.6.0 is known to work: `pip install gptqmodel==7.6.0`"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.train
def test_settings_that_gptqmodel_refuses(models, apart, data, tmp_path):
    asked = config(models("bloom"), data, desc_act=True, act_group_aware=True)
    with pytest.raises(StageError) as error:
        apart(run, asked, tmp_path)
    text = "orders whole groups and cannot be used with `desc_act`; remove one of the two"
    assert str(error.value) == f"`gptq.act_group_aware`: `act_group_aware` {text}"


def test_the_size_of_the_result_is_told_before():
    weights = {"model.layers.0.mlp.down_proj.weight": (576, 1536), "model.embed_tokens.weight": (1000, 577)}
    facts = Facts("the model", {}, {**weights, "model.norm.weight": (577,)}, stored=10)
    source = {"path": "rows.jsonl", "format": "text"}
    whole, four = 2 * (1000 * 577 + 577), 576 * 1536 // 2
    groups = config("base", source, group_size=64)
    assert quantize.needs(groups, facts) == Needs(10, four + 2 * 576 * 1536 // 64 + whole)
    rows = config("base", source, group_size=-1, bits=8)
    assert quantize.needs(rows, facts) == Needs(10, 2 * four + 2 * 576 + whole)
    assert quantize.facts_after_quantizing(rows, facts).stored == quantize.needs(rows, facts).disk
    kept = config("base", source, group_size=-1, bits=8, offload_to_disk=True)
    assert quantize.needs(kept, facts).disk == 2 * quantize.needs(rows, facts).disk
    assert quantize.facts_after_quantizing(kept, facts).stored == quantize.needs(rows, facts).disk
    assert quantize.needs(rows, Facts("not here", {}, known=False)) == Needs(0, 0)


def test_what_cannot_work_is_known_before_torch_is_loaded():
    shapes = {"q_proj": (64, 576), "k_proj": (64, 576), "down_proj": (576, 1536)}
    weights = {f"model.layers.0.mlp.{name}.weight": shape for name, shape in shapes.items()}
    weights["model.embed_tokens.weight"] = (1000, 577)
    facts = Facts("the model", {}, weights)
    source = {"path": "rows.jsonl", "format": "text"}
    assert quantize.check_model(config("base", source, group_size=64), facts) == []
    assert quantize.check_model(config("base", source, group_size=-1), facts) == []
    assert quantize.check(config("base", source)) == []
    assert quantize.check_model(config("base", source, group_size=128), facts) == [
        (
            "group_size",
            "128 does not divide the 576 inputs of `model.layers.0.mlp.q_proj` and of 1 more, and vLLM needs "
            "that; set `group_size: 64`",
        )
    ]
    quantized = Facts("the model", {"quantization_config": {}}, {}, adapters=1)
    given = {
        "bits": 8,
        "lm_head": True,
        "format": "gptq_v2",
        "mock_quantization": True,
        "dynamic": {"-:.*down_proj": {}, "+:.*up_proj": {"damp_percent": 0.1}},
    }
    asked = quantize.Config(model="base", calibration={"data": [source]}, gptq=given)
    assert quantize.check(asked) == [
        ("gptq.bits", "`bits` is a setting of the stage; write it beside `gptq`, not in it"),
        ("gptq.lm_head", "plain transformers cannot load a model with `lm_head`; remove it"),
        ("gptq.format", "transformers and vLLM load `gptq`, not `gptq_v2`; remove it"),
        ("gptq.mock_quantization", "this rounds without calibration; remove it"),
        (
            "gptq.dynamic",
            "plain transformers cannot load a model whose layers `-:.*down_proj` differ; remove it",
        ),
    ]
    assert quantize.check_model(asked, quantized) == [
        ("model", "an adapter cannot be quantized; put a `merge` stage above"),
        ("model", "the model is quantized already; start from the model before its quantization"),
    ]


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({"model_type": "gpt2"}, "`gpt2`: its layers are Conv1D"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "`qwen3_moe`: it has 4 experts, whose weights are one tensor"),
        (
            {"model_type": "x", "text_config": {"n_routed_experts": 8}},
            "`x`: it has 8 experts, whose weights are one tensor",
        ),
    ],
)
def test_an_architecture_that_transformers_cannot_load_quantized_is_refused_while_planning(known, why):
    settings = config("base", {"path": "rows.jsonl", "format": "text"})
    assert quantize.check_model(settings, Facts("the model", known)) == [
        ("model", f"transformers cannot load a quantized {why}; remove the stage")
    ]


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"group_size": 100}, {"shard_size": "4 GB"}])
def test_values_that_the_format_does_not_have(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        config("base", {"path": "rows.jsonl", "format": "text"}, **wrong)


def test_too_few_different_rows_are_known_before_the_stages_above_train(tmp_path):
    needed = "at least 16 are needed: 8 to calibrate with and 8 to measure perplexity on; add data"
    for count, why in [(15, f"the calibration data has 15 different rows, and {needed}"), (16, None)]:
        rows = write_rows(tmp_path / f"{count}.jsonl", count)
        again = {**rows, "max_samples": 4}  # rows that are there already
        asked = quantize.Config(model="m", calibration={"data": [rows, again], "samples": 32})
        if why is None:
            quantize.STAGE.rehearse(asked, Inputs(), tmp_path)
            continue
        with pytest.raises(StageError) as caught:
            quantize.STAGE.rehearse(asked, Inputs(), tmp_path)
        assert str(caught.value) == why
