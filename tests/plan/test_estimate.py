"""What stages take is estimated before they run: memory, rows, steps, time, and what makes them fit."""

import json
import platform
import resource
import tracemalloc
from pathlib import Path

import estimated
import pytest
from planned import pretend

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan import machine
from pipeline.plan.estimate import Ask, estimated_and_measured, estimates
from pipeline.plan.estimate_engine import Engine
from pipeline.plan.estimate_rates import measured_training, parse_rate, rate_text
from pipeline.plan.estimate_result import Batches, Device, StageEstimate
from pipeline.plan.estimate_rows import Rows, lines_in, packed_rows, work_of
from pipeline.plan.placing import build_plan
from stages import pt
from stages.runtime.events import emit

ANSWERS = json.loads(estimated.FILE.read_text(encoding="utf-8"))
SAYS = "estimating memory and time; this takes a few seconds, and is remembered (`--no-estimate` skips it)\n"
LOOKS = "looking for settings with which stage `sft` fits\n"
GPU = ("--gpu", "500MB", "--rate", "1TFLOPS")
EXPECTED = estimated.FILE.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.fixture
def asked(project, monkeypatch, estimates_computed):
    """The questions that the process would get, which is not started: its answers are those that it once gave."""
    questions = []

    def answer(engine, question):
        if engine.purpose is not None:
            engine.say(engine.purpose)
            engine.purpose = None
        questions.append(question)
        if "measure" in question:
            return {"rate": 5e10}
        return dict(ANSWERS[estimated.key(question)])

    monkeypatch.setattr(Engine, "_asked", answer)
    monkeypatch.setattr(machine, "main_memory", lambda: 10**9)
    for name, text in estimated.ROWS.items():
        project.write(name, text)
    project.write("x.yaml", estimated.CONFIG)
    return questions


@pytest.fixture
def call(project):
    def called(*words):
        code = main(list(words))
        shown = project.capsys.readouterr()
        return code, shown.out, shown.err

    return called


def block(out):
    """The lines of the estimates, without the table above them."""
    return out[out.index("estimates for ") :].splitlines()


def test_plan_shows_memory_by_cause_rows_steps_time_disk_and_what_makes_a_stage_fit(asked, call):
    code, out, err = call("plan", "x.yaml", *GPU)
    assert (code, err) == (0, SAYS + LOOKS)
    assert block(out) == EXPECTED.splitlines()


def test_json_has_all_of_it(asked, call):
    code, out, _ = call("plan", "x.yaml", *GPU, "--json")
    assert code == 0
    steps = {step["stage"]: step["estimate"] for step in json.loads(out)["steps"]}
    sft = steps["sft"]
    assert sft["verdict"] == "does not fit"
    assert steps["dpo"]["verdict"] == "fits"
    assert sft["device"] == {"name": "a GPU of 500.0 MB", "memory": 500_000_000, "gpu": True}
    assert sft["memory"]["total"] == sum(size for cause, size in sft["memory"].items() if cause != "total")
    assert (sft["batch"]["rows_of_step"], sft["batch"]["tokens_of_row"]) == (16, 512)
    assert [list(change["settings"]) for change in sft["changes"]] == [
        ["trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps"],
        ["trainer.gradient_checkpointing"],
        ["launch"],
    ]
    assert all(change["memory"] <= 500_000_000 for change in sft["changes"])
    assert sft["rate"] == {"flops_per_second": 1e12, "source": "given with `--rate`", "at_most": False}
    assert sft["seconds"] == sft["flops"] / 1e12
    assert steps["dpo"]["lora_modules"] == [14, 14]
    assert (steps["init"]["memory"], steps["init"]["memory_at_least"]) == (None, 5_857_280)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packed_rows_are_named_with_every_strategy(asked, call, project, monkeypatch, strategy):
    answer = {"memory": {"weights": 10**8}, "parameters": 10**6, "trainable": 10**6, "flops": 1e12}
    monkeypatch.setattr(Engine, "_asked", lambda engine, question: answer)
    project.write("notes.txt", "some words\n")
    head, _, _ = estimated.CONFIG.partition("  sft:\n")
    trainer = f"{{per_device_train_batch_size: 2, max_length: 128, packing_strategy: {strategy}}}"
    head = head.replace("data:\n", "data:\n  notes: {path: notes.txt, format: text}\n", 1)
    project.write("x.yaml", f"{head}  pt: {{data: notes, trainer: {trainer}}}\n")
    code, out, err = call("plan", "x.yaml", *GPU)
    assert (code, err) == (0, "")
    assert "2 packed rows a step (2 × 1 accumulation × 1 process), each of up to 128 tokens" in out
    _, out, _ = call("plan", "x.yaml", *GPU, "--json")
    assert json.loads(out)["steps"][-1]["estimate"]["batch"]["packed"] is True


