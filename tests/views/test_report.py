"""The page of a run, its curves, and the difference of two runs, from a small made-up `saves`."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import planned
import pytest
from markupsafe import escape

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.saves import artifact
from pipeline.saves.links import link
from pipeline.views import charts
from stages.runtime.hashes import Hashes

CONFIG = planned.TOP + (
    """\
stages:
  init: {architecture: bloom, data: books}
  pt: {data: books, lora: {r: 8}}
  evaluate:
    data: consult
    prompts: ["What helps?"]
    gates: [{metric: perplexity, data: consult, stage: pt, versus: init, max_increase: 6%}]
  merge:
"""
)
ACCOUNT = {
    "path": "books.jsonl",
    "read": 1234,
    "kept": 1230,
    "changed": 7,
    "dropped": {"too short": {"rows": 4, "first": ["books.jsonl:3"]}},
    "personal_data": {"email": 2},
    "trained_rows": 1107,
    "like_held_out": 0,
    "held_out": 123,
    "tokens": 45678,
    "trained_tokens": 22839,
    "truncated": 9,
    "longest": 511,
    "share_of_rows": 0.75,
    "share_of_tokens": 0.625,
}
PT = {"data": [ACCOUNT], **{key: ACCOUNT[key] for key in ("tokens", "trained_tokens", "truncated", "longest")}} | {
    "rows": 1107,
    "held_out": 123,
    "packed": 1107,
    "packed_into": 901,
    "padding": 0.031,
    "steps": 20,
    "eval_loss_before": 3.5,
    "eval_loss": 2.25,
}
EVENTS = [
    {"kind": "start"},
    {"kind": "log", "step": 0, "eval_loss": 3.5},
    {"kind": "total", "steps": 20, "step": 0},
    {"kind": "log", "step": 5, "loss": 3.0, "learning_rate": 5e-5, "num_tokens": 1000},
    {"kind": "log", "step": 10, "loss": 2.7, "learning_rate": 4e-5, "num_tokens": 3000},
    {"kind": "log", "step": 15, "loss": 9.0, "learning_rate": 3e-5, "num_tokens": 5000},  # done again
    {"kind": "interrupted"},
    {"kind": "start"},
    {"kind": "total", "steps": 20, "step": 10},
    {"kind": "log", "step": 20, "loss": 2.5, "learning_rate": 1e-5, "num_tokens": 7000, "grad_norm": 0.5},
    {"kind": "log", "step": 20, "eval_loss": 2.25, "eval_runtime": 1.5},
]


def figures(values, **more):
    return [
        {"metric": "perplexity", "data": "consult", "model": model, "lower_is_better": True, "n": 64}
        | {"value": value, "ci": None if value is None else [value - 1, value + 1], "why": None, **more}
        for model, value in values.items()
    ]


WHY = {"value": None, "ci": None, "n": 0, "why": "it is the model that rewards are measured against"}
REWARD = {"metric": "reward_margin", "data": "consult", "lower_is_better": False}
RATIO = {"as": "ratio", "change": 0.87, "ci": [0.8, 0.9], "p": None, "test": "paired bootstrap", "n": 64, "why": None}
TABLE = {
    "schema": 1,
    "models": ["init", "pt"],
    "bootstrap": {"resamples": 2000, "level": 0.95},
    "figures": [
        *figures({"init": 21.125, "pt": 18.375}),
        REWARD | {"model": "init"} | WHY,
        REWARD | {"model": "pt", "value": 1.5, "ci": [1.0, 2.0], "n": 64, "why": None},
    ],
    "comparisons": [
        {"metric": "perplexity", "data": "consult", "model": "pt", "versus": "init", "better": "pt"} | RATIO
    ],
}
ATTACK = "<script>alert(1)</script>"


def asked(before=ATTACK, after="Rest & water"):
    answers = {"init": {"answer": before, "stopped": True}, "pt": {"answer": after, "stopped": False}}
    question = [{"role": "user", "content": "What helps?"}]
    return {"data": "prompts", "row": 1, "prompt": question, "reference": None, "answers": answers}


def build(name="x.yaml", assignments=()):
    return {step.name: step for step in build_plan(load_config(Path(name), assignments), Path("saves")).steps}


def pretend(step, metrics, files=(), **record):
    """What a finished run of this step leaves."""
    step.part.mkdir(parents=True)
    for name, lines in files:
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (step.part / name).write_text(text, encoding="utf-8")
    record = {
        **{"stage": step.name, "use": step.use, "fingerprint": step.fingerprint, "recipe": dict(step.recipe)},
        **{"inputs": dict(step.identities), "stands_on": step.stands_on(), "metrics": metrics, "ignored_gates": []},
        **{"versions": installed_versions(step.use), "started": 1763800000.0, "seconds": 62.0, **record},
        "machine": {"host": "host", "system": "Linux", "cores": 2, "gpu": False},
    }
    artifact.finish(step.part, step.folder, record, Hashes(None))
    link(step.folder, step.link)


def run(steps, table=TABLE, answers=None, metrics=PT):
    """All stages of CONFIG but `merge`."""
    events = [{"time": 1763800000.0 + 2 * number, **event} for number, event in enumerate(EVENTS)]
    pretend(steps["init"], {"parameters": 659200, "vocab_size": 2048})
    pretend(steps["pt"], metrics, [("events.jsonl", events)])
    values = {one["model"]: one["value"] for one in table["figures"] if one["metric"] == "perplexity"}
    told = {"models": table["models"], "figures": {"perplexity": {"consult": values}}}
    files = [("evaluation.json", [table]), ("answers.jsonl", [answers or asked()])]
    pretend(steps["evaluate"], told, files)


@pytest.fixture
def made(project):
    """A project with a run; `call` gives exit code, output and error output."""
    project.write("x.yaml", CONFIG)
    run(build())

    def call(*words):
        code = main(words)
        shown = project.capsys.readouterr()
        return code, shown.out, shown.err

    project.call = call
    return project


class Page(HTMLParser):
    """The text of a page, its elements and attributes; tags that do not match are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags, self.attributes = [], [], set(), []
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words)).replace("_ ", "_")

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [] if self.open[-1:] == ["style"] else [data]


