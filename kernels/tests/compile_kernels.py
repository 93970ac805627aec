"""Compiles kernel variants for one GPU architecture, without a GPU; prints a JSON line for each.

A process of its own: under TRITON_INTERPRET=1, which the tests set, nothing can be compiled.
Run: python kernels/tests/compile_kernels.py 90 [--few | --common | --all [--pairs]]

Alone: the common kernels, each direction with each dtype and with whole vectors or not, but not
with every pair of the two (half of them); `--few`: those of the first and the last direction;
`--common`: all; `--all`: soft caps, scales, and what merges and scales too, and with `--pairs` not
every pair.

`instructions_per_column` are those of the machine code in the longest loop, which in the
statistics kernel is the one over whole blocks of columns, by columns of a thread.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from safereg_kernels import fused
from safereg_kernels import triton_kernels as kernels
from safereg_kernels.block import Block
from safereg_kernels.spec import DIRECTIONS, LossSpec

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = {
    *("policy_stride", "reference_stride", "out_stride", "num_columns", "num_readable", "width"),
    *("columns_per_split", "num_parts", "size"),
}
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PADDED = ("_ptr", "_stride", "per_split", "num_readable")
"""What is a multiple of 16 where rows start at aligned places, whatever the vocabulary."""


def variants(
    *, everything: bool, pairs: bool = False, directions: Sequence[str] = DIRECTIONS
) -> Iterator[dict[str, Any]]:
    """What `fused` launches: kernel, constants, dtypes of logits and gradient, warps, alignment.

    With `pairs`, a direction has whole vectors with one of the dtypes only, others with the other.
    """
    specs = [LossSpec(direction=direction) for direction in directions]
    common_specs = set(specs)
    if everything:
        caps = {"policy_softcap": 30.0, "reference_softcap": 30.0, "is_difference": True}
        specs += [LossSpec(direction=direction, **caps) for direction in DIRECTIONS]
        specs += [LossSpec(temperature=2.0, has_entropy=True, policy_logit_scale=0.5)]
        for direction in DIRECTIONS:
            yield _variant(kernels.merge_kernel, {"DIRECTION": DIRECTIONS.index(direction)}, 1)
        yield _variant(kernels.scale_kernel, {"BLOCK": fused.BLOCK_COLUMNS}, 8)
    for index, spec in enumerate(specs):
        # masked_kl of bfloat16 logits; linear_ce_kl with float32 ones and a bfloat16 head.
        for dtype, has_labels in ((torch.bfloat16, False), (torch.float32, True)):
            block = _block(dtype, has_labels=has_labels)
            warps = fused.num_warps(spec)
            statistics = fused.statistics_constants(block, spec)
            gradient = fused.gradient_constants(block, spec)
            one = index % 2 == int(has_labels)
            for whole in (one,) if pairs else (True, False):
                common = {"logits": TRITON_NAMES[dtype], "whole_vectors": whole}
                common["is_common"] = spec in common_specs
                yield _variant(kernels.statistics_kernel, statistics, warps, **common)
                yield _variant(kernels.gradient_kernel, gradient, warps, **common)
            if spec.direction == "jsd":
                mixture = fused.mixture_constants(spec)
                yield _variant(kernels.mixture_kernel, mixture, 8, logits=TRITON_NAMES[dtype])


def _variant(
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    logits: str = "fp32",
    *,
    whole_vectors: bool = True,
    is_common: bool = False,
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "constants": constants,
        "warps": warps,
        "logits": logits,
        "whole_vectors": whole_vectors,
        "is_common": is_common,
    }


def _block(dtype: torch.dtype, *, has_labels: bool) -> Block:
    logits, weights = torch.empty(1, 16, dtype=dtype), torch.ones(1)
    return Block(
        policy=logits,
        reference=logits,
        labels=torch.zeros(1, dtype=torch.int64) if has_labels else None,
        ce_weights=weights if has_labels else None,
        kl_weights=weights,
        num_columns=16,
    )


def compiled(variant: dict[str, Any], capability: int) -> bytes:
    """The machine code."""
    kernel, constants = variant["kernel"], variant["constants"]
    pointers = {
        "policy_ptr": f"*{variant['logits']}",
        "reference_ptr": f"*{variant['logits']}",
        "out_ptr": "*bf16",
        "tensor_ptr": "*bf16",
        "label_ptr": "*i64",
    }

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        return pointers.get(name) or ("*fp32" if name.endswith("_ptr") else "fp32")

    multiples = (*PADDED, *(("num_columns", "width") if variant["whole_vectors"] else ()))
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith(multiples)
    }
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constexprs=constants,
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    options = fused.launch_options(variant["warps"])
    return triton.compile(source, target=target, options=options).asm["cubin"]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack: a register that is spilled has its place there."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "--dump-resource-usage"))
    assert found is not None
    return {"registers": int(found[1]), "stack": int(found[2])}


def instructions(cubin: bytes, columns_per_thread: float) -> dict[str, Any]:
    """Spills, wide loads, and what is in the longest loop, of the machine code."""
    code = _dump(cubin, "--dump-sass")
    loop = _longest_loop(code)
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": _count(code.splitlines(), r"\bLDG\.E\.(?:\S*\.)?128"),
        "loop_instructions_per_column": len(loop) / columns_per_thread,
        "loop_loads": _count(loop, r"\bLDG\b"),
        "loop_wide_loads": _count(loop, r"\bLDG\.E\.(?:\S*\.)?128"),
        "loop_barriers": _count(loop, r"\bBAR\b"),
    }


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _count(lines: list[str], pattern: str) -> int:
    return sum(re.search(pattern, line) is not None for line in lines)


def _longest_loop(code: str) -> list[str]:
    """Instructions from the target of a backward branch to the branch."""
    lines = [
        (int(match[1], 16), match[2])
        for match in re.finditer(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    ]
    place = {address: index for index, (address, _) in enumerate(lines)}
    longest: list[str] = []
    for index, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        begin = place.get(int(target[1], 16)) if target is not None else None
        if begin is not None and lines[begin][0] < address and index - begin >= len(longest):
            longest = [text for _, text in lines[begin : index + 1]]
    return longest


def main(capability: int, options: set[str]) -> None:
    """Prints a line for each variant."""
    everything = "--all" in options
    pairs = "--pairs" in options or not options & {"--all", "--common"}
    directions = (DIRECTIONS[0], DIRECTIONS[-1]) if "--few" in options else DIRECTIONS
    for variant in variants(everything=everything, pairs=pairs, directions=directions):
        constants, warps = variant["constants"], variant["warps"]
        columns_per_thread = constants.get("BLOCK", 32 * warps) / (32 * warps)
        cubin = compiled(variant, capability)
        line = {
            **constants,
            **{key: value for key, value in variant.items() if key != "constants"},
            "kernel": variant["kernel"].fn.__name__,
            "triton": triton.__version__,
            **resources(cubin),
        }
        if variant["is_common"]:  # to disassemble takes longer than to compile
            line |= instructions(cubin, columns_per_thread)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), set(sys.argv[2:]))
