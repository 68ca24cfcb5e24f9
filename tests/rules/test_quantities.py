import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.quantities import (
    BadQuantity,
    format_bytes,
    format_count,
    format_duration_s,
    format_flops,
    format_rate_bps,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)


def test_what_people_write_is_understood() -> None:
    assert parse_bytes("16 GiB") == 16 * 2**30
    assert parse_bytes("100MB") == 100_000_000
    assert parse_duration_s("80 ms") == 0.08
    assert parse_duration_s("2h") == 7200
    assert parse_bytes_per_s("20 Mbit/s") == 2_500_000
    assert parse_bytes_per_s("1 MB/s") == parse_bytes_per_s("1 MB") == 1_000_000
    assert parse_count("2.5M") == 2_500_000
    assert parse_count(7) == 7


@pytest.mark.parametrize("text", ["", "-1", "1 parsec", "nan", "inf", "1e999", "0x10", "ten", "1 2", "1;2"])
@pytest.mark.parametrize("parse", [parse_bytes, parse_duration_s, parse_bytes_per_s, parse_count])
def test_anything_else_is_refused_with_an_example(parse, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadQuantity, match=r"write for example|finite"):
        parse(text)


def test_a_rate_is_called_one() -> None:
    with pytest.raises(BadQuantity, match="a rate of bytes per second; write for example '100 kB/s'"):
        parse_bytes_per_s("fast")


def test_a_truth_value_is_not_a_number() -> None:
    with pytest.raises(BadQuantity):
        parse_count(True)


@given(st.integers(min_value=0, max_value=10**12))
def test_plain_numbers_pass_through(number: int) -> None:
    assert parse_bytes(number) == parse_bytes(str(number)) == number


def test_printing_keeps_the_unit_readable() -> None:
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(12) == "12 B"
    assert format_duration_s(0.08) == "80 ms"
    assert format_duration_s(75) == "1 min 15 s"
    assert format_duration_s(7260) == "2 h 1 min"
    assert format_rate_bps(20e6) == "20.0 Mbit/s"
    assert format_flops(1.3e6) == "1.3 MFLOP/s" and format_flops(2.24e12) == "2,240.0 GFLOP/s"
    assert format_count(2_500_000) == "2.5 M"
