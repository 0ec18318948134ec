"""Call every function of the coordination service that the project uses, in a job of one process.

test_coordination.py runs this as a separate script, because JAX starts its service only once per process.
"""

import os

from simpo_pipeline.distributed.config import find_membership
from simpo_pipeline.distributed.coordination import JaxCoordination, join, leave
from simpo_pipeline.errors import CoordinationError


def main() -> None:
    try:
        JaxCoordination()
    except CoordinationError as error:
        assert "has not joined a job" in str(error)
    membership = find_membership(os.environ)
    assert membership is not None
    assert join(membership) == (0, 1)
    service = JaxCoordination()
    assert service.get_now("a/1") is None
    assert service.get("a/1", 0.2) is None
    service.put("a/1", b"one")
    service.put("a/2", b"two")
    service.put("a/2", b"\x00three")
    service.put("b", b"other")
    assert service.get("a/2", 5.0) == service.get_now("a/2") == b"\x00three"
    assert service.list("a/") == {"a/1": b"one", "a/2": b"\x00three"}
    service.delete("a/1")
    assert service.list("a/") == {"a/2": b"\x00three"}
    service.delete("a/")
    assert service.list("a/") == {}
    assert service.get_now("b") == b"other"
    assert service.barrier("all", 5.0)
    leave()
    print("all calls answered")


if __name__ == "__main__":
    main()
