"""Cleaning: the settings of each step, its effect on single texts and rows, and the account of all rows."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from stages.data import cleaning, near_duplicates
from stages.data.cleaning_steps import Steps
from stages.runtime.errors import StageError

STEPS = TypeAdapter(Steps)
HAN = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 2000))


def steps(*written):
    """Steps as YAML has them, validated strictly, as the config does."""
    return STEPS.validate_python(list(written), strict=True)


def placed(*rows):
    """Rows with places, of which the first is `x:1`; a string becomes a text row."""
    return [(f"x:{number}", text(row) if isinstance(row, str) else row) for number, row in enumerate(rows, 1)]


def text(content):
    return {"text": content}


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def pair(prompt, chosen, rejected):
    say = {"prompt": f"u:{prompt}", "chosen": f"a:{chosen}", "rejected": f"a:{rejected}"}
    return {name: chat(turn)["messages"] for name, turn in say.items()}


def clean(chosen, rows, others=None):
    """The kept rows with their places, and the account."""
    cleaned = cleaning.Cleaning(chosen, rows, others)
    return list(cleaned), cleaned.account


def cleaned(content, *written):
    """One text after the steps; None when its row is dropped."""
    kept, _ = clean(steps(*written), placed(content))
    return kept[0][1]["text"] if kept else None


def kept_of(rows, *written, **others):
    """The numbers of the kept rows, and the places of the dropped rows by reason."""
    kept, account = clean(steps(*written), rows, others)
    assert account.read == account.kept + sum(entry.rows for entry in account.dropped.values()) == len(rows)
    assert account.kept == len(kept)
    return [int(place[2:]) for place, _ in kept], {reason: entry.first for reason, entry in account.dropped.items()}


# Settings


def test_a_list_as_yaml_has_it():
    found = steps("html", {"length": {"min": 5}}, {"language": "zh"}, "near_duplicates", {"personal_data": "count"})
    assert [step.model_dump() for step in found] == [
        {"step": "html"},
        {"step": "length", "min": 5, "max": None},
        {"step": "language", "name": "zh", "share": 0.5},
        {"step": "near_duplicates", "similarity": 0.8},
        {"step": "personal_data", "action": "count"},
    ]
    assert STEPS.validate_json(STEPS.dump_json(found)) == found
    assert steps({"language": {"name": "zh", "share": 0.7}}, {"html": None}, {"near_duplicates": {"similarity": 1}})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("htlm", "there is no cleaning step `htlm`; did you mean `html`?"),
        ({"near_dup": {}}, "there is no cleaning step `near_dup`; did you mean `near_duplicates`?"),
        (3, "a step is a name, such as `html`, or one with settings, such as `{length: {min: 5}}`"),
        ({}, "a step is a name, such as `html`, or one with settings, such as `{length: {min: 5}}`"),
        (
            {"length": {"min": 5}, "language": "zh"},
            "`length`, `language` are in one mapping; give each step its own, as `{name: …}`",
        ),
        ("length", "`length` needs settings, such as `length: {min: 5, max: 4000}`"),
        ("language", "`language` needs settings, such as `language: zh`"),
        ("contamination", "`contamination` needs settings, such as `contamination: {against: [exam]}`"),
        ({"length": 5}, "`length` takes its settings as a mapping: `min`, `max`"),
        ({"html": True}, "`html` takes no settings"),
        ({"html": {"tags": 1}}, "`html` has no setting `tags`; it takes none"),
        (
            {"near_duplicates": {"similarty": 0.8}},
            "`near_duplicates` has no setting `similarty`; did you mean `similarity`?",
        ),
        ({"language": "cn"}, "`language` is `cn`; there is `en`, `zh`"),
        ({"personal_data": {"action": "hide"}}, "`personal_data` is `hide`; there is `count`, `mask`"),
        ({"length": {}}, "`length` needs `min`, `max` or both, in characters"),
        ({"length": {"min": 9, "max": 5}}, "`min` is 9, more than `max`, 5; no row is both"),
    ],
)
def test_wrong_settings(written, message):
    with pytest.raises(ValidationError) as error:
        steps("width", written)
    assert [found["msg"] for found in error.value.errors()] == [f"Value error, {message}"]


def test_a_wrong_value_is_found_where_yaml_has_it():
    with pytest.raises(ValidationError) as error:
        steps("html", {"length": {"min": 0, "max": "x"}}, {"contamination": {"against": []}})
    where = [found["loc"] for found in error.value.errors()]
    assert where == [(1, "length", "min"), (1, "length", "max"), (2, "contamination", "against")]


def test_a_step_is_listed_once():
    with pytest.raises(ValidationError, match="`html` is listed 2 times; keep one"):
        steps("html", "width", {"html": None})


# Steps on one row


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  一 \t 二\u3000\xa0三  \r\n四\u2028五\x85六 ", "一 二 三\n四\n五\n六"),
        ("\u3000\u3000段落\n\n\n \n\u3000\u3000段落", "段落\n\n段落"),
        ("血\u200b压\ufeff\x00高\u202e", "血压高"),
        ("家\U0001f468\u200d\U0001f469", "家\U0001f468\u200d\U0001f469"),
        ("- 一\n  - 二  三\n\tx", "- 一\n  - 二 三\n\tx"),
        ("看：\n```python\nif a:\n\n\n    b  =  1\n```\n好  吗", "看：\n```python\nif a:\n\n\n    b  =  1\n```\n好 吗"),
        (" \u3000\n", None),
    ],
)
def test_whitespace(before, after):
    assert cleaned(before, "whitespace") == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<p>高血压<br/>能吃<b>党参</b>吗？</p>", "高血压\n能吃党参吗？"),
        ("<DIV class='a'\n id=b><a href=http://x.cn/?a=1>看</a></DIV>", "看"),
        ("<tr><td>一</td><td>二</td></tr>", "一  二"),
        ("P&lt;0.05，血压&lt;140mmHg且&gt;90", "P<0.05，血压<140mmHg且>90"),
        ("P<0.05且x>3，<WBC>，i<n", "P<0.05且x>3，<WBC>，i<n"),
        ("&amp;nbsp;&amp;amp;lt;p&amp;gt;好&ldquo;的&#8221;&nbsp&#x4e2d;", "好“的”\xa0中"),
        ("?a=1&copy=2&lt3 &foo; &#99999999; AT&T", "?a=1&copy=2&lt3 &foo; &#99999999; AT&T"),
        ("a<!-- x --><script>if (a<b) {}</script><style>p {}</style>b --> <!-- c", "ab --> <!-- c"),
        ("用`<br>`换行：\n```html\n<p>&lt;</p>\n```\n<p>好</p>", "用`<br>`换行：\n```html\n<p>&lt;</p>\n```\n\n好"),
        ("&#0;&#xD800;x", "\ufffd\ufffdx"),
        ("<br>", None),
    ],
)
def test_html(before, after):
    assert cleaned(before, "html") == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ＣＴ检查，５０％（约７．４ｍｇ／ｄＬ）", "CT检查，50%（约7.4mg/dL）"),
        ("你好，世界！“一”；甲／乙。３～５天：１０⁹㎎", "你好，世界！“一”；甲／乙。3～5天：10⁹㎎"),
    ],
)
def test_width(before, after):
    assert cleaned(before, "width") == after


def test_length_counts_all_texts_but_system_prompts():
    rows = placed(
        chat("s:" + "长" * 50, "u:问问", "a:答"),
        chat("u:问问", "a:答答"),
        chat("u:问", "a:答答答答答"),
        pair("问", "好好", "坏"),
    )
    assert kept_of(rows, {"length": {"min": 4, "max": 5}}) == (
        [2, 4],
        {"shorter than 4 characters": ["x:1"], "longer than 5 characters": ["x:3"]},
    )


@pytest.mark.parametrize(
    ("content", "chinese", "english"),
    [
        ("患者服用阿莫西林（amoxicillin）", True, False),
        ("Take amoxicillin (阿莫西林) three times a day.", False, True),
        ("これは日本語の文章です。", False, False),
        ("患者の血圧測定結果、午後再検査", True, False),
        ("한국어 문장입니다", False, False),
        ("Это русский текст", False, False),
        ("120/80", True, True),
    ],
)
def test_language(content, chinese, english):
    assert [cleaned(content, {"language": name}) is not None for name in ("zh", "en")] == [chinese, english]


def test_repeated_lines():
    rows = placed(
        "一二三四五六\n" * 3,
        "一二三四五六\n另外一行完全不同的文字在这里写着\n\n  一二三四五六",
        "| 一二三 | 四五六七八九十 |\n|---|---|\n| 一 |\n|---|---|\n|---|---|",
        chat("u:一二三四五六", "a:一二三四五六"),
    )
    assert kept_of(rows, {"repeated_lines": {"share": 0.25}}) == (
        [2, 3, 4],
        {"more than 0.25 of a text in repeated lines": ["x:1"]},
    )


ID_CARD = "11010519491231002X"  # the example of GB 11643-1999


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("电话13800138000，或+86 139-0013-8000。", "电话[手机号]，或[手机号]。", {"mobile": 2}),
        ("１３８００１３８０００", "[手机号]", {"mobile": 1}),
        (f"身份证{ID_CARD}，{ID_CARD.lower()}", "身份证[身份证号]，[身份证号]", {"id_card": 2}),
        ("邮箱zhang.san+1@mail.qq.com。a@b", "邮箱[邮箱]。a@b", {"email": 1}),
        ("13800138000@139.com", "[邮箱]", {"email": 1}),
        ("110105194912310021 213800138000 0.13800138000 12800138000 1380013800", None, {}),
    ],
)
def test_personal_data(before, after, found):
    kept, account = clean(steps({"personal_data": "mask"}), placed(before))
    assert (kept, account.personal_data) == (placed(after or before), found)
    kept, account = clean(steps({"personal_data": "count"}, "width"), placed(before))
    assert (account.changed, account.personal_data) == (int("１" in before), found)


def test_text_that_a_step_uncovers_is_cleaned_too():
    assert cleaned("1380&#8203;0138&#x200b;000", "personal_data", "whitespace", "html") == "[手机号]"
    assert cleaned("好＜ｂｒ＞的", "html", "width") == "好\n的"
    kept, account = clean(steps({"personal_data": "count"}, "html"), placed("13800138000<br>"))
    assert (kept, account.personal_data) == (placed("13800138000"), {"mobile": 1})


def test_rows_stay_normalised():
    rows = placed(
        chat("s:<p>", "u:<b>问</b>", "a:<p>答</p>"),
        chat("u:<br>", "a:答"),
        pair("问", "<b>好</b>", "好"),
        pair("问", "好", "坏<br>"),
        chat("u: 问", "a:答"),
    )
    before = json.dumps(rows)
    kept, account = clean(steps("html"), rows)
    assert [row for _, row in kept] == [chat("u:问", "a:答"), pair("问", "好", "坏"), chat("u: 问", "a:答")]
    assert asdict(account) == {
        "read": 5,
        "kept": 3,
        "changed": 2,
        "dropped": {
            "empty after `html`": {"rows": 1, "first": ["x:2"]},
            "`chosen` and `rejected` the same after `html`": {"rows": 1, "first": ["x:3"]},
        },
        "personal_data": {},
        "notes": [],
    }
    assert json.dumps(rows) == before


# Steps that compare rows


def test_exact_duplicates():
    rows = placed(
        chat("u:问 题", "a:答"),
        chat("u:问\u3000\n题", "a:答 "),
        chat("s:系统", "u:问 题", "a:答"),
        chat("u:问 题", "a:别的"),
        chat("u:问", "a:题答"),
        pair("问", "好", "坏"),
        pair("问", "坏", "好"),
        chat("u:问 题", "a:答"),
        "每日１片",
        "每日1片",
        "每日1.片",
    )
    assert kept_of(rows, "exact_duplicates") == (
        [1, 3, 4, 5, 6, 7, 9, 11],
        {"exact duplicate": ["x:2, as x:1", "x:8, as x:1", "x:10, as x:9"]},
    )
    assert kept_of([("x:1", text("a")), ("x:1", text("a"))], "exact_duplicates")[0] == [1]


def test_the_account_names_three():
    _, account = clean(steps("exact_duplicates"), placed(*["一"] * 6))
    assert account.dropped["exact duplicate"] == cleaning.Dropped(5, ["x:2, as x:1", "x:3, as x:1", "x:4, as x:1"])


def drawn(chance, length=200):
    return "".join(chance.choices(HAN, k=length))


def jaccard(one, other):
    first, second = ({content[at : at + 5] for at in range(len(content) - 4)} for content in (one, other))
    return len(first & second) / len(first | second)


def planted(chance, originals, copies):
    """Texts with altered copies, and for each copy the index of its original and its own."""
    texts = [drawn(chance, chance.randint(120, 280)) for _ in range(originals)]
    pairs = []
    for _ in range(copies):
        original = chance.randrange(originals)
        signs = list(texts[original])
        for at in chance.sample(range(len(signs)), chance.randint(1, 9)):
            signs[at] = chance.choice(("", chance.choice(HAN), signs[at] + chance.choice(HAN)))
        pairs.append((original, len(texts)))
        texts.append("".join(signs))
    return texts, pairs


def test_near_duplicates_are_found():
    texts, pairs = planted(random.Random(3), 1500, 1000)
    found = near_duplicates.repeats(texts, 0.8)
    alike = {copy for original, copy in pairs if jaccard(texts[original], texts[copy]) >= 0.8}
    assert 300 < len(alike) < 900
    assert len(alike & found.keys()) >= 0.99 * len(alike)
    for copy, (other, value) in found.items():
        assert other < copy
        assert other not in found
        assert value == jaccard(texts[other], texts[copy]) >= 0.8


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.9, 1.0])
def test_other_similarities(similarity):
    texts, pairs = planted(random.Random(4), 300, 300)
    found = near_duplicates.repeats(texts, similarity)
    alike = {copy for original, copy in pairs if jaccard(texts[original], texts[copy]) >= similarity}
    assert alike <= found.keys() if similarity == 1 else len(alike & found.keys()) >= 0.98 * len(alike)
    assert all(jaccard(texts[other], texts[copy]) >= similarity for copy, (other, _) in found.items())


def test_near_duplicates_of_rows():
    base = drawn(random.Random(5), 60)
    rows = placed(
        chat("s:系统提示" * 99, f"u:{base}", "a:答一"),
        chat("s:系统提示" * 99, "u:别的问题", "a:别的答案"),  # alike in its system prompt alone
        chat(f"u:{base[:30]}，{base[30:]}", "a:答一"),
        "短",
        "短",
        "短文",
        base[30:] + "ＡＢ c",
        base[30:] + "ab\nC",
    )
    kept, dropped = kept_of(rows, {"near_duplicates": {"similarity": 0.8}})
    assert kept == [1, 2, 4, 6, 7]
    assert dropped == {"near duplicate": ["x:3, 0.86 like x:1", "x:5, 1.00 like x:4", "x:8, 1.00 like x:7"]}


def test_a_row_similar_only_to_a_dropped_row_is_kept():
    base = drawn(random.Random(6), 100)
    chain = [base, "一" + base[:-8] + "二" * 8, "三" * 8 + base[8:-8] + "二" * 8]
    assert [round(jaccard(*two), 2) for two in ((chain[0], chain[1]), (chain[1], chain[2]))] == [0.86, 0.86]
    assert jaccard(chain[0], chain[2]) < 0.8
    assert kept_of(placed(*chain), "near_duplicates")[0] == [1, 3]


def test_rows_around_one_template_are_not_near_duplicates():
    chance = random.Random(7)
    template = drawn(chance, 150)
    assert near_duplicates.repeats([template + drawn(chance, 60) for _ in range(400)], 0.8) == {}


def test_overlap_with_held_out_rows():
    chance = random.Random(8)
    held = [drawn(chance, 100) for _ in range(3)]
    training = [drawn(chance, 100), held[2] + "。", held[0], drawn(chance, 100), held[2][:-1]]
    found = cleaning.overlap([*map(text, held)], [*map(text, training)])
    assert [(pair.held_out, pair.training, round(pair.similarity, 2)) for pair in found] == [
        (0, 2, 1.0),
        (2, 1, 0.99),
        (2, 4, 0.99),
    ]
    assert cleaning.overlap([], [text("一")]) == cleaning.overlap([text("一")], []) == []


EXAM = chat("u:患者，男，６０岁，反复胸痛３年，最可能的诊断是？", "a:心绞痛")


def test_contamination():
    rows = placed(
        "某书：患者男60岁，反复 胸痛3年；最好休息",  # 13 characters are the same
        "某书：患者男60岁，反复胸痛2年；最好休息",
        chat("s:患者，男，60岁，反复胸痛3年，最可能", "u:别的", "a:别的"),
        chat("u:胸痛3年，最可能的诊断是", "a:心绞痛"),  # 13 are of question and answer together
        chat("u:是否", "a:是"),
        chat("u:是否？", "a:是"),
        chat("u:是否", "a:是的"),
    )
    exam = [EXAM, chat("u:是否", "a:是"), text("……")]
    contamination = {"contamination": {"against": ["exam"]}}
    assert kept_of(rows, contamination, exam=exam, x=[]) == (
        [2, 3, 7],
        {"in `exam`": ["x:1: 患者男60岁反复胸痛3年最", "x:4: 胸痛3年最可能的诊断是心绞", "x:5: 是否是"]},
    )
    assert kept_of(rows, contamination, exam=iter([])) == ([1, 2, 3, 4, 5, 6, 7], {})
    with pytest.raises(StageError) as error:
        clean(steps(contamination), rows, {"exams": []})
    message = "`contamination` is against `exam`, and no other data set is called that; did you mean `exams`?"
    assert str(error.value) == message


# Whatever the rows


PLAIN = ["whitespace", "html", "width", "repeated_lines", "exact_duplicates", "near_duplicates"]
MORE = [
    {"length": {"min": 2, "max": 90}},
    {"personal_data": "mask"},
    {"contamination": {"against": ["exam"], "ngram": 5}},
]
PIECES = [
    *"一二三四五，。！ \t\n\r\0<>/&;`#.@-=1A１Ａ％＜＞．",
    *[
        "\u3000",
        "\u200b",
        "\u2028",
        "\ud800",
        "\U0001f468\u200d",
        "\x85",
        "```",
        "\n```\n",
        "<!--",
        "-->",
        "<br>",
        "</p>",
    ],
    *[
        "<script>",
        "</script>",
        "<a href='x'>",
        "&lt;",
        "&amp;",
        "&nbsp",
        "&#60;",
        "&#xFF1C;",
        "amp;",
        "lt;",
        "br",
        "&#",
    ],
    *[
        "13800138000",
        "+86",
        "a@b.cn",
        ID_CARD,
        "一二三四五六\n",
        "ｂ",
        "高血压怎么办",
    ],
]


def odd_row(chance):
    def some():
        return "".join(chance.choices(PIECES, k=chance.randint(1, 12))) + chance.choice(["", "终"])

    kind = chance.randrange(3)
    if kind == 0:
        return text(some())
    if kind == 1:
        return chat(*(["s:" + some()] if chance.random() < 0.3 else []), "u:" + some(), "a:" + some())
    return pair(some(), some(), some())


@pytest.mark.parametrize("seed", range(5))
def test_any_rows(seed):
    """No row crashes it, every row is accounted for, rows keep their order, and cleaning again changes nothing."""
    chance = random.Random(seed)
    rows = placed(*(odd_row(chance) for _ in range(150)))
    rows += [(f"y:{number}", row) for number, (_, row) in enumerate(chance.choices(rows, k=30))]
    every = [*PLAIN, *MORE]
    exam = [odd_row(chance) for _ in range(3)]
    for _ in range(3):
        chosen = steps(*chance.sample(every, chance.randint(1, len(every))))
        kept, account = clean(chosen, iter(rows), {"exam": exam})
        assert account.read == len(rows) == account.kept + sum(entry.rows for entry in account.dropped.values())
        places = [place for place, _ in rows]
        assert [place for place in places if place in {place for place, _ in kept}] == [place for place, _ in kept]
        assert account.changed == sum(row != dict(rows)[place] for place, row in kept)
        again, second = clean(chosen, kept, {"exam": exam})
        assert again == kept
        assert (second.changed, second.dropped, second.kept) == (0, {}, account.kept)
        assert clean(chosen, rows, {"exam": exam})[1] == account


LONG = ["<" * 100_000, "<!--" * 25_000, "-->" * 25_000, "<script>" * 9_000, "</script>" * 9_000, "`" * 99_999]
LONG += ["a" * 100_000 + "@", "a." * 50_000, "&amp" * 25_000, "&" + "amp;" * 25_000, "&#" + "9" * 99_000 + ";"]
LONG += ["1" * 100_000, "９" * 100_000, " " * 100_000 + "x", "x\n" * 50_000, "<a " + "=" * 99_000, "<a" + " " * 99_000]


@pytest.mark.parametrize("content", LONG)
def test_long_odd_texts_do_not_take_long(content):
    """Each text would take minutes with a pattern that scans the rest of the text again from every position."""
    every = [*PLAIN, {"language": "zh"}, {"personal_data": "mask"}]
    clean(steps(*every), placed(content))


def test_tools_calls_and_labels_are_not_changed():
    tools = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "dose"}}]}
    called = {**chat("u:<b>布洛芬</b>吃多少？"), "tools": tools}
    called["messages"] += [call, {"role": "tool", "content": "400 mg"}, *chat("a:每次 400 毫克。")["messages"]]
    labelled = {
        "prompt": chat("u:发烧怎么办？")["messages"],
        "completion": chat("a:多喝水。")["messages"],
        "label": True,
    }
    rows = placed(called, labelled, {**labelled, "label": False}, labelled)
    kept, account = clean(steps("html", "whitespace", "exact_duplicates", "near_duplicates"), rows)
    assert [row for _, row in kept[:1]] == [
        {**called, "messages": [{"role": "user", "content": "布洛芬吃多少？"}, *called["messages"][1:]]}
    ]
    assert {reason: entry.rows for reason, entry in account.dropped.items()} == {
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert (account.kept, account.changed) == (2, 1)


def test_no_rows():
    assert clean(steps(*PLAIN), []) == ([], cleaning.Account())
    assert clean([], placed("一")) == (placed("一"), cleaning.Account(1, 1))


def test_importing_costs_only_pydantic():
    code = "import stages.data.cleaning, sys; print({'numpy', 'torch', 'datasets'} & {*sys.modules})"
    root = Path(cleaning.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Thoughts, calls and weights


def thinking(thought, **more):
    answer = {"role": "assistant", "content": "答", "reasoning_content": thought, **more}
    return {"messages": [{"role": "user", "content": "问"}, answer]}


def test_a_thought_is_cleaned_as_the_words_are():
    kept, account = clean(steps("html", "personal_data"), placed(thinking("<b>想</b> 给 wang@mail.cn 写信")))
    assert [row for _, row in kept] == [thinking("想 给 [邮箱] 写信")]
    assert account.personal_data == {"email": 1}


def test_rows_that_differ_in_a_thought_a_call_or_a_weight_are_no_duplicates():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [thinking("想"), thinking("思"), thinking("想", tool_calls=[call]), thinking("想", weight=0), thinking("想")]
    assert kept_of(placed(*rows), "exact_duplicates") == ([1, 2, 3, 4], {"exact duplicate": ["x:5, as x:1"]})
