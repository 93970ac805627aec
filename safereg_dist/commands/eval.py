"""`safereg eval`: attack success, over-refusal and task accuracy of a model."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import add_local_rank, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--model", type=Path, required=True, help="folder, or its name there:")
    parser.add_argument("--endpoint", help="an OpenAI-compatible server, e.g. http://host:8000/v1")
    parser.add_argument("--api-key-env", default="SAFEREG_API_KEY", help="variable with its key")
    parser.add_argument("--allow-plain-http", action="store_true", help="send the key over http")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], help="files, hub:OWNER/NAME[:CONFIG][@SPLIT]"
    )
    parser.add_argument(
        "--benign", type=Path, nargs="+", default=[], help="benign where a file does not say"
    )
    parser.add_argument("--judge", default="keyword")
    parser.add_argument(
        "--critic", type=Path, nargs="+", default=[], help="YAML of a judge model (risk.critic)"
    )
    parser.add_argument(
        "--attacks", nargs="+", default=[], help="e.g. prefix_injection role_play prefill:8"
    )
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], help="--out of others on the same prompts"
    )
    parser.add_argument(
        "--lm-eval", metavar="TASK,...", help="of lm-evaluation-harness; TASK.yaml for your own"
    )
    parser.add_argument("--lm-eval-limit", type=at_least(1), help="documents of a task; all")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the same one goes on")
    parser.add_argument("--refusal", help="text whose first token P(refuse) is measured on")
    parser.add_argument("--poisoned", help="an answer that complies: P of its first token")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    add_local_rank(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates on the launcher's ranks; the first writes and prints the figures of merit; 0."""
    from safereg_dist.errors import printable
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
                return 0
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
                against=arguments.against,
                respondent=respondent,
                lm_eval=arguments.lm_eval.split(",") if arguments.lm_eval else (),
                lm_eval_limit=arguments.lm_eval_limit,
                device=ranks.device,
                **given,
            )
    print(text_of(result))
    print(f"\nwritten: {printable(arguments.out)}")
    return 0
