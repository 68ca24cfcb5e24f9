"""The rules of money: what an escrow pays to whom, when it ends, and how a bond is lost. Pure: no IO, no clock.

- `commands`: what a ledger can be asked to do: money comes in, goes into escrows and bonds, to who earned it, and out.
- `escrows`: one escrow from its opening to its end, as decisions that return what becomes of it and the moves of money.
- `fees`: what the ledger takes of what escrows pay, announced ahead.
- `bonds`: what is at stake for a node's promises, and lost by two that contradict each other.
- `book.Book`: all accounts, escrows and bonds of one ledger in memory: what a journal on a disk, or a contract, must
  equal.

Invariants: a move takes as much from one account as it gives to another, so that the sum of all is zero; no account but
`issued` is ever below zero; a payee never gets more than its newest voucher says, nor a payer pay more than an escrow
holds; every escrow ends, with or without its payer.
"""
