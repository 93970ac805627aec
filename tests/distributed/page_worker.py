"""Runs the Python that a page shows, each block by itself, in the folder of a small model.

    page_worker.py PAGE

A block finds what a reader has before its first line: a model with its tokenizer, rows, a Trainer's
arguments, an optimizer, an engine that is the model itself, `safety.yaml`. A Trainer is trained.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

import torch
from datasets import Dataset
from support.builders import TEMPLATE, random_rows, save_model, tiny_model
from support.pages import python_of
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import SFTConfig

from safereg_dist import row_of

WITHOUT_LOOP = "engine = ...", "engine = model"
HOW = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}
NOT_HERE = {"report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True}


def main() -> None:
    path = str(save_model(Path("model"), tiny_model(), TEMPLATE))
    Path("safety.yaml").write_text("risk: {estimator: column, max_held_back: 1}\n")
    for block in python_of(Path(sys.argv[1]).read_text()):
        known = what_a_reader_has(path, of_batches="batch_of(" in block)
        before = [weight.clone() for weight in known["model"].parameters()]
        exec(compile(block.replace(*WITHOUT_LOOP), sys.argv[1], "exec"), known)
        if "trainer" in known and "trainer.train()" not in block:
            known["trainer"].train()
        pairs = zip(before, known["model"].parameters(), strict=True)
        print("trained" if any(not a.equal(b) for a, b in pairs) else "ran", flush=True)


def what_a_reader_has(path: str, *, of_batches: bool) -> dict[str, Any]:
    """The names that a block uses and does not make."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    collator = DataCollatorForSeq2Seq(tokenizer)
    texts = random_rows(16)
    tokens = [[1, *tokenizer(f"{t['prompt']} {t['response']}")["input_ids"], 2] for t in texts]
    risks = [text["risk"] for text in texts]
    rows = [
        row_of(f"{at}", ids, [0, 0, *[1] * (len(ids) - 2)], risk=risk)
        for at, (ids, risk) in enumerate(zip(tokens, risks, strict=True))
    ]
    batches = [
        {
            **collator([{"input_ids": ids, "labels": ids} for ids in part]),
            "risk": torch.tensor(risk),
        }
        for part, risk in ((tokens[:4], risks[:4]), (tokens[4:8], risks[4:8]))
    ]
    columns = {"input_ids": tokens, "labels": tokens, "risk": risks}
    hidden, head = torch.randn(2, 8, 16, requires_grad=True), torch.randn(90, 16)
    return {
        **{"path": path, "tokenizer": tokenizer, "model": model, "collator": collator},
        **{"data": Dataset.from_dict(columns), "args": SFTConfig("out", **HOW, **NOT_HERE)},
        **{"windows": [batches] if of_batches else [rows[:4], rows[4:8]], "my_engine": lambda m: m},
        **{"optimizer": torch.optim.SGD(model.parameters(), 0.1), "world_size": 1},
        **{"ids": batches[0]["input_ids"], "AutoModelForCausalLM": AutoModelForCausalLM},
        **{"hidden": hidden, "head": head, "labels": torch.randint(90, (2, 8))},
        **{"b": torch.rand(2, 8), "reference_hidden": hidden.detach(), "reference_head": head},
        **{"device": torch.device("cpu")},
    }


if __name__ == "__main__":
    main()
