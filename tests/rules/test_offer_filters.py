"""Which offers fit a wish, and which of two offers counts: with the reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.market import Stamp, Standing, compare, fits
from shoal.protocol.offers import Capability, Device, Offer, OfferFind, Throughput

GIB = 1 << 30
NODE = bytes.fromhex("ab" * 32)
OTHER = bytes.fromhex("cd" * 32)


def a_device(kind: str = "cuda", memory_bytes: int = 8 * GIB, flops: float = 1e12) -> Device:
    throughput = (Throughput(dtype="float32", flops=flops / 4), Throughput(dtype="bfloat16", flops=flops))
    return Device(kind=kind, name=f"{kind}-{memory_bytes >> 30}", memory_bytes=memory_bytes, memory_bytes_per_s=1e11,
                  throughput=throughput)  # fmt: skip


BIG_AND_SLOW = a_device(memory_bytes=80 * GIB, flops=1e12)
SMALL_AND_FAST = a_device(memory_bytes=8 * GIB, flops=1e14)
OFFER = Offer(
    name="heron", sequence=1, issued_ms=0, lifetime_ms=60_000, accepts=("train", "run"),
    capability=Capability(devices=(BIG_AND_SLOW, SMALL_AND_FAST)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (OfferFind(node=OTHER), "heron (abababab) is not the node cdcdcdcd that was asked for."),
        (OfferFind(name="stork"), "heron (abababab) is not named stork."),
        (OfferFind(accepts="serve"), "heron (abababab) takes train, run jobs, not serve."),
        (OfferFind(model="org/m"), "heron (abababab) has no engine that is up; org/m wanted."),
        (OfferFind(device="mps"), "heron (abababab) has no mps device (it has cuda)."),
        (OfferFind(memory_bytes_min=81 * GIB), "heron (abababab) has 80.0 GiB on cuda-80; 81.0 GiB wanted."),
        (OfferFind(flops_min=2e14), "heron (abababab) measured 100.0 TFLOP/s on cuda-8; 200.0 TFLOP/s wanted."),
        (
            OfferFind(memory_bytes_min=16 * GIB, flops_min=1e13),
            "heron (abababab) measured 1.0 TFLOP/s on cuda-80; 10.0 TFLOP/s wanted.",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_figures(wanted: OfferFind, reason: str) -> None:
    assert fits(NODE, OFFER, wanted) == (False, reason)


@pytest.mark.parametrize(
    "wanted",
    [
        OfferFind(),
        OfferFind(node=NODE, name="heron", accepts="run", device="cuda", idle_only=True),
        OfferFind(memory_bytes_min=80 * GIB),
        OfferFind(flops_min=1e14),
        OfferFind(memory_bytes_min=8 * GIB, flops_min=1e14),
    ],
)
def test_what_fits_names_the_device_that_does(wanted: OfferFind) -> None:
    fitting, reason = fits(NODE, OFFER, wanted)
    assert fitting
    assert reason.startswith("heron (abababab) fits: cuda-")


def test_a_busy_node_fits_unless_only_idle_ones_are_wanted() -> None:
    busy = Offer(name="heron", sequence=1, issued_ms=0, lifetime_ms=60_000, busy=True, capability=OFFER.capability)
    assert fits(NODE, busy, OfferFind())[0]
    assert fits(NODE, busy, OfferFind(idle_only=True)) == (False, "heron (abababab) is busy.")


def test_a_device_nobody_could_measure_satisfies_no_demand_for_speed() -> None:
    device = Device(kind="mps", name="unmeasured", memory_bytes=GIB, memory_bytes_per_s=0, throughput=())
    offer = Offer(name="a", sequence=1, issued_ms=0, lifetime_ms=1000, capability=Capability(devices=(device,)))
    assert fits(NODE, offer, OfferFind())[0]
    assert not fits(NODE, offer, OfferFind(flops_min=1))[0]


amounts = st.integers(0, 100)
made_devices = st.builds(
    lambda kind, gib, tera: a_device(kind, gib * GIB, tera * 1e12), st.sampled_from(["cuda", "cpu"]), amounts, amounts
)


@given(st.lists(made_devices, min_size=1, max_size=4), st.none() | st.sampled_from(["cuda", "cpu"]), amounts, amounts)
def test_some_single_device_must_meet_all_demands(devices: list[Device], kind: str | None, gib: int, tera: int) -> None:
    offer = Offer(name="a", sequence=1, issued_ms=0, lifetime_ms=1000, capability=Capability(devices=tuple(devices)))
    wanted = OfferFind(device=kind, memory_bytes_min=gib * GIB, flops_min=tera * 1e12)
    expected = any(
        (kind is None or device.kind == kind)
        and device.memory_bytes >= gib * GIB
        and max(one.flops for one in device.throughput) >= tera * 1e12
        for device in devices
    )
    fitting, reason = fits(NODE, offer, wanted)
    assert fitting == expected
    assert reason.endswith(".")


@given(st.lists(made_devices, min_size=1, max_size=4), amounts, amounts)
def test_wanting_more_never_lets_more_in(devices: list[Device], gib: int, tera: int) -> None:
    offer = Offer(name="a", sequence=1, issued_ms=0, lifetime_ms=1000, capability=Capability(devices=tuple(devices)))
    strict = OfferFind(memory_bytes_min=(gib + 1) * GIB, flops_min=(tera + 1) * 1e12)
    if fits(NODE, offer, strict)[0]:
        assert fits(NODE, offer, OfferFind(memory_bytes_min=gib * GIB, flops_min=tera * 1e12))[0]


ids = st.sampled_from([b"a" * 32, b"b" * 32])
stamps = st.builds(Stamp, st.just(NODE), st.integers(0, 5), ids)


@given(st.lists(stamps, max_size=12))
def test_whatever_the_order_the_highest_sequence_is_held(arriving: list[Stamp]) -> None:
    held: Stamp | None = None
    for new in arriving:
        standing, reason = compare(held, new)
        assert str(new.sequence) in reason
        if standing is Standing.NEWER:
            assert held is None or new.sequence > held.sequence
            held = new
        else:
            assert held is not None
            assert str(held.sequence) in reason
            assert (standing is Standing.SAME) == (new == held)
            assert (standing is Standing.OLDER) == (new.sequence < held.sequence)
    if arriving:
        assert held is not None
        assert held.sequence == max(stamp.sequence for stamp in arriving)


def test_a_refusal_says_what_to_do() -> None:
    _, reason = compare(Stamp(NODE, 9, b"a" * 32), Stamp(NODE, 9, b"b" * 32))
    assert "sequence above 9" in reason
    assert "own" in reason
