"""The estimate of memory against what a real training run takes, and against what can be counted by hand."""

import json
import shutil
from types import SimpleNamespace

import pytest

from stages import dpo, pt, sft
from stages.training import live_tensors, loop
from stages.training.division import Weights, divide
from stages.training.estimate import Batch, Memory, estimate
from stages.training.settings import TrainingConfig
from stages.training.sharing import Sharing

pytestmark = pytest.mark.train
SHAPE = {  # a LLaMA of which everything can be counted
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 160, "vocab_size": 1000},
    **{"tie_word_embeddings": False},
}
LAYER = 4 * 64 * 64 + 3 * 64 * 160  # weights of the linear modules of a layer
PARAMETERS = 3 * (LAYER + 2 * 64) + 64 + 2 * 1000 * 64
ADAPTERS = 3 * 2 * (4 * (64 + 64) + 3 * (64 + 160))  # of rank 2 on all of them
BATCH = Batch(rows=4, tokens=96)
LORA = {"r": 2}


@pytest.fixture(scope="module")
def measured(tiny, train, rows):
    """Run a stage: its live bytes at the peak by cause, and the estimate of them."""

    def run(folder, stage, architecture, *, data="alpaca", count=3, **settings):
        ledger, real = live_tensors.Ledger(), loop.train
        settings = {"lora": None, **settings}
        settings["trainer"] = {**settings.get("trainer", {}), "max_steps": 2, "per_device_train_batch_size": count}

        def watched(trainer, *arguments):
            trainer.add_callback(live_tensors.callback(ledger, trainer, ahead=False))
            with live_tensors.head_apart(ledger), live_tensors.follow(ledger):
                return real(trainer, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train", watched)
            trainer = train(stage, [tiny(architecture)], rows(data, count), **settings).trainer
        shutil.copy(tiny(architecture) / "config.json", folder)
        batch = shape(trainer.data_collator(list(trainer.train_dataset)))
        settings["trainer"] = {"activation_checkpointing": False, "max_length": 512, **settings["trainer"]}
        config = stage.Config(model="base", data=[rows(data, count)], **settings)
        found = estimate(stage.STAGE.settings["trainer"].split(":")[1], config, folder, batch, Sharing(), gpu=False)
        return SimpleNamespace(live=ledger.peak, memory=found.memory)

    return run


def shape(inputs):
    """The shape of a collated batch."""
    ids = inputs["input_ids"]
    if "completion_mask" in inputs:
        share = float(inputs["completion_mask"].float().mean())
        return Batch(rows=len(ids) // 2, tokens=ids.shape[1], labelled=share)
    share = float((inputs["labels"] != -100).float().mean())
    begins = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist() if "position_ids" in inputs else []
    ends = [*begins[1:], ids.shape[1]]
    documents = tuple(end - begin for begin, end in zip(begins, ends, strict=True)) if begins else ()
    return Batch(rows=len(ids), tokens=ids.shape[1], documents=documents, labelled=share)


def check(result):
    live, total = sum(result.live.values()), result.memory.total
    assert 0.97 * live <= total <= 1.08 * live, (result.live, result.memory)
    for cause in ("weights", "optimizer", "reference", "activations"):
        assert getattr(result.memory, cause) == pytest.approx(result.live[cause], rel=0.05), cause


def test_full_fine_tuning_of_packed_rows(measured, tmp_path):
    check(measured(tmp_path, pt, "llama", data="text"))


def test_an_adapter_under_checkpointing(measured, tmp_path):
    check(measured(tmp_path, sft, "qwen2", lora={"r": 4}, trainer={"activation_checkpointing": True}))


def test_an_adapter_on_a_quantized_base(measured, tmp_path):
    pytest.importorskip("bitsandbytes")
    check(measured(tmp_path, sft, "bloom", lora={"r": 4}, quantized_base="nf4"))


def test_the_measured_order_of_savings_is_the_estimated_order(measured, tmp_path):
    """Pairs on a whole model: nothing saved, the reference computed ahead, and checkpointing."""
    ways = {
        "nothing": {},
        "reference": {"precompute_ref_log_probs": True},
        "checkpointing": {"activation_checkpointing": True},
    }
    found = {
        name: measured(tmp_path, dpo, "bloom", data="preference", trainer=trainer) for name, trainer in ways.items()
    }
    for result in found.values():
        check(result)
    by_live = sorted(found, key=lambda name: sum(found[name].live.values()))
    assert by_live == sorted(found, key=lambda name: found[name].memory.total)
    assert by_live == ["checkpointing", "reference", "nothing"]


# Counted by hand


@pytest.fixture(scope="module")
def counted(tmp_path_factory, rows):
    """The estimate of a stage on `SHAPE`, made once."""
    folder, known = tmp_path_factory.mktemp("shape"), {}
    (folder / "config.json").write_text(json.dumps(SHAPE))

    def run(kind="SFTConfig", batch=BATCH, sharing=None, *, gpu=False, trainer=None, **settings):
        asked = repr((kind, batch, sharing, gpu, trainer, settings))
        if asked not in known:
            trainer = {"activation_checkpointing": False, **(trainer or {})}
            config = TrainingConfig(model="base", data=[rows("alpaca", 1)], trainer=trainer, **settings)
            known[asked] = estimate(kind, config, folder, batch, sharing or Sharing(), gpu=gpu)
        return known[asked]

    return run


def test_weights_gradients_and_moments(counted):
    full = counted(trainer={"gradient_accumulation_steps": 2})
    assert (full.parameters, full.trainable) == (PARAMETERS, PARAMETERS)
    assert full.memory.weights == pytest.approx(4 * PARAMETERS, rel=1e-3)  # and the table of rotary frequencies
    assert full.memory.gradients == 4 * PARAMETERS  # of the first of two batches, while the second is computed
    assert full.memory.optimizer == pytest.approx(8 * PARAMETERS, rel=1e-3)  # and the number of the step
    adapter = counted(lora=LORA, trainer={"gradient_accumulation_steps": 2})
    assert (adapter.parameters, adapter.trainable) == (PARAMETERS + ADAPTERS, ADAPTERS)
    assert adapter.memory.gradients == 4 * ADAPTERS
    assert adapter.memory.optimizer == pytest.approx(8 * ADAPTERS, rel=0.02)
    eight = counted(trainer={"optim": "adamw_8bit"})
    linear, table = 3 * LAYER + 64_000, 3 * 7 + 1  # the embedding and small weights stay in 32 bits
    expected = 2 * linear + 8 * linear / 256 + 2048 * table + 8 * (PARAMETERS - linear)
    assert eight.memory.optimizer == pytest.approx(expected, rel=1e-3)


def test_activations_grow_with_the_batch_and_logits_with_the_labelled_tokens(counted):
    one, double = counted(), counted(batch=Batch(rows=8, tokens=96))
    assert double.memory.activations == pytest.approx(2 * one.memory.activations, rel=0.01)
    half = counted(batch=Batch(rows=4, tokens=96, labelled=0.5))
    assert half.memory.logits == pytest.approx(one.memory.logits / 2, rel=0.03)
    assert half.memory.activations == pytest.approx(one.memory.activations, rel=0.01)
    assert one.memory.logits >= 2 * 4 * 4 * 95 * 1000  # the logits and their gradient in float32


def test_packed_documents_cost_their_own_length(counted):
    """Attention computes 4 · length² · hidden size forward in each layer, and 2.5 times that backward."""
    apart = counted(batch=Batch(rows=1, tokens=384, documents=(96,) * 4))
    one = counted(batch=Batch(rows=1, tokens=384, documents=(384,)))
    attention = 3 * 3.5 * 4 * 64 * (384**2 - 4 * 96**2)
    assert one.flops - apart.flops == pytest.approx(attention, rel=0.01)


def test_work_is_counted(counted):
    labelled = 4 * 95 - 3  # the first token of a row is not predicted, and three rows have one token of padding
    linear = 6 * (3 * LAYER * 4 * 96 + 64_000 * labelled)
    attention = 3 * 3.5 * 4 * 64 * 4 * 96**2
    assert counted().flops == pytest.approx(linear + attention, rel=0.01)
    again = counted(trainer={"activation_checkpointing": True}).flops - counted().flops
    needed = LAYER - 64 * 160  # what the last module of a layer gives is not computed again
    assert again == pytest.approx(2 * 3 * needed * 4 * 96 + attention / 3.5, rel=0.01)


def test_a_reference_is_a_second_model_for_full_fine_tuning_alone(counted):
    assert counted("KTOConfig").memory.reference == pytest.approx(4 * PARAMETERS, rel=1e-3)
    assert counted("DPOConfig", lora=LORA).memory.reference == 0
    assert counted("RewardConfig").memory.weights == pytest.approx(4 * (PARAMETERS - 64_000), rel=1e-2)


def test_a_gpu_computes_in_16_bits_and_keeps_no_square_of_the_length(counted):
    packed = Batch(rows=1, tokens=2048, documents=(2048,))
    adapter = counted(gpu=True, lora=LORA, batch=packed)
    assert adapter.memory.weights == pytest.approx(2 * PARAMETERS + 4 * ADAPTERS, rel=0.02)
    cpu = counted(gpu=False, lora=LORA, batch=packed)
    assert 0.4 * cpu.memory.activations < adapter.memory.activations < 0.7 * cpu.memory.activations
    assert adapter.flops == pytest.approx(cpu.flops, rel=0.02)
    away = counted(gpu=True, lora=LORA, batch=packed, trainer={"activation_offloading": True})
    assert away.memory.activations < 0.6 * adapter.memory.activations
    small = Batch(rows=1, tokens=8)
    foreach, fused = counted(gpu=True, trainer={"optim": "adamw_torch"}, batch=small), counted(gpu=True, batch=small)
    assert foreach.memory.total - fused.memory.total == pytest.approx(4 * PARAMETERS, rel=0.2)  # a temporary of each


# Several devices

WEIGHTS = Weights(trainable=600, frozen=400, held=4000, layer=100, apart=200, largest=150, width=4, size=4)


@pytest.mark.parametrize(
    ("strategy", "offload", "shares", "more", "step"),
    [
        ("ddp", None, {}, {"workspace": 2400}, 0),
        ("zero2", None, {"gradients": 0.25, "optimizer": 0.25}, {"optimizer": 600, "workspace": 664}, 600),
        ("zero2", "optimizer", {"gradients": 0, "optimizer": 0}, {"optimizer": 0, "workspace": 664}, 0),
        (
            "zero3",
            None,
            {"gradients": 0.25, "optimizer": 0.25, "weights": 0.25, "reference": 0.25},
            {"optimizer": 600, "workspace": 664 + 4000},
            600,
        ),
        (
            "zero3",
            "parameters",
            {"gradients": 0, "optimizer": 0, "weights": 0, "reference": 0.25},
            {"optimizer": 0, "workspace": 664 + 4000},
            0,
        ),
        (
            "fsdp2",
            None,
            {"weights": 0.25, "reference": 0.25, "gradients": 0.25, "optimizer": 0.25},
            {"workspace": 4 * (400 + 240)},
            0,
        ),
    ],
)
def test_four_devices(strategy, offload, shares, more, step):
    found = divide(WEIGHTS, Sharing(processes=4, strategy=strategy, offload=offload))
    assert (dict(found.shares), dict(found.more), found.step) == (shares, more, step)


def test_zero_3_divides_the_weights_of_a_real_model(counted):
    one, four = counted(), counted(sharing=Sharing(processes=4, strategy="zero3"))
    assert four.memory.weights == pytest.approx(one.memory.weights / 4, rel=1e-6)
    assert four.memory.optimizer == pytest.approx(one.memory.optimizer / 4 + PARAMETERS, rel=1e-3)
    assert four.memory.activations == one.memory.activations
    assert four.memory.workspace > 4 * PARAMETERS  # the gathered weights
    assert (four.parameters, four.flops) == (one.parameters, one.flops)


# The ledger itself


def test_the_ledger_counts_storages_once_and_while_they_live():
    import torch

    ledger = live_tensors.Ledger()
    with live_tensors.follow(ledger), torch.no_grad():
        first = torch.zeros(1000)  # 4,000 bytes
        view = first[:10]
        second = first + 1
        del first
        assert ledger.total == 8000  # the view holds the first
        del view
        assert ledger.total == 4000
        third = torch.ones(500, dtype=torch.float64)
        del second, third
    assert (ledger.total, sum(ledger.peak.values())) == (0, 8000)
    assert ledger.peak["workspace"] == 8000


def test_memory_is_the_sum_of_its_causes():
    causes = dict(zip(live_tensors.CAUSES, (1, 2, 4, 8, 16, 32, 64), strict=True))
    assert Memory(**causes).total == 127
