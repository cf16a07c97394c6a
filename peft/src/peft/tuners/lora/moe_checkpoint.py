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
"""Gradient checkpointing of a routed model.

A checkpointed block runs again during the backward pass, when the forward is long over; the reentrant kind of
checkpointing runs it first without gradients. So weights enter such a block as inputs and statistics leave it as outputs:
both kinds then give the gradients, and count the tokens, of a run without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .moe_frame import Frame


if TYPE_CHECKING:
    from .moe_context import RoutingContext


class RoutedCheckpoint:
    """A gradient checkpointing function that passes routing weights in, and gate statistics and new weights out."""

    def __init__(self, function: Callable, context: RoutingContext) -> None:
        self.function = function
        self.context = context

    def __call__(self, run: Callable, *args: Any) -> Any:
        context, frame = self.context, self.context.frame
        if not context.running:
            return self.function(run, *args)
        replay = _Replay(context, run, frame, num_args=len(args))
        returned = self.function(replay, *args, *frame.weights.values())
        return replay.hand_over(returned, frame)


class _Replay:
    """The checkpointed computation as a function of tensors only; called in the forward and again in the backward."""

    def __init__(self, context: RoutingContext, run: Callable, frame: Frame, num_args: int) -> None:
        self.context = context
        self.run = run
        self.num_args = num_args
        self.frame = frame.again({})  # as it is now: by the time of the backward, the encoder has returned
        self.given_sites = list(frame.weights)
        self.counted: list[str] = []
        self.decided: list[str] = []
        self.num_outputs = 0
        self.returns_tuple = False

    def __call__(self, *inputs: Any) -> tuple:
        args, weights = inputs[: self.num_args], inputs[self.num_args :]
        frame = self.frame.again(dict(zip(self.given_sites, weights)))
        with self.context.within(frame):
            output = self.run(*args)
        self.returns_tuple = isinstance(output, tuple)
        outputs = output if self.returns_tuple else (output,)
        self.num_outputs = len(outputs)
        decided = {site: made for site, made in frame.weights.items() if site not in self.given_sites}
        self.counted, self.decided = list(frame.statistics), list(decided)
        return (*outputs, *frame.statistics.values(), *decided.values())

    def hand_over(self, returned: tuple, frame: Frame) -> Any:
        """Put what the gates inside measured and decided into the frame; return the computation's own output."""
        outputs, rest = returned[: self.num_outputs], returned[self.num_outputs :]
        for site, vector in zip(self.counted, rest):
            frame.count(site, vector)
        frame.weights.update(zip(self.decided, rest[len(self.counted) :]))
        return tuple(outputs) if self.returns_tuple else outputs[0]
