"""The experts' weights and outputs beside the gates that call them.

    analyzer = ExpertAnalyzer(wrapper)
    analyzer.analyze_expert_router_alignment()

Shape letters: L gates, E experts, H hidden size, B rows, S tokens, T = B * S.
"""

import torch
from torch import Tensor

from moe_ext.router_study.analysis.experts import experts_of
from moe_ext.router_study.analysis.router_analyzer import Compared, mean_interval
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.metrics import experts, weights

SHUFFLES = 20


class ExpertAnalyzer:
    """Compares what the router's rows point at with what the experts read and add.

    Args:
        wrapper: the mixture.
        seed: of shuffles and the bootstrap.
    """

    def __init__(self, wrapper: MoEModelWrapper, *, seed: int = 0) -> None:
        self.wrapper, self.gates, self.seed = wrapper, wrapper.gates, seed

    def extract_all_expert_weights(self) -> dict[str, dict[str, list[Tensor]]]:
        """Of each gate by its name: every matrix of its experts by name, one for each expert; float32 on the CPU."""
        return {name: experts_of(self.gates, place).matrices() for place, name in enumerate(self.gates.names)}

    def analyze_expert_router_alignment(self) -> Tensor:
        """How strongly expert f answers the direction of row e, [L, E, E]; 1 by chance. See `experts.alignment`."""
        rows = self.gates.weights()
        return torch.stack(
            [
                experts.alignment(rows[place].cpu(), experts_of(self.gates, place).readers())
                for place in range(len(self.gates))
            ]
        )

    def similarities(self) -> tuple[Tensor, Tensor]:
        """Cosines of the router's rows and of the experts' weights, each [L, E, E]."""
        of_rows = [weights.cosines(weight.cpu()) for weight in self.gates.weights()]
        of_experts = [experts_of(self.gates, place).similarity() for place in range(len(self.gates))]
        return torch.stack(of_rows), torch.stack(of_experts)

    @torch.no_grad()
    def gate_and_norm(self, ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the gates and lengths of the outputs of all experts, each [L, T] + [E], padding left out.

        Every expert runs on every token, so a few rows are enough.

        Raises:
            ValueError: a gate that looks at another hidden state than its experts read.
        """
        ids_BS, mask_BS = ids_BS.to(self.wrapper.device), mask_BS.to(self.wrapper.device)
        with self.gates.inputs() as seen:
            _, routing = self.wrapper.run(ids_BS, mask_BS)
        real_T = mask_BS.flatten()
        norms = [experts_of(self.gates, place).output_norms(seen[place][real_T]) for place in range(len(self.gates))]
        return routing.logits_LTE[:, real_T].cpu(), torch.stack(norms)

    def compare(self, ids_BS: Tensor | None = None, mask_BS: Tensor | None = None) -> list[Compared]:
        """Alignment, agreement of similarities, and with some text the correlation of rank by gate and by norm."""
        generator = torch.Generator().manual_seed(self.seed)
        table_LEE = self.analyze_expert_router_alignment()
        own, others = (torch.stack(parts) for parts in zip(*map(experts.own_and_others, table_LEE), strict=True))
        of_rows, of_experts = self.similarities()
        agreed = torch.stack([experts.agreement(*pair) for pair in zip(of_rows, of_experts, strict=True)])
        renamed = []
        for _ in range(SHUFFLES):
            order = torch.randperm(self.gates.num_experts, generator=generator)
            renamed += [
                experts.agreement(rows, held[order][:, order]) for rows, held in zip(of_rows, of_experts, strict=True)
            ]
        found = [
            Compared(
                "experts.alignment", own, *mean_interval(own, generator), chance=1.0, shuffled=float(others.mean())
            ),
            Compared(
                "experts.agreement",
                agreed,
                *mean_interval(agreed, generator),
                chance=0.0,
                shuffled=float(torch.stack(renamed).mean()),
            ),
        ]
        if ids_BS is not None:
            gate_LTE, norms_LTE = self.gate_and_norm(ids_BS, mask_BS)
            pairs = list(zip(gate_LTE, norms_LTE, strict=True))
            by_rank = torch.stack([experts.rank_correlation(*pair).mean() for pair in pairs])
            order_T = torch.randperm(gate_LTE.shape[1], generator=generator)
            dealt = [experts.rank_correlation(gate, norms[order_T]).mean() for gate, norms in pairs]
            found.append(
                Compared(
                    "experts.norm_rank",
                    by_rank,
                    *mean_interval(by_rank, generator),
                    chance=0.0,
                    shuffled=float(torch.stack(dealt).mean()),
                )
            )
        return found