def page(made, *words):
    code, out, err = made.call("report", "x.yaml", *words)
    assert (code, err) == (0, "")
    return Path(out.splitlines()[0]).read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(made):
    found = Page(page(made))
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    targets = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert [target for target in targets if not target.startswith("#")] == []
    ids = [value for name, value in found.attributes if name == "id"]
    assert sorted(set(ids)) == sorted(ids)
    assert {target[1:] for target in targets} <= set(ids)


TOLD = [
    "3 of 4 stages done, made in 3 min",
    "merge not run yet",
    "stopped and resumed once",
    "held-out loss 3.500 → 2.250",
    "45,678 tokens · 50.0% of them in the loss · longest sequence 511 · 9 cut off at max_length · 123 rows held",
    "1,107 sequences packed into 901 · 3.1% padding",
    "books.jsonl 1,234 1,230 4 too short books.jsonl:3 7 changed by cleaning 2 email found",
    "123 1,107 45,678 22,839 75.0% 62.5%",
    "init → pt perplexity on consult 21.12 → 18.38: better, −13.0% (−20.0% to −10.0%), n = 64",
    "gates 1 of 1 passed warnings none",
    "What helps? init <script>alert(1)</script> pt Rest & water …",
    "perplexity ↓ on consult , n = 64 64 21.12 20.12 to 22.12 18.38 ★ 17.38 to 19.38 better than init: −13.0% (−20.0%",
    "reward_margin ↑ on consult , n = 64 64 – it is the model that rewards are measured against 1.5",
    "user What helps? init <script>alert(1)</script> pt Rest & water …",
    "✓ gate passed: `evaluate`: x.yaml:12:13: perplexity of `pt` on `consult` is 18.38",
    "659,200",
    "Linux, 2 cores, no GPU",
]


def test_what_the_page_tells(made):
    text = Page(page(made)).text
    assert [words for words in TOLD if words not in text] == []


QUALITY = {
    "perplexity_before": 20.0,
    "perplexity_after": 21.0,
    "quantized": {"perplexity": 21.0, "ratio": 1.05, "ratio_ci": [1.04, 1.0625], "kl": 0.0345, "top1_agreement": 0.914}
    | {"layer_errors": [0.01, 0.02]},
    "rounded": {"perplexity": 24.0, "ratio": 1.2, "ratio_ci": [1.125, 1.25], "kl": 0.125, "top1_agreement": 0.875}
    | {"layer_errors": [0.03, 0.05]},
    "perplexity_rows": 64,
    "perplexity_tokens": 12345,
    **{"bytes_before": 8, "bytes_after": 2, "fallback": []},
}


