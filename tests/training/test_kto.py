"""KTO end to end on a tiny model: the reference is the model that the stage started from, and that is proved."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from planned import TOP, sample

from stages import kto, merge, sft
from stages.data.source import Source
from stages.model.facts import Facts
from stages.model.folder import load_model
from stages.model.inputs import Inputs
from stages.runtime.errors import Interrupted, StageError
from stages.training.settings import inexact_resume

DATA = Path(__file__).parents[2] / "data"
ONE = {"max_steps": 1, "per_device_train_batch_size": 4, "beta": 0.1}
WAYS = pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["LoRA", "full"])
trains = pytest.mark.train


def written(path, rows):
    """Rows of (question, answer, label) as a data set."""
    lines = [{"prompt": question, "completion": answer, "label": label} for question, answer, label in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return Source(path=str(path), format="labelled")


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """Labelled answers made of this project's own pairs: all good ones first, as files that are sorted have them."""
    folder = tmp_path_factory.mktemp("answers")

    def source(good, bad):
        pairs = [json.loads(line) for line in (DATA / "med_prefer.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [(pair["prompt"], pair["chosen"], True) for pair in pairs[:good]]
        rows += [(pair["prompt"], pair["rejected"], False) for pair in pairs[:bad]]
        return written(folder / f"{good}-{bad}.jsonl", rows)

    return source


@pytest.fixture(scope="module")
def tuned(tiny, train, rows):
    """A base and an SFT adapter that changed it."""
    base = tiny("llama")
    return [base, train(sft, [base], rows("alpaca", 4), trainer={"max_steps": 6}).out]


def summed(model, batch, prefix=""):
    """The log-probability of each answer of a batch in nats, by hand; `prefix` "KL_" for the answers of other rows."""
    import torch

    ids, mask, answered = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    told = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (told * answered[:, 1:]).sum(1)


# The reference, and its proof


@trains
@WAYS
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_the_first_loss_is_the_one_of_its_closed_form(tiny, train, answers, architecture, loss_type, lora):
    # Four good and four bad answers in one batch: (4 · 2 + 4 · 0.5) / 8 / 2.
    asked = {**ONE, "per_device_train_batch_size": 8, "loss_type": loss_type}
    asked |= {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    done = train(kto, [tiny(architecture)], answers(4, 4), lora=lora, trainer=asked)
    assert done.metrics["reward_at_start"] == 0
    assert done.metrics["loss_at_start"] == pytest.approx(0.625, abs=1e-6)
    assert done.metrics["loss_first"] == pytest.approx(0.625, abs=1e-6)
    assert (done.metrics["good"], done.metrics["bad"]) == (4, 4)


@trains
@WAYS
def test_the_reference_is_the_sft_model_and_stays_it(tuned, train, answers, lora):
    import torch

    trainer = train(kto, tuned, answers(4, 4), lora=lora, trainer={**ONE, "max_steps": 3}).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    reference, others = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    start, base = (load_model(list(map(str, chain))) for chain in (tuned, tuned[:1]))
    assert (reference - summed(start, batch)).abs().max() < 1e-3
    assert (others - summed(start, batch, "KL_")).abs().max() < 1e-3
    assert (reference - summed(base, batch)).abs().max() > 0.1
    with torch.no_grad():
        assert (reference - summed(trainer.model.eval(), batch)).abs().max() > 0.1


@trains
@WAYS
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_loss_is_that_of_the_papers(tuned, train, answers, loss_type, lora):
    import torch

    asked = {"max_steps": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "loss_type": loss_type}
    asked |= {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = train(kto, tuned, answers(3, 5), lora=lora, trainer=asked).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    model, start = trainer.model.eval(), load_model(list(map(str, tuned)))
    rewards = 0.2 * (summed(model, batch) - summed(start, batch))
    z = 0.0
    if loss_type == "kto":
        z = 0.2 * float((summed(model, batch, "KL_") - summed(start, batch, "KL_")).mean().clamp(min=0))
        assert z > 0
    good = batch["label"]
    losses = torch.where(good, 1.5 * (1 - torch.sigmoid(rewards - z)), 0.7 * (1 - torch.sigmoid(z - rewards)))
    with torch.no_grad():
        assert float(trainer.compute_loss(model, batch)) == pytest.approx(float(losses.mean()), abs=1e-5)
    assert trainer._metrics["eval"]["rewards/chosen"][-1] == pytest.approx(float(rewards[good].mean()), abs=1e-4)
    assert trainer._metrics["eval"]["rewards/rejected"][-1] == pytest.approx(float(rewards[~good].mean()), abs=1e-4)


WRONG = re.compile(
    r"at step 0 the largest reward is [\d.e-]+ and the loss [\d.]+, not 0 and 0\.500000: "
    r"the reference is not the model this stage started from"
)


@trains
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_reference_that_is_the_base_is_caught(tuned, train, answers, tmp_path, monkeypatch, loss_type):
    monkeypatch.setattr(kto, "frozen_copy", lambda config, inputs, args: load_model([str(tuned[0])]))
    with pytest.raises(StageError) as caught:
        train(kto, tuned, answers(4, 4), lora=None, out=tmp_path, trainer={**ONE, "loss_type": loss_type})
    assert WRONG.fullmatch(str(caught.value))
    assert list(tmp_path.rglob("*.safetensors")) == []


@trains
def test_an_adapter_that_is_no_zero_at_the_start_is_caught(tuned, train, answers, tmp_path):
    lora = {"r": 4, "init_lora_weights": False}
    with pytest.raises(StageError) as caught:
        train(kto, tuned, answers(4, 4), lora=lora, out=tmp_path, trainer=ONE)
    assert WRONG.fullmatch(str(caught.value))
    assert list(tmp_path.rglob("*.safetensors")) == []


@trains
def test_dropout_and_noise_do_not_hide_a_wrong_reference_nor_accuse_a_right_one(tuned, train, answers, monkeypatch):
    noisy = {**ONE, "disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.3}}
    done = train(kto, tuned, answers(4, 4), lora=None, trainer={**noisy, "neftune_noise_alpha": 5})
    assert done.metrics["reward_at_start"] == 0
    assert done.metrics["loss_first"] != pytest.approx(0.5, abs=1e-4)
    assert train(kto, tuned, answers(4, 4), lora={"r": 4, "lora_dropout": 0.3}, trainer=noisy).metrics[
        "loss_at_start"
    ] == pytest.approx(0.5)
    monkeypatch.setattr(kto, "frozen_copy", lambda config, inputs, args: load_model([str(tuned[0])]))
    with pytest.raises(StageError, match=WRONG):
        train(kto, tuned, answers(4, 4), lora=None, trainer=noisy)


def arguments(**more):
    plain = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "precompute_ref_log_probs": False}
    return SimpleNamespace(**{**plain, **more})


@pytest.mark.parametrize(
    ("loss", "recorded", "mixed", "shown"),
    [
        (0.5, {"rewards/chosen": 2e-5, "kl": 0.0}, False, "is 2e-05 and the loss 0.500000, not 0 and 0.500000: "),
        (0.5, {"rewards/rejected": -2e-5, "kl": 0.0}, False, "is 2e-05 and the loss 0.500000, not 0 and 0.500000: "),
        (0.5, {"rewards/chosen": 0.0, "kl": 2e-4}, False, "is 2e-05 and the loss 0.500000, not 0 and 0.500000: "),
        (0.51, {"rewards/chosen": 0.0, "kl": 0.0}, False, "is 0 and the loss 0.510000, not 0 and 0.500000: "),
        (0.9, {"rewards/chosen": 1.0, "kl": 0.0}, True, "is 1 and the loss 0.900000, not 0: "),
        (math.nan, {"rewards/chosen": math.nan, "kl": 0.0}, True, "is nan and the loss nan, not 0: "),
    ],
)
def test_what_the_proof_says(loss, recorded, mixed, shown):
    with pytest.raises(StageError) as caught:
        kto.proof(arguments(), loss, recorded, [True, False], mixed=mixed)
    end = "the reference is not the model this stage started from"
    assert str(caught.value) == f"at step 0 the largest reward {shown}{end}"


def test_another_loss_beside_it_leaves_the_rewards_to_prove():
    found = kto.proof(arguments(), 0.9, {"rewards/chosen": 0.0, "kl": 0.0}, [True], mixed=True)
    assert found == {"reward_at_start": 0.0, "loss_at_start": 0.9}


# Pairs for the KL term


def test_each_row_meets_the_answer_of_the_row_before_it_and_never_its_own():
    spare = [[1], [9]]
    assert kto.partners([[1], [2], [3]], spare) == [[3], [1], [2]]
    assert kto.partners([[2]], spare) == [[1]]
    assert kto.partners([[1]], spare) == [[9]]
    assert kto.partners([[5], [5], [6]], spare) == [[6], [1], [5]]  # a row that is drawn twice
    assert kto.partners([[1], [1]], [[1], [1]]) == [[1], [1]]  # there is no other answer


@trains
def test_a_batch_is_paired_from_its_own_rows_and_in_another_order_each_epoch(tiny, train, answers):
    asked = {"max_steps": 6, "per_device_train_batch_size": 2}
    trainer = train(kto, [tiny("llama")], answers(3, 2), trainer=asked).trainer
    own = {tuple(row["completion_ids"]) for row in trainer.train_dataset}
    orders, loader = [], trainer.get_train_dataloader()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert sorted(len(batch["label"]) for batch in batches) == [1, 2, 2]
        for batch in batches:
            said, others = completions(batch), completions(batch, "KL_")
            assert set(said) | set(others) <= own
            assert all(one != other for one, other in zip(said, others, strict=True))
            assert sorted(others) == sorted(said) or len(said) == 1
        orders.append([answer for batch in batches for answer in completions(batch)])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(own)


def completions(batch, prefix=""):
    """The token ids of each answer of a batch."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"].bool()
    return [tuple(row[answered].tolist()) for row, answered in zip(ids, mask, strict=True)]


@trains
def test_the_order_of_the_file_can_be_kept(tiny, train, answers):
    asked = {**ONE, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 5}
    trainer = train(kto, [tiny("llama")], answers(3, 2), trainer=asked).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["label"].tolist() == [True, True, True, False, False]


@trains
@WAYS
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_reference_that_was_computed_ahead_is_the_same(tuned, train, answers, loss_type, lora):
    asked = {"max_steps": 4, "per_device_train_batch_size": 2, "precompute_ref_log_probs": True}
    done = train(kto, tuned, answers(3, 2), lora=lora, eval_size=2, trainer={**asked, "loss_type": loss_type})
    assert done.metrics["reward_at_start"] == pytest.approx(0, abs=1e-4)
    assert done.metrics["loss_at_start"] == pytest.approx(0.5, abs=1e-4)
    assert done.trainer.ref_model is None
    start = load_model(list(map(str, tuned)))
    for batch in done.trainer.get_train_dataloader():  # in another order than when it was computed
        assert (batch["ref_logps"] - summed(start, batch)).abs().max() < 1e-3
        if loss_type == "kto":
            assert (batch["ref_KL_logps"] - summed(start, batch, "KL_")).abs().max() < 1e-3


# Rows


@trains
@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (
            3,
            0,
            "all 3 rows have `label: true`, and KTO learns from both; add rows with `label: false`, or train `sft` ",
        ),
        (0, 2, "all 2 rows have `label: false`, and KTO learns from both; add rows with `label: true`"),
    ],
)
def test_rows_of_one_label_are_refused(tiny, train, answers, tmp_path, good, bad, said):
    with pytest.raises(StageError) as caught:
        train(kto, [tiny("llama")], answers(good, bad), out=tmp_path, trainer=ONE)
    assert str(caught.value) == said + ("on them" if good else "")
    config = kto.Config(model="m", data=[answers(good, bad)])
    with pytest.raises(StageError, match=r"^all \d rows have `label: "):
        kto.STAGE.rehearse(config, Inputs(model=[str(tiny("llama"))]), tmp_path)


@trains
def test_held_out_rows_must_have_the_label_whose_figure_chooses(tiny, train, answers, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "load_best_model_at_end": True}
    asked = {**ONE, **best, "save_steps": 1, "metric_for_best_model": "eval_rewards/margins"}
    held = written(tmp_path / "held.jsonl", [("为什么会失眠？", "睡前别看手机。", True)])
    with pytest.raises(StageError) as caught:
        train(kto, [tiny("llama")], answers(2, 2), eval_data=[held], trainer=asked)
    assert str(caught.value) == (
        "`rewards/margins` needs held-out rows with `label: false`, and there are none; hold out more rows"
    )


@trains
def test_held_out_figures_count_every_answer_once(tuned, train, answers, tmp_path):
    """Five good and one bad answer in batches of two: none holds one of each, and TRL would log no margin."""
    said = ["多休息。", "多喝水。", "睡前别看手机。", "去看医生。", "少喝咖啡。", "不知道。"]
    held = written(tmp_path / "held.jsonl", [("为什么会失眠？", answer, answer != "不知道。") for answer in said])
    asked = {"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    held = held.model_copy(update={"max_dropped": 0.5})
    done = train(kto, tuned, answers(4, 4), eval_data=[held], trainer=asked)
    model, start = done.trainer.model.eval(), load_model(list(map(str, tuned)))
    rewards = {True: [], False: []}
    for batch in done.trainer.get_eval_dataloader():
        found = 0.1 * (summed(model, batch) - summed(start, batch))
        for reward, label in zip(found.tolist(), batch["label"].tolist(), strict=True):
            rewards[label].append(reward)
    assert (len(rewards[True]), len(rewards[False])) == (5, 1)
    logged = done.trainer.state.log_history[-1]
    good, bad = (sum(rewards[label]) / len(rewards[label]) for label in (True, False))
    assert logged["eval_rewards/chosen"] == pytest.approx(good, abs=1e-4)
    assert logged["eval_rewards/margins"] == pytest.approx(good - bad, abs=1e-4)
    assert done.metrics["eval_rewards/margins"] == logged["eval_rewards/margins"]
    assert done.metrics["eval_rewards/margins_before"] == 0
    assert not [name for entry in done.trainer.state.log_history for name in entry if "count/" in name]


def test_batches_weigh_as_many_answers_as_they_hold():
    figures = {"rewards/chosen": [1.0, 4.0], "logps/chosen": [-1.0, -4.0], "count/chosen": [3, 1], "kl": [0.1, 0.2]}
    kto.weigh(figures)
    assert figures == {"rewards/chosen": [1.75], "logps/chosen": [-1.75], "kl": [0.1, 0.2]}
    figures |= {"rewards/rejected": [2.0], "logps/rejected": [0.0], "count/rejected": [7], "rewards/margins": [5.0]}
    kto.weigh(figures)
    assert figures["rewards/margins"] == [-0.25]


@pytest.mark.parametrize(
    ("good", "bad", "trainer", "said"),
    [
        (4, 4, {}, None),
        (4, 3, {}, None),
        (12, 3, {}, "12 good and 3 bad answers; the paper recommends `undesirable_weight` from 3.00 to 4.00 here"),
        (12, 3, {"undesirable_weight": 3}, None),
        (12, 3, {"undesirable_weight": 4}, None),
        (2, 6, {}, "2 good and 6 bad answers; the paper recommends `desirable_weight` from 3.00 to 4.00 here"),
        (2, 6, {"desirable_weight": 2.9}, "2 good and 6 bad answers; the paper recommends `desirable_weight` from 3."),
        (2, 6, {"desirable_weight": 3.5}, None),
        (1, 1, {"desirable_weight": 2.0, "undesirable_weight": 2.0}, None),
    ],
)
def test_the_weights_that_the_paper_recommends(good, bad, trainer, said):
    found = kto.balance(settings(trainer=trainer), good, bad)
    assert found == said or (found or "").startswith(said or " ")


def settings(**more):
    return kto.Config(model="m", data=[Source(path="rows.jsonl", format="labelled")], **more)


@trains
def test_training_prefers_the_good_answers(tuned, train, answers):
    asked = {"max_steps": 6, "per_device_train_batch_size": 6, "beta": 0.1}
    done = train(kto, tuned, answers(6, 6), eval_size=4, trainer=asked)
    metrics, log = done.metrics, [entry for entry in done.trainer.state.log_history if "rewards/margins" in entry]
    assert metrics["loss_last"] < metrics["loss_first"] == pytest.approx(0.5, abs=1e-6)
    assert log[-1]["rewards/margins"] > 0
    assert (metrics["rows"], metrics["held_out"], metrics["steps"]) == (8, 4, 6)
    assert metrics["eval_loss_before"] == pytest.approx(0.5, abs=1e-6)
    few = f"(on only {metrics['held_out_tokens']} tokens)"
    assert kto.STAGE.headline(metrics) == f"held-out loss 0.500 → {metrics['eval_loss']:.3f} {few}"
    names = [figure.name for figure in kto.STAGE.figures(metrics)]
    assert names[:2] == ["training loss", "held-out loss"]


@trains
def test_the_best_model_by_the_held_out_margin(tuned, train, answers):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    asked = {"max_steps": 3, **best, "load_best_model_at_end": True, "metric_for_best_model": "rewards/margins"}
    done = train(kto, tuned, answers(6, 6), eval_size=6, early_stopping=2, trainer=asked)
    assert done.metrics["best_step"] in (1, 2, 3)


@trains
def test_the_merged_model_has_the_logits_that_were_trained(tuned, train, answers, tmp_path):
    import torch

    done = train(kto, tuned, answers(4, 4), trainer={"max_steps": 4})
    chain = list(map(str, [*tuned, done.out]))
    metrics = merge.run(merge.Config(model="$kto"), Inputs(model=chain), tmp_path)
    assert (metrics["adapters"], metrics["layer_difference"] < 1e-5) == (2, True)
    ids = torch.tensor([done.trainer.train_dataset[0]["prompt_ids"]])
    with torch.no_grad():
        trained, merged = (model.eval()(input_ids=ids).logits for model in (done.trainer.model, load_model([tmp_path])))
    assert (trained - merged).abs().max() < 1e-4
    assert (merged - load_model(list(map(str, tuned)))(input_ids=ids).logits).abs().max() > 0.05


# Going on


@pytest.fixture(scope="module")
def log_of():
    """What must be the same after a stop: weights, metrics, and all that was logged but times."""

    def result(done):
        weights = {path.name: path.read_bytes() for path in done.out.glob("*.safetensors")}
        assert weights
        log = [entry for entry in done.trainer.state.log_history if "train_runtime" not in entry]
        times = ("_runtime", "_per_second", "_time")
        return (
            weights,
            done.metrics,
            [{key: value for key, value in entry.items() if not key.endswith(times)} for entry in log],
        )

    return result


RUNS = {
    "LoRA, batches of one, figures summed": {"lora": {"r": 2, "lora_dropout": 0.2}, "logging_steps": 3},
    "the whole model, evaluated": {"lora": None, "eval_size": 2, "eval_strategy": "steps", "eval_steps": 1},
    "a reference that moves": {"lora": None, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "a reference computed ahead": {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
}


@trains
@pytest.mark.parametrize("name", RUNS)
def test_a_stop_leaves_no_trace(tiny, train, answers, tmp_path, at, stop, log_of, name):
    given = dict(RUNS[name])
    own = {key: given.pop(key) for key in ("lora", "eval_size") if key in given}
    asked = {"max_steps": 5, "disable_dropout": False, **given}
    assert inexact_resume(settings(trainer=asked, **own)) is None

    def go(out, callback=None):
        (tmp_path / out).mkdir(exist_ok=True)
        model, rows = [tiny("llama")], answers(4, 3)
        return train(kto, model, rows, out=tmp_path / out, callback=callback, trainer=asked, **own)

    whole = log_of(go("whole"))
    for steps in ([2, 3], *sample(([1], [4]), list(RUNS).index(name))):
        out = f"stopped-{steps}"
        for step in steps:
            with pytest.raises(Interrupted, match=rf"^stopped at step {step} of 5$"):
                go(out, at(step, "on_step_end", stop))
        assert log_of(go(out)) == whole, steps


# What is known before the first stage starts


LABELLED = TOP + "  votes: {path: votes.jsonl, format: labelled}\nstages:\n  init: {architecture: bloom, data: books}\n"
VOTES = '{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}\n'


@pytest.fixture
def votes(project):
    project.write("votes.jsonl", VOTES)
    return project


KL = "the KL term of this loss is estimated from the answers of other rows of a batch, and a batch of 1 has none; "


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("kto: {data: votes, trainer: {per_device_train_batch_size: 1}}", [f"9:61: stage `kto`: {KL}write 2 or more"]),
        ("kto: {data: votes, trainer: {per_device_eval_batch_size: 1}}", [f"9:60: stage `kto`: {KL}write 2 or more"]),
        (
            "kto: {data: votes, trainer: {train_sampling_strategy: group_by_length}}",
            [
                "9:57: stage `kto`: `group_by_length` goes by the length of a row, which TRL does not know of labelled "
                "answers; leave it out, or write `sequential` to keep the order of the file"
            ],
        ),
        (
            "kto: {data: votes, trainer: {train_sampling_strategy: batch_rebalance}}",
            [
                "9:57: stage `kto`: `train_sampling_strategy` has no choice `batch_rebalance` of KTOConfig; there is "
                "`group_by_length`, `random`, `sequential`"
            ],
        ),
        (
            "kto: {data: votes, trainer: {desirable_weight: 0, beta: -1}}",
            [
                "9:50: stage `kto`: `desirable_weight` is 0; it must be above 0",
                "9:59: stage `kto`: `beta` is -1; it must be above 0",
            ],
        ),
        (
            "kto: {data: votes, lora: {r: 4}, trainer: {sync_ref_model: true, neftune_noise_alpha: 5}}",
            [
                "9:62: stage `kto`: with `lora` the reference is the base itself and cannot move; remove it, or `lora`",
                "9:89: stage `kto`: with `lora` the noise would be in the reference too, which is the same model; "
                "remove it",
            ],
        ),
        (
            "kto: {data: votes, trainer: {sync_ref_model: true, precompute_ref_log_probs: true}}",
            ["9:48: stage `kto`: the reference moves, so it cannot be computed ahead; remove one of the two"],
        ),
        (
            "kto: {data: votes, lora: {target_modules: '.*(lm_head|dense)'}}",
            [
                "9:45: stage `kto`: TRL reads the weight of `lm_head` itself, so an adapter on it would not be "
                "trained; leave it out"
            ],
        ),
        (
            "kto: {data: prefer}",
            ["9:15: stage `kto`: `prefer.jsonl` has format `preference`; this stage reads `labelled`"],
        ),
        (
            "kto: {data: votes, eval_size: 1, trainer: {eval_strategy: steps, load_best_model_at_end: true, "
            "metric_for_best_model: rewards/accuracies}}",
            [
                "9:121: stage `kto`: `rewards/accuracies` is not measured here; did you mean `rewards/margins`?",
            ],
        ),
        (
            "kto: {data: votes, trainer: {loss_type: bco, kto_chosen_weight: 2.0}}",
            [
                "9:43: stage `kto`: `loss_type` has no choice `bco` of KTOConfig; there is `apo_zero_unpaired`, `kto`",
                "9:48: stage `kto`: `kto_chosen_weight` is not a setting of KTOConfig; it is now `desirable_weight`",
            ],
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_runs(votes, stage, said):
    code, shown = votes.validate(LABELLED + f"  {stage}\n")
    assert code == 2
    several = [f"{len(said)} problems; nothing was run"] if len(said) > 1 else []
    assert shown.splitlines() == [*(f"x.yaml:{text}" for text in said), *several]


@pytest.mark.parametrize(
    "stage",
    [
        "kto: {data: votes}",
        "kto: {data: votes, trainer: {loss_type: apo_zero_unpaired, per_device_train_batch_size: 1}}",
        "kto: {data: votes, trainer: {train_sampling_strategy: sequential, neftune_noise_alpha: 5}}",
        "kto: {data: votes, trainer: {sync_ref_model: true}}",
        "kto: {data: votes, lora: {target_modules: '.*', exclude_modules: [lm_head, word_embeddings]}}",
        "kto: {data: votes, lora: {}, trainer: {precompute_ref_log_probs: true}}",
    ],
)
def test_what_works_is_let_through(votes, stage):
    code, shown = votes.validate(LABELLED + f"  {stage}\n")
    assert code == 0, shown


def test_a_second_model_is_counted_for_the_whole_model_alone():
    weights = {"model.layers.0.mlp.up_proj.weight": (100, 100)}
    facts = Facts("m", {}, weights, stored=40_000)
    whole, ahead, lora = (
        kto.needs(settings(**more), facts).memory
        for more in ({}, {"trainer": {"precompute_ref_log_probs": True}}, {"lora": {"r": 1}})
    )
    assert whole == ahead + 40_000
    assert lora < ahead


@pytest.mark.train
def test_an_interface_that_trl_no_longer_has_is_named(monkeypatch):
    from trl import KTOTrainer

    monkeypatch.delattr(KTOTrainer, "_prepare_dataset")
    with pytest.raises(StageError) as caught:
        kto._trainer_class()
    assert str(caught.value) == (
        "trl 1.16.0 has no `KTOTrainer._prepare_dataset`, which this stage needs; trl 1.16.0 is known to work: "
        "`pip install trl==1.16.0`"
    )
