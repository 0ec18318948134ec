"""With anything in config.json, a header or the index, loading a model fails only with an error of this package."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from simpo_pipeline.errors import SimpoPipelineError
from simpo_pipeline.model import safetensors_files
from simpo_pipeline.model.hf_weights import load_config
from simpo_pipeline.model.safetensors_files import stored_tensors

anywhere = settings(
    deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 5,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Key of config.json -> field of LlamaConfig.
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings",
}
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 8, 2**31 - 1, 2**31, 2**63, 10**400, 0.0, -0.0, 0.5, 1e-5, 8.0, 1e308, float("nan"), float("inf")]
)
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "8", "silu", "llama3", "default", "\ud800", "a\nb"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
JUNK = st.binary(max_size=40) | st.sampled_from(
    [b"[" * 60_000, b'{"a":' * 60_000, b"9" * 5_000, b"NaN", b'"\\ud800"', b"{}", b"null", b"\x00" * 70]
)
ROPE_KEYS = ["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPES = st.dictionaries(
    st.sampled_from([*ROPE_KEYS, "rope_theta", "partial_rotary_factor", "mscale"]), SCALARS, max_size=6
)
OTHER_KEYS = [
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "quantization_config",
    "anything",
    "pretraining_tp",
]


def tensors() -> dict[str, np.ndarray]:
    layer = {"input_layernorm": (8,), "post_attention_layernorm": (8,), "self_attn.q_proj": (8, 8)}
    layer |= {"self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8)}
    layer |= {"mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4)}
    shapes = {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (5, 8), "model.norm": (8,), "lm_head": (5, 8)}
    return {f"{name}.weight": np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}


WEIGHTS = save(tensors())
HEADER_BYTES = int.from_bytes(WEIGHTS[:8], "little")
HEADER: dict[str, Any] = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])
DATA = WEIGHTS[8 + HEADER_BYTES :]
INDEX = dict.fromkeys(HEADER, "one.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a whole model. Files outside it must not be read."""
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps(CONFIG))
    (inside / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "outside.safetensors").write_bytes(WEIGHTS)
    plain = safetensors_files.open_read

    def open_inside(path: str):
        assert Path(path).resolve().parent == inside.resolve(), f"{path} is outside the folder"
        return plain(path)

    monkeypatch.setattr(safetensors_files, "open_read", open_inside)
    return inside


def loads(folder: Path):
    """Return the config, or None if the folder is refused in one paragraph."""
    try:
        return load_config(str(folder))
    except SimpoPipelineError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


def test_the_folder_itself_is_accepted(folder):
    assert loads(folder) is not None


@given(
    changes=st.dictionaries(st.sampled_from([*CONFIG, *OTHER_KEYS]), JSON | ROPES, max_size=3),
    rope=st.none() | ROPES,
)
@anywhere
def test_any_config_is_read_as_it_is_written_or_refused(folder, changes, rope):
    written = CONFIG | ({} if rope is None else {"rope_scaling": rope}) | changes
    (folder / "config.json").write_text(json.dumps(written))
    config = loads(folder)
    if config is not None:
        read = dataclasses.asdict(config)
        for key, field in FIELDS.items():
            if key in written and (key != "rope_theta" or rope is None):
                assert read[field] == written[key] and isinstance(read[field], bool) == isinstance(written[key], bool)


@given(JUNK)
@anywhere
def test_any_bytes_in_place_of_a_file_are_refused(folder, junk):
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(junk)
        assert loads(folder) is None
        (folder / name).write_bytes(whole)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "I8", "", "f32", 1]),
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
        "other": JSON,
    },
)


@given(
    changes=st.dictionaries(st.sampled_from([*HEADER, "other.weight", "__metadata__"]), ENTRIES | JSON, max_size=2),
    absent=st.sets(st.sampled_from([*HEADER]), max_size=1),
    cut=st.sampled_from([0, 0, 0, 1, 100, len(DATA)]),
    pad=st.integers(0, 9),
)
@anywhere
def test_any_header_is_read_as_the_library_reads_it_or_refused(folder, changes, absent, cut, pad):
    header = {name: entry for name, entry in HEADER.items() if name not in absent} | changes
    text = json.dumps(header).encode() + b" " * pad
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + DATA[: len(DATA) - cut])
    loads(folder)
    try:
        found = {name: (each.dtype, each.shape) for name, each in stored_tensors(str(folder)).items()}
    except SimpoPipelineError:
        return
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            assert found == {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what was accepted: {error}") from error


FILES = st.sampled_from(
    """one.safetensors two.safetensors gone.safetensors ../outside.safetensors ./one.safetensors sub/one.safetensors
    /etc/hostname config.json model.safetensors.index.json ..""".split()
) | st.sampled_from(
    ["", "\ud800.safetensors", "a\n.safetensors", "\x00.safetensors", "~/x.safetensors", "C:\\x.safetensors"]
)


@given(
    weight_map=JSON
    | st.dictionaries(st.sampled_from([*INDEX, "other"]), FILES | JSON, max_size=3).map(
        lambda changes: INDEX | changes
    ),
    others=st.dictionaries(st.sampled_from(["metadata", "x"]), JSON, max_size=1),
)
@anywhere
def test_any_index_leads_to_the_whole_model_or_is_refused(folder, weight_map, others):
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "one.safetensors").write_bytes(WEIGHTS)
    (folder / "two.safetensors").write_bytes(save({"other": np.zeros(2, np.float32)}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **others}))
    config = loads(folder)
    if config is not None:
        assert weight_map == INDEX
