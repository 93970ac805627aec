"""What a step should give, from the equations and plain transformers: the judge of its tests."""

from pathlib import Path

import numpy as np
import torch
from step_cases import Case, micro_batch_rows
from support import oracles
from transformers import AutoModelForCausalLM, PreTrainedModel

from safereg_dist.types import Row

DIRECTIONS = {"kl_forward": "forward", "kl_reverse": "reverse", "l2_logits": "l2"}


def whole_models(folder: Path, policy: str = "policy") -> list[PreTrainedModel]:
    """Policy and reference of a folder in float64, by plain transformers."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        for name in (policy, "reference")
    ]
    for model in models:
        model.set_experts_implementation("eager")  # torch groups no products in float64
    return models


def rows_of_step(case: Case, world_size: int) -> list[Row]:
    """The rows of all ranks and micro-batches of one optimizer step."""
    return [
        row
        for rank in range(world_size)
        for m in range(case.grad_accum_steps)
        for row in micro_batch_rows(rank, m, anchors=case.anchors)
    ]


def coefficient(case: Case, row: Row) -> float:
    """Linear schedule by hand: floor 0, so ceiling * risk."""
    if case.objective == "none" or not any(row.loss_mask):
        return 0.0
    if row.is_anchor:
        return 1.0
    if case.objective == "token_wise":
        return 1.0
    assert row.risk is not None
    return case.ceiling if case.objective == "static" else case.ceiling * row.risk


def expected(
    case: Case, rows: list[Row], models: list[PreTrainedModel]
) -> tuple[dict, dict[str, np.ndarray], dict[str, int]]:
    """Loss and parts, gradients, and counts of rows of one step, in float64.

    Hidden states come from one row at a time, unpadded; the loss and its gradients in states and
    head from `oracles.step_loss`; the rest by the chain rule. `row_of_token` says whose token is.
    """
    policy, reference = models
    policy.zero_grad()
    states, ref_states, labels, row_of_token = [], [], [], []
    for index, row in enumerate(rows):
        targets = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
        if not targets:
            continue
        ids = torch.tensor([row.input_ids])
        at = torch.tensor(targets) - 1
        states.append(policy.base_model(ids).last_hidden_state[0, at])
        with torch.no_grad():
            ref_states.append(reference.base_model(ids).last_hidden_state[0, at])
        labels += [row.input_ids[t] for t in targets]
        row_of_token += [index] * len(targets)
    hidden = torch.cat(states)
    coef = [coefficient(case, row) for row in rows]
    result = oracles.step_loss(
        hidden.detach().numpy(),
        policy.lm_head.weight.detach().numpy(),
        np.array(labels),
        np.array(row_of_token),
        np.array(coef),
        np.array([row.is_anchor for row in rows]),
        torch.cat(ref_states).numpy(),
        reference.lm_head.weight.detach().numpy(),
        objective=case.objective,
        direction=DIRECTIONS[case.divergence],
    )
    hidden.backward(torch.tensor(result["grad_hidden"]))
    grads = {n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None}
    head = next(n for n, p in policy.named_parameters() if p is policy.lm_head.weight)
    grads[head] = result["grad_head"] + grads.get(head, 0.0)  # a tied one has the embedding's too
    result["row_of_token"] = np.array(row_of_token)
    counts = {
        "rows": len(rows),
        "response_tokens": len(labels),
        "active_rows": sum(c > 0 for c in coef),
        "reference_rows": sum(c > 0 for c in coef),
    }
    return result, grads, counts