@pytest.fixture
def quantized(project):
    stages = "stages:\n  init: {architecture: bloom, data: books}\n  quantize: {calibration: {data: books}}\n"
    project.write("x.yaml", planned.TOP + stages)

    def made(metrics, **record):
        steps = build()
        pretend(steps["init"], {"parameters": 659200, "vocab_size": 2048})
        pretend(steps["quantize"], metrics, **record)
        assert main(["report", "x.yaml"]) == 0
        return Page(Path(project.capsys.readouterr().out.splitlines()[0]).read_text(encoding="utf-8")).text

    return made


def test_what_quantization_cost(quantized):
    text = quantized(QUALITY, memory={"host": 3 * 10**9, "gpu": 10**9})
    assert "the original 20 – – – quantize, GPTQ 21 +5.0% +4.0% to +6.2% 0.0345 91.4%" in text
    assert "rounded 24 +20.0% +12.5% to +25.0% 0.125 87.5%" in text
    assert "On 64 rows (12,345 tokens)" in text
    assert "Every module was calibrated." in text
    assert "error of each layer's output" in text
    assert "3.0 GB GPU 1.0 GB" in text


def test_an_estimate_is_beside_what_was_measured(quantized):
    memory = {"memory": {"host": 1_500_000_000, "gpu": None}}
    text = quantized(QUALITY, **memory, estimate={"total": 1_200_000_000, "seconds": 50.0})
    assert "1.5 GB estimated 1.2 GB" in text
    assert "62 s estimated 50 s" in text
    assert "0.4 to 0.6 GB of main memory" in text


def test_what_quantization_could_not_do(quantized):
    text = quantized({**QUALITY, "rounded": {"why": "its perplexity is no number"}, "fallback": ["a.b", "c.d"]})
    assert "rounded its perplexity is no number" in text
    assert "2 modules could not be calibrated and were only rounded: a.b, c.d." in text


def test_every_fingerprint_and_file_is_there(made):
    found = page(made)
    for step in build().values():
        assert step.fingerprint in found
    assert artifact.read(build()["evaluate"].folder)["files"]["answers.jsonl"]["sha256"] in found


def test_an_answer_is_text_and_never_markup(made):
    found = page(made)
    assert ATTACK not in found
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in found


# Line separators, control characters, a byte order mark, an override of direction, a lone quote, and markup.
ANY_TEXT = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\te\x1b[2J\x07\x7f\ufeff\u202ef {{ 1 }} {% x %} </p> <!-- ]]> & \" '"


def test_an_answer_of_any_text_is_on_the_page_as_it_is(project):
    project.write("x.yaml", CONFIG)
    run(build(), answers=asked(ANY_TEXT, f"{ANY_TEXT}\r\n{ANY_TEXT}"))
    assert main(["report", "x.yaml"]) == 0
    found = Path("saves/x/report.html").read_bytes().decode()
    assert f'<p class="text">{escape(ANY_TEXT)}</p>' in found
    assert f'<p class="text">{escape(ANY_TEXT)}\r\n{escape(ANY_TEXT)} …</p>' in found
    assert "Evaluation" in Page(found).text  # every tag is closed


def test_secrets_stay_out(made, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "helps?&12345")
    made.write("x.yaml", CONFIG + "# helps?&12345\n")
    found = page(made)
    assert "&lt;MY_API_KEY&gt;" in found
    assert "12345" not in found


def test_the_lineage_names_the_models(project):
    text = project.model("m") + "  sft: {data: consult, lora: {r: 2}}\n  merge:\n"
    project.write("x.yaml", text)
    assert main(["report", "x.yaml"]) == 0
    found = Page(Path("saves/x/report.html").read_text(encoding="utf-8")).text
    assert "from m folder:" in found
    assert f"from sft {build()['sft'].fingerprint}" in found


def compared(better="pt", **more):
    pair = {"metric": "perplexity", "data": "consult", "model": "pt", "versus": "init", "better": better}
    table = {**TABLE, "comparisons": [pair | RATIO | more]}
    run(build(), table)
    assert main(["report", "x.yaml"]) == 0
    return Page(Path("saves/x/report.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ({"better": "init", "change": 1.0004, "ci": [1.0001, 1.0007]}, "worse than init: +0.0% (+0.0% to +0.1%)"),
        ({"better": None, "change": 0.99, "ci": [0.97, 1.01]}, "≈ init: −1.0% (−3.0% to +1.0%)"),
        ({"better": None, "change": 1.0, "ci": [1.0, 1.0]}, "= init"),
        ({"n": 5}, "≈ init: −13.0% (−20.0% to −10.0%)"),
    ],
    ids=["worse", "chance", "equal", "too few rows"],
)
def test_no_star_for_a_difference_that_may_be_chance(project, pair, told):
    project.write("x.yaml", CONFIG)
    text = compared(**pair)
    is_worse = pair.get("better") == "init"
    assert told in text
    assert "18.38 ★" not in text
    assert ("init → pt perplexity on consult 21.12 → 18.38: worse" in text) == is_worse


