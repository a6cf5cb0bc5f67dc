"""Models on the Hub in a plan and in a run, against a small Hub on the loopback address."""

import json
import struct
from pathlib import Path

import pytest
from fake_hub import READER, TOKENIZER
from planned import TOP

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan

NAME = "org/model"
SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json"}
SFT = "  sft: {data: consult, lora: {r: 8, target_modules: [q_proj]}}\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def commit(project, hub):
    """The commit of a small model on the Hub, whose folder is not on this machine."""
    model(project)
    return hub.add(NAME, project.folder / "m")


def model(project, folder="m", **settings):
    """A model folder with a tokenizer that can be used."""
    project.model(folder, **settings)
    project.write(f"{folder}/tokenizer.json", json.dumps(TOKENIZER))


def config(commit, stages=SFT, name=NAME):
    return f"model: {name}@{commit}\n{TOP}stages:\n{stages}"


def build(project, text, **settings):
    project.write("x.yaml", text)
    return build_plan(load_config(Path("x.yaml")), Path("saves"), **settings)


def problem(text):
    return [f"x.yaml:1:8: stage `sft`: {text}"]


def in_cache(project):
    """The names of the files in the snapshots of the Hub's cache."""
    return {path.name for path in (project.folder / "hub-cache").rglob("snapshots/*/*")}


# A plan


def test_without_online_a_plan_asks_the_hub_for_nothing(project, hub, commit):
    planned = build(project, config(commit))
    assert planned.notes[0] == f"`{NAME}@{commit}` is not on this machine; `run` fetches it, until then it is unchecked"
    assert (planned.problems, hub.requests) == ([], [])


def test_online_checks_the_model_and_fetches_no_weights(project, hub, commit):
    before = build(project, config(commit))
    planned = build(project, config(commit), online=True)
    assert planned.problems == []
    assert planned.notes[0] == (
        f"`{NAME}@{commit}` is not on this machine; its config, tokenizer and the shapes of its weights are checked, "
        "and `run` fetches 64 bytes of weights"
    )
    assert in_cache(project) == SMALL
    assert {span for _, span in hub.asked("GET", WEIGHTS)} == {"bytes=0-100000"}
    (old,), (new,) = before.steps, planned.steps
    assert (new.fingerprint, new.inputs) == (old.fingerprint, old.inputs)


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_a_mistake_about_the_model_is_found_before_it_is_downloaded(project, hub, commit, command):
    project.write("x.yaml", config(commit, SFT.replace("q_proj", "query_key_value")))
    assert main([command, "x.yaml"]) == 0
    project.capsys.readouterr()
    assert main([command, "x.yaml", "--online"]) == 2
    shown = project.capsys.readouterr()
    assert shown.err.startswith("x.yaml:8:")
    assert "`query_key_value`" in shown.err
    assert "q_proj" in shown.err


def test_what_was_fetched_is_not_fetched_again(project, hub, commit):
    for _ in range(2):
        hub.requests.clear()
        build(project, config(commit), online=True)
    assert hub.asked("GET", "resolve/.*json$") == []
    # A part of a model in the cache is no model: without `--online` the plan says the same as before.
    assert build(project, config(commit)).notes[0].endswith("`run` fetches it, until then it is unchecked")


def test_a_part_that_another_program_fetched_is_no_model(project, hub, commit):
    """`AutoTokenizer.from_pretrained` and its like leave some files, and no list of all of them."""
    from huggingface_hub import hf_hub_download

    for name in SMALL:
        hf_hub_download(NAME, name, revision=commit)
    for tree in (project.folder / "hub-cache").rglob("trees/*"):
        tree.unlink()
    planned = build(project, config(commit))
    assert planned.problems == []
    assert planned.notes[0] == f"`{NAME}@{commit}` is not on this machine; `run` fetches it, until then it is unchecked"


def test_the_headers_of_all_files_of_the_index_are_read(project, hub):
    head = {"__metadata__": {"format": "pt"}}
    for number, name in enumerate(("q_proj", "v_proj")):
        weight = {f"model.layers.0.self_attn.{name}.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
        # The header of the second file is longer than what the first request asks for.
        text = json.dumps({**head, **weight}).encode() + b" " * (200_000 * number)
        project.write(f"big/model-{number}.safetensors", struct.pack("<Q", len(text)) + text + bytes(64))
    names = {f"model.layers.0.self_attn.{name}.weight": f"model-{n}.safetensors" for n, name in enumerate(("q_proj", "v_proj"))}  # fmt: skip # noqa: E501
    project.write("big/model.safetensors.index.json", json.dumps({"weight_map": names}))
    model(project, "big")
    (project.folder / "big" / WEIGHTS).unlink()
    commit = hub.add(NAME, project.folder / "big")
    found = build(project, config(commit, SFT.replace("q_proj", "q_proj, v_proj")), online=True)
    assert found.problems == []
    assert found.notes[0].endswith("`run` fetches 128 bytes of weights")
    assert build(project, config(commit, SFT.replace("q_proj", "o_proj")), online=True).problems != []


def test_a_model_without_safetensors_is_refused_before_it_is_downloaded(project, hub):
    model(project)
    (project.folder / "m" / WEIGHTS).rename(project.folder / "m" / "pytorch_model.bin")
    commit = hub.add(NAME, project.folder / "m")
    assert build(project, config(commit), online=True).problems == problem(
        f"`{NAME}@{commit}` has no .safetensors weights (`pytorch_model.bin` is a pickle, which can run code); name a "
        "commit that has them, or convert it to a folder"
    )
    assert hub.asked("GET", "bin$") == []


def test_an_adapter_on_the_hub_brings_its_base(project, hub, commit):
    settings = {"peft_type": "LORA", "base_model_name_or_path": NAME, "revision": commit, "r": 2}
    project.write("a/adapter_config.json", json.dumps(settings))
    head, end = {}, 0
    for side, shape in (("A", [2, 4]), ("B", [4, 2])):
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 32]}
    text = json.dumps(head).encode()
    project.write("a/adapter_model.safetensors", struct.pack("<Q", len(text)) + text + bytes(end))
    adapter = hub.add("org/adapter", project.folder / "a")
    planned = build(project, config(adapter, name="org/adapter"), online=True)
    assert planned.problems == []
    assert [note.split(" is not")[0] for note in planned.notes[:2]] == [
        f"`{NAME}@{commit}`",
        f"`org/adapter@{adapter}`",
    ]
    assert not in_cache(project) & {WEIGHTS, "adapter_model.safetensors"}


