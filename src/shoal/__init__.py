"""Shoal: one computer out of many mixed, distant, mortal GPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.sdk.own_loop import LoopMember, join

__all__ = ["LoopMember", "join"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`shoal.join`, for a loop of one's own: loaded when it is used, as it needs torch."""
    if name in __all__:
        from shoal.sdk import own_loop

        return getattr(own_loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
