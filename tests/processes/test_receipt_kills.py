"""A gateway that is killed while it writes receipts loses none that it had written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from shoal.gateway.receipts import Books, Figures, Kept, read_accounts
from shoal.identity import KeyPair
from shoal.protocol.messages import sign
from shoal.protocol.serving import RequestReceipt

NODE = KeyPair.from_seed(b"n" * 32)
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_receipt_kills import Books, a_line
books = Books(Path(sys.argv[1]), print, file_max_bytes=20_000)
for session in range(100_000):
    books.add(a_line(session))
    print(session, flush=True)
"""


def a_line(session: int) -> Kept:
    receipt = RequestReceipt(
        job=b"j" * 32, ring=b"r" * 16, session=session, first=0, stop=2, prompt_tokens=1, generated_tokens=2,
        computed_positions=3,
    )  # fmt: skip
    return Kept(
        time_ms=0, node=NODE.node_id.hex(), name="amber", job=receipt.job.hex(), ring=receipt.ring.hex(),
        session=f"{session:016x}", first=0, stop=2, figures=Figures(1, 2, 3), envelope=sign(NODE, receipt).to_bytes(),
    )  # fmt: skip


def test_what_was_written_survives_kill_9(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        words = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)]
        written = -1
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while written < 100:
                written = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            written = max([written, *(int(line) for line in process.stdout if line.endswith("\n"))])
        said: list[str] = []
        books = Books(folder, said.append)
        accounts = read_accounts(folder)
        assert accounts.nodes[NODE.node_id.hex()].sessions in (written + 1, written + 2) and accounts.bad == []
        books.add(a_line(1 << 40))
        books.close()
        assert read_accounts(folder).bad == [] and len(said) <= 1