# What the Hub refuses

GATED = "(it is gated: access is granted to accounts); ask for access on its page of the Hub, and "
REFUSALS = [
    ({"gated": True}, None, f"{GATED}set HF_TOKEN to a token of that account"),
    ({"gated": True}, READER, f"{GATED}the account of HF_TOKEN needs it"),
    ({"private": True}, None, "(there is none of this name, or it is private); check the name, or set HF_TOKEN"),
    (
        {},
        "hf_an-old-token",
        "(HF_TOKEN is not a valid token); make a token in the settings of the Hub, and set HF_TOKEN to it",
    ),
]


@pytest.mark.parametrize(("settings", "token", "text"), REFUSALS)
@pytest.mark.parametrize("way", ["fetch", "online"])
def test_what_the_hub_refuses_is_said_with_a_way_out(project, hub, monkeypatch, settings, token, text, way):
    model(project)
    commit = hub.add(NAME, project.folder / "m", **settings)
    hub.use(monkeypatch, project.folder, token)
    found = build(project, config(commit), **{way: True}).problems
    assert found == problem(f"the Hub does not hand out `{NAME}@{commit}` {text}")


@pytest.mark.parametrize("way", ["fetch", "online"])
def test_a_wrong_name_and_a_wrong_revision(project, hub, commit, way):
    assert build(project, config(commit, name="org/modle"), **{way: True}).problems == problem(
        f"the Hub does not hand out `org/modle@{commit}` (there is none of this name, or it is private); check the "
        "name, and whether HF_TOKEN may read it"
    )
    other = "d" * 40
    assert build(project, config(other), **{way: True}).problems == problem(
        f"the Hub does not hand out `{NAME}@{other}` (it has no such commit or branch); copy the 40 hex digits of a "
        "commit from its page of the Hub"
    )


@pytest.mark.parametrize("way", ["fetch", "online"])
def test_no_network_and_offline(project, hub, commit, monkeypatch, way):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the library
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert build(project, config(commit), **{way: True}).problems == problem(
        f"the Hub does not hand out `{NAME}@{commit}` (HF_HUB_OFFLINE is set); unset it"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert build(project, config(commit), **{way: True}).problems == problem(
        f"the Hub does not hand out `{NAME}@{commit}` ([Errno 111] Connection refused); check name, commit, access "
        "and network"
    )


# A download


@pytest.fixture
def large(project, hub, monkeypatch):
    """The commit of a model of 2 MB, and the library's retries without a wait."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    model(project, weights={"model.layers.0.self_attn.q_proj.weight": [512, 1024]})
    return hub.add(NAME, project.folder / "m")


def test_a_cut_connection_goes_on_where_it_was(project, hub, large):
    hub.cut[WEIGHTS] = [1_000_000, 500_000]
    planned = build(project, config(large), fetch=True)
    assert (planned.problems, hub.cut[WEIGHTS]) == ([], [])
    first, second, third = (span for _, span in hub.asked("GET", WEIGHTS))
    assert (first, second, third) == (None, "bytes=1000000-", "bytes=1500000-")
    (folder,) = planned.steps[0].inputs.model
    assert Path(folder).name == large
    assert (Path(folder) / WEIGHTS).read_bytes() == (project.folder / "m" / WEIGHTS).read_bytes()


def test_a_connection_that_breaks_for_good_is_one_sentence(project, hub, large):
    hub.cut[WEIGHTS] = [0] * 20
    (found,) = build(project, config(large), fetch=True).problems
    assert found.startswith(f"x.yaml:1:8: stage `sft`: the Hub does not hand out `{NAME}@{large}` (peer closed")
    assert found.endswith("; check name, commit, access and network")
    hub.cut.clear()
    assert build(project, config(large)).notes[0].endswith("`run` fetches it, until then it is unchecked")
    assert build(project, config(large), fetch=True).problems == []


def test_a_model_that_is_here_is_not_fetched_again(project, hub, commit):
    build(project, config(commit), fetch=True)
    hub.requests.clear()
    planned = build(project, config(commit), fetch=True)
    assert (planned.problems, hub.asked("GET", "resolve")) == ([], [])
    assert build(project, config(commit), online=True).notes == planned.notes


def test_what_is_in_the_cache_is_used_when_the_hub_cannot_be_reached(project, hub, commit):
    before = build(project, config(commit), fetch=True)
    hub.down = 500
    planned = build(project, config(commit), fetch=True)
    assert planned.problems == []
    assert [step.inputs for step in planned.steps] == [step.inputs for step in before.steps]


@pytest.mark.parametrize("way", ["fetch", "online"])
def test_a_hub_that_is_down_is_one_sentence(project, hub, commit, monkeypatch, way):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the library
    hub.down = 503
    assert build(project, config(commit), **{way: True}).problems == problem(
        f"the Hub does not hand out `{NAME}@{commit}` (it answers with status 503); try again later"
    )
