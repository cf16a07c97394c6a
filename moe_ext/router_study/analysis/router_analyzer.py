"""The routers' weights: directions, spectra and subspaces, each against random ones.

    analyzer = RouterAnalyzer(wrapper)
    analyzer.compute_router_similarity_matrix()
    analyzer.analyze_router_subspaces()

Shape letters: L gates, E experts, H hidden size, R dimensions of a subspace.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.metrics import weights

RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Compared:
    """A figure of the weights with its interval, its chance level and its control.

    Args:
        values: one for each gate, or for each pair of neighbouring gates.
        low, high: 95 % bootstrap interval of their mean.
        chance: of random weights of the same shape.
        shuffled: of the same weights in another order.
    """

    name: str
    values: Tensor
    low: float
    high: float
    chance: float
    shuffled: float

    @property
    def mean(self) -> float:
        return float(self.values.mean())


class RouterAnalyzer:
    """Looks at the rows that score the experts.

    Args:
        wrapper: the mixture.
        seed: of random weights, shuffles and the bootstrap.
    """

    def __init__(self, wrapper: MoEModelWrapper, *, seed: int = 0) -> None:
        self.gates, self.seed = wrapper.gates, seed

    def extract_all_router_weights(self) -> dict[str, Tensor]:
        """The rows [E, H] of each gate by its name, float32 on the CPU."""
        return {name: weight.cpu() for name, weight in zip(self.gates.names, self.gates.weights(), strict=True)}

    def compute_router_similarity_matrix(self) -> Tensor:
        """Cosine of every row with every other, over all gates, [L * E, L * E].

        Raises:
            ValueError: the gates look at hidden states of different widths.
        """
        held = list(self.extract_all_router_weights().values())
        if len(widths := {weight.shape[1] for weight in held}) > 1:
            raise ValueError(f"The gates read {sorted(widths)} numbers, so their rows cannot be compared.")
        return weights.cosines(torch.cat(held))

    def spectra(self, *, centred: bool = False) -> list[Tensor]:
        """Singular values of each gate."""
        return [weights.spectrum(weight, centred=centred) for weight in self.extract_all_router_weights().values()]

    def random_spectrum(self, *, centred: bool = False) -> Tensor:
        """Mean singular values of random rows as long as the first gate's."""
        weight_EH, generator = next(iter(self.extract_all_router_weights().values())), self._generator()
        size = weight_EH.double().norm() / math.sqrt(weight_EH.numel())
        draws = [
            weights.spectrum(weights.random_like(weight_EH, generator) * size, centred=centred)
            for _ in range(RANDOM_DRAWS)
        ]
        return torch.stack(draws).mean(dim=0)

    def analyze_router_subspaces(self, *, num_dimensions: int | None = None) -> dict[str, Tensor]:
        """Principal angles between the router subspaces of all pairs of gates of one width, radians.

        Args:
            num_dimensions: R; None takes the number of experts.

        Returns:
            `angles` [P, R] and `pairs` [P, 2] of the P pairs; `random` and `shuffled` [R], the mean of random
            subspaces and of the routers with each row's numbers in another order.
        """
        held = list(self.extract_all_router_weights().values())
        R = num_dimensions or min(*held[0].shape, self.gates.num_experts)
        pairs = [
            (one, other)
            for one in range(len(held))
            for other in range(one + 1, len(held))
            if held[one].shape == held[other].shape
        ]
        generator = self._generator()

        def angles(make) -> Tensor:
            return torch.stack(
                [
                    weights.principal_angles(make(held[one]), make(held[other]), num_dimensions=R)
                    for one, other in pairs or [(0, 0)]
                ]
            )

        random = [
            weights.principal_angles(
                weights.random_like(held[0], generator), weights.random_like(held[0], generator), num_dimensions=R
            )
            for _ in range(RANDOM_DRAWS)
        ]
        return {
            "pairs": torch.tensor(pairs).view(-1, 2),
            "angles": angles(lambda weight: weight) if pairs else torch.zeros(0, R, dtype=torch.float64),
            "random": torch.stack(random).mean(dim=0),
            "shuffled": angles(lambda weight: weights.shuffled_rows(weight, generator)).mean(dim=0),
        }

    def compare(self) -> list[Compared]:
        """Mean |cosine| of rows, effective rank, and smallest principal angle of two layers, beside chance."""
        held, generator = list(self.extract_all_router_weights().values()), self._generator()
        shuffled = [weights.shuffled_rows(weight, generator) for weight in held]
        random = [weights.random_like(weight, generator) for weight in held]
        figures = [
            Compared(
                "weights.cosine",
                (values := torch.stack([weights.mean_cosine(weight) for weight in held])),
                *mean_interval(values, generator),
                chance=sum(map(weights.mean_cosine_by_chance, held)) / len(held),
                shuffled=_mean(weights.mean_cosine, shuffled),
            ),
            Compared(
                "weights.effective_rank",
                (values := torch.stack([weights.effective_rank(weight) for weight in held])),
                *mean_interval(values, generator),
                chance=_mean(weights.effective_rank, random),
                shuffled=_mean(weights.effective_rank, shuffled),
            ),
        ]
        subspaces = self.analyze_router_subspaces()
        if len(subspaces["pairs"]):
            smallest = subspaces["angles"][:, 0]
            figures.append(
                Compared(
                    "weights.smallest_angle",
                    smallest,
                    *mean_interval(smallest, generator),
                    chance=float(subspaces["random"][0]),
                    shuffled=float(subspaces["shuffled"][0]),
                )
            )
        return figures

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def mean_interval(values: Tensor, generator: torch.Generator, *, replicates: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of a handful of values (Efron 1979)."""
    drawn = torch.randint(len(values), (replicates, len(values)), generator=generator)
    means = values.double().cpu()[drawn].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _mean(figure, held: list[Tensor]) -> float:
    return float(torch.stack([figure(weight) for weight in held]).mean())
