"""Redaction of secrets in records, and of nothing else."""

import pytest

from simpo_pipeline.executor.records.secrets import is_secret_name, redact_command_line, redact_json, redact_text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("a.py --hf_token hf_x --prefix p", "a.py --hf_token *** --prefix p"),
        ("a.py --hf_token=hf_x", "a.py --hf_token=***"),
        ("a.py --hf_token -abc", "a.py --hf_token ***"),
        ("a.py --wandb.api_key x y --n 1", "a.py --wandb.api_key *** *** --n 1"),
        ("a.py --db.password=x --access-key x", "a.py --db.password=*** --access-key ***"),
        ("a.py --secret_key abc --private_key=abc", "a.py --secret_key *** --private_key=***"),
        ("a.py --auth_header x --tracker.wandb_key k", "a.py --auth_header *** --tracker.wandb_key ***"),
        ("a.py HF_TOKEN=hf_x", "a.py HF_TOKEN=***"),
        ("a.py https://me:secret@host/x", "a.py https://***@host/x"),
        ("a.py https://h/x?token=abc&n=1", "a.py https://h/x?token=***&n=1"),
        ("a.py https://h/x?X-Goog-Signature=abc", "a.py https://h/x?X-Goog-Signature=***"),
        ("a.py {hf_token:hf_abcdefghijkl}", "a.py {hf_token:***}"),
        ("a.py --max_tokens 64 --tokenizer t --num_kv_heads 2", "a.py --max_tokens 64 --tokenizer t --num_kv_heads 2"),
        ("/runs/token/a.py --key_size 3 --n=1", "/runs/token/a.py --key_size 3 --n=1"),
    ],
)
def test_secrets_in_a_command_line_are_redacted(words, shown):
    assert redact_command_line(words.split()) == shown.split()


def test_secrets_in_a_config_are_redacted_and_tokens_of_a_tokenizer_are_not():
    config = {
        "hub": {"hf_token": "x", "eos_token": "</s>", "pad_token": "<pad>"},
        "keys": ["AIzaSyA1234567890"],
        "n": 1,
    }
    assert redact_json(config) == {
        "hub": {"hf_token": "***", "eos_token": "</s>", "pad_token": "<pad>"},
        "keys": ["***"],
        "n": 1,
    }


def test_names_are_read_word_by_word():
    assert all(map(is_secret_name, ("apiKey", "HF_TOKEN", "token", "--client-secret", "passwd")))
    assert not any(map(is_secret_name, ("max_new_tokens", "tokenizer", "monkey", "author", "bos_token", "")))


def test_plain_text_is_unchanged():
    assert redact_text("gs://bucket/path?x=1 a@b") == "gs://bucket/path?x=1 a@b"
