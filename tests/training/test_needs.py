"""What a stage is said to need at least, against what it then takes: never more, and not much less."""

import json
import math
from dataclasses import replace

import pytest
from planned import inputs

from stages import dpo, init, merge, pt, sft
from stages.chat.template import template_text
from stages.model import device
from stages.model.facts import NO_MODEL, Facts, Needs, read_facts
from stages.model.folder import load_model
from stages.model.inputs import Inputs
from stages.training import needs as needs_module

pytestmark = pytest.mark.train

RULE = r".*\.(q_proj|down_proj)"
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "max_length": 600, "per_device_train_batch_size": 1}
RUNS = {
    "full": (pt, {"lora": None}),
    "two steps": (pt, {"lora": None, "max_steps": 2}),
    "one kept": (pt, {"lora": None, "save_total_limit": 1}),
    "nothing saved": (pt, {"lora": None, "save_strategy": "no", "max_steps": 1}),
    "by epoch": (pt, {"lora": None, "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
    "a share": (pt, {"lora": None, "save_steps": 0.5}),
    "another optimizer": (pt, {"lora": None, "optim": "adafactor"}),
    "16 bits": (pt, {"lora": None, "model_init_kwargs": {"dtype": "bfloat16"}}),
    "LoRA": (sft, {"lora": {"r": 64}}),
    "LoRA on some": (sft, {"lora": {"r": 128, "target_modules": RULE}}),
    "DPO": (dpo, {"lora": None}),
    "DPO with LoRA": (dpo, {"lora": {"r": 64}}),
    "DPO computed ahead": (dpo, {"lora": None, "precompute_ref_log_probs": True}),
}


@pytest.fixture(scope="module")
def middle(tmp_path_factory, rows):
    """A model that outweighs its tokenizer, and what is known of it before it is made."""
    folder = tmp_path_factory.mktemp("middle")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
    settings = {"data": [rows("alpaca", 20)], "tie_word_embeddings": False, "template": template_text("med")}
    config = init.Config(architecture="llama", **settings, **sizes)
    init.run(config, Inputs(), folder)
    return folder, config


class Peak:
    """The most that lay in a folder when a checkpoint was written, and that a step had in memory."""

    def __init__(self, folder):
        self.folder, self.disk, self.memory = folder, 0, 0

    def callback(self):
        from transformers import TrainerCallback

        peak = self

        class Callback(TrainerCallback):
            def on_save(self, args, state, control, **others):
                peak.look()

            def on_optimizer_step(self, args, state, control, **others):
                weights = list(others["model"].parameters())
                gradients = [weight.grad for weight in weights if weight.grad is not None]
                states = [value for held in others["optimizer"].state.values() for value in held.values()]
                peak.memory = max(peak.memory, size(weights) + size(gradients) + size(states))

        return Callback()

    def look(self):
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        self.disk = max(self.disk, sum(path.stat().st_size for path in files))


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if hasattr(tensor, "numel"))


def close(least, found):
    return 0.6 * found <= least <= found


@pytest.mark.parametrize("name", RUNS)
def test_training_takes_what_was_said_and_little_more(middle, train, rows, tmp_path, monkeypatch, name):
    monkeypatch.setattr("shutil.which", lambda name: None)  # whatever this machine has
    stage, settings = RUNS[name]
    kinds = {pt: "text", sft: "alpaca", dpo: "preference"}
    trainer = {**SAVED, **{key: value for key, value in settings.items() if key != "lora"}}
    source = rows(kinds[stage], 1)
    peak = Peak(tmp_path)
    asked = {"lora": settings["lora"], "trainer": trainer}
    done = train(stage, [middle[0]], source, out=tmp_path, callback=peak.callback(), **asked)
    peak.look()
    reference = getattr(done.trainer, "ref_model", None)
    memory = peak.memory + (size(reference.parameters()) if reference is not None else 0)
    config = stage.Config(model="base", data=[source], **asked)
    needs = stage.STAGE.needs(config, read_facts(middle[0]))
    assert close(needs.disk, peak.disk), f"{needs.disk:,} of {peak.disk:,} bytes on disk"
    assert close(needs.memory, memory), f"{needs.memory:,} of {memory:,} bytes in memory"
    if settings["lora"] is None:
        stored = read_facts(tmp_path).stored
        assert stage.STAGE.facts(config, read_facts(middle[0])).stored == stored
    else:
        before = read_facts(middle[0])
        assert stage.STAGE.facts(config, before) == replace(before, adapters=1)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"r": 4},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": RULE},
        {"target_modules": RULE, "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens", "self_attn"]},
    ],
    ids=lambda lora: json.dumps(lora),
)
def test_the_weights_that_lora_trains_are_counted_as_peft_makes_them(middle, lora):
    from peft import LoraConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora}
    model = get_peft_model(load_model([str(middle[0])]), LoraConfig(**settings))
    made, _ = model.get_nb_trainable_parameters()
    assert needs_module._adapter_parameters(lora, read_facts(middle[0])) == made


