"""The one entry for every launcher; same arguments as `safereg train`.

deepspeed launch/finetune.py CONFIG.yaml [key=value ...]
torchrun --nproc-per-node 8 launch/finetune.py CONFIG.yaml [key=value ...]
python launch/finetune.py CONFIG.yaml [key=value ...]
"""

import sys

from safereg_dist.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
