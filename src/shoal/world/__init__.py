"""The door: everything that rules and engines may not reach for themselves comes in through these interfaces.

`Clock` is time, `Dice` is randomness, `Disk` is storage, `Link` and `Endpoint` are the network, `Directory` is where
nodes are found, `Ledger` is who keeps the money. Each has a real implementation and one for tests; one suite of tests
runs on both.
"""

from shoal.world.clock import Clock, HeldClock, SystemClock, within
from shoal.world.dice import Dice, SeededDice, SystemDice
from shoal.world.directory import Directory, FoundOffer
from shoal.world.disk import DirectoryDisk, Disk, DiskLock, Fault, FaultyDisk, FileInfo, MemoryDisk
from shoal.world.ledger import Ledger, MemoryLedger, OutcomeUnknown
from shoal.world.network import (
    Address,
    Body,
    DeadlineExceeded,
    Endpoint,
    Handler,
    Link,
    LinkLost,
    LinkStats,
    Refused,
    ReplyTooLarge,
    Request,
    Unreachable,
    source_of,
)

__all__ = [
    "Address",
    "Body",
    "Clock",
    "DeadlineExceeded",
    "Dice",
    "Directory",
    "DirectoryDisk",
    "Disk",
    "DiskLock",
    "Endpoint",
    "Fault",
    "FaultyDisk",
    "FileInfo",
    "FoundOffer",
    "Handler",
    "HeldClock",
    "Ledger",
    "Link",
    "LinkLost",
    "LinkStats",
    "MemoryDisk",
    "MemoryLedger",
    "OutcomeUnknown",
    "Refused",
    "ReplyTooLarge",
    "Request",
    "SeededDice",
    "SystemClock",
    "SystemDice",
    "Unreachable",
    "source_of",
    "within",
]
