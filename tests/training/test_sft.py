"""SFT end to end on a tiny model, and what the training stages share: checkpoints, resuming, broken numbers."""

import hashlib
import json
import shutil

import pytest

from pipeline.saves.artifact import TO_GO_ON
from stages import sft
from stages.chat.encoder import Encoder
from stages.chat.labels import IGNORED, encode_chat
from stages.data.source import Source, rows_of
from stages.model.generation import load_engine
from stages.model.inputs import Inputs
from stages.runtime.errors import Interrupted, StageError
from stages.training import loop, progress
from stages.training.checkpoint import newest_whole, rotate, seal

pytestmark = pytest.mark.train

ADAPTER = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "events.jsonl",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
MODEL = sorted({*ADAPTER, "config.json", "model.safetensors"} - {"adapter_config.json", "adapter_model.safetensors"})


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path), format="messages")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in TO_GO_ON)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))


def notes(folder):
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "note"]


def loss_by_hand(folder, rows):
    """Mean cross-entropy of a folder's model over what comes after the prompt, row by row and without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for messages in rows:
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        ids = torch.tensor(tokenizer.apply_chat_template(messages)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(asked) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[len(asked) :], reduction="sum"))
        count += len(ids) - len(asked)
    return total / count


@pytest.fixture(scope="module")
def done(tiny, train, rows):
    """LoRA on 8 rows, 2 of them held out."""
    return train(sft, [tiny("llama")], rows("alpaca", 8), eval_size=0.25)


# What is trained


def test_the_loss_is_that_of_the_answers_alone(tiny, train, rows):
    source = rows("alpaca", 8)
    first = train(sft, [tiny("llama")], source, trainer={"max_steps": 1, "per_device_train_batch_size": 8})
    expected = loss_by_hand(tiny("llama"), [row["messages"] for row in rows_of(source)])
    assert first.metrics["loss_first"] == pytest.approx(expected, abs=1e-4)


def test_the_batch_holds_answers_their_ends_and_padding(done, rows):
    tokenizer = done.trainer.processing_class
    told = {row["messages"][-1]["content"] + "</s>" for row in rows_of(rows("alpaca", 8))}
    for batch in done.trainer.get_train_dataloader():
        for labels in batch["labels"]:
            assert tokenizer.decode(labels[labels != IGNORED]) in told


def test_a_model_that_learnt_a_row_gives_its_answer_and_stops(tiny, train, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = talk("感冒了应该注意什么？", "多休息，多喝水。")
    settings = {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    out = train(sft, [tiny("qwen3")], written(tmp_path / "one.jsonl", [row]), lora=None, trainer=settings).out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=100, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "多休息，多喝水。</s>"
    assert load_engine([str(out)]).answer(row["messages"][:1], 100) == "多休息，多喝水。"


@pytest.mark.parametrize(("architecture", "tied"), [("bloom", True), ("qwen3", False)])
def test_full_fine_tuning_changes_every_weight(tiny, train, rows, architecture, tied):
    import torch
    from safetensors.torch import load_file

    base = tiny(architecture, tied=tied)
    out = train(sft, [base], rows("alpaca", 4), lora=None).out
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert names(out) == MODEL


def test_lora_changes_its_own_weights_and_no_other(tiny, train, rows):
    import torch
    from safetensors.torch import load_file

    base = tiny("bloom")
    before = {name: sha256(base / name) for name in names(base)}
    done = train(sft, [base], rows("alpaca", 4))
    assert {name: sha256(base / name) for name in names(base)} == before
    weights = load_file(done.out / "adapter_model.safetensors")
    trained = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert len(weights) == 2 * len(trained) == 16
    assert all(weight.any() for weight in trained.values())
    inside = done.trainer.model.get_base_model().state_dict()
    for name, weight in load_file(base / "model.safetensors").items():
        kept = name if name in inside else f"{name.removesuffix('.weight').removesuffix('.bias')}.base_layer"
        kept = kept if name in inside else kept + name[name.rindex(".") :]
        assert torch.equal(inside[kept], weight)


def test_the_artifact_is_an_adapter_without_a_pickle(done, tiny):
    assert names(done.out) == ADAPTER
    config = json.loads((done.out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny("llama"))
    assert config["r"] == 4
    assert config["inference_mode"]


# What is kept and what is held out


def test_rows_without_room_for_their_answer_are_dropped_and_counted(tiny, train, tmp_path):
    question, answer = "感冒了怎么办？", "多休息。"
    talks = [talk(question, answer), talk(question * 20, answer), talk(question, answer * 20)]
    tokenizer = tokenizer_of(tiny("llama"))
    encoded = [encode_chat(Encoder(tokenizer), row["messages"]) for row in talks]
    room = len(encoded[0][0])
    trained = sum(label != IGNORED for _, labels in encoded for label in labels[:room])
    source = written(tmp_path / "rows.jsonl", talks)
    with pytest.raises(StageError) as error:
        train(sft, [tiny("llama")], source, trainer={"max_length": room})
    assert str(error.value) == (
        f"1 of 3 rows lose their answer at `max_length` {room}, the first at {source.path}:2; that is more than "
        "`max_dropped` 0.01 of them; raise `max_length`, or `max_dropped` of the data"
    )
    source = source.model_copy(update={"max_dropped": 0.34})
    done = train(sft, [tiny("llama")], source, trainer={"max_length": room})
    account = {"rows": 3, "dropped": 1, "truncated": 1, "tokens": 2 * room, "trained_tokens": trained}
    assert {key: done.metrics[key] for key in account} == account
    assert list(done.trainer.train_dataset["input_ids"]) == [encoded[0][0], encoded[2][0][:room]]
    assert (
        notes(done.out)[0] == f"{source.path}: 3 rows read, 2 to train on, 1 dropped (no answer left at `max_length`)"
    )
    assert notes(done.out)[1:] == [
        f"3 rows, 1 dropped, 1 truncated, {2 * room} tokens, {trained} in the loss",
        f"1 of 3 rows (33%) are longer than `max_length` {room} and lose their end, so the model would not learn to "
        "stop after them; raise `max_length`",
    ]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_without_gradient_checkpointing_the_weights_are_the_same(tiny, train, rows, kind):
    lora, made = {**LORA, "lora_dropout": 0.1}, []
    for chosen in (True, False):
        asked = {"max_steps": 3, "activation_checkpointing": chosen}
        done = train(sft, [tiny(kind)], rows("alpaca", 8), lora=lora, trainer=asked)
        assert done.trainer.args.gradient_checkpointing is chosen
        made.append(sha256(done.out / "adapter_model.safetensors"))
    assert made[0] == made[1]


def test_gradient_checkpointing_is_off_where_the_layers_fit(tiny, rows, tmp_path):
    config, inputs = sft.Config(model="base", data=[rows("alpaca", 8)]), Inputs(model=[str(tiny("llama"))])
    chosen = loop.checkpointing(config, inputs, tmp_path)
    assert not loop.arguments("SFTConfig", config, tmp_path, **chosen).gradient_checkpointing
    (said,) = notes(tmp_path)
    assert said.startswith("gradient checkpointing is off: the layers keep ")
    asked = config.model_copy(update={"trainer": {"gradient_checkpointing": True}})
    chosen = loop.checkpointing(asked, inputs, tmp_path)
    assert loop.arguments("SFTConfig", asked, tmp_path, **chosen).gradient_checkpointing


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_no_room_for_any_answer(tiny, train, rows):
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], rows("alpaca", 5), trainer={"max_length": 8})
    assert str(caught.value) == "all 5 rows lose their answer at `max_length` 8; raise it"


def test_held_out_rows_are_measured_before_and_after_and_never_trained_on(done, tiny, rows):
    trained = [tuple(ids) for ids in done.trainer.train_dataset["input_ids"]]
    held = [tuple(ids) for ids in done.trainer.eval_dataset["input_ids"]]
    tokenizer = tokenizer_of(tiny("llama"))
    examples = {tuple(encode_chat(Encoder(tokenizer), row["messages"])[0]): row for row in rows_of(rows("alpaca", 8))}
    assert (len(trained), len(held)) == (6, 2)
    assert {*trained, *held} == examples.keys()
    expected = loss_by_hand(tiny("llama"), [examples[ids]["messages"] for ids in held])
    assert done.metrics["eval_loss_before"] == pytest.approx(expected, abs=1e-4)
    assert done.metrics["eval_loss"] < done.metrics["eval_loss_before"]
    shown = f"held-out loss {done.metrics['eval_loss_before']:.3f} → {done.metrics['eval_loss']:.3f}"
    assert sft.STAGE.headline(done.metrics) == f"{shown} (on only {done.metrics['held_out_tokens']} tokens)"


def test_holding_out_every_row(tiny, train, rows):
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], rows("alpaca", 3), eval_size=3)
    assert str(caught.value) == "`eval_size` holds out 3 of 3 rows; nothing is left to train on"


def test_settings_that_the_library_refuses(tiny, train, rows):
    with pytest.raises(StageError, match=r"^SFTConfig refuses these settings: .*nearly"):
        train(sft, [tiny("llama")], rows("alpaca", 3), trainer={"lr_scheduler_type": "nearly"})


# The same again


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny, train, rows):
    def adapter(seed):
        lora = {"r": 4, "lora_dropout": 0.1}
        out = train(sft, [tiny("llama")], rows("alpaca", 4), lora=lora, seed=seed, trainer={"max_steps": 2}).out
        return sha256(out / "adapter_model.safetensors")

    assert adapter(1) == adapter(1) != adapter(2)


RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
LORA = {"r": 4, "lora_dropout": 0.1}  # dropout draws random numbers, which must go on where they were


@pytest.mark.parametrize("lora", [LORA, None], ids=["LoRA", "full"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tiny, train, rows, tmp_path, at, stop, lora):
    whole = train(sft, [tiny("llama")], rows("alpaca", 8), lora=lora, eval_size=2, trainer=RESUMED)
    asked = {"lora": lora, "eval_size": 2, "trainer": RESUMED, "out": tmp_path}
    with pytest.raises(Interrupted, match=r"^stopped at step 3 of 6$"):
        train(sft, [tiny("llama")], rows("alpaca", 8), callback=at(3, "on_step_end", stop), **asked)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert not list((tmp_path / "checkpoints").rglob("training_args.bin"))
    again = train(sft, [tiny("llama")], rows("alpaca", 8), **asked)
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert sha256(tmp_path / weights) == sha256(whole.out / weights)
    assert names(tmp_path) == (ADAPTER if lora else MODEL)
    assert again.metrics == whole.metrics


@pytest.mark.parametrize(
    ("trainer", "kept"),
    [
        ({"save_steps": 6}, ["checkpoint-3", "checkpoint-4"]),
        ({"save_strategy": "no"}, []),
        ({"save_steps": 6, "eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True}, []),
    ],
)
def test_a_checkpoint_is_written_when_the_last_one_is_old(tiny, train, rows, tmp_path, at, monkeypatch, trainer, kept):
    """Unless the user wants none, or the choice of the best model would depend on the clock."""

    def killed(*_):
        raise Interrupted("killed")

    monkeypatch.setattr(progress, "SAVE_SECONDS", 0)
    asked = {"trainer": {**RESUMED, **trainer}, "eval_size": 2, "lora": LORA, "out": tmp_path}
    with pytest.raises(Interrupted, match=r"^killed$"):
        train(sft, [tiny("llama")], rows("alpaca", 8), callback=at(4, "on_step_begin", killed), **asked)
    assert checkpoints(tmp_path) == kept


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tiny, train, rows, tmp_path, at, stop):
    whole = train(sft, [tiny("llama")], rows("alpaca", 8), lora=LORA, trainer=RESUMED)
    asked = {"lora": LORA, "trainer": RESUMED, "out": tmp_path}
    with pytest.raises(Interrupted, match=r"^stopped at step 5 of 6$"):
        train(sft, [tiny("llama")], rows("alpaca", 8), callback=at(5, "on_step_end", stop), **asked)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    flip(tmp_path / "checkpoints" / "checkpoint-5" / "adapter_model.safetensors")
    train(sft, [tiny("llama")], rows("alpaca", 8), **asked)
    assert notes(tmp_path)[-1] == (
        "checkpoint-5 is damaged (adapter_model.safetensors has changed); it is kept as corrupt-checkpoint-5, "
        "the one before is used"
    )
    assert sha256(tmp_path / "adapter_model.safetensors") == sha256(whole.out / "adapter_model.safetensors")


def test_the_best_checkpoint_is_found_where_the_folder_has_moved_to(tiny, train, rows, tmp_path, at, stop):
    """transformers only warns when it is not there, and takes the last weights for the best."""
    worst = {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the first is the best one
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0, **worst}
    asked = {"lora": LORA, "trainer": {**RESUMED, **best}, "eval_size": 2}
    whole = train(sft, [tiny("llama")], rows("alpaca", 8), **asked)
    assert whole.trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    (tmp_path / "here").mkdir()
    with pytest.raises(Interrupted, match=r"^stopped at step 5 of 6$"):
        train(
            sft, [tiny("llama")], rows("alpaca", 8), callback=at(5, "on_step_end", stop), out=tmp_path / "here", **asked
        )
    there = (tmp_path / "here").rename(tmp_path / "there")
    train(sft, [tiny("llama")], rows("alpaca", 8), out=there, **asked)
    assert sha256(there / "adapter_model.safetensors") == sha256(whole.out / "adapter_model.safetensors")


# Checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def checkpoint(folder, step, *, sealed=True):
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "training_args.bin"):
        (made / name).write_bytes(f"{name} at step {step}".encode())
    if sealed:
        seal(made)
    return made


def test_the_newest_sealed_checkpoint_is_used(tmp_path):
    for step in (2, 9, 10):
        made = checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, sealed=False)
    assert newest_whole(tmp_path) == (made, [])
    assert names(made) == ["complete.json", "model.safetensors", "optimizer.pt"]


@pytest.mark.parametrize(
    ("harm", "damage"),
    [
        (lambda made: flip(made / "optimizer.pt"), "optimizer.pt has changed"),
        (lambda made: cut(made / "model.safetensors"), "model.safetensors has changed"),
        (lambda made: (made / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda made: cut(made / "complete.json"), "complete.json is torn"),
    ],
    ids=["a flipped bit", "a file cut off", "a file deleted", "a torn seal"],
)
def test_damage_is_seen(tmp_path, harm, damage):
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    harm(newer)
    note = f"checkpoint-4 is damaged ({damage}); it is kept as corrupt-checkpoint-4, the one before is used"
    assert newest_whole(tmp_path) == (older, [note])
    assert names(tmp_path) == ["checkpoint-2", "corrupt-checkpoint-4"]


@pytest.mark.parametrize(
    ("harm", "damage"),
    [
        (lambda best: flip(best / "model.safetensors"), "model.safetensors has changed"),
        (shutil.rmtree, "it is gone"),
    ],
    ids=["a flipped bit", "deleted"],
)
def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(tmp_path, harm, damage):
    """At the end the best one would be loaded, and safetensors has no checksum."""
    made = {}
    for step, best in ((2, 2), (4, 4), (6, 4)):
        made[step] = checkpoint(tmp_path, step, sealed=False)
        state = {"best_model_checkpoint": f"elsewhere/checkpoint-{best}"}
        (made[step] / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
        seal(made[step])
    assert newest_whole(tmp_path, with_best=True) == (made[6], [])
    harm(made[4])
    assert newest_whole(tmp_path) == (made[6], [])
    found, notes = newest_whole(tmp_path, with_best=True)
    assert found == made[2]
    assert notes[0] == (
        f"checkpoint-6 is damaged (the best one until then, checkpoint-4: {damage}); it is kept as "
        "corrupt-checkpoint-6, the one before is used"
    )


def test_nothing_to_go_on_from(tmp_path):
    checkpoint(tmp_path, 2, sealed=False)
    assert newest_whole(tmp_path) == (None, [])
    assert newest_whole(tmp_path / "none") == (None, [])


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    for step in (2, 4, 6, 10):
        checkpoint(tmp_path, step)
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-6"]


# Broken numbers


def poison(model):
    import torch

    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("nan"))


def test_a_loss_that_is_not_a_number_stops_the_stage(tiny, train, rows, tmp_path, at):
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], rows("alpaca", 4), out=tmp_path, callback=at(2, "on_step_begin", poison))
    assert str(caught.value) == (
        "`loss` is nan at step 3; nothing of it is kept as a result. Lower `trainer.learning_rate`, set "
        "`trainer.max_grad_norm`, or train in bf16 instead of fp16; then run again"
    )
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_weight_that_is_not_a_number_is_never_written(tiny, train, rows, tmp_path, at):
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("llama")], rows("alpaca", 4), out=tmp_path, callback=at(3, "on_step_end", poison))
    assert str(caught.value) == (
        "the weight `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` is not finite after "
        "step 3; lower `trainer.learning_rate` and run again"
    )
    assert list(tmp_path.rglob("*.safetensors")) == []
