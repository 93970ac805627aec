"""How many digits of a divergence survive the dtype of the logits, on real hidden states.

A policy on its way from one model to its fine-tuned version (weights base + share * (tuned - base),
in bfloat16) is held against the base; both use the base's head. For each token the divergence and
its gradient in the policy's hidden state, as `linear_ce_kl` returns them (bfloat16, which alone
rounds a gradient by some 0.2 %), are compared with a float64 computation from the same states and
head. What is shown is the error of the arithmetic, not of the models' bfloat16 trunks:

    python benchmarks/bench_logits_error.py --model DIR --tuned DIR --prompts FILE.jsonl

Rows of the file have `messages`, or `prompt` and `response`; the response's tokens count.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import provenance, write_csv
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from safereg_dist.data import tokenize_row
from safereg_dist.data.files import read_rows
from safereg_kernels import linear_ce_kl

RESULTS = Path(__file__).resolve().parent / "results" / "kernels"
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
VARIANTS = [
    (dtype, is_difference)
    for dtype in (torch.float32, torch.bfloat16)
    for is_difference in (False, True)
]
COLUMNS = [
    *("date", "hardware", "commit", "torch", "triton", "model", "tuned", "N", "V", "H"),
    *("direction", "tuned_share", "logits_dtype", "is_difference", "logit_difference_std"),
    *("divergence_nats", "grad_error_median", "grad_error_p90", "divergence_error_median"),
    "divergence_error_p90",
]


def response_rows(path: Path, model: Path, max_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(token ids [1, S], positions that predict a response token) of the first rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, count = [], 0
    for where, raw in read_rows(path):
        row = tokenize_row(raw, where, tokenizer, default_id=where)
        positions = [t - 1 for t in range(1, len(row.loss_mask)) if row.loss_mask[t]]
        rows.append((torch.tensor([row.input_ids]), torch.tensor(positions)))
        count += len(positions)
        if count >= max_tokens:
            break
    return rows


def load(folder: Path, device: torch.device) -> PreTrainedModel:
    """The model in float32, so that a small step between two models is not rounded away twice."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def interpolated(base: PreTrainedModel, tuned: PreTrainedModel, share: float) -> PreTrainedModel:
    """A bfloat16 model with the weights base + share * (tuned - base)."""
    policy = type(base)(base.config).to(base.device, torch.bfloat16).eval()
    of_base, of_tuned = base.state_dict(), tuned.state_dict()
    policy.load_state_dict(
        {name: torch.lerp(of_base[name], of_tuned[name], share) for name in of_base}
    )
    return policy


@torch.no_grad()
def last_states(model: PreTrainedModel, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Last hidden states that predict response tokens, bfloat16 [N, H]."""
    states = []
    for input_ids, positions in rows:
        output = model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
        states.append(output.last_hidden_state[0, positions.to(model.device)])
    return torch.cat(states)


def exact(
    hidden: Tensor, reference: Tensor, head: Tensor, direction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], its gradient [N, H], std over tokens of the logits' difference), float64."""
    hidden64 = hidden.double().requires_grad_()
    x, y = hidden64 @ head.double().T, reference.double() @ head.double().T
    a, b = x.log_softmax(-1), y.log_softmax(-1)
    u, w = (b, a) if direction == "forward" else (a, b)
    divergence = (u.exp() * (u - w)).sum(-1)
    (grad,) = torch.autograd.grad(divergence.sum(), hidden64)
    return divergence.detach(), grad, (x - y).detach().std(-1)


def fused(
    hidden: Tensor,
    reference: Tensor,
    head: Tensor,
    direction: str,
    logits_dtype: torch.dtype,
    is_difference: bool,
) -> tuple[Tensor, Tensor]:
    """(divergence [N], its gradient [N, H]) as `linear_ce_kl` gives them."""
    hidden = hidden.detach().requires_grad_()
    tokens = len(hidden)
    loss, _, divergence = linear_ce_kl(
        hidden,
        head,
        torch.zeros(tokens, dtype=torch.int64, device=hidden.device),
        ce_weights=torch.zeros(tokens),
        kl_weights=torch.ones(tokens),
        reference_hidden=reference,
        reference_head=head,
        direction=direction,
        logits_dtype=logits_dtype,
        is_difference=is_difference,
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    return divergence, grad


def error_rows(
    hidden: Tensor, reference: Tensor, head: Tensor, direction: str
) -> list[dict[str, Any]]:
    """The errors of each variant; tokens on which the two models agree exactly are left out."""
    divergence64, grad64, spread = exact(hidden, reference, head, direction)
    moved = (hidden != reference).any(-1)
    rows = []
    for logits_dtype, is_difference in VARIANTS:
        divergence, grad = fused(hidden, reference, head, direction, logits_dtype, is_difference)
        grad_error = ((grad.double() - grad64).norm(dim=-1) / grad64.norm(dim=-1))[moved]
        divergence_error = ((divergence.double() - divergence64).abs() / divergence64)[moved]
        rows.append(
            {
                "N": int(moved.sum()),
                "direction": direction,
                "logits_dtype": str(logits_dtype).removeprefix("torch."),
                "is_difference": is_difference,
                "logit_difference_std": float(spread[moved].median()),
                "divergence_nats": float(divergence64[moved].median()),
                "grad_error_median": float(grad_error.median()),
                "grad_error_p90": float(grad_error.quantile(0.9)),
                "divergence_error_median": float(divergence_error.median()),
                "divergence_error_p90": float(divergence_error.quantile(0.9)),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as people read them."""
    print("share   std(x-y)  divergence  logits         error of dX (p90)   of D (p90)")
    for row in rows:
        variant = row["logits_dtype"] + (" diff" if row["is_difference"] else "")
        print(
            f"{row['tuned_share']:<7} {row['logit_difference_std']:<9.2g} "
            f"{row['divergence_nats']:<11.2g} {variant:14s} "
            f"{row['grad_error_median']:.1e} ({row['grad_error_p90']:.1e})   "
            f"{row['divergence_error_median']:.1e} ({row['divergence_error_p90']:.1e})  "
            f"{row['direction']}"
        )


def main() -> None:
    """Measures and writes `results/kernels/logits_error.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="base, a Hugging Face folder")
    parser.add_argument("--tuned", type=Path, required=True, help="the same, fine-tuned")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL or CSV")
    parser.add_argument("--max-tokens", type=int, default=512, help="about so many are measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "logits_error.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    inputs = response_rows(arguments.prompts, arguments.model, arguments.max_tokens)
    base, tuned = load(arguments.model, device), load(arguments.tuned, device)
    head = base.get_output_embeddings().weight.detach().to(torch.bfloat16)
    reference = last_states(interpolated(base, tuned, 0.0), inputs)
    common = {
        **{key: value for key, value in provenance(device).items() if key in COLUMNS},
        "model": "/".join(arguments.model.resolve().parts[-2:]),
        "tuned": "/".join(arguments.tuned.resolve().parts[-2:]),
        "V": len(head),
        "H": head.shape[1],
    }
    rows = []
    for share in tqdm(SHARES, desc="shares of the tuning", unit=" shares"):
        hidden = last_states(interpolated(base, tuned, share), inputs)
        for direction in ("forward", "reverse"):
            found = error_rows(hidden, reference, head, direction)
            rows += [{**common, "tuned_share": share, **row} for row in found]
    write_csv(rows, arguments.out, COLUMNS)
    print_table(rows)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
