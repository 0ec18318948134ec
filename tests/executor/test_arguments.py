"""Flags become a config: text exactly as it is, everything else by its type."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.arguments import parse_arguments


@dataclass(frozen=True)
class Lease:
    seconds: float = 1.0
    safe: bool = False


@dataclass(frozen=True)
class Flags:
    prefix: str | None = None
    dry_run: bool = False
    force: bool = True
    run_only: list[str] | None = None
    count: int | None = None
    preset: Literal["tiny", "big"] = "tiny"
    lease: Lease = field(default_factory=Lease)

    def __post_init__(self):
        if self.count is not None and self.count < 0:
            raise ConfigError(f"--count is {self.count}; it must be 0 or more.")


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("", Flags()),
        ("--dry_run", Flags(dry_run=True)),
        ("--dry_run --prefix gs://b/x", Flags(dry_run=True, prefix="gs://b/x")),
        ("--prefix /x --dry_run", Flags(dry_run=True, prefix="/x")),
        ("--dry_run true --force false", Flags(dry_run=True, force=False)),
        ("--dry_run=true --count=3", Flags(dry_run=True, count=3)),
        ("--run_only train-.* ^report", Flags(run_only=["train-.*", "^report"])),
        ("--run_only [train,report]", Flags(run_only=["train", "report"])),
        ("--lease.safe --lease.seconds 2.5", Flags(lease=Lease(2.5, True))),
        ("--preset big", Flags(preset="big")),
        ("--prefix 2024", Flags(prefix="2024")),
        ("--prefix -1 --count -0", Flags(prefix="-1", count=0)),
        ("--prefix a --prefix b", Flags(prefix="b")),
        ("--run_only 010 on null", Flags(run_only=["010", "on", "null"])),
        ("--run_only [ab].* []", Flags(run_only=["[ab].*", "[]"])),
        ("--run_only []", Flags(run_only=[])),
        ("--count null --dry_run True", Flags(dry_run=True)),
        ("--count 010 --lease.seconds 1e1", Flags(count=10, lease=Lease(10.0))),
        ('--lease {"seconds":3}', Flags(lease=Lease(3.0))),
    ],
)
def test_flags_are_read_into_the_config(line, flags):
    assert parse_arguments(Flags, line.split()) == flags


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dry_rnu", "Unknown flag --dry_rnu. Did you mean --dry_run"),
        ("--lease.second 3", "Did you mean --lease.seconds"),
        ("--zzz 1", "Unknown flag --zzz. Run with --help"),
        ("--count many", "count.*many"),
        ("--dry_run maybe", "dry_run.*maybe"),
        ("--preset huge", "--preset is 'huge'; expected one of tiny, big"),
        ("--preset=huge", "--preset is 'huge'; expected one of tiny, big"),
        ("stray", "stray"),
        ("--count", "--count has no value"),
        ("--prefix", "--prefix has no value"),
        ("--count 1e1", "count is 10.0; expected an integer"),
        ("--count 1:30", "count is '1:30'; expected an integer"),
        ("--count [", "command line: count: "),
        ("--dry_run yes", "dry_run is 'yes'; expected true or false"),
        ("--prefix a b", "--prefix has 2 values: a, b"),
        ("--run_only [1]", r"run_only\[0\] is 1; expected text"),
        ("--lease 3 --lease.safe", "--lease.safe is given twice, whole or in part"),
        ("--lease.safe --lease {}", "--lease is given twice, whole or in part"),
        ("-- a", "Unknown flag --"),
        ("--count -3", "^--count is -3; it must be 0 or more"),
        ("--config_path /no/such/file", "Cannot read '/no/such/file': nothing is stored there"),
        ("--config_path on", "Cannot read 'on'"),
    ],
)
def test_a_bad_flag_is_one_sentence_that_names_it(line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_arguments(Flags, line.split())
    assert "\n" not in str(caught.value)


def test_a_config_file_is_read_and_flags_go_before_it(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text(json.dumps({"count": 3, "prefix": "/from/file"}))
    assert parse_arguments(Flags, ["--config_path", str(path), "--count", "4"]) == Flags(count=4, prefix="/from/file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("count: 1:30", "count is '1:30'; expected an integer"),
        ("prefix: 010", "prefix is 10; expected text or null; put text in quotes"),
        ("cuont: 3", "cuont is not a setting; the nearest is count"),
        ("count: [", "flags.yaml: "),
    ],
)
def test_a_config_file_is_yaml_1_2_and_a_wrong_one_is_refused(tmp_path, text, sentence):
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_arguments(Flags, ["--config_path", str(path)])
    assert sentence in str(caught.value)
    path.write_text("prefix: off")
    assert parse_arguments(Flags, ["--config_path", str(path)]) == Flags(prefix="off")


@given(
    text=st.text(max_size=8) | st.sampled_from(["on", "null", "~", "[", "{", "010", "1e3", "'x'", "a: b", "# a", ""])
)
def test_a_text_flag_has_exactly_the_given_text(text):
    assert parse_arguments(Flags, [f"--prefix={text}"]) == Flags(prefix=text)
    if not text.startswith("--") and text != "-h":
        assert parse_arguments(Flags, ["--prefix", text, "--dry_run"]) == Flags(prefix=text, dry_run=True)
