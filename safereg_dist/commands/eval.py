"""`safereg eval`: attack success, over-refusal and task accuracy of a model."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import (
    add_endpoint,
    add_json,
    add_local_rank,
    add_quiet,
    at_least,
    example,
)
from safereg_dist.commands.outcome import Outcome, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg eval --model MODEL --prompts held_out.jsonl --out runs/base/eval.json",
        "safereg eval --model runs/my-run/model --prompts held_out.jsonl "
        "--out runs/my-run/eval.json",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model; of --endpoint its name there",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="figures; answers are kept beside it, and the same command goes on",
    )
    _add_prompts(parser)
    _add_judges(parser)
    _add_comparison(parser)
    add_endpoint(parser)
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=64, help="tokens of an answer"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=32, help="prompts that are answered at once"
    )
    add_json(parser)
    add_quiet(parser)
    add_local_rank(parser)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSONL or CSV, or hub:OWNER/NAME[:CONFIG][@SPLIT]; without a label harmful",
    )
    parser.add_argument(
        "--benign",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="the same; without a label benign",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="forms of attack, e.g. prefix_injection role_play prefill:8",
    )
    parser.add_argument(
        "--lm-eval", metavar="TASK,...", help="of lm-evaluation-harness; TASK.yaml for your own"
    )
    parser.add_argument(
        "--lm-eval-limit", type=at_least(1), help="documents of a task (default: all)"
    )


def _add_judges(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", default="keyword", help="what tells a refusal")
    parser.add_argument(
        "--critic",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML of a judge model beside it, as risk.critic",
    )
    parser.add_argument(
        "--refusal",
        metavar="TEXT",
        help="P(refuse) is that of its first token (default: the row's `response`)",
    )
    parser.add_argument(
        "--poisoned",
        metavar="TEXT",
        help="P(poisoned) is that of its first token (default: the row's `complying`)",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="--out of the model before training on the same prompts, shown beside this one "
        "(default: base/eval.json beside the folder of --out, where there is one)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="--out of others on the same prompts: differences, prompt by prompt",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Evaluates on the launcher's ranks; the first writes and prints the figures of merit."""
    from safereg_dist.errors import printable
    from safereg_dist.evaluate.compare import BASE, base_beside
    from safereg_dist.evaluate.critics import read_critic
    from safereg_dist.evaluate.evaluate import evaluate_model
    from safereg_dist.evaluate.respondent import respondent_of
    from safereg_dist.evaluate.shared import shared_among
    from safereg_dist.evaluate.table import text_of
    from safereg_dist.parallel.distributed import distributed_ranks

    with distributed_ranks() as ranks:
        given = {
            name: getattr(arguments, name)
            for name in ("endpoint", "api_key_env", "max_new_tokens", "batch_size")
        }
        sides = {"dtype": None, "device": ranks.device, "progress": ranks.is_main}
        sides |= {"allow_plain_http": arguments.allow_plain_http}
        own = respondent_of(arguments.model, **given, **sides)
        with shared_among(ranks, own) as respondent:
            if respondent is None:
                return Outcome()
            result = evaluate_model(
                arguments.model,
                arguments.prompts,
                benign_files=arguments.benign,
                judge=arguments.judge,
                critics={file.stem: read_critic(file) for file in arguments.critic},
                out=arguments.out,
                attacks=arguments.attacks,
                refusal=arguments.refusal,
                poisoned=arguments.poisoned,
                base=arguments.base or base_beside(arguments.out),
                base_may_differ=arguments.base is None,
                against=arguments.against,
                respondent=respondent,
                lm_eval=arguments.lm_eval.split(",") if arguments.lm_eval else (),
                lm_eval_limit=arguments.lm_eval_limit,
                device=ranks.device,
                **given,
            )
    print(text_of(result))
    print(f"\nwritten: {printable(arguments.out)}")
    folder = arguments.out.parent
    # A report looks for that name; of the base alone there is nothing to report yet.
    is_read = arguments.out.name == "eval.json" and folder.name != BASE
    return Outcome(figures=result, now=command("report", folder) if is_read else "")
