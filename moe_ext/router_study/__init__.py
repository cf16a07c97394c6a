"""What the routers of a mixture of experts do: measured, drawn, and compared with chance; see docs/router_study.md."""

from moe_ext.router_study.analysis.expert_analyzer import ExpertAnalyzer
from moe_ext.router_study.analysis.router_analyzer import RouterAnalyzer
from moe_ext.router_study.collect.collector import ActivationCollector
from moe_ext.router_study.collect.data import DatasetLoader
from moe_ext.router_study.collect.wrapper import MoEModelWrapper

__all__ = ["ActivationCollector", "DatasetLoader", "ExpertAnalyzer", "MoEModelWrapper", "RouterAnalyzer"]
