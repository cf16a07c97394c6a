"""Generate several tokens a backbone pass, inside the backbone's own `generate`.

    decoding = generate(model, input_ids, attention_mask=..., max_new_tokens=100)
    decoding.sequences, decoding.report.tokens_per_pass

`generate(custom_generate=callable)` of transformers prepares everything as for its own greedy decoding or sampling
(logits processors, stopping criteria, cache, several returned sequences); the callable here is its inner loop. Each
turn is one pass of the backbone over the token it chose last and what was drafted behind it, by the heads or by
copying from the text (sources.py), whichever promises more for its time (planning.py):

    lossless   the backbone's own choices are compared with the draft from the first on; those that agree stand, the
               first that differs takes the draft's place, and the cache forgets the rest. The output is that of
               plain `generate`.
    fast       the draft stands unread.

A batch goes on by as many tokens as all its rows agree on. No private name of transformers is used.

Shape letters: B rows, L tokens, Q of them in the last pass, K drafted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from moe_ext.multi_token.decoding.planning import Choice, OpenGates, PassCosts, Plan, Planner, measure_costs, wait_for
from moe_ext.multi_token.decoding.rows import GrowingRows
from moe_ext.multi_token.decoding.sources import Draft, DraftSource, SourceName, sources_of
from moe_ext.multi_token.model.mixture import MultiTokenMoE
from moe_ext.multi_token.model.passes import backbone_passes

Mode = Literal["lossless", "fast"]
ALL_SOURCES: tuple[SourceName, ...] = ("heads", "copies")

# The text before the passes whose cost is measured: so many tokens, going round, so that there is something to copy.
COST_CONTEXT, COST_PERIOD = 64, 8
# What `generate` measured of the models that are alive.
MEASURED: WeakKeyDictionary[MultiTokenMoE, dict[tuple, PassCosts]] = WeakKeyDictionary()


@dataclass
class Record:
    """How a source did.

    Args:
        drafted: how often it drafted at each place, the first first.
        accepted: how often its draft stood there.
    """

    drafted: list[int]
    accepted: list[int]

    def __add__(self, other: "Record") -> "Record":
        return Record(
            [a + b for a, b in zip(self.drafted, other.drafted, strict=True)],
            [a + b for a, b in zip(self.accepted, other.accepted, strict=True)],
        )


@dataclass
class Report:
    """What a generation took.

    Args:
        passes: of the backbone, the prompt's included.
        rows: B.
        tokens: new tokens of all rows, padding left out.
        sources: how each did.
    """

    passes: int = 0
    rows: int = 1
    tokens: int = 0
    sources: dict[SourceName, Record] = field(default_factory=dict)

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
    sources: Sequence[SourceName] | None = None,
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
        sources: what may draft: `heads`, `copies`; by default both, and in `fast` the heads.
        plan: which of them drafts, and how much; by default `lossless` weighs their cost against the routers' gates,
            and `fast` asks the heads whose gate is open. The cost is measured in the first call for a batch size.
        stop_strings: texts that end a row, found with the tokenizer.
        tokenizer: the backbone's own; needed for stop strings alone.
        streamer: receives tokens as they are decided; batch of 1 only, as in transformers.
        settings: whatever `generate` of transformers takes for greedy decoding or sampling.

    Raises:
        ValueError: beams, scores or attentions are asked for, the cache cannot forget single tokens, or `fast` is to
            do without heads.
    """
    criteria = StoppingCriteriaList(settings.pop("stopping_criteria", None) or [])
    if stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings are given without the tokenizer to find them with. Pass tokenizer as well.")
        # transformers 5.23 hands the tokenizer to none but its own loops, so the criterion is made here.
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if sources is None:
        sources = ALL_SOURCES if mode == "lossless" else ("heads",)
    if plan is None:
        if mode == "fast" and "heads" not in sources:
            raise ValueError(
                f"mode is fast and sources is {', '.join(sources)}, but what is taken unread are drafts of heads. Add "
                "heads, or give a plan for the copies."
            )
        plan = Planner(_known_costs(model, sources, len(input_ids))) if mode == "lossless" else OpenGates()
    loop = DecodingLoop(sources_of(model, sources), plan, verified=mode == "lossless", streamer=streamer)
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
        sources: what may draft.
        plan: which of them drafts, and how much.
        verified: whether the backbone checks the drafts.
        streamer: receives tokens as they are decided; the prompt comes from `generate` itself.

    `report` holds what the last call took.
    """

    def __init__(
        self,
        sources: Sequence[DraftSource],
        plan: Plan,
        *,
        verified: bool = True,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.sources = {source.name: source for source in sources}
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
        self.report = Report(
            rows=len(input_ids),
            sources={
                name: Record([0] * source.longest, [0] * source.longest) for name, source in self.sources.items()
            },
        )
        mask_BL = model_kwargs.get("attention_mask")
        mask_BL = torch.ones_like(input_ids) if mask_BL is None else mask_BL
        for source in self.sources.values():
            source.start(input_ids, mask_BL)
        self.unread: dict[SourceName, list[Tensor]] = {name: [] for name in self.sources}
        rows = GrowingRows(input_ids, logits_processor, stopping_criteria, generation_config)
        with backbone_passes(backbone, input_ids, model_kwargs) as passes:
            going = rows.add(*rows.choose(passes.read_prompt()))
            state_BQD = passes.states()
            self._stream(rows, 1)
            while going:
                draft = self._draft(state_BQD, rows)
                logits_BQV = passes.read(torch.cat([rows.last_B[:, None], draft.tokens_BK], dim=1))
                num_stood, going = self._settle(rows, draft, logits_BQV)
                state_BQD = passes.states(num_stood + 1)
                passes.forget(draft.num_tokens - num_stood)
                self.plan.record(Choice(draft.source, draft.num_tokens), num_stood + 1)
                self._stream(rows, num_stood + 1)
        self.report.passes, self.report.tokens = passes.num_passes, rows.num_new_tokens
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=rows.ids_BL, past_key_values=passes.cache)
        return rows.ids_BL

    def _draft(self, state_BQD: Tensor, rows: GrowingRows) -> Draft:
        """What the source that the plan takes says next."""
        gates = {}
        for name, source in self.sources.items():
            self.unread[name].append(state_BQD)
            if not self.plan.asks(name):
                continue
            gates_BK = source.gates(torch.cat(self.unread[name], dim=1), rows.ids_BL)
            self.unread[name] = []
            # One token less than there is room for: the pass itself adds one.
            gates[name] = gates_BK[rows.live_B.to(gates_BK.device), : rows.room - 1]
        choice = self.plan.choose(gates)
        if choice.source is None:
            return Draft(None, rows.last_B.new_empty(len(rows.last_B), 0))
        return Draft(choice.source, self.sources[choice.source].write(rows.last_B, choice.num_drafts))

    def _settle(self, rows: GrowingRows, draft: Draft, logits_BQV: Tensor) -> tuple[int, bool]:
        """Add to the rows what a pass decided.

        Returns:
            How many drafts stood with more to follow, so that one token more than that was added; and whether any row
            goes on.
        """
        for place in range(draft.num_tokens):
            record = self.report.sources[draft.source]
            record.drafted[place] += 1
            chosen_B, scores_BV = rows.choose(logits_BQV[:, place])
            agrees = True
            if self.verified:
                agrees = rows.agree(chosen_B, draft.tokens_BK[:, place])
            else:
                chosen_B = rows.pad_finished(draft.tokens_BK[:, place])
            record.accepted[place] += agrees
            going = rows.add(chosen_B, scores_BV)
            if not (agrees and going):
                return place, going
        return draft.num_tokens, rows.add(*rows.choose(logits_BQV[:, -1]))

    def _stream(self, rows: GrowingRows, num_tokens: int) -> None:
        if self.streamer is not None:
            self.streamer.put(rows.ids_BL[:, -num_tokens:].cpu())


def _known_costs(model: MultiTokenMoE, sources: Sequence[SourceName], batch_size: int) -> PassCosts:
    """`costs_of`, measured once for a model where it is."""
    known = MEASURED.setdefault(model, {})
    key = (*sources, batch_size, model.backbone_device, model.backbone.dtype)
    if key not in known:
        known[key] = costs_of(model, sources, batch_size=batch_size)
    return known[key]


@torch.inference_mode()
def costs_of(model: MultiTokenMoE, sources: Sequence[SourceName] = ALL_SOURCES, *, batch_size: int = 1) -> PassCosts:
    """Measure c(k), asking and drafting included, of a model where it is, behind a short text of arbitrary tokens."""
    text_BL = torch.arange(COST_CONTEXT + 1, device=model.backbone_device).repeat(batch_size, 1) % COST_PERIOD
    prompt_BP = text_BL[:, :-1]
    held = {source.name: source for source in sources_of(model, sources)}
    cache = DynamicCache(config=model.backbone.config)
    with backbone_passes(model.backbone, prompt_BP, {"past_key_values": cache}) as passes:
        passes.read_prompt()
        state_BPD = passes.states()
        for source in held.values():
            source.start(prompt_BP, torch.ones_like(prompt_BP))
            source.gates(state_BPD, text_BL)

        def run_pass(name: SourceName | None, num_drafts: int) -> None:
            """What a turn of the loop does on the device, with nothing kept."""
            if name is not None:
                source = copy(held[name])  # this one reads on, `held` does not
                # The states of as many tokens as a whole draft that stands brings.
                source.gates(state_BPD[:, -num_drafts - 1 :], text_BL).tolist()
                if num_drafts:
                    source.write(text_BL[:, -1], num_drafts).tolist()
            # Arbitrary tokens in place of the draft, which may be shorter where a head is OFF.
            read_BQ = text_BL[:, :1].expand(-1, num_drafts + 1)
            passes.read(read_BQ).argmax(dim=-1).tolist()
            wait_for(model.backbone_device)
            passes.forget(num_drafts + 1)

        return measure_costs(run_pass, {name: source.longest for name, source in held.items()})


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
