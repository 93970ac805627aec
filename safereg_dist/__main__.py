"""`python -m safereg_dist` is the `safereg` command."""

from safereg_dist.cli import entry

entry()