def test_the_page_begins_with_the_result_the_warnings_and_one_question(made):
    part = build()["pt"].folder / "events.jsonl"
    with open(part, "a", encoding="utf-8") as file:
        file.write('\n{"kind": "note", "time": 0, "text": "9 of 9 rows lose their end", "warning": true}\n')
    text = Page(page(made)).text
    parts = [
        "init → pt perplexity",
        "warnings 1",
        "stage `pt`: 9 of 9 rows lose",
        "What helps? init",
        "What ran, and why",
    ]
    places = [text.index(words) for words in parts]
    assert places == sorted(places)
    assert "nothing it depends on has changed" not in text


def test_a_gate_that_says_no(made):
    made.write("x.yaml", CONFIG.replace("versus: init, max_increase: 6%", "max: 10"))
    text = Page(page(made)).text
    assert "✗ gate failed: `evaluate`: x.yaml:12:13: perplexity of `pt` on `consult` is 18.38" in text
    assert "a gate of `evaluate` failed, and `run` stops after it" in text


def test_nothing_has_run_yet(made):
    found = Page(page(made, "--saves", "other")).text
    assert "0 of 4 stages done" in found
    assert "Stages Config Lineage result nothing has run yet warnings none What ran, and why" in found
    assert "Gates" not in found
    assert "Evaluation" not in found


def test_a_stage_that_is_not_finished_shows_how_far_it_came(made):
    made.write("z.yaml", CONFIG.replace("r: 8", "r: 4"))
    part = build("z.yaml")["pt"].part
    part.mkdir()
    lines = [json.dumps({"time": 0, **event}) for event in EVENTS[:4]]
    (part / "events.jsonl").write_text("\n".join([*lines, '{"kind": "lo']), encoding="utf-8")  # being written
    assert made.call("report", "z.yaml", "--curves", "curves")[0] == 0
    text = Page(Path("saves/z/report.html").read_text(encoding="utf-8")).text
    assert "1 of 4 stages done" in text
    assert "pt (not run yet) " in text
    assert Path("curves/pt/metrics.csv").read_text(encoding="utf-8").endswith("\n5,,3.0,5e-05,1000\n")


def test_a_folder_that_two_configs_use_says_so(made):
    made.write("z.yaml", CONFIG)
    for step in build("z.yaml").values():
        link(step.folder, step.link) if step.state == "done" else None
    assert "done also used by z 2025-11-22" in Page(page(made)).text


def test_curves_leave_out_what_was_done_again_and_what_a_clock_says(made):
    rows = charts.history(build()["pt"].folder)
    assert charts.curves(rows)["loss"] == {
        "held out loss": [(0, 3.5), (20, 2.25)],
        "loss": [(5, 3.0), (10, 2.7), (20, 2.5)],
    }
    assert charts.curves(rows)["tokens per second"] == {"tokens per second": [(10, 1000.0)]}
    assert charts.as_csv(rows) == (
        "step,eval_loss,loss,learning_rate,num_tokens,grad_norm\n"
        "0,3.5,,,,\n5,,3.0,5e-05,1000,\n10,,2.7,4e-05,3000,\n20,2.25,2.5,1e-05,7000,0.5\n"
    )


