"""What is read out of the compiler's text, on a text in its manner."""

import pytest

from simpo_pipeline.preflight.collectives import traffic_of
from simpo_pipeline.preflight.hlo import array_bytes, executed, parse_module, total_cycles

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b), backend_config={"estimated_cycles":"7"}
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p), backend_config={"window_config":{"estimated_cycles":"5"}}
}

%layer (c: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %c = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %kernel = bf16[8,128]{1,0} custom-call(%c), custom_call_target="tpu", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/while/body/kernel"}
  %product = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%kernel), calls=%fused, backend_config={"estimated_cycles":"100"}
  %reduced = bf16[8,128]{1,0} all-reduce(%product), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%c, %reduced)
}

%more_layers (c: (s32[], bf16[8,128])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = u32[]{:T(128)} constant(32)
  %at = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %bound), direction=LT
}

%cheap (p: f32[4]) -> f32[4] {
  ROOT %cheap.1 = f32[4]{0} negate(%p), backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[4]) -> f32[4] {
  ROOT %dear.1 = f32[4]{0} negate(%p), backend_config={"estimated_cycles":"1000"}
}

%token (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %layers = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%s), condition=%more_layers, body=%layer
  %choice = f32[4]{0} conditional(%s), branch_computations={%cheap, %dear}, metadata={op_name="step/body/draw/cond"}
  %gathered = f32[16]{0} all-gather(%choice), replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %state = (s32[]{:T(128)}, f32[4]{0}) tuple(%s, %choice)
}

%goes_on (s: (s32[], f32[4])) -> pred[] {
  ROOT %s.1 = pred[] custom-call(%s), custom_call_target="any"
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %unknown = f32[4]{0} negate(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %before = f32[4]{0} negate(%x), backend_config={"estimated_cycles":"50"}
  %moved = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%before), source_target_pairs={{0,1}}
  %loop = (s32[]{:T(128)}, f32[4]{0}) while(%moved), condition=%goes_on, body=%token
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def module():
    return parse_module(TEXT)


def names(instructions, **which):
    return {e.instruction.name for e in instructions if all(getattr(e, key) == value for key, value in which.items())}


def test_a_loop_of_known_length_counts_its_body_so_often_and_others_once_a_turn(module):
    found = executed(module)
    assert {e.times for e in found if e.instruction.name == "product"} == {32}
    assert {"product", "gathered"} <= names(found, each_turn=True)
    assert {"before", "loop"} <= names(found, each_turn=False)


def test_cycles_are_those_of_what_runs_without_the_parts_of_fusions_and_what_the_compiler_has_no_idea_of(module):
    found = executed(module)
    assert total_cycles([e for e in found if not e.each_turn]) == 50
    assert total_cycles([e for e in found if e.each_turn]) == 32 * 100 + 1
    assert total_cycles([e for e in executed(module, ("draw",)) if e.each_turn]) == 32 * 100 + 1000
    assert total_cycles([e for e in executed(module, ("body",)) if e.each_turn]) == 32 * 100 + 1


def test_what_follows_a_kernel_that_tells_of_itself_in_several_lines_is_read(module):
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


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[4,4]<=[16]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("replica_groups={}", 16),
    ],
)
def test_the_groups_of_a_collective_are_read_in_each_spelling(groups, size):
    text = TEXT.replace("replica_groups={{0,1,2,3}}", groups)
    (reduced,) = (each for each in traffic_of(executed(parse_module(text)), 16) if each.kind == "all-reduce")
    assert reduced.received_bytes == pytest.approx(reduced.moved_bytes * 2 * (size - 1) / size)


def test_bytes_of_types_leave_layouts_out():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[], pred[4]{0:T(512)(128)(4,1)}, s8[2])") == [12, 4, 4, 2]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule empty")
