"""Rows are on disk as soon as their samples finish, and readable however their writer ends."""

import pytest

from simpo_pipeline.errors import DataError
from simpo_pipeline.inference.config import SamplingParams
from simpo_pipeline.inference.generated_rows import RowStream, generated_row, read_finished_rows
from simpo_pipeline.inference.sequence import Completion, FinishReason, Request, TokenLogprobs
from simpo_pipeline.storage.jsonl import JsonlWriter


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def found(path: str) -> list[int]:
    return [row["number"] for row in read_finished_rows(path)]


def test_on_a_local_disk_each_row_is_readable_at_once(tmp_path) -> None:
    path = str(tmp_path / "folder" / "rows.jsonl")
    with RowStream(JsonlWriter(path)) as stream:
        assert found(path) == []
        stream.write([{"number": 1}, {"number": 2}])
        assert found(path) == [1, 2]
        stream.write([{"number": 3}])
        assert found(path) == [1, 2, 3]


@pytest.mark.parametrize("where", ["file", "memory", "gcs"])
def test_rows_of_an_earlier_file_are_removed_before_the_first_new_one(where, tmp_path, request) -> None:
    folder = {"file": str(tmp_path), "memory": f"memory://{tmp_path}"}
    path = f"{request.getfixturevalue('gcs_here') if where == 'gcs' else folder[where]}/rows.jsonl"
    with RowStream(JsonlWriter(path)) as stream:
        stream.write([{"number": 1}])
    assert found(path) == [1]
    with RowStream(JsonlWriter(path)) as stream:
        assert found(path) == []
        stream.write([{"number": 2}])
    assert found(path) == [2]


def test_on_a_bucket_rows_are_uploaded_every_two_seconds_and_at_the_end(gcs_here) -> None:
    path, clock = f"{gcs_here}/rows.jsonl", Clock()
    with RowStream(JsonlWriter(path), clock) as stream:
        for number in range(20):
            clock.seconds = number / 4
            stream.write([{"number": number}])
            assert found(path) == list(range(number // 8 * 8 + 1 if number >= 8 else 0))
    assert found(path) == list(range(20))


def test_uploads_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock, num_uploads = f"memory://{tmp_path}/rows.jsonl", Clock(), 0

    def slow_upload() -> None:
        nonlocal num_uploads
        num_uploads += 1
        clock.seconds += 10

    stream = RowStream(JsonlWriter(path), clock)
    monkeypatch.setattr(stream._writer, "flush", slow_upload)
    for _ in range(4000):
        clock.seconds += 1
        stream.write([{"number": 0}])
    assert 17 <= num_uploads <= 4000 / 200
    assert num_uploads * 10 <= clock.seconds / 20 + 10


def test_a_truncated_last_row_is_skipped_and_any_other_damage_is_an_error(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"number": 1}\n{"number": 2')
    assert found(str(path)) == [1]
    path.write_bytes(b'{"number": 1}\n{"number": 2\n{"number": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not JSON .*; only the last line may be cut"):
        found(str(path))
    path.write_bytes(b"[1]\n")
    with pytest.raises(DataError, match=r"line 1: got a list; each line must be a JSON object"):
        found(str(path))


def test_rows_are_written_even_if_the_block_raises(gcs_here) -> None:
    path = f"{gcs_here}/rows.jsonl"
    with pytest.raises(RuntimeError), RowStream(JsonlWriter(path)) as stream:
        stream.write([{"number": 1}])
        raise RuntimeError
    assert found(path) == [1]


def row_of(reason: FinishReason, tokens: bytes, **sampling) -> dict:
    logprobs = tuple(TokenLogprobs(-0.5, ((7, -0.25), (8, -2.0))) for _ in tokens)
    params = SamplingParams(max_tokens=9, **sampling)
    completion = Completion(
        Request((1, 2), 3, 4, params), tuple(tokens), reason, logprobs if params.logprobs is not None else None
    )
    return generated_row(completion, "ask", lambda tokens: bytes(tokens).decode())


def test_the_text_of_a_row_excludes_its_stop_token_or_string() -> None:
    assert row_of("length", b"abc")["generated_text"] == "abc"
    assert row_of("stop", b"abc")["generated_text"] == "ab"
    assert row_of("stop_string", b"abc.", stop=("c.", "."))["generated_text"] == "ab"
    assert row_of("stop_string", b"a.b.", stop=(".",), min_tokens=4)["generated_text"] == "a.b"


def test_a_row_has_only_the_requested_fields() -> None:
    plain = row_of("length", b"abc")
    assert plain == {
        "global_prompt_index": 3,
        "sample_index": 4,
        "prompt": "ask",
        "prompt_token_count": 2,
        "generated_text": "abc",
        "generated_tokens": list(b"abc"),
        "generated_token_count": 3,
        "finish_reason": "length",
    }
    chosen = {"logprobs": [-0.5] * 3, "cumulative_logprob": -1.5}
    assert row_of("length", b"abc", logprobs=0) == plain | chosen
    top = {"top_logprobs": [[[7, -0.25], [8, -2.0]]] * 3}
    assert row_of("length", b"abc", logprobs=2) == plain | chosen | top
