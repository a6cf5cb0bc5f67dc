"""The server over HTTP, with OpenAI's own client and LangChain's, and with clients that break things."""

import base64
import http.client
import json
import socket
import threading
import time
import urllib.request

import pytest

pytestmark = pytest.mark.train
ASKED = [{"role": "user", "content": "感冒了应该注意什么？"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.fixture(scope="module")
def server(served):
    with served(queue=64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def call(server, path, body=None, *, method=None, headers=None, port=None):
    """The status, the headers and the text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port or server.port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})}
    connection.request(method or ("POST" if data is not None else "GET"), path, data, given)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def message(text):
    return json.loads(text)["error"]["message"]


def test_the_greedy_answer_is_the_engines(client, engine):
    answer = client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=24)
    ids = engine.prompt(ASKED)
    assert len(engine.answer(ASKED, 24)) > 5
    assert answer.choices[0].message.content == engine.answer(ASKED, 24)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 24
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_answer_with_its_usage_and_done(client, server, engine):
    settings = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 24, "stream": True}
    chunks = list(client.chat.completions.create(**settings, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == engine.answer(ASKED, 24)
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [24]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    _, headers, raw = call(server, "/v1/chat/completions", settings)
    assert headers["content-type"].startswith("text/event-stream")
    assert raw.endswith("data: [DONE]\n\n")


def test_several_answers_stop_texts_and_seeds(client):
    settings = {"model": "tiny", "messages": ASKED, "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12}
    first = client.chat.completions.create(**settings)
    again = client.chat.completions.create(**settings)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    whole = texts[0]
    stop = whole[2:4]
    stopped = client.chat.completions.create(**settings, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.find(stop)].rstrip()
    assert stopped.finish_reason == "stop"


def test_plain_completions_go_on_without_the_template(client, engine):
    answer = client.completions.create(model="tiny", prompt=["头痛", "咳嗽"], temperature=0, max_tokens=6)
    ids = [engine.encoder.token_ids([text], special=True)[0] for text in ("头痛", "咳嗽")]
    expected = engine.generate(ids, {"max_new_tokens": 6})
    assert [choice.text for choice in answer.choices] == [
        engine.tokenizer.decode(one, skip_special_tokens=True) for one in expected
    ]


def test_langchain_talks_to_it_unchanged(server, engine):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=16)
    expected = engine.answer(ASKED, 16)
    assert model.invoke([("user", ASKED[0]["content"])]).content == expected
    assert "".join(chunk.content for chunk in model.stream([("user", ASKED[0]["content"])])) == expected


def test_generate_takes_an_instruction(server, engine):
    asked = {"instruction": "感冒了", "input": "应该注意什么？", "temperature": 0, "max_new_tokens": 10}
    status, _, text = call(server, "/generate", asked)
    expected = engine.answer([{"role": "user", "content": "感冒了\n应该注意什么？"}], 10)
    assert (status, json.loads(text)["response"]) == (200, expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logprobs": True}, "this server does not support `logprobs`; remove it"),
        ({"response_format": {"type": "json_object"}}, "this server does not support `response_format`; remove it"),
        ({"temprature": 1}, "there is no parameter `temprature`; did you mean `temperature`?"),
        ({"max_tokens": -4}, "`max_tokens`: Input should be greater than or equal to 1"),
        ({"temperature": 9}, "`temperature`: Input should be less than or equal to 2"),
        ({"n": 100}, "this server gives 8 answers to a request at most"),
        ({"model": "other"}, "there is no model `other`; there is `tiny`"),
        ({"stream_options": {"include_usage": True}}, "`stream_options` needs `stream: true`"),
        ({"messages": []}, "`messages`: List should have at least 1 item after validation, not 0"),
        ({"max_tokens": True}, "`max_tokens`: Input should be a valid integer"),
        ({"temperature": "0.5"}, "`temperature`: Input should be a valid number"),
        ({"stop": [""]}, "`stop`: takes up to 16 texts of 1 to 500 characters"),
        ({"stop": ["a"] * 17}, "`stop`: takes up to 16 texts of 1 to 500 characters"),
        ({"parallel_tool_calls": False}, "this server does not support `parallel_tool_calls`; remove it"),
        ({"tools": [TOOL], "tool_choice": "required"}, "`tool_choice`: Input should be 'auto' or 'none'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
            "`messages.0.content.1`: this server reads text alone; remove the part of type `image_url`",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "`messages.0.content`: Input should be a valid string"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "多喝水。"}]},
            "the last message is from the assistant; end with the user's question",
        ),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "`max_tokens` and `max_completion_tokens` differ; they mean the same, so send one",
        ),
    ],
)  # fmt: skip
def test_a_parameter_without_effect_is_refused_by_name(server, change, text):
    status, _, raw = call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 4, **change})
    assert (status, message(raw)) == (404 if "model" in change else 400, text)
    assert json.loads(raw)["error"]["param"] in change


def test_parameters_that_ask_for_nothing_are_taken(server):
    nothing = {"logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}, "seed": None, "user": "me"}
    status, _, _ = call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1, **nothing})
    assert status == 200


def test_roles_that_training_refuses_are_refused(server):
    turns = [*ASKED, *ASKED]
    status, _, raw = call(server, "/v1/chat/completions", {"messages": turns, "max_tokens": 1})
    assert status == 400
    assert message(raw).startswith("message 2 of `prompt` is from the user, not the assistant")


def test_a_tool_call_in_the_answer_is_handed_out(server, client, engine, monkeypatch):
    """An untrained model calls nothing, so the text of its answer is set; all else is as it is served."""
    from stages.model import live

    called = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    real = live.Answer._update_text

    def update(answer, *more):
        real(answer, *more)
        if answer.reason is not None:
            answer.text = called

    monkeypatch.setattr(live.Answer, "_update_text", update)
    settings = {"model": "tiny", "messages": ASKED, "max_tokens": 4, "tools": [TOOL]}
    choice = client.chat.completions.create(**settings).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    (made,) = choice.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "北京"})
    chunks = list(client.chat.completions.create(**settings, stream=True))
    calls = [one for chunk in chunks for choice in chunk.choices for one in choice.delta.tool_calls or []]
    assert [(one.index, one.function.name) for one in calls] == [(0, "weather")]
    # The call and the output of the tool go back into the conversation.
    turn = {"role": "assistant", "content": None, "tool_calls": [made.model_dump()]}
    turns = [*ASKED, turn, {"role": "tool", "tool_call_id": made.id, "content": "晴"}]
    monkeypatch.undo()
    answer = client.chat.completions.create(model="tiny", messages=turns, tools=[TOOL], max_tokens=3, temperature=0)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe{}", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
        (b"null", 400),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"x" * 2_000_001, 413),
        (b"x" * 20_000_000, 413),  # a client that is still sending gets the answer too
    ],
)
def test_a_broken_body_is_answered(server, body, status):
    found, _, text = call(server, "/v1/chat/completions", body)
    assert found == status
    assert message(text)


def test_other_hosts_are_refused_without_a_key(server):
    status, _, text = call(server, "/v1/models", headers={"host": "evil.example"})
    assert (status, message(text)) == (
        403,
        "this server answers requests to localhost and loopback addresses, not to `evil.example`",
    )


def test_loopback_hosts_are_answered_and_a_forwarded_one_does_not_count(server):
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.2:1", "[::1]", "[::1]:8000"):
        assert call(server, "/v1/models", headers={"host": host})[0] == 200
    for host in ("localhost.evil.example", "[::2]:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", ""):
        assert call(server, "/v1/models", headers={"host": host, "x-forwarded-host": "localhost"})[0] == 403


@pytest.mark.parametrize(
    ("given", "status", "text"),
    [
        (("/v1/files", {}), 404, "there is no route `/v1/files`; /openapi.json describes all routes"),
        (("/generate",), 405, "`/generate` takes POST, not GET"),
        (("/v1/models", {}), 405, "`/v1/models` takes GET, not POST"),
    ],
)  # fmt: skip
def test_a_route_or_a_method_that_is_not_there_is_named(server, given, status, text):
    found, _, raw = call(server, *given)
    assert (found, message(raw)) == (status, text)


def test_a_body_that_is_not_declared_as_json_is_refused(server):
    """A page of another site can send such a body without asking; it must not put the model to work."""
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        status, _, raw = call(server, "/generate", {"instruction": "x"}, headers={"content-type": kind})
        assert (status, message(raw)) == (
            415,
            "send the body as JSON, with the header `content-type: application/json`",
        )


def test_head_is_answered_as_get_is_without_a_body(server):
    for path in ("/", "/health", "/v1/models"):
        status, headers, text = call(server, path, method="HEAD")
        assert (status, text, int(headers["content-length"]) > 0) == (200, "", True)


def test_each_prompt_is_counted_once_however_often_it_is_answered(server, engine):
    size = len(engine.encoder.token_ids(["头痛"], special=True)[0])
    body = {"prompt": ["头痛", "头痛"], "n": 2, "max_tokens": 3, "temperature": 1.0}
    usage = json.loads(call(server, "/v1/completions", body)[2])["usage"]
    assert usage == {"prompt_tokens": 2 * size, "completion_tokens": 12, "total_tokens": 2 * size + 12}


def test_max_length_holds_beside_max_new_tokens(server, engine):
    size = len(engine.prompt([{"role": "user", "content": "感冒了"}]))
    body = {"instruction": "感冒了", "max_length": size + 3, "max_new_tokens": 9, "temperature": 0}
    assert json.loads(call(server, "/generate", body)[2])["usage"]["completion_tokens"] == 3


def test_a_request_without_a_seed_does_not_depend_on_the_seed_of_another(server):
    seeded = {"messages": ASKED, "max_tokens": 1, "temperature": 1.0, "seed": 7}
    body = {"messages": ASKED, "max_tokens": 12, "temperature": 1.0}
    texts = []
    for _ in range(2):
        call(server, "/v1/chat/completions", seeded)
        texts.append(json.loads(call(server, "/v1/chat/completions", body)[2])["choices"][0]["message"]["content"])
    assert texts[0] != texts[1]


def test_a_request_that_waits_too_long_is_answered_while_another_one_runs(served, engine):
    from pipeline.serve.answering import Limits

    went_on = threading.Event()
    handle = engine.model.register_forward_pre_hook(lambda *given: went_on.wait(30) and None)
    body = {"messages": ASKED, "max_tokens": 4, "temperature": 0}
    try:
        with served(limits=Limits(seconds=0.5)) as server:
            first = threading.Thread(target=call, args=(server, "/v1/chat/completions", body))
            first.start()
            time.sleep(0.2)
            status, _, text = call(server, "/v1/chat/completions", {**body, "seed": 1})
            assert not went_on.is_set()
            assert "stagewise_waiting_requests 0.0" in call(server, "/metrics")[2]
            went_on.set()
            first.join()
    finally:
        went_on.set()
        handle.remove()
    assert (status, message(text)) == (504, "the answer took too long; ask for fewer tokens with `max_tokens`")


def test_a_server_that_ends_leaves_no_thread_and_no_request_unanswered(served, engine):
    handle = engine.model.register_forward_pre_hook(lambda *given: time.sleep(0.02))
    body = {"messages": ASKED, "max_tokens": 900, "temperature": 0}
    found = []

    def ask(server, seed):
        try:
            found.append(call(server, "/v1/chat/completions", {**body, "seed": seed})[0])
        except OSError:
            found.append("closed")

    try:
        with served() as server:
            threads = [threading.Thread(target=ask, args=(server, seed)) for seed in range(3)]
            for thread in threads:
                thread.start()
            while "stagewise_running_answers 1.0" not in call(server, "/metrics")[2]:
                time.sleep(0.05)
            workers = [thread for thread in threading.enumerate() if thread.name == "worker"]
            began = time.monotonic()
        for thread in threads:
            thread.join(20)
    finally:
        handle.remove()
    assert time.monotonic() - began < 10
    assert len(found) == 3
    assert 200 not in found
    assert sum(thread.is_alive() for thread in workers) <= 1  # the module's own server has one


def test_every_route_but_health_needs_the_key(served):
    paths = ("/", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing")
    posts = ("/v1/chat/completions", "/v1/completions", "/generate")
    with served(key="k" * 20) as server:
        for path in paths:
            assert call(server, path)[0] == 401
            assert call(server, path, headers={"authorization": "Bearer " + "k" * 19})[0] == 401
        for path in posts:
            assert call(server, path, b"{")[0] == 401  # before the body is looked at
        assert call(server, "/health")[0] == 200
        for scheme in ("Bearer " + "k" * 20, "Basic " + base64.b64encode(b"me:" + b"k" * 20).decode()):
            assert call(server, "/v1/models", headers={"authorization": scheme})[0] == 200


def test_a_full_queue_answers_429_with_the_time_to_wait(served):
    body = {"messages": ASKED, "max_tokens": 200, "temperature": 0}
    with served(queue=1, batch=1) as server:
        found = []

        def ask():
            found.append(call(server, "/v1/chat/completions", body)[:2])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    statuses = sorted(status for status, _ in found)
    assert set(statuses) == {200, 429}
    assert all(int(headers["retry-after"]) >= 1 for status, headers in found if status == 429)


def test_a_client_that_leaves_ends_its_work(served):
    body = json.dumps({"messages": ASKED, "max_tokens": 900, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"  # noqa: E501
    with served() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(head.encode() + body)
            assert b"200 OK" in leaving.recv(200)
        deadline = time.monotonic() + 20
        while "stagewise_running_answers 0.0" not in (text := call(server, "/metrics")[2]):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        tokens = next(
            line for line in text.splitlines() if line.startswith('stagewise_tokens_total{kind="completion"}')
        )
        assert float(tokens.split()[1]) < 800


def test_a_body_that_never_arrives_is_given_up(served):
    with served(body_seconds=0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        slow.settimeout(20)
        assert b"408" in slow.recv(200)


def test_an_answer_that_takes_too_long_is_ended(served, engine):
    from pipeline.serve.answering import Limits

    with served(limits=Limits(seconds=0.05)) as server:
        status, _, text = call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 800})
    assert (status, message(text)) == (504, "the answer took too long; ask for fewer tokens with `max_tokens`")


def test_two_models_and_the_page(served, engine):
    with served({"dpo": engine, "base": engine}) as server:
        names = [model["id"] for model in json.loads(call(server, "/v1/models")[2])["data"]]
        status, headers, text = call(server, "/")
    assert names == ["dpo", "base"]
    assert status == 200
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert "https://" not in text
    assert "innerHTML" not in text


def test_its_own_description_names_every_route(server):
    described = json.loads(urllib.request.urlopen(f"{server.url}/openapi.json").read())
    assert {"/v1/chat/completions", "/v1/completions", "/generate", "/health", "/metrics"} <= described["paths"].keys()


def test_equal_requests_that_wait_are_one_batch(served, engine):
    """Eight requests at once take far fewer steps of the model than one after the other."""
    steps = []
    handle = engine.model.register_forward_hook(lambda *given: steps.append(1))
    body = {"messages": ASKED, "max_tokens": 60, "temperature": 0}
    try:
        with served() as server:
            threads = [threading.Thread(target=call, args=(server, "/v1/chat/completions", body)) for _ in range(9)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        handle.remove()
    assert 60 <= len(steps) <= 60 * 4
