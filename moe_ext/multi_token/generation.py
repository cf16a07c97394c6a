"""Generate several tokens a backbone pass, inside the backbone's own `generate`.

    decoding = generate(model, input_ids, attention_mask=..., max_new_tokens=100)
    decoding.sequences, decoding.report.tokens_per_pass

`generate(custom_generate=callable)` of transformers prepares everything as for its own greedy decoding or sampling
(logits processors, stopping criteria, cache, several returned sequences); the callable here is its inner loop. Each
turn is one pass of the backbone over the token it chose last and what the heads drafted behind it:

    lossless   the backbone's own choices are compared with the draft from the first on; those that agree stand, the
               first that differs takes the draft's place, and the cache forgets the rest. The output is that of
               plain `generate`.
    fast       the draft stands unread.

A batch goes on by as many tokens as all its rows agree on. No private name of transformers is used.

Shape letters: B rows, L tokens, K drafted tokens, D hidden size, H heads, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from moe_ext.multi_token.drafting import draft
from moe_ext.multi_token.model import MultiTokenMoE
from moe_ext.multi_token.passes import BackbonePasses, backbone_passes
from moe_ext.multi_token.planning import OpenGates, PassCosts, Plan, Planner, measure_costs, wait_for
from moe_ext.multi_token.router import gates_of
from moe_ext.multi_token.rows import GrowingRows

Mode = Literal["lossless", "fast"]

COST_CONTEXT = 64  # tokens that stand before the passes whose cost is measured


@dataclass
class Report:
    """What a generation took.

    Args:
        passes: of the backbone, the prompt's included.
        rows: B.
        tokens: new tokens of all rows, padding left out.
        drafted: how often each head drafted.
        accepted: how often its draft stood.
    """

    passes: int = 0
    rows: int = 1
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a row for each pass of the backbone."""
        return self.tokens / self.rows / max(1, self.passes)


@dataclass(frozen=True)
class Decoding:
    """What `generate` gives.

    Args:
        sequences: [B, L], prompts included; a row that ended early is padded.
        report: what they took.
    """

    sequences: Tensor
    report: Report


