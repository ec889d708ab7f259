"""What some releases of torch cannot do, pruned or not."""

import re

import pytest
import torch

TESTED = (2, 14)  # the release on which these were seen to work; 2.4 was seen not to
OLD = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < TESTED
fast_path = pytest.mark.skipif(
    OLD, reason="on torch 2.4 the fast path of TransformerEncoderLayer reads weights without running hooks"
)
compiled_property = pytest.mark.skipif(OLD, reason="torch 2.4 cannot compile the reading of a pruned out_proj in full")
compiled_then_pruned = pytest.mark.skipif(
    OLD, reason="torch 2.4 does not notice that a module which it has compiled is pruned, natively or not"
)
other_default = pytest.mark.skipif(
    OLD, reason="torch 2.4's jacrev fails, and its Adam keeps the step there, when the default device is meta"
)
