"""The head of the loss: TRL's numbers, computed where they are needed, and figures at the steps that are logged."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest

from stages import dpo, pt, sft
from stages.runtime.errors import StageError
from stages.training import loss_head

pytestmark = pytest.mark.train

SETTINGS = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.0, 5.0, 1.0),
    "scale": (1.0, None, 0.25),
}


@pytest.mark.parametrize("rows", [100, 7], ids=["at once", "in blocks"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_scores_and_gradients_are_those_of_trl(monkeypatch, rows, settings, biased):
    import torch
    from trl.kernels import ChunkedLogProbFunction

    monkeypatch.setattr(loss_head, "AT_ONCE", 30 * rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(30, 16)
    targets, bias = torch.randint(30, (50,)), torch.randn(30) if biased else None
    temperature, softcap, scale = settings
    wanted = loss_head.FIELDS
    results = []
    for ours in (True, False):
        inputs = [part if part is None else part.clone().requires_grad_() for part in (hidden, weight, bias)]
        if ours:
            fields = loss_head.scores(*inputs, targets, temperature, softcap, scale, wanted)
        else:
            fields = ChunkedLogProbFunction.apply(*inputs, targets, temperature, 32768, softcap, scale, wanted)
        (fields[0] * torch.linspace(0, 1, 50)).sum().backward()
        results.append([*fields, *(part.grad for part in inputs if part is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def logged(done):
    return [entry for entry in done.trainer.state.log_history if "loss" in entry]


def weights(done):
    return (done.out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_figures_are_of_the_logged_step_and_the_loss_of_all_steps(tiny, train, rows, accumulation):
    asked = {"max_steps": 4, "gradient_accumulation_steps": accumulation}
    every = train(sft, [tiny("llama")], rows("alpaca", 20), trainer={**asked, "logging_steps": 1})
    second = train(sft, [tiny("llama")], rows("alpaca", 20), trainer={**asked, "logging_steps": 2})
    assert weights(second) == weights(every)
    assert [entry["step"] for entry in logged(second)] == [2, 4]
    for entry, before, at in zip(logged(second), logged(every)[::2], logged(every)[1::2], strict=True):
        for figure in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert entry[figure] == at[figure]
        assert entry["loss"] == pytest.approx((before["loss"] + at["loss"]) / 2, abs=1e-6)
        assert before["entropy"] != at["entropy"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"logging_steps": 3}, [3]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [1, 2, 3, 4]),
    ],
)
def test_figures_are_computed_at_no_other_step(tiny, train, rows, monkeypatch, asked, expected):
    from transformers import TrainerCallback

    real, seen, steps = loss_head._figures, [], []

    def figures(logits, targets, wanted):
        if "entropy" in wanted:
            seen.append(steps[-1])
        return real(logits, targets, wanted)

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            steps.append(state.global_step + 1)

    monkeypatch.setattr(loss_head, "_figures", figures)
    source = rows("text", 8)
    done = train(pt, [tiny("llama")], source, callback=Steps(), trainer={"max_steps": 4, "packing": False, **asked})
    assert seen == expected
    if asked.get("logging_strategy") != "epoch":
        assert [entry["step"] for entry in logged(done)] == expected
    assert all({"entropy", "mean_token_accuracy"} <= entry.keys() for entry in logged(done))


def test_held_out_rows_are_measured_whole(tiny, train, rows):
    """The accuracy and the entropy of an evaluation are those of plain transformers on the held-out rows."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = {"max_steps": 1, "logging_steps": 10, "packing": False}
    done = train(pt, [tiny("qwen3")], rows("text", 12), eval_size=4, lora=None, trainer=asked)
    model = AutoModelForCausalLM.from_pretrained(done.out)
    correct, entropy, count = 0, 0.0, 0
    with torch.no_grad():
        for row in done.trainer.eval_dataset:
            ids = torch.tensor(row["input_ids"])
            log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            correct += int((log_probs.argmax(-1) == ids[1:]).sum())
            entropy -= float((log_probs.exp() * log_probs).sum())
            count += len(ids) - 1
    last = next(entry for entry in reversed(done.trainer.state.log_history) if "eval_entropy" in entry)
    # TRL takes the mean of the batches, here two of two rows
    assert last["eval_entropy"] == pytest.approx(entropy / count, rel=0.02)
    assert last["eval_mean_token_accuracy"] == pytest.approx(correct / count, abs=0.02)


def test_a_batch_without_a_labelled_token_trains_nothing(tiny, train, rows):
    import torch

    done = train(sft, [tiny("llama")], rows("alpaca", 4))
    batch = next(iter(done.trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = done.trainer.compute_loss(done.trainer.model.train(), batch)
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_trl_is_as_it_was_outside_of_a_loss(tiny, train, rows):
    from trl.trainer import utils

    before = utils._ChunkedLogProbFunction, utils._use_triton
    train(sft, [tiny("llama")], rows("alpaca", 4), trainer={"max_steps": 1})
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_another_head_of_trl_is_refused(monkeypatch):
    from trl.trainer import utils

    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(StageError) as caught:
        loss_head.install(SimpleNamespace(compute_loss=None, _metrics={}), every_step=False)
    advice = "trl 1.16.0 is known to work: `pip install trl==1.16.0`"
    needed = "`trl.trainer.utils._ChunkedLogProbFunction`, which this stage needs"
    assert str(caught.value) == f"trl {version('trl')} has no {needed}; {advice}"


def test_preference_training_logs_what_trl_logs(tiny, train, rows, monkeypatch):
    asked = {"max_steps": 2, "logging_steps": 1}
    with_ours = train(dpo, [tiny("llama")], rows("preference", 6), eval_size=2, trainer=asked)
    monkeypatch.setattr(loss_head, "install", lambda trainer, every_step: None)
    with_trl = train(dpo, [tiny("llama")], rows("preference", 6), eval_size=2, trainer=asked)
    timed = ("runtime", "per_second", "preparation_time")
    for found, expected in zip(*(done.trainer.state.log_history for done in (with_ours, with_trl)), strict=True):
        assert {key: value for key, value in found.items() if not key.endswith(timed)} == pytest.approx(
            {key: value for key, value in expected.items() if not key.endswith(timed)}, rel=1e-3, abs=1e-5
        )
    assert "logits/chosen" in with_ours.trainer.state.log_history[1]
