"""The options of the commands."""

from dataclasses import dataclass, field

from moe_common.models.base_model import default_device
from moe_common.runs.options import check_at_least
from moe_common.text.documents import Part
from moe_ext.moe_models import SMALL_MOE
from moe_ext.router_study.analysis.causal import NOWHERE
from moe_ext.router_study.collect.data import DatasetLoader, TokenRows, parse_sources
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.metrics.vocabulary import LEAST_SEEN
from moe_ext.router_study.report.track import ReportTo

MODEL_HELP = "Mixture: small-moe, a folder of a mixture or of a routed LoRA mixture, or a hub model as owner/name."
OLMOE = "allenai/OLMoE-1B-7B-0924"


@dataclass(kw_only=True)
class TextOptions:
    """Of every command that reads text."""

    data: str = field(
        default="prose,code,math",
        metadata={
            "help": "Domains as name=source,...: prose, code, math, a file, a folder, or a hub dataset such as gsm8k."
        },
    )
    split: Part = field(default="test", metadata={"help": "Split of built-in domains, files and owner/name."})
    max_tokens: int = field(default=32768, metadata={"help": "Tokens of each domain."})
    row_tokens: int = field(default=512, metadata={"help": "Tokens that the model reads at once."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a forward pass."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Routers to study, by number from 0; by default all.", "nargs": "+"}
    )
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of documents, shuffles and bootstraps."})

    def __post_init__(self):
        check_at_least(self, batch_size=1, row_tokens=2, max_tokens=self.row_tokens)

    def rows(self, wrapper: MoEModelWrapper) -> dict[str, TokenRows]:
        """The text of each domain as tokens of this model.

        Raises:
            ValueError: rows longer than the model's context; all that the loader raises.
        """
        if wrapper.context is not None and self.row_tokens > wrapper.context:
            raise ValueError(
                f"row_tokens is {self.row_tokens}, but the model's context has {wrapper.context} tokens. "
                "Lower row_tokens."
            )
        loader = DatasetLoader(
            wrapper.tokenizer,
            split=self.split,
            max_tokens=self.max_tokens,
            row_tokens=self.row_tokens,
            seed=self.seed,
        )
        return loader.rows(parse_sources(self.data))


@dataclass(kw_only=True)
class RunOptions(TextOptions):
    """Of `run`."""

    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    out: str = field(metadata={"help": "Folder of the results; of several revisions each gets one below it."})
    revision: list[str] = field(
        default_factory=list, metadata={"help": "Revisions of the model: branches or tags, or folders below it."}
    )
    replicates: int = field(default=200, metadata={"help": "Draws of the bootstrap."})
    least_seen: int = field(
        default=LEAST_SEEN, metadata={"help": "Vocabulary: leave out ids that are seen less often."}
    )
    as_in_script: bool = field(
        default=False, metadata={"help": "Also count pairs next to each other in rank, as the OLMoE authors' script."}
    )
    save_logits: bool = field(default=False, metadata={"help": "Also keep the raw scores, as safetensors."})
    counts_mb: int = field(default=4096, metadata={"help": "MiB that the counts may take."})
    sample_mb: int = field(default=256, metadata={"help": "MiB of scores to keep for shuffled controls."})
    report_to: ReportTo = field(default="none", metadata={"help": "Log the figures as well."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, replicates=2, least_seen=1, counts_mb=1, sample_mb=1)


@dataclass(kw_only=True)
class EvolutionOptions(TextOptions):
    """Of `evolution`."""

    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    revisions: list[str] = field(
        metadata={
            "help": "Branches or tags of the model, folders below it, or any folders of models; the end is the "
            "last by number."
        }
    )
    out: str = field(metadata={"help": "Folder of the results."})


@dataclass(kw_only=True)
class InterveneOptions(TextOptions):
    """Of `intervene`."""

    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    out: str = field(metadata={"help": "Folder of the results."})
    max_tokens: int = field(default=8192, metadata={"help": "Tokens of each domain."})
    experts: list[int] | None = field(
        default=None, metadata={"help": "Experts to change; by default each in turn.", "nargs": "+"}
    )
    to: str = field(
        default=NOWHERE,
        metadata={
            "help": "Destination of an expert's tokens: nowhere, next (the best not chosen), or an expert's number."
        },
    )


@dataclass(kw_only=True)
class ReproduceOptions(TextOptions):
    """Of `reproduce olmoe`."""

    model: str = field(
        default=OLMOE, metadata={"help": "The OLMoE model; any other is compared with the same figures."}
    )
    out: str = field(metadata={"help": "Folder of the results."})
    data: str = field(default="fineweb,codeparrot,gsm8k", metadata={"help": "Domains as name=source,..."})
    revisions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Checkpoints for the saturation; OLMoE's at about 1, 10, 20, 40 and 100 % where none is named."
        },
    )


@dataclass(kw_only=True)
class OverheadOptions:
    """Of `overhead`."""

    model: str = field(default=SMALL_MOE, metadata={"help": f"{MODEL_HELP} wide is an untrained OLMoE."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a pass."})
    row_tokens: int = field(default=256, metadata={"help": "Tokens of a row."})
    rounds: int = field(default=30, metadata={"help": "Pairs of passes."})
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})

    def __post_init__(self):
        check_at_least(self, batch_size=1, row_tokens=2, rounds=1)
