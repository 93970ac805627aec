"""`safereg convert-gguf`: a GGUF file as a Hugging Face folder that every verb takes."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import example
from safereg_dist.commands.outcome import Outcome, command
from safereg_dist.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg convert-gguf model.gguf --out models/my-model  # needs the extra `gguf`"
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf", help="the model, with its weights")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="of the model in safetensors"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of the written weights"
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja file (default: the template in the file)",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Converts and prints one line."""
    from safereg_dist.models.gguf import convert_gguf

    template = None
    if arguments.chat_template is not None:
        try:
            template = arguments.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"cannot read {arguments.chat_template}: {err}") from err
    weights = convert_gguf(
        arguments.file, arguments.out, precision=arguments.precision, chat_template=template
    )
    print(f"{weights / 1e6:.1f}M weights in {arguments.precision} written to {arguments.out}")
    given = ("--model", arguments.out, "--data", "ROWS.jsonl", "--out", "run.yaml")
    return Outcome(now=command("config", "init", *given))
