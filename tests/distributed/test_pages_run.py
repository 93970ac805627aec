"""Claimed: every command on a page runs as it is written, in the order of the page, and ends with
status 0, unless a comment says what it needs or that it takes long (`support.pages.MARK`).

Real processes in one project on disk, whose files have the names that the pages use. The model is a
small one of the demo's world, a little trained; so is the judge, which `safereg serve-critic`
serves. What differs from the pages is in `STANDS_FOR` and `RANKS`: a path of the reader's, the
length of a run, ports, how many ranks; and a configuration that has been trained before goes to a
folder of its own. A command that an earlier page had is not run again.
"""

import subprocess
import time
from pathlib import Path

import pytest
from same_bits.world import HIDDEN_SIZE, NUM_LAYERS
from support.builders import write_jsonl
from support.extent import FULL
from support.launching import ROOT, Launcher, kill_session, tail
from support.pages import PAGES, Command, commands_of, files_of, name_of, python_of

from safereg_dist.demo.base import PEAK_LEARNING_RATE, batch_source
from safereg_dist.demo.guard import train_guard
from safereg_dist.demo.tokenizer import build_tokenizer
from safereg_dist.demo.training import save_model, train_from_scratch
from safereg_dist.demo.world import DATA_SETS

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
FIRST, VERBS = ROOT / "README.md", ROOT / "docs" / "reference" / "verbs.md"
QUICK = ("README.md", *(f"docs/{n}.md" for n in ("compliance", "data", "report", "watching")))
MODULES = {
    "safereg": ["-m", "safereg_dist"],
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "deepspeed": ["-m", "deepspeed.launcher.runner"],
}
"""What this interpreter runs in the place of a command."""
MARKED = ("axolotl", "bash", "docker", "kubectl", "mpirun", "pip", "sbatch", "source")
"""Commands of other programs, which no test runs: they need what is not everywhere."""
STANDS_FOR = {
    "$MODEL": "MODEL",
    "/models/my-chat-model": "MODEL",
    "steps: 500, save_every: 100": "steps: 4, save_every: 2",
    "NAME": "guard",
    "my-model": "guard",
    "output_dir: runs/mine\n": "output_dir: runs/mine\nsigning: {ed25519: private.pem}\n",
}
RANKS = ("--nproc", "--nproc-per-node", "--num_gpus")
SWEEP = """
config: mine.yaml
out: runs/sweep
axes: {seed: {0: [train.seed=0]}}
arms: {adaptive: []}
evaluation: {prompts: [held_out.jsonl], max_new_tokens: 4}
"""


def is_to_run(command: Command) -> bool:
    return command.words[0] in (*MODULES, "openssl") and not command.is_marked


