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

The sparse form multiplies less, but sorts, gathers and runs one small product for each expert. In float32 on a CPU core
it wins where there are many more experts than a token keeps: 8 times as many for some hundred tokens, 32 times as many
for one. In bfloat16 a CPU with AMX multiplies the large stacked factors by its tiles, and small products are slow. On a
GPU the sparse form would wait for the counts of tokens and start hundreds of kernels; it was not measured there. Both
keep the stacked form.

`python -m benchmarks --parts forms`, in the project this was written for, prints the figures.
"""

from __future__ import annotations

from typing import Optional

import torch


# How many times the kept experts there must be, by the tokens of a call.
EXPERTS_OVER_KEPT = {512: 8, 32: 16, 1: 32}


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
    needed = next(over for tokens, over in EXPERTS_OVER_KEPT.items() if num_tokens >= tokens)
    return len(set(ranks)) == 1 and len(ranks) >= needed * kept
