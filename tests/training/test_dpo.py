"""DPO end to end on a tiny model: the reference is the model that the stage started from, and that is proved."""

import inspect
import math
import re
from types import SimpleNamespace

import pytest

from pipeline.config import settings
from stages import dpo, sft
from stages.data.source import Source
from stages.model.folder import load_model
from stages.runtime.errors import Interrupted, StageError

pytestmark = pytest.mark.train

ONE = {"max_steps": 1, "per_device_train_batch_size": 4, "beta": 0.1}
WAYS = pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["LoRA", "full"])
LOSSES = settings._hidden("DPOConfig", "loss_type")
NEEDED = {"exo_pair": {"label_smoothing": 1e-3}}  # it takes the logarithm


@pytest.fixture(scope="module")
def tuned(tiny, train, rows):
    """A base and an SFT adapter that changed it."""
    base = tiny("llama")
    return [base, train(sft, [base], rows("alpaca", 4), trainer={"max_steps": 6}).out]


def summed(model, batch):
    """The log-probability of each answer of a batch, by hand."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    told = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (told * batch["completion_mask"][:, 1:]).sum(1)


# The loss where policy and reference agree: -log σ(0), 1 - 0 and (0 - 1/(2 β))².


@WAYS
@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_first_loss_is_the_one_of_its_closed_form(tuned, train, rows, loss_type, loss, lora):
    metrics = train(dpo, tuned, rows("preference", 4), lora=lora, trainer={**ONE, "loss_type": loss_type}).metrics
    assert metrics["margin_at_start"] == 0
    assert metrics["loss_at_start"] == pytest.approx(loss, abs=1e-4)
    assert metrics["loss_first"] == pytest.approx(loss, abs=1e-4)


@WAYS
def test_the_reference_is_the_sft_model_and_stays_it(tuned, train, rows, lora):
    import torch

    trainer = train(dpo, tuned, rows("preference", 4), lora=lora, trainer={**ONE, "max_steps": 3}).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
    start, base = (summed(load_model(list(map(str, chain))), batch) for chain in (tuned, tuned[:1]))
    assert (reference - start).abs().max() < 1e-3
    assert (reference - base).abs().max() > 0.1
    assert (reference - summed(trainer.model.eval(), batch)).abs().max() > 0.1


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
def test_other_ways_to_start_an_adapter_leave_the_reference_as_it_is(tuned, train, rows, start):
    metrics = train(dpo, tuned, rows("preference", 4), lora={"r": 4, "init_lora_weights": start}, trainer=ONE).metrics
    assert metrics["margin_at_start"] < 1e-5


WRONG = re.compile(
    r"at step 0 the reward margin is [\d.e-]+ and the loss [\d.]+, not 0 and 0\.693147: "
    r"the reference is not the model this stage started from"
)


def test_a_reference_that_is_the_base_is_caught(tuned, train, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "frozen_copy", lambda config, inputs, args: load_model([str(tuned[0])]))
    with pytest.raises(StageError) as caught:
        train(dpo, tuned, rows("preference", 4), lora=None, out=tmp_path, trainer=ONE)
    assert WRONG.fullmatch(str(caught.value))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_an_adapter_that_is_no_zero_at_the_start_is_caught(tuned, train, rows, tmp_path):
    lora = {"r": 4, "init_lora_weights": False}
    with pytest.raises(StageError) as caught:
        train(dpo, tuned, rows("preference", 4), lora=lora, out=tmp_path, trainer=ONE)
    assert WRONG.fullmatch(str(caught.value))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_wrong_reference_is_caught_where_the_loss_has_no_closed_form(tuned, train, rows):
    lora = {"r": 4, "init_lora_weights": False}
    with pytest.raises(
        StageError, match=r"^at step 0 the reward margin is [\d.e-]+ and the loss [\d.]+, not 0: the re"
    ):
        train(dpo, tuned, rows("preference", 4), lora=lora, trainer={**ONE, "loss_type": "apo_zero"})


def test_dropout_and_noise_do_not_hide_a_wrong_reference_nor_accuse_a_right_one(tuned, train, rows, monkeypatch):
    noisy = {**ONE, "disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.3}}
    done = train(dpo, tuned, rows("preference", 4), lora=None, trainer={**noisy, "neftune_noise_alpha": 5})
    assert (done.metrics["margin_at_start"], done.metrics["loss_at_start"]) == (0, pytest.approx(math.log(2)))
    assert done.metrics["loss_first"] != pytest.approx(math.log(2), abs=1e-4)
    monkeypatch.setattr(dpo, "frozen_copy", lambda config, inputs, args: load_model([str(tuned[0])]))
    with pytest.raises(StageError, match=WRONG):
        train(dpo, tuned, rows("preference", 4), lora=None, trainer=noisy)


def test_another_loss_beside_it_leaves_the_margin_to_prove():
    args = SimpleNamespace(
        beta=0.1, loss_type=["sigmoid"], label_smoothing=0, use_weighting=False, f_divergence_type="reverse_kl"
    )
    args.precompute_ref_log_probs = False
    assert dpo.proof(args, 0.695, {"rewards/margins": 0.0}, mixed=True) == {
        "margin_at_start": 0.0,
        "loss_at_start": 0.695,
    }
    with pytest.raises(StageError, match=r"^at step 0 the reward margin is 0\.001 and the loss 0\.695000, not 0: the"):
        dpo.proof(args, 0.695, {"rewards/margins": 1e-3}, mixed=True)
    with pytest.raises(StageError, match=r"^at step 0 the reward margin is 0 and the loss 0\.695000, not 0 and 0\.693"):
        dpo.proof(args, 0.695, {"rewards/margins": 0.0}, mixed=False)


@WAYS
def test_a_reference_that_was_computed_ahead_is_the_same(tuned, train, rows, lora):
    asked = {**ONE, "precompute_ref_log_probs": True}
    metrics = train(dpo, tuned, rows("preference", 4), lora=lora, trainer=asked).metrics
    assert metrics["margin_at_start"] == pytest.approx(0, abs=1e-4)
    assert metrics["loss_at_start"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_the_installed_trl_trains(tuned, train, rows, loss_type):
    asked = {**ONE, "loss_type": loss_type, **NEEDED.get(loss_type, {})}
    metrics = train(dpo, tuned, rows("preference", 4), trainer=asked).metrics
    assert math.isfinite(metrics["loss_first"])
    assert metrics["margin_at_start"] == 0


def test_the_losses_are_known():
    assert {"sigmoid", "hinge", "ipo", "exo_pair", "sft"} <= set(LOSSES)


def test_settings_that_trl_refuses_are_no_fault_of_ours(tuned, train, rows):
    with pytest.raises(StageError) as caught:
        train(dpo, tuned, rows("preference", 4), trainer={**ONE, "loss_type": "exo_pair"})
    assert str(caught.value) == (
        "TRL refuses these settings: Label smoothing must be greater than 0.0 when using 'exo_pair' loss. "
        "The EXO paper recommends a value of 1e-3."
    )


def test_losses_can_be_mixed(tuned, train, rows):
    asked = {**ONE, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    metrics = train(dpo, tuned, rows("preference", 4), trainer=asked).metrics
    assert metrics["margin_at_start"] == 0
    assert metrics["loss_first"] > math.log(2)


def test_training_prefers_the_chosen_answers(tuned, train, rows):
    asked = {"max_steps": 4, "per_device_train_batch_size": 6, "beta": 0.1}
    done = train(dpo, tuned, rows("preference", 8), eval_size=2, trainer=asked)
    metrics = done.metrics
    assert metrics["loss_last"] < 0.9 * metrics["loss_first"]
    assert (metrics["rows"], metrics["dropped"], metrics["steps"]) == (6, 0, 4)
    assert metrics["eval_rewards/margins_before"] == 0
    assert metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert (
        dpo.STAGE.headline(metrics)
        == f"held-out preference accuracy {metrics['eval_rewards/accuracies']:.0%} of {metrics['held_out']} pairs"
    )
    trained, held = (
        set(map(tuple, part["chosen_ids"])) for part in (done.trainer.train_dataset, done.trainer.eval_dataset)
    )
    assert (len(trained), len(held), trained & held) == (6, 2, set())


def test_held_out_figures_count_each_pair_and_each_token_once(tuned, train, rows):
    trainer = train(dpo, tuned, rows("preference", 8), eval_size=5, trainer={"max_steps": 3}).trainer
    found = []
    for batch in (5, 4, 2):  # a last batch with one pair, which must not count as much as the others together
        trainer.args.per_device_eval_batch_size = batch
        figures = trainer.evaluate()
        names = [name for name in figures if re.search("rewards|logps|logits|accuracy|entropy", name)]
        found.append({name: figures[name] for name in names})
    whole, *parts = found
    assert len(whole) == 10
    assert whole["eval_rewards/accuracies"] * 5 == pytest.approx(round(whole["eval_rewards/accuracies"] * 5))
    for part in parts:
        assert part == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_pairs_whose_prompt_fills_the_room_are_dropped_and_counted(tuned, train, tmp_path):
    rows = written(tmp_path / "pairs.jsonl", ["感冒了怎么办？", "感冒了怎么办？" * 30])
    rows = rows.model_copy(update={"max_dropped": 0.5})
    held = written(tmp_path / "held.jsonl", ["为什么会失眠？晚上睡不好", "夜里总是睡不着，失眠怎么办？" * 20])
    done = train(dpo, tuned, rows, eval_data=[held], trainer={**ONE, "max_length": 80})
    assert (done.metrics["rows"], done.metrics["dropped"]) == (2, 1)
    assert len(done.trainer.train_dataset) == 1
    assert len(done.trainer.eval_dataset) == 1


def test_no_room_for_any_answer(tuned, train, tmp_path):
    rows = written(tmp_path / "pairs.jsonl", ["感冒了怎么办？" * 30, "发烧了怎么办？" * 30])
    with pytest.raises(StageError) as caught:
        train(dpo, tuned, rows, trainer={**ONE, "max_length": 80})
    assert str(caught.value) == "all 2 rows lose their answer at `max_length` 80; raise it"


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tuned, train, rows, tmp_path, at, stop):
    asked = {"trainer": {"max_steps": 4, "beta": 0.1, "save_strategy": "steps", "save_steps": 2}}
    whole = train(dpo, tuned, rows("preference", 4), **asked)
    with pytest.raises(Interrupted, match=r"^stopped at step 3 of 4$"):
        train(dpo, tuned, rows("preference", 4), out=tmp_path, callback=at(3, "on_step_end", stop), **asked)
    again = train(dpo, tuned, rows("preference", 4), out=tmp_path, **asked)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (whole.out / name).read_bytes()
    assert again.metrics == whole.metrics


def written(path, prompts):
    pair = '{{"prompt": "{}", "chosen": "多休息，多喝水。", "rejected": "不知道。"}}\n'
    path.write_text("".join(map(pair.format, prompts)), encoding="utf-8")
    return Source(path=str(path), format="preference")


def test_smoothing_that_the_loss_does_not_read_is_refused():
    def problems(**trainer):
        return dpo.STAGE.check(dpo.Config.model_construct(trainer=trainer))

    text = (
        "`label_smoothing`: only the losses robust, exo_pair, aot, aot_unpaired read it; remove it, or write "
        "`loss_type: robust`"
    )
    read = {loss for loss in LOSSES if not problems(loss_type=loss, label_smoothing=0.1)}
    assert read == {"robust", "exo_pair", "aot", "aot_unpaired"}
    assert problems(label_smoothing=0.1) == [("trainer.label_smoothing", text)]
    assert problems(loss_type=["sigmoid", "aot"], label_smoothing=0.1) == problems(label_smoothing=0.0) == []


def test_the_losses_that_read_smoothing_are_those_of_trl():
    from trl import DPOTrainer

    branches = inspect.getsource(DPOTrainer._compute_loss).split('loss_type == "')[1:]
    assert {branch.partition('"')[0] for branch in branches if "self.label_smoothing" in branch} == {*dpo.SMOOTHED}
