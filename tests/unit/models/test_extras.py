"""Claimed: where a module of an extra is missing, a script's own import and a verb say which extra
brings it, in one line of our family of errors; a module of no extra stays Python's own error.

Exact. The missing module is hidden from a fresh interpreter's import system.
"""

import subprocess
import sys

import pytest

from safereg_dist.errors import ConfigError
from safereg_dist.models.extras import install, needed, require

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("module", "statement", "extra"),
    [
        ("datasets", "from safereg_dist.integrations.trainer import SafeRegTrainer", "train"),
        ("accelerate", "from safereg_dist import prepare", "train"),
        ("trl", "from safereg_dist.integrations.trl import SafeRegSFTTrainer", "trl"),
        ("megatron", "from safereg_dist.integrations.megatron import MegatronSafety", "megatron"),
    ],
)
def test_an_import_names_the_extra(module, statement, extra):
    words = [sys.executable, "-c", HIDE, module, statement]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = f'this needs {module}, which is not installed: pip install "safereg-dist[{extra}]"'
    assert done.stderr.splitlines()[-1] == f"safereg_dist.errors.ConfigError: {told}"


def test_commands_and_other_modules():
    assert install("trl", "peft", "datasets") == 'pip install "safereg-dist[peft,train,trl]"'
    assert install("no_such") == ""
    require("json", "datasets")
    with pytest.raises(ModuleNotFoundError, match="no_such"), needed():
        import no_such  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        require("no_such")
    with pytest.raises(ConfigError, match="this needs gguf"), needed():
        raise ModuleNotFoundError(name="gguf.vocab")
