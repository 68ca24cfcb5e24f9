"""Who somebody is, and how that is shown: keys, hashes, and the signed envelope.

A node is its Ed25519 public key, the `NodeId`. A record that crosses a machine boundary travels in an `Envelope`: the
exact body bytes, who signed them, and what for. The signature covers the bytes as they were received, so nothing is
ever re-encoded to verify it. A record's id is the hash of what was signed.
"""

from shoal.identity.hashing import HASH_BYTES, Hash, blake3_hash, hash_from_hex, hash_of_parts
from shoal.identity.keys import BadKeyFile, KeyPair, NodeId, load_key, load_or_create_key, node_id_from_hex, short_id
from shoal.identity.signing import ENVELOPE_OVERHEAD_BYTES, BadEnvelope, BadSignature, Envelope, record_id, seal

__all__ = [
    "ENVELOPE_OVERHEAD_BYTES",
    "HASH_BYTES",
    "BadEnvelope",
    "BadKeyFile",
    "BadSignature",
    "Envelope",
    "Hash",
    "KeyPair",
    "NodeId",
    "blake3_hash",
    "hash_from_hex",
    "hash_of_parts",
    "load_key",
    "load_or_create_key",
    "node_id_from_hex",
    "record_id",
    "seal",
    "short_id",
]
