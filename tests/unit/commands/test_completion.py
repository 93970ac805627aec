"""Claimed: the completion of a shell knows every verb and the options of each. Exact."""

import subprocess

import pytest

from safereg_dist.cli import main
from safereg_dist.commands.completion import SHELLS
from safereg_dist.commands.verbs import VERBS

pytest.importorskip("shtab")


def test_bash_completes_verbs_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> set[str]:
        code = f"{script}\nCOMP_WORDS=({' '.join(words)} '')\nCOMP_CWORD={len(words)}\n"
        code += '_shtab_safereg\nprintf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert set(VERBS) <= completed("safereg")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_is_told_of_the_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for option in ("hostfile", "model-config", "dry-run"):
        assert option in script
