import subprocess
import sys
from pathlib import Path

import pytest

from simpo_pipeline.errors import DataError, StorageError
from simpo_pipeline.storage.files import read_bytes, write_bytes
from simpo_pipeline.storage.jsonl import JsonlWriter, read_jsonl
from simpo_pipeline.storage.paths import join


def test_rows_are_read_back_in_order(folder):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "text": "zwei\nZeilen ü"}]
    with JsonlWriter(join(folder, "metrics.jsonl")) as writer:
        for row in rows:
            writer.write(row)
    assert list(read_jsonl(join(folder, "metrics.jsonl"))) == rows
    assert read_bytes(join(folder, "metrics.jsonl")).count(b"\n") == 2


def test_a_writer_that_wrote_nothing_leaves_an_empty_file(folder):
    with JsonlWriter(join(folder, "x")):
        pass
    assert list(read_jsonl(join(folder, "x"))) == []


def test_flushed_rows_can_be_read_while_the_writer_is_open(folder):
    with JsonlWriter(join(folder, "x")) as writer:
        writer.write({"n": 1})
        writer.flush()
        assert list(read_jsonl(join(folder, "x"))) == [{"n": 1}]
        writer.write({"n": 2})
    assert list(read_jsonl(join(folder, "x"))) == [{"n": 1}, {"n": 2}]


def test_a_step_that_runs_again_starts_a_new_log(folder):
    for number in (1, 2):
        with JsonlWriter(join(folder, "x")) as writer:
            writer.write({"n": number})
    assert list(read_jsonl(join(folder, "x"))) == [{"n": 2}]


def test_rows_written_before_an_error_are_kept(folder):
    with pytest.raises(RuntimeError, match="stop"), JsonlWriter(join(folder, "x")) as writer:
        writer.write({"n": 1})
        raise RuntimeError("stop")
    assert list(read_jsonl(join(folder, "x"))) == [{"n": 1}]


def test_a_full_disk_is_a_storage_error_even_if_the_last_flush_fails(tmp_path: Path):
    program = (
        "import resource, signal, sys\n"
        "from simpo_pipeline.errors import StorageError\n"
        "from simpo_pipeline.storage.jsonl import JsonlWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with JsonlWriter(sys.argv[1]) as writer:\n"
        "        for number in range(1000):\n"
        "            writer.write({'n': number})\n"
        "except StorageError as error:\n"
        "    assert 'File too large' in str(error), error\n"
        "    sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr


def test_rows_written_before_a_kill_are_kept(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    program = (
        "import os, signal, sys\n"
        "from simpo_pipeline.storage.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(sys.argv[1])\n"
        "writer.write({'n': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    assert list(read_jsonl(str(path))) == [{"n": 1}]


def test_a_row_that_is_not_json_is_refused_and_leaves_no_partial_line(folder):
    with JsonlWriter(join(folder, "x")) as writer:
        with pytest.raises(DataError, match="not JSON"):
            writer.write({"n": object()})
        writer.write({"n": 1})
    assert list(read_jsonl(join(folder, "x"))) == [{"n": 1}]


def test_a_closed_writer_refuses_rows(folder):
    writer = JsonlWriter(join(folder, "x"))
    writer.close()
    writer.close()
    with pytest.raises(StorageError, match="closed"):
        writer.write({"n": 1})


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b"\xff"])
def test_a_bad_line_is_named_by_file_and_number(folder, line):
    write_bytes(join(folder, "bad.jsonl"), b'{"n": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3"):
        list(read_jsonl(join(folder, "bad.jsonl")))


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "[]", '{"n": ' + "9" * 5000 + "}"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "x").write_text('{"n": 1}\n' + line)
    with pytest.raises(DataError, match="x, line 2: "):
        list(read_jsonl(str(tmp_path / "x")))
