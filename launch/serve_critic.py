"""As `safereg serve-critic`: a local guard with the API of OpenAI, for tests and small jobs.

python launch/serve_critic.py --model FOLDER --format llama_guard [--host H] [--port 8800]
"""

import sys

from safereg_dist.cli import entry

if __name__ == "__main__":
    entry(["serve-critic", *sys.argv[1:]])
