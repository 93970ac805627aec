"""The verbs of the `safereg` command, one module each: `add_arguments(parser)` and `run(args)`."""
