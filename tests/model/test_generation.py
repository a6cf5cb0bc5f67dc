"""The engine answers as a model is served: alone and in a batch, from a chain, from four bits, with any template."""

import json
import shutil
from pathlib import Path

import pytest

from stages import merge
from stages.chat.template import template_text
from stages.data.source import rows_of
from stages.model.generation import Engine, load_engine
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

ASKED = [{"role": "user", "content": "感冒了要不要吃抗生素？"}]
SHORT = {"max_new_tokens": 12}
ALL = 10**6  # tokens in memory at once: every prompt in one batch


@pytest.fixture(scope="module")
def lively(tiny, tmp_path_factory):
    """The folder of a model whose answers differ from prompt to prompt: untrained ones repeat a single token."""
    import torch
    from safetensors.torch import load_file, save_file

    made = {}

    def model(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("lively") / architecture
            file = shutil.copytree(tiny(architecture, tied=False), folder) / "model.safetensors"
            torch.manual_seed(0)
            drawn = {name: torch.randn_like(w) / 4 if w.ndim == 2 else w for name, w in load_file(file).items()}
            save_file(drawn, file, {"format": "pt"})
            made[architecture] = folder
        return made[architecture]

    return model


def prompts_of(engine, rows, count=5):
    """Prompts of different lengths."""
    asked = [row["messages"][:1] for row in rows_of(rows("alpaca", count))]
    prompts = [engine.prompt(messages) for messages in asked]
    assert len(set(map(len, prompts))) > 1
    return prompts


# Alone and in a batch


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bloom"])
def test_answers_are_the_same_alone_and_in_a_batch(lively, rows, architecture):
    engine = load_engine([str(lively(architecture))])
    prompts = prompts_of(engine, rows)
    alone = [engine.generate([prompt], SHORT)[0] for prompt in prompts]
    for tokens in (1, 300, ALL):
        assert engine.generate(prompts, SHORT, tokens=tokens) == alone
    assert len(set(map(tuple, alone))) > 1
    assert engine.answer(rows_of(rows("alpaca", 1))[0]["messages"][:1], 12) == engine.text(alone[0])


def test_answers_near_the_last_position_are_the_same_alone_and_in_a_batch(lively, rows, monkeypatch):
    engine = load_engine([str(lively("llama"))])
    prompts = prompts_of(engine, rows)
    limit = max(map(len, prompts)) + 3
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", limit)
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    together = engine.generate(prompts, SHORT, tokens=ALL)
    assert [len(ids) for ids in together] == [min(12, limit - len(prompt)) for prompt in prompts]
    assert together == [engine.generate([prompt], SHORT)[0] for prompt in prompts]


@pytest.mark.parametrize("size", [0, 64, 65])
def test_a_prompt_without_room_for_an_answer_is_refused(lively, monkeypatch, size):
    engine = load_engine([str(lively("llama"))])
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", 64)
    with pytest.raises(StageError) as caught:
        engine.generate([[5] * 63, [5] * size], SHORT)
    assert str(caught.value) == f"a prompt of {size} tokens cannot be answered; this model takes 1 to 63 tokens"


def test_no_prompts_have_no_answers(lively):
    assert load_engine([str(lively("llama"))]).generate([], SHORT) == []


def test_progress_is_the_number_of_prompts_done(lively, rows):
    engine, done = load_engine([str(lively("llama"))]), []
    engine.generate(prompts_of(engine, rows, 3), {"max_new_tokens": 1}, tokens=1, report=done.append)
    assert done == [1, 2, 3]


def test_a_streamer_gets_the_text_of_an_answer_while_it_is_generated(lively):
    from transformers import TextIteratorStreamer

    engine = load_engine([str(lively("llama"))])
    streamer = TextIteratorStreamer(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (ids,) = engine.generate([engine.prompt(ASKED)], {**SHORT, "streamer": streamer})
    assert "".join(streamer).strip() == engine.text(ids) != ""


# Stop tokens


def test_an_answer_ends_with_the_first_stop_token(lively, rows, monkeypatch):
    engine = load_engine([str(lively("llama"))])
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    prompts = prompts_of(engine, rows)
    whole = engine.generate(prompts, SHORT, tokens=ALL)
    assert [engine.stopped(ids) for ids in whole] == [False] * 5
    stop = whole[0][5]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [stop, 599])
    ended = engine.generate(prompts, SHORT, tokens=ALL)
    assert ended == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]
    assert [engine.stopped(ids) for ids in ended] == [stop in ids for ids in whole]
    assert ended[0][-1] == stop
    (cut,) = engine.generate(prompts[:1], {"max_new_tokens": len(ended[0]) - 1})
    assert (cut, engine.stopped(cut)) == (ended[0][:-1], False)
    assert not engine.stopped([])


