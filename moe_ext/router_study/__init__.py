"""What the routers of a mixture of experts do: measured, drawn, and compared with chance; see docs/router_study.md."""

from moe_ext.router_study.collector import ActivationCollector
from moe_ext.router_study.data import DatasetLoader
from moe_ext.router_study.expert_analyzer import ExpertAnalyzer
from moe_ext.router_study.router_analyzer import RouterAnalyzer
from moe_ext.router_study.wrapper import MoEModelWrapper

__all__ = ["ActivationCollector", "DatasetLoader", "ExpertAnalyzer", "MoEModelWrapper", "RouterAnalyzer"]
