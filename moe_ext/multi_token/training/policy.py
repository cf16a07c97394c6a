"""Router and heads as a policy: in every window it decides how many heads speak, and what they say.

Head after head: the router lets it speak with the probability sigmoid(r_j), or the window ends; a head that speaks
draws its token from softmax(logits_j), and OFF ends the window as well. The backbone's own token, which opens each
window, is no choice of the policy.

Shape letters: N windows, D hidden size, H heads, C classes that heads choose among (vocabulary.py; OFF last).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moe_ext.multi_token.model.mixture import MultiTokenMoE

SILENT = -1  # in place of a token, where a head did not speak


@dataclass(frozen=True)
class Windows:
    """Windows and what was decided in them.

    Args:
        state_ND: what the first head of each starts from.
        first_N: the backbone's own token, which opens it.
        spoken_NH: what each head said (OFF counts), or -1 where it did not speak.
    """

    state_ND: Tensor
    first_N: Tensor
    spoken_NH: Tensor

    @classmethod
    def joined(cls, parts: list["Windows"]) -> "Windows":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Decisions:
    """What a policy makes of decisions that were taken.

    Args:
        log_prob_N: of all that was decided in a window, together.
        entropy_N: of the distributions it was drawn from, in nats, added up.
        speak_NH: log-odds that a head speaks.
        tokens_NHC: log-probabilities of what it says.
        asked_NH: whether the router was asked about the head.
        spoke_NH: whether the head spoke.
    """

    log_prob_N: Tensor
    entropy_N: Tensor
    speak_NH: Tensor
    tokens_NHC: Tensor
    asked_NH: Tensor
    spoke_NH: Tensor


@torch.no_grad()
def act(model: MultiTokenMoE, state_1D: Tensor, first_1: Tensor, *, greedy: bool = False) -> Windows:
    """Decide one window.

    Args:
        model: the policy.
        state_1D: what its first head starts from.
        first_1: the backbone's own token.
        greedy: take the likelier choice rather than draw.
    """
    first_1D = state_1D = state_1D.to(model.device, model.dtype)
    speak_H = torch.sigmoid(model.router(state_1D))[0]
    spoken = [SILENT] * model.config.num_heads
    token_1, vocabulary = first_1, model.vocabulary()
    for place in range(model.config.num_heads):
        threshold = 0.5 if greedy else float(torch.rand(()))
        if not float(speak_H[place]) > threshold:
            break
        state_1D = model.heads.step(place, first_1D, state_1D, model.embed(token_1))
        logits_1C = model.heads.logits(place, state_1D, vocabulary.score)
        class_1 = logits_1C.argmax(dim=-1) if greedy else torch.multinomial(logits_1C.softmax(dim=-1), 1)[:, 0]
        token_1 = vocabulary.token_C[class_1]
        spoken[place] = int(token_1)
        if spoken[place] == model.off_id:
            break
    return Windows(first_1D, first_1.to(model.device), torch.tensor([spoken], device=model.device))


def judge(model: MultiTokenMoE, windows: Windows) -> Decisions:
    """How likely a policy makes what was decided; differentiable in router and heads."""
    spoke_NH = windows.spoken_NH != SILENT
    speak_NH = model.router(windows.state_ND)
    ended_NH = windows.spoken_NH == model.off_id
    # The router is asked about a head where all before it spoke and none was OFF.
    open_NH = (spoke_NH & ~ended_NH).long()
    asked_NH = torch.cat([torch.ones_like(open_NH[:, :1]), open_NH[:, :-1]], dim=1).cumprod(dim=1).bool()
    tokens, vocabulary = [], model.vocabulary()
    state_ND, token_N = windows.state_ND, windows.first_N
    for place in range(model.config.num_heads):
        state_ND = model.heads.step(place, windows.state_ND, state_ND, model.embed(token_N))
        tokens.append(model.heads.logits(place, state_ND, vocabulary.score).log_softmax(dim=-1))
        said_N = windows.spoken_NH[:, place]
        token_N = torch.where(spoke_NH[:, place] & ~ended_NH[:, place], said_N, 0)
    tokens_NHC = torch.stack(tokens, dim=1)
    log_speak_NH = torch.where(spoke_NH, logsigmoid(speak_NH), logsigmoid(-speak_NH))
    class_NH = vocabulary.classes(windows.spoken_NH).clamp(min=0)  # of a head that was silent any: it does not count
    log_said_NH = tokens_NHC.gather(-1, class_NH[..., None])[..., 0]
    chance_NH = torch.sigmoid(speak_NH)
    entropy_speak_NH = -chance_NH * logsigmoid(speak_NH) - (1 - chance_NH) * logsigmoid(-speak_NH)
    entropy_said_NH = -(tokens_NHC.exp() * tokens_NHC).sum(dim=-1)
    return Decisions(
        log_prob_N=(log_speak_NH * asked_NH + log_said_NH * spoke_NH).sum(dim=1),
        entropy_N=(entropy_speak_NH * asked_NH + entropy_said_NH * spoke_NH).sum(dim=1),
        speak_NH=speak_NH,
        tokens_NHC=tokens_NHC,
        asked_NH=asked_NH,
        spoke_NH=spoke_NH,
    )


def divergence(policy: Decisions, reference: Decisions) -> Tensor:
    """[N] Kullback-Leibler divergence of a policy from another in the decisions that were taken, in nats."""
    chance_NH = torch.sigmoid(policy.speak_NH)
    speak_NH = chance_NH * (logsigmoid(policy.speak_NH) - logsigmoid(reference.speak_NH)) + (1 - chance_NH) * (
        logsigmoid(-policy.speak_NH) - logsigmoid(-reference.speak_NH)
    )
    said_NH = (policy.tokens_NHC.exp() * (policy.tokens_NHC - reference.tokens_NHC)).sum(dim=-1)
    return (speak_NH * policy.asked_NH + said_NH * policy.spoke_NH).sum(dim=1)
