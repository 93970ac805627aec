"""Compiles every kernel variant for one GPU architecture, without a GPU; prints JSON lines.

A process of its own: under TRITON_INTERPRET=1, which the tests set, nothing can be compiled.
Run: python kernels/tests/compile_kernels.py 90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from safereg_kernels import fused
from safereg_kernels import triton_kernels as kernels
from safereg_kernels.block import DIRECTIONS, Formula

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SCALARS = {
    "policy_stride": "i64",
    "reference_stride": "i64",
    "out_stride": "i64",
    "num_columns": "i32",
    "width": "i32",
    "columns_per_split": "i32",
    "num_parts": "i32",
    "inv_temperature": "fp32",
    "policy_cap": "fp32",
    "reference_cap": "fp32",
}


def variants():
    """(kernel, logits dtype, gradient dtype, constants, warps) of what `fused` launches."""
    for direction in range(len(DIRECTIONS)):
        yield kernels.merge_kernel, "fp32", "fp32", {"DIRECTION": direction}, 1
        # masked_kl of bfloat16 logits; linear_ce_kl with float32 ones and a bfloat16 head.
        settings = [(False, False, "bf16"), (True, False, "fp32"), (True, True, "fp32")]
        for has_labels, is_capped, logits in settings:
            constants = {
                "DIRECTION": direction,
                "HAS_LABELS": has_labels,
                "POLICY_CAPPED": is_capped,
                "REFERENCE_CAPPED": is_capped,
                "IS_DIFFERENCE": is_capped,
                "BLOCK": fused.BLOCK_COLUMNS,
            }
            cap = 30.0 if is_capped else None
            warps = fused.num_warps(Formula(policy_softcap=cap, num_columns=1))
            for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
                yield kernel, logits, "bf16", constants, warps


def compiled(kernel, logits, gradient, constants, warps, capability):
    pointers = {
        "policy_ptr": f"*{logits}",
        "reference_ptr": f"*{logits}",
        "out_ptr": f"*{gradient}",
        "label_ptr": "*i64",
    }
    signature = {
        name: "constexpr" if name in constants else SCALARS.get(name) or pointers.get(name, "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_stride", "num_columns", "width", "per_split"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=fused.launch_options(warps))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes and spilled loads and stores of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\S*\.)?128", code)),
    }


def main(capability: int) -> None:
    for kernel, logits, gradient, constants, warps in variants():
        cubin = compiled(kernel, logits, gradient, constants, warps, capability).asm["cubin"]
        name = kernel.fn.__name__
        line = {"kernel": name, "logits": logits, **constants, "warps": warps, **resources(cubin)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
