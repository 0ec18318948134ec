"""The coordination service is jax's, behind a private client: one file knows it, and this notices when it moves."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWNER = ROOT / "src" / "simpo_pipeline" / "distributed" / "coordination.py"


def test_the_private_client_is_where_it_was_and_answers_every_call_that_is_made(launch):
    job = launch(1, "tests/distributed/coordination_alone.py").require_success()
    assert "all calls answered" in job.lines(0)


def test_one_file_alone_imports_what_jax_keeps_private():
    owners = set()
    folders = ("src", "steps", "experiments", "infra", "benchmarks")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith(("jax._src", "jaxlib")) for name in names):
                owners.add(path)
    assert owners == {OWNER}
