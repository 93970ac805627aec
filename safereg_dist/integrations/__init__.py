"""Training stacks that people have: each gets the same step, in their own shape.

collator        rows of a stack's batches, found where they are collated
trainer         transformers.Trainer and any subclass of it
trl             trl.SFTTrainer
axolotl, llamafactory      the two that are driven by YAML
anchors         anchor rows mixed into a data set of any kind
"""

from safereg_dist.models.extras import require

require("accelerate", "datasets")
