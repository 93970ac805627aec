"""`safereg convert-gguf`: a GGUF file as a Hugging Face folder that every verb takes."""

import argparse
from pathlib import Path

from safereg_dist.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("file", type=Path, help="the .gguf file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file in place of the model's")


def run(arguments: argparse.Namespace) -> int:
    """Converts and prints one line; 0."""
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
    return 0
