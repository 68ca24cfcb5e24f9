"""The agent on a machine whose owner lends it, and the members it runs.

    NodeAgent   holds links and blobs, measures, publishes the offer, answers invitations
    MemberRun   one member of one job: records (decided by `rounds.following`), engine process and blobs, wired together

The agent never imports torch. Whatever happens in the work happens in the engine process: the agent reports its death
and goes on.
"""

from shoal.node.agent import NodeAgent, NodeSettings
from shoal.node.member import EngineSettings, MemberRun

__all__ = ["EngineSettings", "MemberRun", "NodeAgent", "NodeSettings"]
