"""Secrets of the environment are masked in logs, and are handed on with nothing."""

import json

import pytest

from pipeline import secret
from pipeline.errors import StageFailed


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    (tmp_path / "key.pem").touch()
    for name, value in {
        "HF_TOKEN": "hf_abcdefgh",
        "OPENAI_API_KEY": "sk-abcdefgh",
        "MAX_TOKENS": "100000000",
        "TOKENIZERS_PARALLELISM": "false",
        "SSL_KEY_SECRET": str(tmp_path / "key.pem"),
        "HOME_TOWN": "Shanghai-Pudong",
        "TOKENIZER_CLASS": "Qwen2Tokenizer",
        "POSTGRES_PASSWORD": "postgres",
    }.items():
        monkeypatch.setenv(name, value)


def test_what_is_named_as_a_secret_and_can_be_one_is_masked():
    plain = "100000000 false Shanghai-Pudong Qwen2Tokenizer postgres"
    assert secret.mask(f"hf_abcdefgh sk-abcdefgh {plain}") == f"<HF_TOKEN> <OPENAI_API_KEY> {plain}"


def test_the_path_of_a_key_is_no_secret(tmp_path):
    assert str(tmp_path / "key.pem") not in secret.values()


def test_a_log_is_masked_in_place_whatever_its_bytes(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff token=hf_abcdefgh\n")
    secret.mask_file(log)
    assert log.read_bytes() == b"\xff token=<HF_TOKEN>\n"


def test_a_log_without_a_secret_is_not_touched(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"text")
    before = log.stat().st_mtime_ns
    secret.mask_file(log)
    secret.mask_file(tmp_path / "no.txt")
    assert log.stat().st_mtime_ns == before


def test_a_text_file_with_a_secret_stops_the_stage(tmp_path):
    secret.forbid(tmp_path, "sft")
    (tmp_path / "config.json").write_text('{"hub_token": "hf_abcdefgh"}', encoding="utf-8")
    with pytest.raises(StageFailed) as error:
        secret.forbid(tmp_path, "sft")
    assert str(error.value) == (
        f"stage `sft`: `{tmp_path}/config.json` holds the value of the environment variable HF_TOKEN; take it out of "
        "the data or the settings, or `unset HF_TOKEN` if it is not a secret, and run again"
    )


def test_a_secret_is_masked_as_json_writes_it(monkeypatch):
    value = 'pass"word\\1é'
    monkeypatch.setenv("MY_PASSWORD", value)
    for ascii_only in (True, False):
        assert secret.mask(json.dumps({"a": value}, ensure_ascii=ascii_only)) == '{"a": "<MY_PASSWORD>"}'
