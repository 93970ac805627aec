"""The verbs of `safereg`: one file each, with `add_arguments` and `run`."""
