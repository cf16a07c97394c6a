"""A frozen backbone with token heads and a router beside it: several tokens a backbone pass.

    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=3, k_max=2))
    loss = model(input_ids=..., attention_mask=..., labels=...)["loss"]
    tokens = generate(model, input_ids, max_new_tokens=100)          # generation.py

Shape letters: B rows, L tokens, Q of them new, T = Q + 1, W window places (head j's at j, the backbone's own at 0),
D hidden size, H heads, V vocabulary, C classes that heads choose among (vocabulary.py), K copied tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from moe_common.text.packing import IGNORED_LABEL
from moe_ext.multi_token.model.backbone import check_backbone, states_of
from moe_ext.multi_token.model.copying import copies_everywhere, judge_copies
from moe_ext.multi_token.model.heads import HeadKind, TokenHeads
from moe_ext.multi_token.model.losses import LossWeights, copy_loss, head_loss, router_losses
from moe_ext.multi_token.model.prefix_attention import Prefix
from moe_ext.multi_token.model.router import CopyRouter, HeadRouter, gates_of
from moe_ext.multi_token.model.vocabulary import DraftVocabulary, draft_vocabulary
from moe_ext.multi_token.model.windows import window_targets

Stage = Literal["heads", "router"]


@dataclass(kw_only=True)
class MultiTokenConfig:
    """What is built beside a backbone.

    Args:
        num_heads: H, tokens that can be drafted beyond the backbone's own.
        k_max: heads that are on at a position, on average, when stage 2 ends.
        head_width: numbers in a head's inner layer, in multiples of the hidden size.
        draft_vocabulary: frequent tokens among which heads choose; None: all.
        max_copy: tokens that can be copied from the text in one draft.
        teacher_forcing_end: probability, when stage 2 ends, that a head reads the text's token rather than a draft. 0
            suits `fast`; what follows a wrong draft is nothing to `lossless`, which 1 suits.
        kind: `sequential` heads read the tokens drafted before them; `independent` ones are there for comparison.
        prefix_attention: whether an attention layer over the text stands in front of the heads; independent heads
            never have one, whatever is given.
        w_bce: weight of the router's binary cross-entropy.
        w_lb: of its load balance.
        w_ent: of its entropy.
        w_budget: of what its gates exceed the budget by.
    """

    num_heads: int = 3
    k_max: int = 2
    head_width: int = 4
    draft_vocabulary: int | None = None
    max_copy: int = 16
    teacher_forcing_end: float = 0.0
    kind: HeadKind = "sequential"
    prefix_attention: bool = True
    w_bce: float = 1.0
    w_lb: float = 0.2
    w_ent: float = 0.01
    w_budget: float = 0.05

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"heads is {self.num_heads}, but there must be at least 1.")
        if not 1 <= self.k_max <= self.num_heads:
            raise ValueError(
                f"k_max is {self.k_max}, but must lie between 1 and heads ({self.num_heads}): no more heads can be on "
                "than there are. Lower k_max or raise heads."
            )
        for name in ("head_width", "draft_vocabulary", "max_copy"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        if not 0 <= self.teacher_forcing_end <= 1:
            raise ValueError(
                f"teacher_forcing_end is {self.teacher_forcing_end}, but a probability must lie between 0 and 1."
            )
        if self.kind not in ("sequential", "independent"):
            raise ValueError(f"kind is '{self.kind}', but must be sequential or independent.")
        self.prefix_attention = self.prefix_attention and self.kind == "sequential"
        for name in ("w_bce", "w_lb", "w_ent", "w_budget"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but a loss weight must not be negative.")

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(bce=self.w_bce, balance=self.w_lb, entropy=self.w_ent, budget=self.w_budget)


@dataclass
class Training:
    """Where training stands; set before each step.

    Args:
        stage: `heads` trains the heads alone, all of them on; `router` trains both.
        teacher_forcing: probability that a head reads the text's token rather than the one that was drafted.
        heads_on: heads that are on at a position, on average.
    """

    stage: Stage = "heads"
    teacher_forcing: float = 1.0
    heads_on: float = field(default=float("inf"))


class MultiTokenMoE(nn.Module):
    """Router and heads; the backbone is used, never trained, saved or moved with them.

    Args:
        backbone: any causal language model of transformers, also one in 8 or 4 bits. Its weights are frozen.
        config: what to build.

    Raises:
        ValueError: a model that has no lm_head, or whose lm_head reads something else than its body returns.
    """

    def __init__(self, backbone: PreTrainedModel, config: MultiTokenConfig) -> None:
        super().__init__()
        check_backbone(backbone)
        backbone.requires_grad_(False).eval()
        self.config = config
        # In a tuple, where torch does not look for modules: the backbone is no part of the state dict.
        self._held = (backbone,)
        hidden_size = backbone.get_input_embeddings().weight.shape[1]
        if backbone.config.get_text_config().hidden_size != hidden_size:
            raise ValueError(
                f"The embedding of {type(backbone).__name__} has {hidden_size} numbers and its states "
                f"{backbone.config.get_text_config().hidden_size}; heads need both alike. Take another backbone."
            )
        self.heads = TokenHeads(
            config.num_heads,
            hidden_size,
            config.head_width * hidden_size,
            config.kind,
            prefix_attention=config.prefix_attention,
        )
        size = min(config.draft_vocabulary or self.off_id, self.off_id)
        # A buffer, so that it is saved with the heads; training puts the frequent tokens in (`draft_only`).
        chosen = config.draft_vocabulary is not None
        self.heads.register_buffer("drafted_tokens", torch.arange(size), persistent=chosen)
        self.router = HeadRouter(hidden_size, hidden_size, config.num_heads)
        self.copy_router = CopyRouter(hidden_size, hidden_size, config.max_copy)
        self.training_state = Training()

    @property
    def backbone(self) -> PreTrainedModel:
        return self._held[0]

    @property
    def device(self) -> torch.device:
        """Where router and heads are."""
        return self.router.layers[1].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of router and heads."""
        return self.router.layers[1].weight.dtype

    @property
    def backbone_device(self) -> torch.device:
        return self.backbone.get_input_embeddings().weight.device

    @property
    def off_id(self) -> int:
        """The class that stands for OFF: one behind the last token that the lm_head knows."""
        return self.backbone.get_output_embeddings().weight.shape[0]

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a text; none where the backbone names none."""
        named = [self.backbone.generation_config.eos_token_id, self.backbone.config.get_text_config().eos_token_id]
        lists = [[end] if isinstance(end, int) else end for end in named if end is not None]
        return sorted({end for ends in lists for end in ends})

    def embed(self, tokens_N: Tensor) -> Tensor:
        """[N, D] the backbone's embedding, where the heads are."""
        table = self.backbone.get_input_embeddings()
        return table(tokens_N.to(self.backbone_device)).to(self.device, self.dtype)

    def lm_head(self, state_ND: Tensor) -> Tensor:
        """[N, V] the backbone's own frozen lm_head on a head's state, where the heads are."""
        layer = self.backbone.get_output_embeddings()
        return layer(state_ND.to(self.backbone_device, layer.weight.dtype)).to(self.device)

    def draft_only(self, token_S: Tensor) -> None:
        """Let heads choose among these tokens; as many as `draft_vocabulary` says."""
        self.heads.drafted_tokens.copy_(token_S)

    def vocabulary(self) -> DraftVocabulary:
        """The tokens that heads choose among, and their rows of the lm_head."""
        return draft_vocabulary(
            self.heads.drafted_tokens, self.off_id, self.backbone.get_output_embeddings(), self.lm_head
        )

    def states(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """[B, L, D] the backbone's states, where the heads are."""
        where = self.backbone_device
        states_BLD = states_of(self.backbone, input_ids_BL.to(where), attention_mask_BL.to(where))
        return states_BLD.to(self.device, self.dtype)

    def first_states(
        self, state_BQD: Tensor, ids_BT: Tensor, mask_BQ: Tensor, past: Prefix | None = None
    ) -> tuple[Tensor, Prefix | None]:
        """What the first head starts from: the backbone's states, and what the prefix attention adds to them.

        Args:
            state_BQD: the backbone's, behind each new token of a text.
            ids_BT: these tokens, and the one that follows the last of them.
            mask_BQ: 0 where a new token is padding.
            past: what was given back for the text before them; None at its beginning.

        Returns:
            [B, Q, D], where the heads are; and what the next call needs of the text.
        """
        state_BQD = state_BQD.to(self.device, self.dtype)
        if self.heads.prefix is None:
            return state_BQD, None
        return self.heads.prefix(state_BQD, self.embed(ids_BT), mask_BQ.to(self.device), past)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch of text at every position; see `Training` for what is on.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 on padding.
            labels: [B, L], the tokens unshifted; -100 for those that are not to be learnt.

        Returns:
            `loss`, and its parts by name: `head_loss`, `right` (share of heads that are right where those before them
            are), and in stage `router` the routers' losses.
        """
        now = self.training_state
        state_BLD = self.states(input_ids, attention_mask)
        targets_BLW = window_targets(
            labels, num_heads=self.config.num_heads, end_ids=self.end_ids, off_id=self.off_id
        ).to(self.device)
        # Positions with nothing to learn are dropped first: the lm_head is most of the cost.
        learnt_BL = (targets_BLW[..., 0] != IGNORED_LABEL) & attention_mask.to(self.device).bool()
        # Nothing follows a row's last token, and nothing is learnt there.
        first_BLD, _ = self.first_states(state_BLD, pad(input_ids, (0, 1)), attention_mask)
        first_ND, targets_NW = first_BLD[learnt_BL], targets_BLW[learnt_BL]
        nll_NH, right_NH, read_truth_NH = self.read_windows(first_ND, targets_NW, now.teacher_forcing)
        # The router judges what the heads make of their first state, and must not bend it to its own losses.
        router_logits_NH = self.router(first_ND.detach())
        judged_NH = read_truth_NH & (targets_NW[:, 1:] != IGNORED_LABEL)
        drafted_NH = self.vocabulary().classes(targets_NW[:, 1:]) != IGNORED_LABEL
        on_NH = heads_on(gates_of(router_logits_NH.detach()), now.heads_on) & drafted_NH
        parts = {
            "head_loss": head_loss(nll_NH, on_NH),
            "right": (right_NH & judged_NH).sum() / judged_NH.sum().clamp(min=1),
        }
        if now.stage == "heads":
            return {"loss": parts["head_loss"], **parts}
        routed = router_losses(
            router_logits_NH, right_NH=right_NH, judged_NH=judged_NH, on_NH=on_NH, budget=now.heads_on
        )
        matched_N, right_NK, judged_NK = self.copies(input_ids, labels, learnt_BL)
        routed["copy_bce"] = copy_loss(self.copy_router(state_BLD[learnt_BL], matched_N), right_NK, judged_NK)
        return {"loss": parts["head_loss"] + self.config.loss_weights.total(routed), **parts, **routed}

    def copies(self, input_ids_BL: Tensor, labels_BL: Tensor, learnt_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What would be copied at the N positions that are learnt: matched_N, right_NK, judged_NK (copying.py)."""
        matched_BL, copied_BLK = copies_everywhere(input_ids_BL, self.config.max_copy)
        right_BLK, judged_BLK = judge_copies(copied_BLK, labels_BL)
        where = learnt_BL.to(input_ids_BL.device)
        return tuple(each[where].to(self.device) for each in (matched_BL, right_BLK, judged_BLK))

    def count_copies(self, rows: Sequence[dict[str, list[int]]]) -> None:
        """Let the copy router begin with how often copies stand in these rows."""
        parts = []
        for row in rows:
            tokens_1L, labels_1L = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            parts.append(self.copies(tokens_1L, labels_1L, torch.ones_like(tokens_1L, dtype=torch.bool)))
        self.copy_router.count(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def read_windows(
        self, first_ND: Tensor, targets_NW: Tensor, teacher_forcing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all heads along windows of known text.

        Args:
            first_ND: what the first head of each window starts from.
            targets_NW: as `window_targets` gives them.
            teacher_forcing: probability that a head reads the text's token rather than the draft of the head before.

        Returns:
            The negative log-likelihood of each head's target (0 where it is -100 or never drafted), whether the head
            drafts its target, and whether all that it has read of the window is the text's; each [N, H].
        """
        vocabulary = self.vocabulary()
        nll, right, read_truth = [], [], []
        state_ND = first_ND
        token_N = targets_NW[:, 0]
        truth_N = torch.ones_like(token_N, dtype=torch.bool)
        for place in range(self.config.num_heads):
            target_N = targets_NW[:, place + 1]
            known_N = (token_N >= 0) & (token_N < self.off_id)
            # OFF, and what is not known, reads as zeros.
            token_ND = self.embed(torch.where(known_N, token_N, 0)) * known_N[:, None]
            state_ND = self.heads.step(place, first_ND, state_ND, token_ND)
            logits_NC = self.heads.logits(place, state_ND, vocabulary.score)
            class_N = vocabulary.classes(target_N)
            nll.append(cross_entropy(logits_NC, class_N, ignore_index=IGNORED_LABEL, reduction="none"))
            # Compared with the highest score, which is found in a tenth of the time of its place.
            score_N = logits_NC.detach().gather(1, class_N.clamp(min=0)[:, None])[:, 0]
            right.append((score_N == logits_NC.detach().amax(dim=-1)) & (class_N != IGNORED_LABEL))
            read_truth.append(truth_N)
            token_N = target_N
            if teacher_forcing < 1:
                taught_N = torch.rand(target_N.shape, device=target_N.device) < teacher_forcing
                drafted_N = vocabulary.token_C[logits_NC.detach().argmax(dim=-1)]
                token_N = torch.where(taught_N, target_N, drafted_N)
            truth_N = truth_N & (token_N == target_N) & (target_N != IGNORED_LABEL)
        return torch.stack(nll, dim=1), torch.stack(right, dim=1), torch.stack(read_truth, dim=1)


def heads_on(gates_NH: Tensor, average: float) -> Tensor:
    """[N, H] which heads are on: those with the highest gates, so many a position on average.

    Gates never rise with the head's number, so those that are on are each position's first ones.
    """
    wanted = round(average * gates_NH.shape[0]) if average < gates_NH.shape[1] else gates_NH.numel()
    if wanted >= gates_NH.numel():
        return torch.ones_like(gates_NH, dtype=torch.bool)
    highest = torch.topk(gates_NH.flatten(), max(1, wanted)).indices
    on_M = torch.zeros(gates_NH.numel(), dtype=torch.bool, device=gates_NH.device)
    on_M[highest] = True
    return on_M.view_as(gates_NH)
