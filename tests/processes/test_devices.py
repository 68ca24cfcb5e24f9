"""Measuring this machine, here and in a child that may die."""

import asyncio
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.devices import MeasureFailed, fast_dtypes, measure_in_child
from shoal.node.agent import DeviceMissing, check_device, computing_first
from shoal.protocol.offers import Capability, Device, Throughput


def pretend(code: str) -> tuple[str, ...]:
    """A command that does `code` where the measuring process would be."""
    return (sys.executable, "-c", code)


def test_this_machine_is_measured_in_a_child(tmp_path: Path) -> None:
    capability = asyncio.run(measure_in_child(folder=tmp_path, threads=1, kinds=["cpu"]))
    (cpu,) = capability.devices
    assert cpu.kind == "cpu"
    assert cpu.name
    assert cpu.threads == 1
    assert cpu.memory_bytes > 1 << 28
    assert cpu.memory_bytes_per_s > 1e7
    measured = {one.dtype: one.flops for one in cpu.throughput}
    assert measured["float32"] > 1e7
    assert set(measured) <= {"float32", "bfloat16"}
    assert capability.disk_free_bytes > 0
    assert capability.disk_write_bytes_per_s > 0
    assert "torch" in capability.software
    assert list(tmp_path.iterdir()) == []
    assert set(fast_dtypes(cpu)) >= {"float32"}


def test_a_machine_too_busy_to_repeat_is_measured_all_the_same() -> None:
    """Its time is over before the first product was begun."""
    import torch

    from shoal.devices.measure import MATMUL_BUDGET_S, matmul_flops

    ticks = itertools.chain([0.0], itertools.count(2 * MATMUL_BUDGET_S, 0.001))
    assert matmul_flops(torch.device("cpu"), torch.float32, lambda: next(ticks)) > 0


def test_a_device_that_was_not_measured_is_refused() -> None:
    kinds = ("cpu", "cuda", "cuda")
    capability = Capability(devices=tuple(Device(kind, "x", 1, 1.0, ()) for kind in kinds))
    for name in ("cpu", "cuda", "cuda:1"):
        check_device(name, capability)
    for name in ("mps", "cuda:2", "cuda:x", "tpu", ""):
        with pytest.raises(DeviceMissing, match="it has cpu:0, cuda:0, cuda:1"):
            check_device(name, capability)


def test_the_agent_that_measures_does_not_load_torch() -> None:
    check = "import sys, shoal.node.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=120).returncode == 0


def test_the_speed_limit_is_in_the_figures() -> None:
    """With a clock by which every repetition takes equally long, the figures differ by the limit alone."""
    import torch

    from shoal.devices.measure import measure_device

    torch.set_num_threads(1)

    def ticking() -> float:
        ticks[0] += 0.01
        return ticks[0]

    figures = []
    for limit in (1.0, 0.25):
        ticks = [0.0]
        figures.append(measure_device(torch.device("cpu"), "cpu", limit, ticking))
    whole, quarter = figures
    assert quarter.memory_bytes_per_s == pytest.approx(whole.memory_bytes_per_s / 4)
    assert [one.flops for one in quarter.throughput] == pytest.approx([one.flops / 4 for one in whole.throughput])
    assert quarter.memory_bytes == whole.memory_bytes


def test_flops_are_two_n_cubed_over_the_best_repetition() -> None:
    import torch

    from shoal.devices.measure import MATMUL_SMALLEST, matmul_flops

    torch.set_num_threads(1)
    # Each repetition reads the clock before and after, and once more for the budget: 0.9 s, then 0.5 s and stop.
    readings = iter([0.0, 0.0, 0.1, 0.1, 0.1, 0.15, 0.15, 0.2, 0.3, 9.0, 9.0])
    flops = matmul_flops(torch.device("cpu"), torch.float32, lambda: next(readings))
    assert flops == pytest.approx(2 * MATMUL_SMALLEST**3 / 0.05)


def test_the_first_product_of_all_is_no_measure() -> None:
    """It starts threads and loads kernels; beside other work that alone took longer than there is time for."""
    import torch

    from shoal.devices.measure import MATMUL_SMALLEST, matmul_flops

    readings = itertools.chain([0.0, 0.0, 5.0, 5.0, 5.0, 5.001], itertools.repeat(5.001))
    flops = matmul_flops(torch.device("cpu"), torch.float32, lambda: next(readings))
    assert flops == pytest.approx(2 * MATMUL_SMALLEST**3 / 0.001)


