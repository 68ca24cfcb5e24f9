"""Paying nodes: places held all together, money set aside, vouchers for what was earned, and the rest asked back.

Who pays reckons what a node has earned; `purse.Purse` does the rest, by what `escrow` does at the ledger; `bills` is
what it writes down.
"""
