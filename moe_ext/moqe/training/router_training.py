"""Train the router with transformers' Trainer, on the experts' cached outputs.

The order of all rows of a run, curriculum first, is fixed beforehand by the seed; accumulation, the schedule in
optimiser steps, checkpoints and resuming are the Trainer's own. A run that was interrupted ends with the same numbers,
on a CPU to the last bit, as one that was not.

Shape letters: B rows, L tokens, D size of a state, E experts.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from moe_common.runs.resumable_trainer import ResumableTrainer
from moe_common.runs.run_folder import RUN
from moe_common.runs.trainer_arguments import trainer_arguments
from moe_common.runs.trainer_callbacks import Annealing, log_in_lines
from moe_common.runs.whole_files import write_json
from moe_ext.moqe.mixture.expert_set import ExpertSet
from moe_ext.moqe.mixture.router import Router
from moe_ext.moqe.options import TrainOptions
from moe_ext.moqe.training.losses import balance_loss, choice_loss, mixed_losses, predicted
from moe_ext.moqe.training.rows import collate_rows
from moe_ext.moqe.training.state_cache import StateCache, collate_states

logger = logging.getLogger(__name__)


OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}


class RouterTraining(nn.Module):
    """The router's loss; its parameters are the router's alone, the experts being frozen and kept outside.

    Args:
        router: the router.
        experts: whose embedding it reads and whose heads turn states into logits.
    """

    accepts_loss_kwargs = True  # for Trainer: `num_items_in_batch` is among the arguments of `forward`

    def __init__(self, router: Router, experts: ExpertSet) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        states: list[Tensor] | None = None,
        expert_losses: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss in nats a token.

        Args:
            input_ids, attention_mask: [B, L].
            labels: [B, L], aligned with the predictions; -100 is left out.
            states: [B, L, D] of every expert; mode token.
            expert_losses: [B, E] of every expert behind the prefix; mode sequence.
            num_items_in_batch: tokens of all batches of an optimiser step, so that accumulation weighs tokens alike.
        """
        config = self.router.config
        num_tokens = (labels != -100).sum()
        scores_BLE = self.router(self.experts.embed(input_ids), attention_mask)
        if config.mode == "sequence":
            total = choice_loss(scores_BLE, expert_losses, attention_mask, config.prefix_length)
            weights_TE = scores_BLE[:, : config.prefix_length].softmax(-1)[
                attention_mask[:, : config.prefix_length] == 1
            ]
        else:
            kept, labels_T = predicted(states, labels)
            weights_TE = self.router.weights(scores_BLE)[labels != -100]
            total = mixed_losses(self.experts, kept, weights_TE, labels_T).sum()
        if config.balance:
            total = total + config.balance * balance_loss(weights_TE) * num_tokens
        items = num_tokens if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / items}


class StateRows(Dataset):
    """The rows of a run in the order they are read, by number."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> int:
        return self.order[place]


class DescribeCheckpoints(TrainerCallback):
    """Puts into each checkpoint what run it belongs to, so that it is never taken for one of other experts."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RUN, self.run)


def reading_order(num_small: int, num_large: int, *, small_epochs: float, epochs: float, seed: int) -> list[int]:
    """The rows of a run by number: the small set's, shuffled anew in each of its epochs, then the large set's.

    Args:
        num_small: rows of the curriculum, which have the first numbers.
        num_large: rows behind them.
        small_epochs, epochs: passes over the one and the other; a broken pass ends early.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for first, count, passes in ((0, num_small, small_epochs), (num_small, num_large, epochs)):
        wanted = len(order) + round(passes * count)
        while len(order) < wanted:
            order += [first + row for row in torch.randperm(count, generator=generator).tolist()]
        del order[wanted:]
    return order


def collator(cache: StateCache, expert_losses_NE: Tensor | None) -> Callable[[list[int]], dict[str, Any]]:
    """What turns numbers of rows into a batch for `RouterTraining`.

    Args:
        cache: of the rows.
        expert_losses_NE: of every row and expert in mode sequence; None in mode token, which needs the states.
    """

    def collate(rows: list[int]) -> dict[str, Any]:
        if expert_losses_NE is not None:
            batch = collate_rows([cache.rows[row] for row in rows], cache.experts.tokenizer.pad_token_id)
            return {**batch, "expert_losses": expert_losses_NE[rows]}
        batch, states = collate_states(cache, rows)
        return {**batch, "states": states}

    return collate


def train_router(
    model: RouterTraining,
    order: Sequence[int],
    collate: Callable[[list[int]], dict[str, Any]],
    options: TrainOptions,
    folder: Path,
    *,
    run: dict[str, Any],
    checkpoint: Path | None = None,
) -> int:
    """Train, from a checkpoint where there is one.

    Args:
        model: changed in place.
        order: of `reading_order`.
        collate: of `collator`.
        options: of the run.
        folder: for checkpoints.
        run: what each checkpoint says of the run.
        checkpoint: to go on from, in place of the newest in the folder.

    Returns:
        The number of optimiser steps.
    """
    steps = -(-len(order) // (options.batch_size * options.gradient_accumulation_steps))
    arguments = trainer_arguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup_fraction * steps),
        weight_decay=options.weight_decay,
        optim=OPTIMIZERS[options.optimizer],
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        seed=options.seed,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    router_config = model.router.config

    def anneal(progress: float) -> None:
        first, last = router_config.temperature_start, router_config.temperature
        model.router.current_temperature = first + progress * (last - first)

    model.router.gradient_checkpointing = options.gradient_checkpointing
    trainer = ResumableTrainer(
        model=model,
        args=arguments,
        train_dataset=StateRows(order),
        data_collator=collate,
        callbacks=[Annealing(anneal), DescribeCheckpoints(run)],
    )
    log_in_lines(trainer)
    trainer.train_on(checkpoint=checkpoint)
    model.router.current_temperature = router_config.temperature
    model.router.eval()
    return trainer.state.global_step
