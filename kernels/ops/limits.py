"""Limits that operators, kernels and passes share."""

import torch

# Of activations and of weights in float: what the kernels read and write. ``kernels/cpu/dtypes.h`` has
# the same for C++.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of a decode step, at most: up to so many, reading the weight is most of the time, and a matrix
# instruction has one tile of rows.
DECODE_ROWS = 16