def test_curves_are_written_the_same_each_time(made):
    once, again = (made.call("report", "x.yaml", "--curves", name) for name in ("one", "two"))
    assert once[1] == "saves/x/report.html\none/pt/loss.png\none/pt/metrics.csv\n"
    assert again[0] == 0
    assert Path("one/pt/loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("loss.png", "metrics.csv"):
        assert Path("one/pt", name).read_bytes() == Path("two/pt", name).read_bytes()


def test_the_report_of_no_config(made):
    code, _, err = made.call("report", "y.yaml")
    assert code == 2
    assert err.startswith("y.yaml")
    assert made.call("report", "x.yaml", "--out", "saves")[::2] == (
        2,
        "--out saves: is a folder; name a file, such as saves/report.html\n",
    )


@pytest.fixture
def two(made):
    """A second run, with another rate, another figure and another answer."""
    made.write("y.yaml", CONFIG.replace("r: 8", "r: 16"))
    table = {**TABLE, "figures": [*figures({"init": 21.125, "pt": 17.5}), *TABLE["figures"][2:]]}
    steps = build("y.yaml")
    steps.pop("init")
    link(build()["init"].folder, Path("saves/y/init"))
    pretend(steps["pt"], {**PT, "eval_loss": 2.0})
    values = {"models": ["init", "pt"], "figures": {"perplexity": {"consult": {"init": 21.125, "pt": 17.5}}}}
    files = [("evaluation.json", [table]), ("answers.jsonl", [asked(after="Sleep")])]
    pretend(steps["evaluate"], values, files)
    return made


def test_a_diff_in_whole(two):
    assert two.call("diff", "x.yaml", "y") == (
        0,
        """\
A: x.yaml
B: y

settings: 1 differs
  stage  name    A  B
  pt     lora.r  8  16

versions: none differ

figures: 2 differ; 31 are the same
  stage     name                           A      B
  evaluate  figures.perplexity.consult.pt  18.38  17.5
  pt        eval_loss                      2.25   2

answers: 1 of 2 differ
  prompts, row 1, pt: What helps?
    A: Rest & water
    B: Sleep
""",
        "",
    )


def test_a_diff_for_scripts(two):
    code, out, _ = two.call("diff", "saves/x", "saves/y", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["settings"] == [{"stage": "pt", "name": "lora.r", "a": 8, "b": 16}]
    assert [(one["name"], one["a"], one["b"]) for one in found["figures"]][-1] == ("eval_loss", 2.25, 2.0)
    assert [(one["model"], one["a"], one["b"]) for one in found["answers"]] == [("pt", "Rest & water", "Sleep")]


def test_a_small_difference_shows(two):
    step = build("y.yaml")["pt"]
    record = json.loads((step.folder / "record.json").read_text(encoding="utf-8"))
    record["metrics"]["eval_loss"] = 2.2500001
    (step.folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert "pt        eval_loss                      2.25   2.2500001" in two.call("diff", "x", "y")[1]


def answers_of(two, a, b):
    """The lines of a diff below the number of answers that differ."""
    for name, answer in (("x.yaml", a), ("y.yaml", b)):
        file = build(name)["evaluate"].folder / "answers.jsonl"
        file.write_text(json.dumps(asked(after=answer), ensure_ascii=False) + "\n", encoding="utf-8")
    code, out, err = two.call("diff", "x", "y")
    assert (code, err) == (0, "")
    return out.partition("\nanswers: ")[2].split("\n")


LONG = "word " * 60


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        (
            "one",
            ANY_TEXT,
            ("one", "a b c d e\\x1b[2J\\x07\\x7f\ufeff\u202ef {{ 1 }} {% x %} </p> <!-- ]]> & \" '"),
        ),
        ("'", '"', ("'", '"')),
        ("one two", "one\u2028two", ("'one two'", "'one\\u2028two'")),
        (LONG + "end", LONG + "END", ("…" + LONG[-20:] + "end'", "…" + LONG[-20:] + "END'")),
        (f"{LONG}x{LONG}", f"{LONG}y{LONG}", (f"…{LONG[-20:]}x{LONG[:79]}", f"…{LONG[-20:]}y{LONG[:79]}")),
    ],
    ids=["any text", "quotes", "white space", "late", "middle"],
)
def test_a_diff_shows_answers_of_any_text_on_one_line_each(two, a, b, shown):
    assert answers_of(two, a, b) == [
        "1 of 2 differ",
        "  prompts, row 1, pt: What helps?",
        f"    A: {shown[0]}",
        f"    B: {shown[1]}",
        "",
    ]


def test_a_diff_cuts_no_secret_in_two(two, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-" + "1234" * 10)
    lines = answers_of(two, "word " * 18 + "canary-" + "1234" * 10, "other")
    assert lines[2] == "    A: " + "word " * 18 + "<MY_API_K…"


def test_a_run_with_itself(made):
    assert "settings: none differ" in made.call("diff", "x", "x")[1]


def test_a_diff_of_no_run(two):
    assert two.call("diff", "xs", "z.yaml") == (
        2,
        "",
        "xs: there is no run of this name in saves; did you mean `x`?\n"
        "z.yaml: there is no run of this name in saves; there is `x`, `y`\n"
        "2 problems; nothing was run\n",
    )
