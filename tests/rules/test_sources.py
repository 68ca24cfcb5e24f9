"""What counts as one place that requests come from."""

import pytest

from shoal.world import source_of


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("/run/relay.sock", "?"),
        ("", "?"),
    ],
)
def test_an_address_or_the_network_of_one_subscriber_is_one_source(host: str, source: str) -> None:
    assert source_of(host) == source