def test_a_lora_base_is_counted_in_16_bits_where_it_will_be(middle, rows, monkeypatch):
    facts = read_facts(middle[0])

    def memory(gpu, **trainer):
        monkeypatch.setattr(device, "gpus", lambda: gpu)
        config = sft.Config(model="m", data=[rows("alpaca", 1)], lora={"r": 1}, trainer=trainer)
        return sft.STAGE.needs(config, facts).memory

    assert memory(0) - memory(1) == 2 * facts.parameters
    assert memory(0, model_init_kwargs={"dtype": "bfloat16"}) == memory(1)
    assert memory(1, model_init_kwargs={"dtype": "float32"}) == memory(0)
    assert memory(0, model_init_kwargs={"dtype": "auto"}) == memory(0)  # it is stored in float32


def test_init_takes_what_was_said(middle):
    folder, config = middle
    written = (folder / "model.safetensors").stat().st_size
    assert close(init.needs(config, NO_MODEL).disk, written)
    stored = init.facts(config, NO_MODEL).stored
    assert init.needs(config, NO_MODEL) == Needs(stored, stored)
    known, found = init.facts(config, NO_MODEL).weights, read_facts(folder).weights
    assert {name: found[name] for name in known} == dict(known)
    assert {len(shape) for name, shape in found.items() if name not in known} == {1}


@pytest.mark.parametrize("shard_size", ["4GB", "0.5MB"])
def test_merge_takes_what_was_said(middle, adapt, tmp_path, shard_size):
    config = merge.Config(model="chain", shard_size=shard_size, verify=False)
    needs = merge.needs(config, read_facts(middle[0]))
    metrics = merge.run(config, inputs(config, middle[0], adapt([middle[0]])), tmp_path)
    assert needs.disk == read_facts(tmp_path).stored
    assert close(needs.disk, sum(path.stat().st_size for path in tmp_path.iterdir()))
    largest = max(math.prod(shape) for shape in read_facts(middle[0]).weights.values())
    assert needs.memory == 4 * largest  # one weight, in float32, whatever the size of the files
    assert metrics["shards"] == (1 if shard_size == "4GB" else 4)
    verified = config.model_copy(update={"verify": True})
    assert merge.needs(verified, read_facts(middle[0])) == replace(needs, memory=2 * needs.memory)


def test_nothing_is_said_of_a_model_that_is_not_here_yet(rows):
    unknown = Facts("`org/name`", {}, known=False)
    for stage in (pt, sft, dpo):
        config = stage.Config(model="org/name", data=[rows("alpaca", 1)], lora={"r": 4})
        assert stage.STAGE.needs(config, unknown) == Needs(0, 0)
    assert merge.needs(merge.Config(model="org/name"), unknown) == Needs(0, 0)
