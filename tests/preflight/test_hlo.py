"""Parsing of the compiler's text, on a text in the same format."""

import pytest

from simpo_pipeline.preflight.collectives import traffic_of
from simpo_pipeline.preflight.hlo import array_bytes, executed, parse_module, total_cycles


@pytest.fixture(scope="module")
def module(hlo_text):
    return parse_module(hlo_text)


def names(instructions, **which):
    return {e.instruction.name for e in instructions if all(getattr(e, key) == value for key, value in which.items())}


def test_a_loop_of_known_length_multiplies_its_body_and_other_loops_count_one_iteration(module):
    found = executed(module)
    assert {e.times for e in found if e.instruction.name == "product"} == {32}
    assert {"product", "gathered"} <= names(found, each_turn=True)
    assert {"before", "loop"} <= names(found, each_turn=False)


def test_cycles_exclude_the_parts_of_fusions_and_unknown_estimates(module):
    found = executed(module)
    assert total_cycles([e for e in found if not e.each_turn]) == 50
    assert total_cycles([e for e in found if e.each_turn]) == 32 * 100 + 1
    assert total_cycles([e for e in executed(module, ("draw",)) if e.each_turn]) == 32 * 100 + 1000
    assert total_cycles([e for e in executed(module, ("body",)) if e.each_turn]) == 32 * 100 + 1


def test_instructions_after_a_kernel_of_several_lines_are_parsed(module):
    assert [instruction.name for instruction in module.computations["layer"]] == [
        *("c", "kernel", "product", "reduced", "next")
    ]
    assert module.computations["layer"][1].op_name == "jit(step)/while/body/kernel"


def test_collectives_are_summed_by_kind_and_type(module):
    reduced, gathered, moved = traffic_of(executed(module), 4)
    assert (reduced.kind, reduced.dtype, reduced.count) == ("all-reduce", "bf16", 32)
    assert reduced.moved_bytes == 32 * 8 * 128 * 2
    assert reduced.received_bytes == reduced.moved_bytes * 2 * 3 / 4
    assert (gathered.kind, gathered.count, gathered.received_bytes) == ("all-gather", 1, 16 * 4 * 3 / 4)
    assert (moved.kind, moved.count, moved.received_bytes) == ("collective-permute", 1, 16)


SCATTERED = """HloModule step

%all-reduce-scatter.1 (input: f32[8,16]) -> f32[8,4] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[8,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %place), dynamic_slice_sizes={8,4}
}

ENTRY %main (gradient: f32[8,16]) -> f32[8,4] {
  %gradient = f32[8,16]{1,0} parameter(0)
  ROOT %mine = f32[8,4]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_all_reduce_that_keeps_only_a_slice_is_a_reduce_scatter():
    (scattered,) = traffic_of(executed(parse_module(SCATTERED)), 4)
    assert (scattered.kind, scattered.moved_bytes) == ("reduce-scatter", 8 * 16 * 4)
    assert scattered.received_bytes == 8 * 16 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[4,4]<=[16]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("replica_groups={}", 16),
    ],
)
def test_the_groups_of_a_collective_are_parsed_in_each_spelling(hlo_text, groups, size):
    text = hlo_text.replace("replica_groups={{0,1,2,3}}", groups)
    (reduced,) = (each for each in traffic_of(executed(parse_module(text)), 16) if each.kind == "all-reduce")
    assert reduced.received_bytes == pytest.approx(reduced.moved_bytes * 2 * (size - 1) / size)


def test_the_bytes_of_types_ignore_layouts():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[], pred[4]{0:T(512)(128)(4,1)}, s8[2])") == [12, 4, 4, 2]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule empty")
