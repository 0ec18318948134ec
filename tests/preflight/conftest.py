"""A small program in the text format of XLA's TPU backend."""

import pytest

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

%fast (p: f32[4]) -> f32[4] {
  ROOT %fast.1 = f32[4]{0} negate(%p), backend_config={"estimated_cycles":"1"}
}

%slow (p: f32[4]) -> f32[4] {
  ROOT %slow.1 = f32[4]{0} negate(%p), backend_config={"estimated_cycles":"1000"}
}

%token (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %layers = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%s), condition=%more_layers, body=%layer
  %choice = f32[4]{0} conditional(%s), branch_computations={%fast, %slow}, metadata={op_name="step/body/draw/cond"}
  %gathered = f32[16]{0} all-gather(%choice), replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %state = (s32[]{:T(128)}, f32[4]{0}) tuple(%s, %choice)
}

%continues (s: (s32[], f32[4])) -> pred[] {
  ROOT %s.1 = pred[] custom-call(%s), custom_call_target="any"
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %unknown = f32[4]{0} negate(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %before = f32[4]{0} negate(%x), backend_config={"estimated_cycles":"50"}
  %moved = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%before), source_target_pairs={{0,1}}
  %loop = (s32[]{:T(128)}, f32[4]{0}) while(%moved), condition=%continues, body=%token
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="session")
def hlo_text() -> str:
    return TEXT
