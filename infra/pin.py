"""Pin every dependency to an exact version, without URLs, in `constraint-dependencies` of pyproject.toml.

    python infra/pin.py            # resolve again and write the pins
    python infra/pin.py --check    # exit 1 if the pins no longer resolve to themselves

uv resolves for every supported Python version and platform at once. A package that needs different versions on
different Python versions gets two pins with markers. uv.lock contains registry URLs, so it is not committed.
"""

import argparse
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]$", re.MULTILINE | re.DOTALL)
# The two extras conflict with each other, so each is exported separately.
EXTRAS = ("gpu", "tpu")


def export_pins(extra: str) -> set[str]:
    """Return the requirement lines `name==version ; marker` of the locked environment with one extra."""
    command = ["uv", "export", "--format", "requirements.txt", "--all-groups", "--extra", extra]
    command += ["--no-hashes", "--no-annotate", "--no-header", "--no-emit-project", "--quiet"]
    exported = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {re.sub(r" *; *", " ; ", line) for line in exported.splitlines() if "==" in line}


def without_extra_markers(pin: str) -> str:
    """Remove the `extra == ...` clauses that uv writes for conflicting extras: a constraint must not name extras."""
    name, _, marker = pin.partition(" ; ")
    clauses = [clause for clause in re.split(r" and ", marker) if clause and "extra" not in clause]
    return f"{name} ; {' and '.join(clauses)}" if clauses else name


def with_pins(pyproject: str, pins: list[str]) -> str:
    """Return the text of pyproject.toml with its constraints replaced."""
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    return BLOCK.sub(lambda _: f"constraint-dependencies = [\n{lines}]", pyproject, count=1)


def resolve(pyproject: str) -> list[str]:
    """Resolve all dependencies and return the new pins. Leaves pyproject.toml without constraints."""
    (ROOT / "pyproject.toml").write_text(with_pins(pyproject, []))
    subprocess.run(["uv", "lock", "--upgrade", "--quiet"], cwd=ROOT, check=True)
    return sorted({without_extra_markers(pin) for extra in EXTRAS for pin in export_pins(extra)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check whether the pins still resolve")
    check = parser.parse_args().check
    if check:
        return subprocess.run(["uv", "lock", "--quiet"], cwd=ROOT).returncode
    path = ROOT / "pyproject.toml"
    before = path.read_text()
    try:
        pins = resolve(before)
    except BaseException:
        path.write_text(before)
        raise
    path.write_text(with_pins(before, pins))
    subprocess.run(["uv", "lock", "--quiet"], cwd=ROOT, check=True)
    print(f"pinned {len(pins)} requirements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
