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
"""Names of adapters: which one can have, and whose a weight is by its key."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


def refuse_unusable_names(names: Iterable[str]) -> None:
    """Raise a `ValueError` that names those which no adapter can have, because it is held in module dicts by its name."""
    attributes = nn.ModuleDict()
    bad = [name for name in names if not name or "." in name or hasattr(attributes, name)]
    if bad:
        raise ValueError(
            f"No adapter can be called {', '.join(map(repr, bad))}: a name must not be empty, hold a dot or be that of "
            "an attribute of modules, such as 'train' or 'half'. Rename it."
        )


def is_of_adapter(key: str, name: str) -> bool:
    """Whether a key of the state dict is a LoRA weight of this adapter; layers may be numbered like adapters."""
    return re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", key) is not None
