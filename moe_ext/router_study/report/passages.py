"""Text with the expert of each token, for the page to colour."""

from dataclasses import dataclass

from moe_ext.router_study.collect.collector import Activations

TOKENS_OF_A_PASSAGE = 220


@dataclass(frozen=True)
class Passage:
    """The beginning of a row.

    Args:
        domain: its name.
        tokens: the text, token by token.
        layers: labels of the gates.
        chosen: for each gate and token the experts chosen, the first choice first.
    """

    domain: str
    tokens: list[str]
    layers: list[str]
    chosen: list[list[list[int]]]


def passages_of(activations: Activations, tokenizer) -> list[Passage]:
    """One passage of each domain, from the sample; none without a tokenizer."""
    if tokenizer is None:
        return []
    sample, E, passages = activations.sample, activations.gates.num_experts, []
    domain_R = (sample.part_R // activations.num_groups).tolist()
    for number, domain in enumerate(activations.domains):
        row = domain_R.index(number)
        real = sample.mask_RS[row].nonzero()[:TOKENS_OF_A_PASSAGE, 0]
        chosen_LSK = sample.chosen_RLSK[row][:, real]
        passages.append(
            Passage(
                domain,
                [_shown(tokenizer.decode([token])) for token in sample.ids_RS[row, real].tolist()],
                activations.gates.labels,
                [
                    [[expert for expert in chosen if expert < E] for chosen in of_tokens]
                    for of_tokens in chosen_LSK.tolist()
                ],
            )
        )
    return passages


def _shown(token: str) -> str:
    """A token may hold a part of a character, which no font has."""
    return token.replace("\N{REPLACEMENT CHARACTER}", "\N{MIDDLE DOT}")
