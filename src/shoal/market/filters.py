"""Does an offer fit a wish?"""

from __future__ import annotations

from shoal.identity import short_id
from shoal.protocol.offers import Device, Offer, OfferFind
from shoal.quantities import format_bytes, format_count


def best_flops(device: Device) -> float:
    """FLOP/s of a device's fastest dtype; 0 when none was measured."""
    return max((measured.flops for measured in device.throughput), default=0.0)


def fits(node: bytes, offer: Offer, wanted: OfferFind) -> tuple[bool, str]:
    """Whether `node`'s offer fits, and why or why not, with the figures.

    Demands on a device (kind, memory, throughput) must be met by one device together: a big slow one and a small fast
    one do not make a big fast one. `limit` and `after` belong to paging and are not looked at.
    """
    who = f"{offer.name} ({short_id(node)})"
    if wanted.node is not None and node != wanted.node:
        return False, f"{who} is not the node {short_id(wanted.node)} that was asked for."
    if wanted.name is not None and offer.name != wanted.name:
        return False, f"{who} is not named {wanted.name}."
    if wanted.accepts is not None and wanted.accepts not in offer.accepts:
        return False, f"{who} takes {', '.join(offer.accepts) or 'no'} jobs, not {wanted.accepts}."
    if wanted.idle_only and offer.busy:
        return False, f"{who} is busy."
    if wanted.model is not None and (offer.engine is None or offer.engine.model != wanted.model):
        there = f"serves {offer.engine.model}" if offer.engine else "has no engine that is up"
        return False, f"{who} {there}; {wanted.model} wanted."
    device, reason = _closest_device(offer, wanted)
    if reason:
        return False, f"{who} {reason}"
    return True, f"{who} fits: {device.name}, {format_bytes(device.memory_bytes)}, {_flops(best_flops(device))}."


def _closest_device(offer: Offer, wanted: OfferFind) -> tuple[Device, str]:
    """The first device that meets every demand, or the one that came furthest with the demand where it failed."""
    devices = offer.capability.devices
    reason = f"has no {wanted.device} device (it has {', '.join(dict.fromkeys(one.kind for one in devices))})."
    closest, furthest = devices[0], 0
    for device in devices:
        memory, flops = device.memory_bytes, best_flops(device)
        if wanted.device is not None and device.kind != wanted.device:
            continue
        if memory < wanted.memory_bytes_min:
            if furthest < 1 or (furthest == 1 and memory > closest.memory_bytes):
                closest, furthest = device, 1
                reason = f"has {format_bytes(memory)} on {device.name}; {format_bytes(wanted.memory_bytes_min)} wanted."
        elif flops < wanted.flops_min:
            if furthest < 2 or flops > best_flops(closest):
                closest, furthest = device, 2
                reason = f"measured {_flops(flops)} on {device.name}; {_flops(wanted.flops_min)} wanted."
        else:
            return device, ""
    return closest, reason


def _flops(value: float) -> str:
    return f"{format_count(value)}FLOP/s" if value >= 1000 else f"{value:.0f} FLOP/s"
