"""The house ledger: one that an operator runs, as a process that others ask over links, and the other side of it.

- `messages`: what is asked of a ledger, and what it answers.
- `service.LedgerService` answers on links; `server.LedgerServer` puts it on a data folder: a key, a database, a lock.
- `RemoteLedger` is such a ledger for who needs one: it implements `world.Ledger`.
- `journals`: a journal in a file, and whether it is what the operator has signed before.

Invariants: what was acknowledged survives `kill -9`; no money moves on a request that the rules of `shoal.ledger` do
not allow, whoever sends it; a checkpoint is signed of a line that is on the disk already; whoever asks need not believe
the operator, as the journal can be checked from its beginning.

Only the client is imported with the room: databases are for those who run a ledger.
"""

from shoal.house.client import OtherLedger, RemoteLedger
from shoal.house.messages import LedgerInfo
from shoal.world import OutcomeUnknown

__all__ = ["LedgerInfo", "OtherLedger", "OutcomeUnknown", "RemoteLedger"]