def test_a_second_plan_asks_nothing_also_with_another_learning_rate(asked, call):
    first = call("plan", "x.yaml", *GPU)
    assert len(asked) > 5
    asked.clear()
    assert call("plan", "x.yaml", *GPU) == (0, first[1], "")
    assert call("plan", "x.yaml", *GPU, "--set", "sft.trainer.learning_rate=1e-3")[2] == ""
    assert asked == []


def test_changes_are_combined_where_none_suffices_alone_and_none_is_named_without_need(asked, call, monkeypatch):
    """A made-up memory, by which it is known what suffices: a batch of 1, a quarter of the activations, LoRA."""

    def memory(engine, question):
        asked.append(question)
        config, batch = question["estimate"]["config"], question["estimate"]["batch"]
        kept = 0.25 if config["trainer"]["gradient_checkpointing"] else 1.0
        trained = 10**6 if config["lora"] else 10**8
        found = {"weights": 10**8, "gradients": trained, "optimizer": 2 * trained, "logits": 0, "reference": 0}
        found |= {"activations": int(10**8 * kept * batch["rows"]), "workspace": 0}
        return {"memory": found, "parameters": 10**8, "trainable": trained // 4, "flops": 1e12}

    monkeypatch.setattr(Engine, "_asked", memory)

    def changes(size):
        out = call("plan", "x.yaml", "--gpu", size, "--rate", "1TFLOPS", "--json", "--until", "sft")[1]
        found = json.loads(out)["steps"][1]["estimate"]["changes"]
        return [(sorted(key.rpartition(".")[2] for key in one["settings"]), one["memory"]) for one in found]

    batch = ["gradient_accumulation_steps", "per_device_train_batch_size"]
    assert changes("900MB") == [
        (batch, 800_000_000),  # a batch of 4
        (["gradient_checkpointing"], 800_000_000),
        (["launch"], 800_000_000),  # four GPUs
    ]
    assert changes("700MB") == [
        (batch, 600_000_000),
        (["gradient_checkpointing", "lora"], 503_000_000),
        (["launch"], 600_000_000),
    ]
    assert changes("500MB") == [
        ([*batch[:1], "gradient_checkpointing", *batch[1:]], 450_000_000),
        ([*batch[:1], "lora", *batch[1:]], 303_000_000),
    ]
    assert len(asked) < 40


def test_without_estimates_validate_and_a_finished_chain_ask_nothing(project, asked, call):
    code, out, err = call("plan", "x.yaml", "--no-estimate")
    assert (code, "estimates for" in out, err) == (0, False, "")
    assert call("validate", "x.yaml")[0] == 0
    for step in build_plan(load_config(Path("x.yaml")), Path("saves")).steps:
        pretend(step, metrics={})
    code, out, err = call("plan", "x.yaml")
    assert (code, "estimates for" in out, err, asked) == (0, False, "", [])


def test_fit_writes_the_cheapest_change_keeps_the_comments_and_then_the_plan_fits(asked, call):
    code, out, err = call("plan", "x.yaml", *GPU, "--fit")
    assert (code, err) == (0, SAYS + LOOKS)
    assert out.startswith(
        "--- x.yaml\n+++ x.yaml\n@@ -11,4 +11,4 @@\n"
        "     # without checkpointing it is fast\n"
        "-    trainer: {gradient_checkpointing: false,   # and takes memory\n"
        "-              per_device_train_batch_size: 16, max_length: 512}\n"
        "+    trainer: {gradient_accumulation_steps: 4, gradient_checkpointing: false,   # and takes memory\n"
        "+              per_device_train_batch_size: 4, max_length: 512}\n"
        "   dpo:\n"
    )
    text = Path("x.yaml").read_text()
    assert [line.partition("#")[2] for line in text.splitlines()] == [
        line.partition("#")[2] for line in estimated.CONFIG.splitlines()
    ]
    assert [line.split("  ")[1].strip() for line in block(out) if line.startswith(("sft", "dpo"))] == ["fits", "fits"]
    again = call("plan", "x.yaml", *GPU, "--fit")
    assert (again[0], again[1].splitlines()[0]) == (0, "every stage whose memory is known fits; nothing was written")
    assert Path("x.yaml").read_text() == text


def test_a_folder_of_a_later_version_does_not_stop_the_plan(asked, call):
    expected = call("plan", "x.yaml", *GPU)
    folder = Path("saves/sft-0123456789ab")
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"schema": 99, "files": {}}), encoding="utf-8")
    assert call("plan", "x.yaml", *GPU)[:2] == expected[:2]


