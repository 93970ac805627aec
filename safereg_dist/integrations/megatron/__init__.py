"""Megatron-core: the step inside its schedules.

safety.py       what a script calls: `MegatronSafety`
step.py         one step of one rank, in the order in which it runs
probes.py       stage 1 where a probe gives the risk: states lie over ranks
agreement.py    what all ranks agree on before a schedule
read_ahead.py   the step's items, read before its schedule
checks.py       what is refused at the start
"""

from safereg_dist.integrations.megatron.safety import MegatronSafety
from safereg_dist.models.extras import require

__all__ = ["MegatronSafety"]

require("megatron")
