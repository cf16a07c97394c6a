# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The choice between the two ways to compute a routed linear layer; `moe_product.py` holds their arithmetic.

The sparse form multiplies less, but sorts, gathers and runs one small product for each expert that is hit. Its time over
that of the stacked form, measured on one CPU core with AMX, 1024 inputs and outputs, rank 16, top-2, `eval / training`:

    float32        1 token        32 tokens      128 tokens     512 tokens     2048 tokens
     8 experts     2.83 / 0.81    1.82 / 1.24    1.47 / 1.17    1.64 / 1.29    1.55 / 1.41
    16 experts     1.84 / 0.59    1.79 / 1.14    1.08 / 0.85    0.81 / 0.73    0.82 / 0.81
    32 experts     1.09 / 0.40    1.51 / 0.94    0.91 / 0.67    0.53 / 0.48    0.50 / 0.44
    64 experts     0.66 / 0.33    1.19 / 0.66    0.77 / 0.60    0.41 / 0.36    0.31 / 0.25

In bfloat16 the stacked form has the tiles, and small products are slow: 64 experts take 1.00 to 6.30 times its time in
eval. On a GPU the sparse form would wait for the counts of tokens, and start hundreds of kernels. Both stay stacked.
"""

from __future__ import annotations

from typing import Optional

import torch


MANY_TOKENS = 512


def sparse_pays(num_tokens: int, ranks: list[int], kept: Optional[int], dtype: torch.dtype, device: str) -> bool:
    """Whether each token should meet its kept experts only, rather than all experts in one product.

    Args:
        num_tokens: tokens of this call.
        ranks: rank of each expert.
        kept: experts kept for each token, if that is fixed.
        dtype: in which the products run.
        device: type of the device, such as "cpu".
    """
    if kept is None or num_tokens == 0 or device != "cpu" or dtype.itemsize < 4 or torch.compiler.is_compiling():
        return False
    all_over_kept = sum(ranks) / (kept * max(ranks))
    return all_over_kept >= (8 if num_tokens >= MANY_TOKENS else 32)