def generate(
    model: MultiTokenMoE,
    input_ids: Tensor,
    *,
    mode: Mode = "lossless",
    plan: Plan | None = None,
    stop_strings: list[str] | None = None,
    tokenizer=None,
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> Decoding:
    """Continue prompts with drafted tokens.

    Args:
        model: heads, router and backbone.
        input_ids: [B, L]; rows of several lengths are padded on the left, with an `attention_mask` in `settings`.
        mode: `lossless` gives the backbone's own output, `fast` takes drafts unread.
        plan: how many heads draft; by default `lossless` weighs their cost against the router's gates, and `fast`
            asks the heads whose gate is open.
        stop_strings: texts that end a row, found with the tokenizer.
        tokenizer: the backbone's own; needed for stop strings alone.
        streamer: receives tokens as they are decided; batch of 1 only, as in transformers.
        settings: whatever `generate` of transformers takes for greedy decoding or sampling.

    Raises:
        ValueError: beams, scores or attentions are asked for, or the cache cannot forget single tokens.
    """
    criteria = StoppingCriteriaList(settings.pop("stopping_criteria", None) or [])
    if stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings are given without the tokenizer to find them with. Pass tokenizer as well.")
        # transformers 5.23 hands the tokenizer to none but its own loops, so the criterion is made here.
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if plan is None:
        plan = Planner(costs_of(model, batch_size=len(input_ids))) if mode == "lossless" else OpenGates()
    loop = DecodingLoop(model, plan, verified=mode == "lossless", streamer=streamer)
    where = model.backbone_device
    if settings.get("attention_mask") is not None:
        settings["attention_mask"] = settings["attention_mask"].to(where)
    answer = model.backbone.generate(
        input_ids.to(where), custom_generate=loop, stopping_criteria=criteria, streamer=streamer, **settings
    )
    return Decoding(answer if isinstance(answer, Tensor) else answer.sequences, loop.report)


class DecodingLoop:
    """The inner loop of `generate`, to be given to it as `custom_generate`.

    Args:
        model: heads, router and backbone.
        plan: how many heads draft.
        verified: whether the backbone checks the drafts.
        streamer: receives tokens as they are decided; the prompt comes from `generate` itself.

    `report` holds what the last call took.
    """

    def __init__(
        self, model: MultiTokenMoE, plan: Plan, *, verified: bool = True, streamer: BaseStreamer | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self.verified = verified
        self.streamer = streamer
        self.report = Report()

    @torch.inference_mode()
    def __call__(
        self,
        backbone,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `generate`.

        Raises:
            ValueError: what is asked for is neither greedy decoding nor sampling with a cache.
        """
        _check_settings(generation_config, model_kwargs)
        model_kwargs.pop("synced_gpus", None)
        model_kwargs.pop("streamer", None)
        num_heads = self.model.config.num_heads
        self.report = Report(rows=len(input_ids), drafted=[0] * num_heads, accepted=[0] * num_heads)
        rows = GrowingRows(input_ids, logits_processor, stopping_criteria, generation_config)
        with backbone_passes(backbone, input_ids, model_kwargs) as passes:
            going = rows.add(*rows.choose(passes.read_prompt()))
            state_BD = passes.state_at(-1)
            self._stream(rows, 1)
            while going:
                draft_BK = self._draft(state_BD, rows)
                logits_BQV = passes.read(torch.cat([rows.last_B[:, None], draft_BK], dim=1))
                num_stood, going = self._settle(rows, draft_BK, logits_BQV)
                state_BD = passes.state_at(num_stood)
                passes.forget(draft_BK.shape[1] - num_stood)
                self.plan.record(draft_BK.shape[1], num_stood + 1)
                self._stream(rows, num_stood + 1)
        self.report.passes, self.report.tokens = passes.num_passes, rows.num_new_tokens
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=rows.ids_BL, past_key_values=passes.cache)
        return rows.ids_BL

    def _draft(self, state_BD: Tensor, rows: GrowingRows) -> Tensor:
        """[B, K] what the heads say next."""
        gates_BH = gates_of(self.model.router(state_BD.to(self.model.device, self.model.dtype)))
        # One token less than there is room for: the pass itself adds one.
        num_drafts = min(self.plan.choose(gates_BH[rows.live_B.to(gates_BH.device)]), rows.room - 1)
        return draft(self.model, state_BD, rows.last_B, num_drafts)

    def _settle(self, rows: GrowingRows, draft_BK: Tensor, logits_BQV: Tensor) -> tuple[int, bool]:
        """Add to the rows what a pass decided.

        Returns:
            How many drafts stood with more to follow, so that one token more than that was added; and whether any row
            goes on.
        """
        num_drafts = draft_BK.shape[1]
        for place in range(num_drafts):
            self.report.drafted[place] += 1
            chosen_B, scores_BV = rows.choose(logits_BQV[:, place])
            agrees = True
            if self.verified:
                agrees = rows.agree(chosen_B, draft_BK[:, place])
            else:
                chosen_B = rows.pad_finished(draft_BK[:, place])
            self.report.accepted[place] += agrees
            going = rows.add(chosen_B, scores_BV)
            if not (agrees and going):
                return place, going
        return num_drafts, rows.add(*rows.choose(logits_BQV[:, num_drafts]))

    def _stream(self, rows: GrowingRows, num_tokens: int) -> None:
        if self.streamer is not None:
            self.streamer.put(rows.ids_BL[:, -num_tokens:].cpu())


@torch.inference_mode()
def costs_of(model: MultiTokenMoE, *, batch_size: int = 1) -> PassCosts:
    """Measure c(k), drafting included, of a model where it is, behind a short text of arbitrary tokens."""
    text_BL = torch.arange(COST_CONTEXT, device=model.backbone_device).repeat(batch_size, 1) % model.off_id
    cache = DynamicCache(config=model.backbone.config)
    with backbone_passes(model.backbone, text_BL, {"past_key_values": cache}) as passes:
        passes.read_prompt()
        state_BD = passes.state_at(-1)

        def run_pass(num_drafts: int) -> None:
            _one_turn(model, passes, state_BD, text_BL, num_drafts)

        return measure_costs(run_pass, model.config.num_heads)


def _one_turn(
    model: MultiTokenMoE, passes: BackbonePasses, state_BD: Tensor, text_BL: Tensor, num_drafts: int
) -> None:
    """What a turn of the loop does on the device, with nothing kept."""
    gates_of(model.router(state_BD.to(model.device, model.dtype))).tolist()
    drafted_BK = draft(model, state_BD, text_BL[:, -1], num_drafts)
    # Arbitrary tokens in place of the draft, which may be shorter where a head is OFF.
    passes.read(text_BL[:, : num_drafts + 1]).argmax(dim=-1).tolist()
    drafted_BK.tolist()
    wait_for(model.backbone_device)
    passes.forget(num_drafts + 1)


def _check_settings(settings: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"The generation mode is {mode.value}, but drafts can be checked in greedy decoding and sampling alone. "
            "Leave out beams, assistants and prompt lookup."
        )
    asked = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if settings.return_dict_in_generate and getattr(settings, name)
    ]
    if asked:
        raise ValueError(f"{', '.join(asked)} cannot be given by passes of several tokens. Use plain generate for it.")
    if not model_kwargs.get("use_cache") or model_kwargs.get("past_key_values") is None:
        raise ValueError("Generation without a KV cache was asked for, but drafts need one. Set use_cache=True.")
