"""Stage 3: proximal policy optimisation of router and heads (Schulman et al. 2017, arXiv:1707.06347).

An episode is an answer written in windows (policy.py), each read by the backbone unverified; its reward (rewards.py)
comes at the end. The loss of a window with the ratio q of its probability now and when it was drawn, advantage A,
return R and value v is

    -min(q A, clip(q, 1 - c, 1 + c) A)  +  w_value (v - R)^2  -  w_entropy H  +  w_kl KL(policy || policy of stage 2)

with A by generalised advantage estimation (arXiv:1506.02438), discount 1, made zero-mean and unit-variance. The
backbone is frozen, and so is the prefix attention: what the heads start from is kept from the rollout, and the updates
need no pass over the text.

TRL has no PPO trainer since 1.13, and its GRPO and RLOO call a model's own forward, which knows no windows.

Shape letters: N windows, D hidden size, Q tokens of a pass, T = Q + 1.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from moe_common.runs.checkpoints import load_state, save_state
from moe_common.runs.finite import check_weights
from moe_ext.multi_token.model.mixture import MultiTokenMoE
from moe_ext.multi_token.model.passes import backbone_passes
from moe_ext.multi_token.training.data import Task
from moe_ext.multi_token.training.policy import Decisions, Windows, act, divergence, judge
from moe_ext.multi_token.training.rewards import RewardWeights, reward_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """How stage 3 is trained.

    Args:
        steps: rounds of episodes and updates.
        episodes: a round.
        updates: passes over a round's windows.
        lr: learning rate.
        clip: how far the ratio may move the loss.
        trace: lambda of the advantage estimation.
        w_value, w_entropy, w_kl: weights of the loss's other terms.
        rewards: weights of the reward's parts.
        longest: most tokens of an answer.
        save_steps: rounds between two checkpoints.
        logging_steps: rounds between two lines of the log.
        seed: of questions and decisions.
    """

    steps: int
    episodes: int = 8
    updates: int = 4
    lr: float = 1e-5
    clip: float = 0.2
    trace: float = 0.95
    w_value: float = 0.5
    w_entropy: float = 0.01
    w_kl: float = 0.05
    rewards: RewardWeights = RewardWeights()
    longest: int = 64
    save_steps: int = 5000
    logging_steps: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Episode:
    """An answer: its windows, its tokens, and the parts of its reward."""

    windows: Windows
    written: list[int]
    parts: dict[str, float]


@dataclass(frozen=True)
class Round:
    """A round's windows, and what they are learnt from."""

    windows: Windows
    log_prob_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    reference: Decisions


def train_ppo(model: MultiTokenMoE, tasks: Sequence[Task], settings: PPOSettings, folder: Path) -> dict[str, float]:
    """Train router and heads, in place; called again with the same arguments it goes on where it was interrupted.

    Args:
        model: as stage 2 left it.
        tasks: questions to answer.
        settings: of the stage.
        folder: for checkpoints.

    Returns:
        The mean parts of the reward, and `reward`, over the last round.
    """
    model.requires_grad_(True)
    reference = MultiTokenMoE(model.backbone, model.config).to(model.device).requires_grad_(False)
    reference.load_state_dict(model.state_dict())
    value = nn.Linear(model.router.layers[1].in_features, 1).to(model.device)
    nn.init.zeros_(value.weight)
    nn.init.zeros_(value.bias)
    optimizer = torch.optim.AdamW([*model.parameters(), *value.parameters()], lr=settings.lr, weight_decay=0.0)
    torch.manual_seed(settings.seed)
    held = {"model": model, "value": value, "optimizer": optimizer}
    done = _resume(held, folder)
    means: dict[str, float] = {}
    progress = tqdm(range(done, settings.steps), initial=done, total=settings.steps, desc="ppo", unit="step")
    for step in progress:
        chosen = Random(f"{settings.seed}/{step}").choices(tasks, k=settings.episodes)
        episodes = [play(model, task, settings) for task in chosen]
        means = _means(episodes, settings.rewards)
        losses = update(model, value, optimizer, _round(model, reference, value, episodes, settings), settings)
        check_weights(chain(model.named_parameters(), value.named_parameters("value")), step + 1)
        progress.set_postfix({"reward": f"{means['reward']:.3f}"})
        if (step + 1) % settings.logging_steps == 0 or step + 1 == settings.steps:
            shown = {**means, **losses}
            logger.info("step %d %s", step + 1, " ".join(f"{name} {number:.4f}" for name, number in shown.items()))
        if (step + 1) % settings.save_steps == 0:
            state = {name: part.state_dict() for name, part in held.items()}
            save_state(folder, step + 1, {**state, "rng": torch.get_rng_state(), "step": step + 1})
    return means


