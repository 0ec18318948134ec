import os

import pytest

from simpo_pipeline.errors import ConfigError, StorageError
from simpo_pipeline.storage import paths


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("/a", ("b", "c"), "/a/b/c"),
        ("/a/", ("b/c",), "/a/b/c"),
        ("gs://bucket", ("x",), "gs://bucket/x"),
        ("gs://bucket/", ("x", "", "y"), "gs://bucket/x/y"),
        ("memory://", ("x",), "memory://x"),
        ("relative", ("x",), "relative/x"),
        ("/", ("x",), "/x"),
        ("", ("x",), "x"),
    ],
)
def test_joined_paths_have_one_slash_between_neighbours(base, parts, joined):
    assert paths.join(base, *parts) == joined


@pytest.mark.parametrize("part", ["/etc", "gs://other/x"])
def test_a_part_that_would_escape_the_base_is_refused(part):
    with pytest.raises(StorageError, match="must be relative"):
        paths.join("/a", part)


def test_local_paths_are_distinguished_from_urls():
    assert [paths.is_local(path) for path in ("/a", "a/b", "file:///a", "gs://b/a", "memory://a", "hf://x")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_url_that_lost_a_slash_is_refused_with_the_corrected_url():
    with pytest.raises(ConfigError, match="gs://bucket/x"):
        paths.absolute("gs:/bucket/x")


def test_absolute_paths_do_not_depend_on_the_working_directory():
    assert paths.absolute("runs") == os.path.join(os.getcwd(), "runs")
    assert paths.absolute("/a/b/") == "/a/b"
    assert paths.absolute("file:///a/b") == "/a/b"
    assert paths.absolute("gs://bucket/a/") == "gs://bucket/a"


def test_parent_and_base_name_split_a_path():
    assert paths.parent("gs://bucket/a/b") == "gs://bucket/a"
    assert paths.base_name("gs://bucket/a/b/") == "b"
    assert paths.is_relative("a") and not paths.is_relative("/a") and not paths.is_relative("gs://a")