def test_a_slow_dtype_is_given_up_while_it_is_cheap() -> None:
    """When even the smallest product takes a second, it is tried twice, and nothing larger is."""
    import torch

    from shoal.devices.measure import MATMUL_SMALLEST, matmul_flops

    seconds = [0.0]

    def slow() -> float:
        seconds[0] += 1.0
        return seconds[0]

    flops = matmul_flops(torch.device("cpu"), torch.bfloat16, slow)
    assert flops == pytest.approx(2 * MATMUL_SMALLEST**3 / 1.0)
    assert seconds[0] <= 8


def test_a_dtype_that_a_device_cannot_multiply_is_left_out() -> None:
    import time

    import torch

    from shoal.devices.measure import matmul_flops

    assert matmul_flops(torch.device("cpu"), torch.bits8, time.perf_counter) == 0


def test_a_disk_that_cannot_be_written_has_no_rate(tmp_path: Path) -> None:
    import time

    from shoal.devices.measure import disk_write_rate

    assert disk_write_rate(tmp_path / "missing", time.perf_counter) == 0
    assert disk_write_rate(tmp_path, time.perf_counter) > 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL and said nothing"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("raise SystemExit('CUDA driver crashed.')", "status 1 and said: CUDA driver crashed. The node itself goes on"),
        ("print('{}')", "not a capability"),
        ("print('hello')", "not a capability"),
        ("pass", "not a capability"),
        ("import sys; sys.stdout.write('x' * 10_000_000)", "more than 65536 bytes"),
        ("import sys; sys.stderr.write('x' * 10_000_000); sys.exit(3)", "status 3"),
    ],
)
def test_a_child_that_fails_is_a_sentence(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(MeasureFailed, match=words) as failure:
        asyncio.run(measure_in_child(folder=tmp_path, command=pretend(code)))
    assert len(str(failure.value)) < 5000


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    with pytest.raises(MeasureFailed, match="longer than"):
        asyncio.run(measure_in_child(folder=tmp_path, command=pretend(code), deadline_s=1))
    if note.exists():
        assert not Path(f"/proc/{note.read_text()}").exists()


def test_a_child_is_ended_when_nobody_waits_for_it(tmp_path: Path) -> None:
    async def scene() -> None:
        waiting = asyncio.create_task(
            measure_in_child(folder=tmp_path, command=pretend("import time; time.sleep(1000)"))
        )
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scene())


def test_a_command_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MeasureFailed, match="could not be started"):
        asyncio.run(measure_in_child(folder=tmp_path, command=("/no/such/python",)))


def test_kinds_that_a_machine_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(MeasureFailed, match="no device of the kinds abacus"):
        asyncio.run(measure_in_child(folder=tmp_path, kinds=["abacus"]))


def test_an_offer_names_the_device_that_computes_first() -> None:
    devices = [Device(kind, name, 1, 1.0, ()) for kind, name in (("cuda", "a"), ("rocm", "b"), ("cpu", "c"))]
    for name, order in (("cuda:1", "bac"), ("cuda", "abc"), ("cpu", "cab")):
        made = computing_first(Capability(devices=tuple(devices)), name)
        assert "".join(device.name for device in made.devices) == order


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"float32": 100.0}, ("float32",)),
        ({"float32": 100.0, "bfloat16": 2.0}, ("float32",)),
        ({"float32": 100.0, "bfloat16": 109.0}, ("float32",)),
        ({"float32": 100.0, "bfloat16": 800.0}, ("bfloat16", "float32")),
        ({"float32": 100.0, "bfloat16": 800.0, "float16": 900.0}, ("float16", "bfloat16", "float32")),
        ({"bfloat16": 800.0}, ("float32",)),
        ({}, ("float32",)),
    ],
)
def test_a_narrow_dtype_counts_only_where_it_measured_faster(
    figures: dict[str, float], expected: tuple[str, ...]
) -> None:
    throughput = tuple(Throughput(dtype=dtype, flops=flops) for dtype, flops in figures.items())
    device = Device(kind="cpu", name="x", memory_bytes=1, memory_bytes_per_s=1, throughput=throughput)
    assert fast_dtypes(device) == expected
