"""The library that wallets are tested with (`eth-account`), without what its import does to the process: a part of it
raises the limit of recursion a hundredfold, and what is nested too deep would then overflow the stack."""

import sys

_depth = sys.getrecursionlimit()
from eth_account import Account  # noqa: E402
from eth_account.messages import encode_typed_data  # noqa: E402

sys.setrecursionlimit(_depth)

__all__ = ["Account", "encode_typed_data"]