class Project:
    """A folder with what the pages name, in which their commands run."""

    def __init__(self, folder: Path) -> None:
        _write_world(folder)
        self._folder, self._launch = folder, Launcher(folder)
        self._done: set[tuple[str, ...]] = set()
        self._trained: list[str] = []
        self._stands_for, self._judge = dict(STANDS_FOR), None

    def run_page(self, page: Path) -> None:
        text = page.read_text()
        for name, content in files_of(text).items():
            (self._folder / name).write_text(self._here(content))
        for command in filter(is_to_run, commands_of(text)):
            words = tuple(map(self._here, command.words))
            if words not in self._done:
                self._done.add(words)
                begin = time.monotonic()
                self._run([*words], f"{name_of(page)}: {' '.join(command.words)}")
                print(f"{time.monotonic() - begin:5.1f} s  {' '.join(words)}")

    def serve_judge(self) -> None:
        """Once, for all pages: at the ports that they name."""
        if self._judge is not None:
            return
        save_model(*train_guard(seed=0, steps=150, progress=False), self._folder / "guard")
        words = ("serve-critic", "--model", "guard", "--format", "llama_guard", "--port", "0")
        self._judge, log = self._launch.start(*MODULES["safereg"], *words, launcher="forked")
        while "http://" not in log.read_text():
            assert self._judge.poll() is None, tail(log)
            time.sleep(0.05)
        port = log.read_text().split("http://127.0.0.1:")[1].split("/")[0].split()[0]
        for shown in ("127.0.0.1:8000", "127.0.0.1:8800", "host:8000"):
            self._stands_for[shown] = f"127.0.0.1:{port}"

    def close(self) -> None:
        if self._judge is not None:
            kill_session(self._judge)

    def _here(self, text: str) -> str:
        for shown, here in self._stands_for.items():
            text = text.replace(shown, here)
        return text

    def _run(self, words: list[str], shown: str) -> None:
        for at, word in enumerate(words[:-1]):
            if word in RANKS:
                words[at + 1] = "2"
        if "serve-critic" in words:  # by itself it serves until it is ended
            return self.serve_judge()
        if words[1:3] == ["config", "init"]:
            (self._folder / words[-1]).unlink(missing_ok=True)
        if any(word in words for word in ("train", "launch", "doctor")) and "--print" not in words:
            config = next(Path(word).name for word in words if word.endswith(".yaml"))
            self._trained.append(config)
            if (again := self._trained.count(config)) > 1 and "output_dir=" not in shown:
                words.append(f"output_dir=runs/{config}-{again}")
        if words[0] in MODULES:
            how = "forked" if words[0] in ("safereg", "python") else "python"
            done = self._launch(*MODULES[words[0]], *words[1:], launcher=how)
            assert done.status == 0, f"{shown}\n{done.output}"
        else:
            done = subprocess.run(words, cwd=self._folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{shown}\n{done.stdout}{done.stderr}"


def _write_world(folder: Path) -> None:
    (folder / "runs").mkdir(parents=True)
    tokenizer = build_tokenizer()
    base = train_from_scratch(
        tokenizer,
        batch_source(0),
        seed=0,
        steps=60,
        learning_rate=PEAK_LEARNING_RATE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        name="base",
        progress=False,
    )
    save_model(base, tokenizer, folder / "MODEL")
    links = {"base": "MODEL", "GUARD": "guard", "project": "."}
    links |= {"runs/sft": "mine", "RUN": "runs/mine", "launch": ROOT / "launch"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    train = DATA_SETS["train"](0)
    poisoned = [row for row in train if row["id"].startswith("poison")]
    harmless = [row for row in train if row["id"].startswith("task")]
    rows = {
        ("rows", "my_rows", "ROWS"): [*poisoned[:4], *harmless[:36]],
        ("labelled_prompts", "LABELLED", "unseen"): DATA_SETS["probe"](0)[:480],
        ("prompts",): DATA_SETS["eval"](0)[::20],
        ("held_out", "HELD_OUT"): DATA_SETS["eval"](0)[::24],
    }
    for names, content in rows.items():
        for name in names:
            write_jsonl(folder / f"{name}.jsonl", content)
    (folder / "sweep.yaml").write_text(SWEEP)
    for words in (
        "genpkey -algorithm ed25519 -out private.pem",
        "pkey -in private.pem -pubout -out public.pem",
    ):
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory):
    opened = Project(tmp_path_factory.mktemp("pages") / "project")
    yield opened
    opened.close()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_no_test_runs_is_marked(page: Path) -> None:
    commands = [c for c in commands_of(page.read_text()) if c.words[0] in MARKED]
    assert [" ".join(c.words) for c in commands if not c.is_marked] == []


PAGES_TO_RUN = [page for page in PAGES if any(map(is_to_run, commands_of(page.read_text())))]


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=name_of)
def test_commands_run(page: Path, project: Project) -> None:
    project.run_page(FIRST)  # what other pages begin from
    if name_of(page) not in QUICK:
        if not FULL:
            pytest.skip("SAFEREG_TESTS=full")
        project.serve_judge()
        if "run.yaml" in page.read_text():
            project.run_page(VERBS)
    project.run_page(page)


PYTHON = {
    "README.md": ["trained", "trained"],
    "kernels/README.md": ["ran", "ran"],
    "docs/how_it_works.md": ["trained"],
    "docs/kernels.md": ["ran"],
    "docs/stacks/loops.md": ["trained", "trained"],
    "docs/stacks/megatron.md": [],  # needs Megatron's own files; test_megatron runs the example
    "docs/stacks/trainer.md": ["trained", "trained"],
}
"""What each block does to the weights of the model that it is given."""
QUICK = "README.md", "docs/stacks/loops.md"


@pytest.mark.parametrize("name", PYTHON)
def test_python_runs(name: str, launch: Launcher) -> None:
    if not PYTHON[name] or (name not in QUICK and not FULL):
        pytest.skip("SAFEREG_TESTS=full")
    done = launch(ROOT / "tests" / "distributed" / "page_worker.py", ROOT / name, launcher="forked")
    assert done.status == 0, done.output
    assert [line for line in done.output.splitlines() if line in ("ran", "trained")] == PYTHON[name]


def test_every_page_with_python_is_known() -> None:
    assert [name_of(page) for page in PAGES if python_of(page.read_text())] == [*PYTHON]
