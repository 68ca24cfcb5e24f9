"""Processes that compute for an agent: started or forked, spoken to over pipes, told apart when they die.

What is said differs from engine to engine (`shoal.training.commands`, `shoal.inference.commands`); how it is said, and
what happens when nobody answers any more, is here.
"""

from shoal.engines.child import ChildEngine, EngineDied, EngineFailed
from shoal.engines.lifetime import die_with_parent
from shoal.engines.messages import FRAME, FRAME_MAX_BYTES, SENTENCE_MAX, Done, EngineMessage, Failed, Stop
from shoal.engines.template import warm

__all__ = [
    "FRAME",
    "FRAME_MAX_BYTES",
    "SENTENCE_MAX",
    "ChildEngine",
    "Done",
    "EngineDied",
    "EngineFailed",
    "EngineMessage",
    "Failed",
    "Stop",
    "die_with_parent",
    "warm",
]
