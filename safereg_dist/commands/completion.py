"""`safereg completion`: what a shell needs to complete verbs and options.

safereg completion bash > ~/.local/share/bash-completion/completions/safereg
safereg completion zsh > "${fpath[1]}/_safereg"
"""

import argparse

from safereg_dist.commands.options import example

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg completion bash > safereg.bash")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")


def run(arguments: argparse.Namespace) -> int:
    """Prints the script; 0."""
    import shtab

    from safereg_dist.commands.verbs import command_parser

    print(shtab.complete(command_parser(), shell=arguments.shell))
    return 0
