import pytest

from simpo_pipeline.errors import PathNotFoundError
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import write_bytes
from simpo_pipeline.storage.paths import join


def test_the_checksum_is_that_of_the_published_check_value(folder):
    write_bytes(join(folder, "x"), b"123456789")
    assert crc32c_of(join(folder, "x")) == "e3069283"


def test_the_empty_file_has_the_zero_checksum_with_all_its_digits(folder):
    write_bytes(join(folder, "x"), b"")
    assert crc32c_of(join(folder, "x")) == "00000000"


@pytest.mark.parametrize("position", [0, 1_500_000, 3_000_000])
def test_the_checksum_of_a_file_of_several_chunks_depends_on_every_byte(folder, position):
    data = bytearray(3_000_001)
    write_bytes(join(folder, "zeros"), bytes(data))
    data[position] = 1
    write_bytes(join(folder, "one"), bytes(data))
    assert crc32c_of(join(folder, "zeros")) != crc32c_of(join(folder, "one"))


def test_the_checksum_of_a_missing_file_is_an_error(folder):
    with pytest.raises(PathNotFoundError):
        crc32c_of(join(folder, "nothing"))
