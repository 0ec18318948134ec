"""The only place that chooses a store by the scheme of a path."""

from simpo_pipeline.storage.fsspec_store import FsspecStore
from simpo_pipeline.storage.gcs_store import GcsStore
from simpo_pipeline.storage.local_store import LocalStore
from simpo_pipeline.storage.paths import is_local
from simpo_pipeline.storage.store import Store

_LOCAL, _GCS = LocalStore(), GcsStore()
_BY_SCHEME: dict[str, Store] = {"gs": _GCS, "gcs": _GCS, "memory": FsspecStore(in_process=True)}
_OTHER = FsspecStore()


def store_of(path: str) -> Store:
    """Return the store that serves `path`. It does not connect to it."""
    return _LOCAL if is_local(path) else _BY_SCHEME.get(path.split("://", 1)[0], _OTHER)