@torch.no_grad()
def play(model: MultiTokenMoE, task: Task, settings: PPOSettings, *, greedy: bool = False) -> Episode:
    """Write one answer.

    Args:
        model: the policy, with its backbone.
        task: what is asked, and the right answer.
        settings: the longest answer.
        greedy: take the likelier choices rather than draw.
    """
    where = model.backbone_device
    prompt_1L = torch.tensor([task.prompt], device=where)
    cache = DynamicCache(config=model.backbone.config)
    windows: list[Windows] = []
    written: list[int] = []
    past = None
    with backbone_passes(model.backbone, prompt_1L, {"past_key_values": cache}) as passes:
        first_1 = passes.read_prompt().argmax(dim=-1)
        while True:
            state_1QD = passes.states()
            text = [*task.prompt, *written, int(first_1)]
            ids_1T = torch.tensor([text[-state_1QD.shape[1] - 1 :]])
            first_1QD, past = model.first_states(state_1QD, ids_1T, torch.ones_like(ids_1T[:, 1:]), past)
            window = act(model, first_1QD[:, -1], first_1, greedy=greedy)
            windows.append(window)
            said = [int(first_1), *(token for token in window.spoken_NH[0].tolist() if 0 <= token < model.off_id)]
            written += said
            ends = [place for place, token in enumerate(written) if token in model.end_ids]
            if ends:
                written = written[: ends[0] + 1]
            if ends or len(written) >= settings.longest:
                break
            first_1 = passes.read(torch.tensor([said], device=where))[:, -1].argmax(dim=-1)
        num_passes = passes.num_passes
    parts = reward_parts(
        written,
        task.reference,
        num_passes=num_passes,
        num_heads=model.config.num_heads,
        end_ids=model.end_ids,
    )
    return Episode(Windows.joined(windows), written, parts)


def update(
    model: MultiTokenMoE, value: Callable[[Tensor], Tensor], optimizer, played: Round, settings: PPOSettings
) -> dict[str, float]:
    """Learn from a round; gives the means of what the loss is made of, in its last pass."""
    for _ in range(settings.updates):
        now = judge(model, played.windows)
        parts = ppo_losses(
            log_prob_N=now.log_prob_N,
            old_log_prob_N=played.log_prob_N,
            advantage_N=played.advantage_N,
            value_N=value(played.windows.state_ND)[:, 0],
            return_N=played.return_N,
            clip=settings.clip,
        )
        parts["entropy"] = now.entropy_N.mean()
        parts["kl"] = divergence(now, played.reference).mean()
        loss = (
            parts["policy"]
            + settings.w_value * parts["value"]
            - settings.w_entropy * parts["entropy"]
            + settings.w_kl * parts["kl"]
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: float(part.detach()) for name, part in parts.items()}


def ppo_losses(
    *, log_prob_N: Tensor, old_log_prob_N: Tensor, advantage_N: Tensor, value_N: Tensor, return_N: Tensor, clip: float
) -> dict[str, Tensor]:
    """The clipped loss of the policy, the squared error of the value, and the share of ratios that were clipped."""
    ratio_N = (log_prob_N - old_log_prob_N).exp()
    bounded_N = ratio_N.clamp(1 - clip, 1 + clip)
    return {
        "policy": -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N).mean(),
        "value": (value_N - return_N).square().mean(),
        "clipped": (ratio_N != bounded_N).float().mean(),
    }


def advantages(value_N: Tensor, reward: float, trace: float) -> Tensor:
    """[N] generalised advantages of an episode's windows, whose whole reward comes after the last; discount 1."""
    following_N = torch.cat([value_N[1:], value_N.new_tensor([reward])])
    surprise = (following_N - value_N).tolist()
    estimated, running = [], 0.0
    for difference in reversed(surprise):
        running = difference + trace * running
        estimated.append(running)
    return value_N.new_tensor(estimated[::-1])


@torch.no_grad()
def _round(
    model: MultiTokenMoE, reference: MultiTokenMoE, value: nn.Linear, episodes: list[Episode], settings: PPOSettings
) -> Round:
    windows = Windows.joined([episode.windows for episode in episodes])
    advantage, returns = [], []
    for episode in episodes:
        value_N = value(episode.windows.state_ND)[:, 0]
        advantage.append(advantages(value_N, settings.rewards.total(episode.parts), settings.trace))
        returns.append(advantage[-1] + value_N)
    advantage_N = torch.cat(advantage)
    spread = advantage_N.std(unbiased=False).clamp(min=1e-6)
    return Round(
        windows=windows,
        log_prob_N=judge(model, windows).log_prob_N,
        advantage_N=(advantage_N - advantage_N.mean()) / spread,
        return_N=torch.cat(returns),
        reference=judge(reference, windows),
    )


def _means(episodes: list[Episode], weights: RewardWeights) -> dict[str, float]:
    names = episodes[0].parts
    means = {name: sum(episode.parts[name] for episode in episodes) / len(episodes) for name in names}
    return {"reward": weights.total(means), **means}


def _resume(held: dict, folder: Path) -> int:
    """Load the newest whole checkpoint; gives the steps that were done by then."""
    state = load_state(folder)
    if state is None:
        return 0
    for name, part in held.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    return state["step"]
