"""The coordination service of JAX has a private client. One file uses it, and these tests detect when it changes."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROOM = ROOT / "src" / "simpo_pipeline" / "distributed"
# Private modules of JAX that the project uses, each with the one file that may import it.
OWNERS = {
    "jax._src.distributed": ROOM / "coordination.py",
    "jax._src.compilation_cache": ROOM / "compilation_cache.py",
    "jax._src.compilation_cache_interface": ROOM / "compilation_cache.py",
}


def test_the_private_client_of_jax_exists_and_answers_every_call_the_project_makes(launch):
    job = launch(1, "tests/distributed/coordination_alone.py").require_success()
    assert "all calls answered" in job.lines(0)


def test_each_private_module_of_jax_is_imported_by_one_file():
    users: set[tuple[str, pathlib.Path]] = set()
    folders = ("src", "steps", "experiments", "infra", "benchmarks")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                names = [f"{module}.{alias.name}" for alias in node.names] if module == "jax._src" else [module]
            users |= {(name, path) for name in names if name.startswith(("jax._src", "jaxlib"))}
    assert users == set(OWNERS.items())
