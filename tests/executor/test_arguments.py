import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

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
        ("--count", "count"),
        ("--count -3", "--count is -3; it must be 0 or more"),
        ("--prefix [", "Bad flags"),
        ("--config_path /no/such/file", "No such file"),
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
