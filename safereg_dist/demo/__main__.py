"""The demo: base model -> probe -> anchors -> arms -> evaluation -> report.

Each stage is a command that a user would type for a real model; it is printed before it runs.
Stages that are done already are not done again. By default the world is a small made-up one, whose
model is trained from scratch; with `--estimators` it has three arms more, whose risk comes from a
guard model. With `--real` the model is SmolLM2-135M-Instruct, from a wheel of the package index.
"""

import argparse
import sys
from pathlib import Path

from safereg_dist.demo.toy import run_demo
from safereg_dist.errors import SafeRegError


def main() -> int:
    """Runs a demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m safereg_dist.demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: runs/demo, with --real runs/real")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimators", action="store_true", help="three arms more, with a guard")
    parser.add_argument("--real", action="store_true", help="a real instruct model")
    parser.add_argument("--wheel", type=Path, help="with --real: the model's wheel, on disk")
    arguments = parser.parse_args()
    out = arguments.out or Path("runs", "real" if arguments.real else "demo")
    try:
        if arguments.real:
            from safereg_dist.demo.real.run import run_real

            run_real(out, seed=arguments.seed, ranks=arguments.ranks, wheel=arguments.wheel)
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
