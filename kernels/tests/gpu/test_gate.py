"""The gate on a real GPU: every case of production against float64 (skipped without a GPU).

What may round, and by how much, is derived in gate_measures.py. `python kernels/tests/gate.py` runs
the same cases and prints how near each comes to what is allowed.
"""

import pytest
import torch
from gate import compile_ahead
from gate_cases import production_cases, small_cases
from gate_checks import check
from gate_inputs import Case
from gate_measures import worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_ahead([*production_cases(), *small_cases()])


@pytest.mark.parametrize("case", production_cases(), ids=lambda case: case.name)
def test_production_shape(case: Case) -> None:
    torch.cuda.empty_cache()
    measure = worst(check(case, torch.device("cuda")))
    assert measure.ratio <= 1, measure


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_few_rows(case: Case) -> None:
    """Rows whose columns are spread over programs."""
    torch.cuda.empty_cache()
    measure = worst(check(case, torch.device("cuda")))
    assert measure.ratio <= 1, measure
