"""Tests only: lets accelerate run DeepSpeed and FSDP on CPU ranks.

accelerate knows both on accelerators alone: on a CPU it would train each rank by itself. This tells
it that ranks are GPU ranks over gloo, whose device is the CPU. Import it before the first
Accelerator.
"""

import os

import torch
from accelerate import state


def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None, _plain=None):
    if int(os.environ.get("LOCAL_RANK", -1)) != -1 and not cpu and not torch.cuda.is_available():
        return "gloo", state.DistributedType.MULTI_GPU
    return _PLAIN_BACKEND(self, cpu, sagemaker_dp, backend)


def _set_device(self):
    if self.device is None and not torch.cuda.is_available():
        self.device = torch.device("cpu")
    else:
        _PLAIN_DEVICE(self)


_PLAIN_BACKEND = state.PartialState._prepare_backend
_PLAIN_DEVICE = state.PartialState.set_device
state.PartialState._prepare_backend = _prepare_backend
state.PartialState.set_device = _set_device
