"""Answers while they are generated: stop texts, limits, penalties, seeds; greedy ones are those of the engine."""

import pytest

pytestmark = pytest.mark.train
QUESTIONS = ("感冒了怎么办？", "高血压的人能喝咖啡吗？要注意什么？", "A question.")


@pytest.fixture(scope="module")
def live():
    from stages.model import live

    return live


def prompts(engine):
    return [engine.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]


def answered(live, engine, sampling=None, **settings):
    answers = [live.Answer(ids, settings.pop("max_tokens", 24), **settings) for ids in prompts(engine)]
    live.generate(engine, answers, sampling or live.Sampling(temperature=0))
    return answers


def test_a_batch_gives_what_the_engine_gives_alone(live, engine):
    answers = answered(live, engine)
    alone = [engine.generate([ids], {"max_new_tokens": 24})[0] for ids in prompts(engine)]
    assert [answer.ids for answer in answers] == alone
    assert [answer.text for answer in answers] == [engine.text(ids) for ids in alone]


def test_each_answer_of_a_batch_has_its_own_limit(live, engine):
    answers = [live.Answer(ids, limit) for ids, limit in zip(prompts(engine), (3, 9, 24), strict=True)]
    whole = answered(live, engine)
    live.generate(engine, answers, live.Sampling(temperature=0))
    assert [len(answer.ids) for answer in answers] == [3, 9, 24]
    assert [answer.ids for answer in answers] == [
        one.ids[: len(answer.ids)] for one, answer in zip(whole, answers, strict=True)
    ]
    assert {answer.reason for answer in answers} == {"length"}


def test_an_answer_ends_before_a_stop_text_and_no_part_of_it_is_shown(live, engine):
    whole = answered(live, engine)[0].text
    stop = whole[len(whole) // 2 :][:3]
    pieces = []
    answer = live.Answer(prompts(engine)[0], 24, stop=[stop], on_text=pieces.append)
    live.generate(engine, [answer], live.Sampling(temperature=0))
    assert answer.reason == "stop"
    assert answer.text == whole[: whole.find(stop)].rstrip()
    assert "".join(pieces) == answer.text


def test_pieces_of_text_add_up_to_the_answer_and_hold_whole_characters(live, engine):
    """Token by token: a character of several tokens is shown once it is whole, and a stop text never in part."""
    text = "  多喝水，注意休息 👍。\n\n忌辛辣。\n\n"
    pieces = []
    answer = live.Answer([1], 1000, stop=["###"], on_text=pieces.append)
    for token in engine.encoder.token_ids([text + "##x ###rest"])[0]:
        answer.take(token, engine, set())
    assert answer.reason == "stop"
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text == f"{text}##x".strip()
    assert not any("\ufffd" in piece or piece.endswith("#") for piece in pieces)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(live, engine):
    seeds = (1, 1, 2)
    texts = [[a.text for a in answered(live, engine, live.Sampling(temperature=1.0, seed=seed))] for seed in seeds]
    assert texts[0] == texts[1] != texts[2]


def test_a_frequency_penalty_counts_the_tokens_of_the_answer(live, engine):
    """Greedy answers of an untrained model repeat themselves; with a strong penalty no token comes twice soon."""
    free = answered(live, engine)[0].ids
    penalised = answered(live, engine, live.Sampling(temperature=0, frequency_penalty=2.0, presence_penalty=2.0))[0].ids
    assert len(set(free)) < len(set(penalised)) == len(penalised)


def test_temperature_samples_also_where_the_models_own_config_does_not(live, engine):
    assert not engine.model.generation_config.do_sample
    assert live.Sampling().settings() == {"num_beams": 1}
    assert live.Sampling(temperature=0.7).settings()["do_sample"]
    assert live.Sampling(top_p=0.5).settings() == {
        **{"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.5, "top_k": 0}
    }


def test_a_cancelled_answer_ends_at_the_next_token(live, engine):
    answer, steps = live.Answer(prompts(engine)[0], 200), []

    def cancel(*given):
        steps.append(1)
        if len(steps) == 5:
            answer.cancel()

    handle = engine.model.register_forward_hook(cancel)
    try:
        live.generate(engine, [answer], live.Sampling(temperature=0))
    finally:
        handle.remove()
    assert answer.reason == "cancelled"
    assert len(answer.ids) == 4
    assert len(steps) == 5


def test_answers_of_one_seed_differ_where_a_batch_does_not_fit_the_positions(live, engine):
    short, long = [5], prompts(engine)[1]
    room = live.room(engine, short)
    answers = [live.Answer(ids, limit) for ids, limit in ((short, room), (short, room), (long, 1))]
    for answer in answers[:2]:
        answer.on_text = lambda text, answer=answer: answer.cancel() if len(answer.ids) > 20 else None
    live.generate(engine, answers, live.Sampling(temperature=1.0, seed=3))
    assert answers[0].ids[:20] != answers[1].ids[:20]
