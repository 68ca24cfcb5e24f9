"""Which nodes hold which layers of a model. Pure rules over measured figures; no IO, no torch, no clock."""

from shoal.sharding.needs import GATEWAY, LeftOut, Links, ModelNeeds, Plan, Replica, ServingNode, Stage
from shoal.sharding.planning import cheapest, plan
from shoal.sharding.replanning import loaded, replan
from shoal.sharding.standbys import standbys
from shoal.sharding.survival import Presence

__all__ = [
    "GATEWAY",
    "LeftOut",
    "Links",
    "ModelNeeds",
    "Plan",
    "Presence",
    "Replica",
    "ServingNode",
    "Stage",
    "cheapest",
    "loaded",
    "plan",
    "replan",
    "standbys",
]
