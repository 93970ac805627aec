"""The gate itself: it holds for the kernels as they are, and fails for kernels that are broken.

Claimed: each mutation, a plausible slip in the source of the kernels, is caught by the small case
named beside it, so by the case of production of the same name. A mutation whose pattern no longer
matches is an error: whoever rewrites a kernel rewrites its mutation. Run under the interpreter.
"""

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from gate_cases import small_cases
from gate_checks import check
from gate_inputs import Case
from gate_measures import worst

from safereg_kernels import fused, triton_kernels

CASES = {case.name: case for case in small_cases()}
CPU = torch.device("cpu")


class Mutation(NamedTuple):
    """All matches of a pattern replaced."""

    name: str
    pattern: str
    replacement: str
    caught_by: str


MUTATIONS = [
    Mutation("last block is left out", r"if whole_end < end:", "if end < 0:", "whole rows forward"),
    Mutation(
        "gradient of the last block is left out",
        r"for start in range\(whole_end, end, BLOCK\):",
        "for start in range(end, end, BLOCK):",
        "whole rows forward",
    ),
    Mutation(
        "padding takes part",
        r"x = tl\.where\(columns < end, x, -_INF\)",
        "x = tl.where(columns < num_readable, x, -_INF)",
        "shards forward padded",
    ),
    Mutation(
        "padding is not zeroed",
        r"grad = tl\.where\(columns < token_end, grad, 0\.0\)",
        "grad = grad + 1e-30",
        "shards forward padded",
    ),
    Mutation(
        "no p in the gradient of the divergence",
        r"on_pt = scaled_weight / ",
        "on_pt = 0.0 / ",
        "whole rows forward",
    ),
    Mutation(
        "no q in the gradient of the divergence",
        r"on_q = scaled_weight / ",
        "on_q = 0.0 / ",
        "whole rows forward",
    ),
    Mutation(
        "no divergence in the gradient",
        r"\+ tl\.load\(at \+ 6\) \* _LOG2_E",
        "",
        "whole rows reverse",
    ),
    Mutation(
        "no -1 at the label",
        r"grad -= tl\.where\(columns == label, ce_weight, 0\.0\)",
        "grad = grad",
        "whole rows forward",
    ),
    Mutation(
        "label off by one",
        r"label = tl\.load\(label_ptr \+ row\)\.to\(tl\.int32\)",
        "label = tl.load(label_ptr + row).to(tl.int32) - 1",
        "whole rows forward",
    ),
    Mutation(
        "one row is skipped",
        r"has_kl = tl\.load\(kl_weight_ptr \+ row\) != 0",
        "has_kl = (tl.load(kl_weight_ptr + row) != 0) & (row != 6)",
        "whole rows forward",
    ),
    Mutation(
        "the other weight",
        r"kl_weight = tl\.load\(kl_weight_ptr \+ row\)",
        "kl_weight = tl.load(ce_weight_ptr + row)",
        "whole rows forward",
    ),
    Mutation(
        "no 1 / T",
        r"scaled_weight = kl_weight \* inv_temperature",
        "scaled_weight = kl_weight",
        "whole rows reverse",
    ),
    Mutation(
        "the temperature reaches the cross-entropy",
        r"at_p1 = _product\(max_p, _LOG2_E \* 1\.0\)",
        "at_p1 = _product(max_p, c)",
        "whole rows reverse",
    ),
    Mutation(
        "half of the z-loss",
        r"2\.0 \* z_loss \* lse",
        "z_loss * lse",
        "whole rows reverse",
    ),
    Mutation("beta and 1 - beta", r"\*= 1\.0 - beta", "*= beta", "whole rows jsd"),
    Mutation(
        "no soft cap in the gradient",
        r"1\.0 - part \* part",
        "1.0",
        "whole rows soft caps",
    ),
    Mutation(
        "no logit scale in the gradient",
        r"grad = grad \* scale",
        "grad = grad",
        "whole rows soft caps",
    ),
    Mutation(
        "sign of the log ratio",
        r"d = gap \* (\w+) - centre",
        r"d = centre - gap * \1",
        "whole rows reverse",
    ),
    Mutation(
        "parts merge without their weights",
        r"u \* part",
        "part",
        "shards reverse T 0.7",
    ),
    Mutation(
        "means of parts are not weighted",
        r"ref_a \+= apart \* share",
        "ref_a += apart * 0.5",
        "shards l2",
    ),
    Mutation(
        "the label is looked for in the wrong part",
        r"\(label >= first\)",
        "(label > first)",
        "whole rows forward",
    ),
    Mutation(
        "the difference is taken for the logits",
        r"raw \+ apart",
        "apart",
        "linear difference",
    ),
    Mutation(
        "offsets of 32 bits",
        r"row = tl\.program_id\(0\)\.to\(tl\.int64\)",
        "row = tl.program_id(0)",
        "rows beyond 2^31 in place",
    ),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton path on the CPU; a small row has a whole block and a partial one."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need TRITON_INTERPRET=1")
    monkeypatch.setenv("SAFEREG_KERNELS", "triton")
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 256)


def broken(mutation: Mutation, folder: Path) -> ModuleType:
    """The kernels with a mutation; a file, since the interpreter reads the source of a kernel."""
    source = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    changed, count = re.subn(mutation.pattern, mutation.replacement, source)
    assert count > 0, f"{mutation.pattern!r} is not in the kernels any more"
    assert changed != source
    path = folder / "broken_kernels.py"
    path.write_text(changed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_kernels_hold(case: Case) -> None:
    measure = worst(check(case, CPU))
    assert measure.ratio <= 1, measure


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # broken kernels overflow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_broken_kernels_fail(
    mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "kernels", broken(mutation, tmp_path))
    measure = worst(check(CASES[mutation.caught_by], CPU))
    assert measure.ratio > 2, f"{mutation.name} passes: {measure}"


def test_eager_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEREG_KERNELS", "eager")
    for case in CASES.values():
        measure = worst(check(case, CPU))
        assert measure.ratio <= 1, (case.name, measure)
