"""The demo: base model -> probe -> anchors -> arms -> evaluation -> report.

Each stage is a command that a user would type for a real model; it is printed before it runs.
Stages that are done already are not done again. By default the world is a small made-up one, whose
model is trained from scratch; with `--estimators` it has three arms more, whose risk comes from a
guard model. With `--real` the model is SmolLM2-135M-Instruct, from a wheel of the package index;
your copies of public sets are evaluated too where you give them (`--advbench FILE` and so on).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safereg_dist.demo.real.public import SETS as PUBLIC_SETS
from safereg_dist.demo.toy import run_demo
from safereg_dist.errors import SafeRegError


def main(words: Sequence[str] | None = None) -> int:
    """Runs a demo, with these arguments or the command line's; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m safereg_dist.demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: runs/demo, with --real runs/real")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimators", action="store_true", help="three arms more, with a guard")
    parser.add_argument("--real", action="store_true", help="a real instruct model")
    parser.add_argument("--wheel", type=Path, help="with --real: the model's wheel, on disk")
    for name in PUBLIC_SETS:
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", help="with --real: a public set"
        )
    parser.add_argument("--public-rows", type=int, metavar="N", help="of each public set; all")
    arguments = parser.parse_args(words)
    public = {name: getattr(arguments, name) for name in PUBLIC_SETS if getattr(arguments, name)}
    if public and not arguments.real:
        parser.error(f"--{next(iter(public))} is evaluated with --real: add it")
    out = arguments.out or Path("runs", "real" if arguments.real else "demo")
    try:
        if arguments.real:
            from safereg_dist.demo.real.run import run_real

            run_real(
                out,
                seed=arguments.seed,
                ranks=arguments.ranks,
                wheel=arguments.wheel,
                public=public,
                public_rows=arguments.public_rows,
            )
        else:
            run_demo(
                out,
                ranks=arguments.ranks,
                seed=arguments.seed,
                estimators=arguments.estimators,
            )
    except SafeRegError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