def test_the_text_of_an_answer_has_no_special_tokens_and_no_blanks_around_it(lively):
    engine = load_engine([str(lively("llama"))])
    ids = [*engine.tokenizer("  多喝水。 \n", add_special_tokens=False)["input_ids"], engine.tokenizer.eos_token_id]
    assert engine.stopped(ids)
    assert engine.text(ids) == "多喝水。"


# Folders


def test_a_chain_of_two_adapters_answers_as_the_merged_folder(lively, adapt, rows, tmp_path):
    import torch

    base = lively("llama")
    first = adapt([base], seed=1)
    second = adapt([base, first], seed=2)
    chain = [str(base), str(first), str(second)]
    merge.run(merge.Config(model="chain"), Inputs(model=chain), tmp_path)
    engines = [load_engine(folders) for folders in (chain, [str(tmp_path)], chain[:2], chain[:1])]
    prompts = prompts_of(engines[0], rows)
    whole, merged, part, alone = [engine.generate(prompts, SHORT, tokens=ALL) for engine in engines]
    assert whole == merged
    assert part != whole != alone
    weights = engines[1].model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in engines[0].model.state_dict().items())


@pytest.mark.parametrize("adapters", [0, 1])
def test_a_folder_with_missing_weights_names_them(lively, adapt, tmp_path, adapters):
    from safetensors.torch import load_file, save_file

    base = lively("llama")
    folder = shutil.copytree(base, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    lost = ["model.layers.1.input_layernorm.weight", "model.norm.weight"]
    save_file(
        {name: weight for name, weight in weights.items() if name not in lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    chain = [str(folder), *(str(adapt([base])) for _ in range(adapters))]
    assert load_engine(chain).missing == lost
    assert load_engine([str(base), *chain[1:]]).missing == []


def quantized(folder, out):
    """A folder rounded to 4 bits as GPTQ stores it (symmetric, groups of 32); before it the same weights unpacked."""
    import torch
    from safetensors.torch import load_file, save_file

    def packed(values):  # eight 4-bit numbers in an int32, the first one in the lowest bits
        shifts = torch.arange(8) * 4
        return (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.int32)

    plain, small = shutil.copytree(folder, out / "plain"), shutil.copytree(folder, out / "small")
    weights = load_file(folder / "model.safetensors")
    stored = {}
    for name, weight in list(weights.items()):
        if weight.ndim != 2 or "layers" not in name:
            stored[name] = weight
            continue
        module, groups = name.removesuffix(".weight"), weight.float().unflatten(1, (-1, 32))
        scales = (groups.abs().amax(-1) / 7).half().float()
        numbers = (groups / scales[..., None]).round().clamp(-8, 7) + 8
        weights[name] = ((numbers - 8) * scales[..., None]).flatten(1).to(weight.dtype)
        stored[f"{module}.qweight"] = packed(numbers.flatten(1)).T.contiguous()
        stored[f"{module}.qzeros"] = packed(torch.full_like(scales.T, 7))  # 8 - 1: the first format of GPTQ
        stored[f"{module}.scales"] = scales.T.half().contiguous()
        stored[f"{module}.g_idx"] = (torch.arange(weight.shape[1]) // 32).to(torch.int32)
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, small / "model.safetensors", {"format": "pt"})
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    (small / "config.json").write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")
    return plain, small


def answers_without_compiling(folder, rows):
    """What a process of its own finds: GPTQModel patches what it imports."""
    import torch
    from torch.utils import cpp_extension

    def compiles(*_, **__):
        raise AssertionError("a kernel is compiled")

    cpp_extension._jit_compile = torch.compile = compiles
    engine = load_engine([folder])
    kernels = {type(module).__name__ for module in engine.model.modules() if hasattr(module, "qweight")}
    logits = engine.model(input_ids=torch.tensor([engine.prompt(ASKED)])).logits[0].float().tolist()
    return kernels, list(engine.missing), logits, engine.generate([engine.prompt(ASKED)], SHORT)


def test_a_folder_of_4_bits_loads_on_a_cpu_without_compiling(lively, apart, tmp_path):
    import torch

    plain, small = quantized(lively("llama"), tmp_path)
    kernels, missing, logits, answers = apart(answers_without_compiling, str(small), ASKED)
    assert (kernels, missing) == ({"TorchLinear"}, [])
    engine = load_engine([str(plain)])
    with torch.no_grad():
        expected = engine.model(input_ids=torch.tensor([engine.prompt(ASKED)])).logits[0]
    assert (torch.tensor(logits) - expected).abs().max() < 0.02 * expected.abs().max()
    assert len(answers[0]) == 12


# Prompts


def test_a_prompt_is_what_the_template_of_the_folder_writes(tiny):
    folder = tiny("llama", template="med")
    engine = load_engine([str(folder)])
    expected = engine.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert engine.prompt(ASKED) == expected
    assert "### 问题:\n感冒了要不要吃抗生素？" in engine.tokenizer.decode(expected)


def test_a_template_that_is_given_replaces_the_one_of_the_folder(tiny):
    folder = tiny("llama", template="med")
    engine = load_engine([str(folder)], template_text("chatml"))
    expected = "<|im_start|>user\n感冒了要不要吃抗生素？<|im_end|>\n<|im_start|>assistant\n"
    assert engine.tokenizer.decode(engine.prompt(ASKED)) == expected
    stops = engine.tokenizer.convert_ids_to_tokens(engine.model.generation_config.eos_token_id)
    assert stops == ["<|im_end|>", "</s>"]
    assert template_text("med") == (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")


def test_without_a_chat_template_the_prompt_is_the_last_message(tiny):
    engine = load_engine([str(tiny("llama", template=None))])
    messages = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, *ASKED]
    assert engine.prompt(messages) == engine.tokenizer("感冒了要不要吃抗生素？")["input_ids"]
    assert engine.answer(messages, 12) == engine.text(engine.generate([engine.prompt(ASKED)], SHORT)[0])


def test_a_text_starts_as_the_tokenizer_starts_it(tiny):
    from tokenizers.processors import TemplateProcessing

    engine = load_engine([str(tiny("llama", template=None))])
    bos = engine.tokenizer.bos_token_id
    backend = engine.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert engine.prompt(ASKED) == engine.tokenizer("感冒了要不要吃抗生素？")["input_ids"]
    assert engine.prompt(ASKED)[0] == bos


def test_tools_that_the_template_does_not_write_are_refused(tiny):
    engine = load_engine([str(tiny("llama", template="med"))])
    tools = [{"type": "function", "function": {"name": "dose", "description": "d", "parameters": {}}}]
    with pytest.raises(StageError, match=r"^the template does not write the tools"):
        engine.prompt(ASKED, tools)


def test_an_engine_of_a_model_and_a_tokenizer_lacks_nothing():
    assert Engine("model", "tokenizer").missing == ()
