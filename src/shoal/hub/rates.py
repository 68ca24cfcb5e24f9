"""How much one address may ask of a hub at once."""

from __future__ import annotations

from shoal.errors import LinkError

FINDS_PER_SOURCE = 8
"""Searches under way at once from one address, over links and by HTTP each, whatever keys ask."""


class HubBusy(LinkError):
    """More is being asked of the hub than it may queue."""

    code = "SH-332"