def test_the_lines_of_a_large_file_are_counted_without_holding_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    with open(file, "wb") as rows:
        for _ in range(10_000):
            rows.write(b"x" * 999 + b"\n")
    tracemalloc.start()
    found = lines_in(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == 10_000
    assert most < 1_000_000, most  # of 10 MB


def test_fit_leaves_a_link_the_mode_and_the_byte_order_mark_of_the_file(asked, call):
    file = Path("real.yaml")
    Path("x.yaml").rename(file)
    Path("x.yaml").symlink_to(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    file.chmod(0o640)
    assert call("plan", "x.yaml", *GPU, "--fit")[0] == 0
    assert (Path("x.yaml").is_symlink(), file.stat().st_mode & 0o777) == (True, 0o640)
    content = file.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    assert b"gradient_accumulation_steps: 4" in content
    assert sorted(path.name for path in Path().glob("*.yaml*")) == ["real.yaml", "x.yaml"]


def test_fit_that_cannot_write_leaves_the_file_as_it_is(asked, call):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # no file grows beyond 40 bytes, as on a full disk
    try:
        code, _, err = call("plan", "x.yaml", *GPU, "--fit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (2, SAYS + LOOKS + "x.yaml: cannot be written (File too large), and is as it was\n")
    assert [path.read_text() for path in Path().glob("x.yaml*")] == [estimated.CONFIG]


def test_fit_with_set_and_a_stage_that_nothing_helps_are_refused(asked, call):
    changed = call("plan", "x.yaml", *GPU, "--fit", "--set", "sft.trainer.learning_rate=1e-3")
    text = "--fit: writes into `x.yaml`, which lacks what `--set` says; write that there first\n"
    assert changed[::2] == (2, SAYS + LOOKS + text)
    assert Path("x.yaml").read_text() == estimated.CONFIG


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "24"], "--gpu 24: is not a size of memory; write it as `24GB` or `80GiB`\n"),
        (["--gpu", "0GB"], "--gpu 0GB: is not a size of memory; write it as `24GB` or `80GiB`\n"),
        (["--rate", "fast"], "--rate fast: is not a speed; write it as `400TFLOPS` or `50GFLOPS`\n"),
        (["--rate", "0TFLOPS"], "--rate 0TFLOPS: is not a speed; write it as `400TFLOPS` or `50GFLOPS`\n"),
        (
            ["--gpu", "24GB", "--no-estimate"],
            "--no-estimate: it leaves out what `--gpu`, `--rate` and `--fit` are for; remove it\n",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(asked, call, words, said):
    assert call("plan", "x.yaml", *words) == (2, "", said)
    assert asked == []


def test_what_cannot_be_computed_is_said_and_the_plan_goes_on(asked, call, monkeypatch):
    told = {"why": "RuntimeError: no kernel for this"}
    given = Engine._asked
    monkeypatch.setattr(
        Engine, "_asked", lambda self, question: told if question["estimate"]["use"] == "sft" else given(self, question)
    )
    code, out, _ = call("plan", "x.yaml", *GPU)
    lines = block(out)
    assert code == 0
    assert "sft                 memory is not known: RuntimeError: no kernel for this" in lines
    assert any(line.startswith("dpo   fits") for line in lines)
    monkeypatch.setattr(Engine, "_asked", lambda self, question: None)  # killed: it is asked again the next time
    out = call("plan", "x.yaml", "--gpu", "600MB", "--rate", "1TFLOPS", "--set", "dpo.lora.r=4")[1]
    assert "dpo                 memory is not known: the process that estimates has ended without an answer" in block(
        out
    )
    monkeypatch.setattr(Engine, "_asked", lambda self, question: {"why": "asked again"})
    out = call("plan", "x.yaml", "--gpu", "600MB", "--rate", "1TFLOPS", "--set", "dpo.lora.r=4")[1]
    assert "dpo                 memory is not known: asked again" in block(out)


def test_run_is_warned_by_what_a_plan_has_remembered(asked, call, monkeypatch):
    call("plan", "x.yaml")
    asked.clear()
    monkeypatch.setattr(machine, "main_memory", lambda: 25 * 10**6)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    planned.estimates = estimates(planned, Ask(), print)
    total = sum(planned.estimates["sft"].memory.values())
    assert list(machine.memory_notes(planned)) == [
        f"stage `sft` takes about {total / 1e6:.1f} MB of memory, and this machine has 25.0 MB; `pipeline plan` names "
        "what would make it fit"
    ]
    assert asked == []


def test_the_record_of_a_stage_that_is_alike_gives_the_speed(asked, call, monkeypatch):
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    found = estimates(planned, Ask(compute=True), print)
    step = next(step for step in planned.steps if step.name == "sft")
    assert found["sft"].speed.at_most
    step.part.mkdir(parents=True)
    monkeypatch.setattr("time.time", lambda: 100.0)
    emit(step.part, "total", steps=3, step=0, batch=2)
    monkeypatch.setattr("time.time", lambda: 103.0)
    emit(step.part, "step", step=2)
    emit(step.part, "log", step=3, loss=1.0)
    monkeypatch.setattr("time.time", lambda: 200.0)
    emit(step.part, "log", step=3, eval_loss=1.0)  # an evaluation after the last step
    assert measured_training(step.part) == {"steps": 3, "seconds": 3.0}
    metrics = {"rows": 1, "dropped": 0, "tokens": 512, "longest": 600, "padding": 0.0}
    record = estimated_and_measured(step, found["sft"], metrics)
    assert record["estimate"]["total"] == found["sft"].total
    (step.part / "events.jsonl").unlink()
    step.part.rmdir()
    pretend(step, use="sft", metrics=metrics, machine={"host": platform.node(), "gpu": False}, **record)
    now = estimates(build_plan(load_config(Path("x.yaml"), ["sft.seed=7"]), Path("saves")), Ask(compute=True), print)
    assert now["sft"].speed.source == f"of `{step.folder.name}`"
    assert now["sft"].speed.rate == pytest.approx(record["training"]["flops_of_step"])
    shorter = now["sft"].work.padded_tokens / 512  # the rows that the stage has counted were longer
    assert now["sft"].seconds == pytest.approx(now["sft"].work.steps * shorter)
    assert now["sft"].work.counted is False  # the record has no tokenizer.json, so its rows may be others


def test_rates_are_read_and_written():
    assert [parse_rate(text) for text in ("400TFLOPS", "1.5 PFLOP/s", "50gflops", "50", "TFLOPS")] == [
        4e14,
        1.5e15,
        5e10,
        None,
        None,
    ]
    assert [rate_text(rate) for rate in (4e14, 8.2e12, 5e10)] == ["400 TFLOP/s", "8.2 TFLOP/s", "50 GFLOP/s"]


@pytest.mark.parametrize(
    ("lengths", "room", "rows"), [([], 8, 0), ([8, 8], 8, 2), ([5, 4, 3, 3, 1], 8, 2), ([5, 5, 5, 3, 3], 8, 3)]
)
def test_rows_are_packed_as_best_fit_decreasing_packs_them(lengths, room, rows):
    assert packed_rows(lengths, room) == rows


@pytest.fixture(scope="module")
def real(tmp_path_factory, estimates_computed):
    """A project of which the first plan was made with the real process: its folder, and what the plan wrote."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, text in {**estimated.ROWS, "x.yaml": estimated.CONFIG}.items():
            Path(name).write_text(text, encoding="utf-8")
        said = []
        planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
        found = estimates(planned, Ask(compute=True, gpu=500_000_000, rate=1e12), said.append)
    return folder, found, said


@pytest.mark.train
def test_the_real_process_answers_as_the_answers_that_are_kept(real):
    _, found, said = real
    assert said == [SAYS.strip(), LOOKS.strip()]
    kept = {json.loads(asked)["use"]: answer for asked, answer in reversed(ANSWERS.items()) if '"gpu": true' in asked}
    assert found["sft"].memory.keys() == kept["sft"]["memory"].keys()
    assert found["sft"].total == pytest.approx(sum(kept["sft"]["memory"].values()), rel=0.1)
    assert (found["dpo"].parameters, found["dpo"].trainable) == (kept["dpo"]["parameters"], kept["dpo"]["trainable"])
    assert [list(change.settings) for change in found["sft"].changes] == [
        ["trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps"],
        ["trainer.gradient_checkpointing"],
        ["launch"],
    ]


@pytest.mark.train
def test_the_real_process_is_not_started_again_and_fit_writes_what_fits(real, monkeypatch, capsys):
    folder, found, _ = real
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Engine, "_started", lambda self: pytest.fail("a process was started"))
    assert main(["plan", "x.yaml", *GPU]) == 0
    out, err = capsys.readouterr()
    assert (len(block(out)), err) == (len(EXPECTED.splitlines()), "")
    assert main(["plan", "x.yaml", *GPU, "--fit"]) == 0
    out, err = capsys.readouterr()
    assert (err, "does not fit" in out) == ("", False)
    assert f"sft   fits          {found['sft'].changes[0].memory / 1e6:.1f} MB of memory" in out
    assert "# without checkpointing it is fast" in Path("x.yaml").read_text()


def test_each_of_several_processes_is_estimated_with_its_own_share_of_a_step(project, asked, monkeypatch):
    """With the accumulation of all of them, gradients would be held during the next forward pass."""
    seen = []
    monkeypatch.setattr(Engine, "_asked", lambda engine, question: seen.append(question) or {"why": "enough"})
    launched = "trainer: {gradient_accumulation_steps: 8, per_device_train_batch_size: 1, max_length: 64}"
    text = estimated.CONFIG[: estimated.CONFIG.index("  sft:")] + f"  sft: {{data: consult, {launched}}}\n"
    for processes in (1, 8):
        project.write("x.yaml", f"launch: {{processes: {processes}}}\n{text}")
        main(["plan", "x.yaml"])
    given = [question["estimate"]["config"]["trainer"]["gradient_accumulation_steps"] for question in seen]
    assert given == [8, 1]


def test_texts_that_are_cut_and_not_packed_count_as_their_pieces():
    rows = Rows(count=2, tokens=300, longest=200, lengths=[100, 100, 100])
    batches = Batches(rows=1, accumulation=1, processes=1, on_machine=1, row_tokens=100, longest_seen=True)
    training = pt.Config(model="x", data=[{"path": "x", "format": "text"}]).training(cut=True)
    assert work_of(rows, batches, training, {"packing": False}).steps_of_epoch == 3


def test_the_main_memory_of_a_machine_holds_the_processes_of_that_machine(monkeypatch):
    batches = Batches(rows=1, accumulation=1, processes=8, on_machine=2, row_tokens=8, longest_seen=True)
    cpu = Device(name="this machine", memory=100, gpu=False)
    found = StageEstimate(device=cpu, memory={"weights": 40}, batches=batches)
    assert (found.total, found.verdict) == (80, "fits")
