"""The CUDA emulation itself, under several seeds: each planted bug of csrc/emulation/selftest is
reported, with the kernel, block and thread, and each mended kernel passes."""

import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = shutil.which(os.environ.get("CXX", "c++"))
SEEDS = range(8)
PASSED, REPORTED = 0, 1

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

MESSAGES = {  # case: what the report has to say beside the launch, the block and the thread
    "missing_barrier": r"'tile' of missing_barrier.*(no barrier between|uninitialised)",
    "missing_second_barrier": r"'tile' of missing_second_barrier.*no barrier between",
    "unsynchronised_sum": r"race on element 0 of .*'total' of unsynchronised_sum",
    "atomic_kinds": r"'v' of atomic_kinds",
    "atomic_beside_read": r"race on element 0 of .*'total' of atomic_beside_read",
    "out_of_bounds_read": r"element 96 of .*'tile' of out_of_bounds_read is out of bounds",
    "out_of_bounds_dynamic": r"element 96 of .*'dynamic_shared' .*out of bounds, it has 96",
    "dynamic_beyond_launch": r"dynamic_shared of 96 .*768 bytes.* in dynamic_beyond_launch",
    "too_much_shared": r"shared memory of 49156 bytes.*'tile' of too_much_shared",
    "too_many_blocks": r"grid \(1, 65536, 1\): at most",
    "too_many_shared_bytes": r"166913 bytes of dynamic shared memory: at most 166912",
    "too_many_threads": r"block \(1056, 1, 1\): a block has 1 to 1024 threads",
    "divergent_barrier": r"__syncthreads in divergent_barrier.* waits at another one",
    "skipped_barrier": r"__syncthreads in skipped_barrier.* is reached by 40 of 96 threads: "
    r"thread \(40, 0, 0\) has returned",
    "early_return": r"__syncthreads in early_return.* is reached by 95 of 96 threads: "
    r"thread \(77, 0, 0\) has returned",
    "shuffle_outside_mask": r"in shuffle_outside_mask.* reads lane \d+,.* outside the mask",
    "shuffle_absent_lanes": r"in shuffle_absent_lanes.* for ever for lanes 0xffff0000: .*returned",
    "shuffle_partial_warp": r"in shuffle_partial_warp.* reads lane \d+, which is outside the block",
    "shuffle_segments": r"width 12, .* in shuffle_segments",
    "vote_without_caller": r"__ballot_sync in vote_without_caller.* does not name the calling lane",
    "mixed_collectives": r"in mixed_collectives.* while lanes of it wait at __a(ny|ll)_sync",
    "misaligned_load": r"load16 4 bytes past a multiple of 16, in misaligned_load",
    "pack_index": r"entry 4 of a pack of 4",
    "misaligned_shared_store": r"store16_shared 8 bytes past .* in misaligned_shared_store",
    "uninitialised_shared": r"element 3 of .*'partials' of .*is used uninitialised",
    "left_by_another_block": r"'tile' of left_by_another_block is used uninitialised",
    "missing_syncwarp": r"'tile' of missing_syncwarp.*(no barrier between|uninitialised)",
    "syncwarp_across_warps": r"'tile' of syncwarp_across_warps.*(no barrier between|uninitialised)",
    "syncwarp_of_half": r"'tile' of syncwarp_of_half.*(no barrier between|uninitialised)",
    "block_sum": r"'partials' of block_sum.*(no barrier between|uninitialised)",
}


def build(path: Path, *flags: str) -> Path:
    sources = [*CSRC.glob("emulation/*.cpp"), *CSRC.glob("emulation/selftest/*.cpp")]
    command = [CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", "-DTOKCORE_EMULATED", f"-I{CSRC}", *flags]
    subprocess.run([*command, *map(str, sources), "-o", str(path)], check=True)
    return path


class Selftest:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.tokcore_selftest_name.restype = ctypes.c_char_p
        self.library.tokcore_emulation_get_seed.restype = ctypes.c_uint64
        self.library.tokcore_emulation_set_seed.argtypes = [ctypes.c_uint64]
        self.library.tokcore_selftest_run.argtypes = [
            *(ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64),
            *(ctypes.c_char_p, ctypes.c_size_t),
        ]

    def names(self):
        count = self.library.tokcore_selftest_count()
        return [self.library.tokcore_selftest_name(i).decode() for i in range(count)]

    def run(self, name, seed, mended=False):
        message = ctypes.create_string_buffer(2000)
        status = self.library.tokcore_selftest_run(name.encode(), mended, seed, message, 2000)
        return status, message.value.decode()


@pytest.fixture(scope="session", params=["assembly", "ucontext"])
def selftest(request, tmp_path_factory):
    flags = ["-DTOKCORE_EMULATION_UCONTEXT"] if request.param == "ucontext" else []
    return Selftest(
        build(tmp_path_factory.mktemp(request.param) / "libtokcore_selftest.so", *flags)
    )


def test_every_case_is_listed(selftest):
    assert set(selftest.names()) == set(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_planted_bug_is_reported(selftest, name):
    for seed in SEEDS:
        status, message = selftest.run(name, seed)
        assert status == REPORTED, f"seed {seed}: {message}"
        assert re.search(MESSAGES[name], message), message
        launched = r"^emulated kernel launched by run at \S+selftest\.cpp:\d+"
        assert re.search(launched, message), message
        if not name.startswith("too_many"):  # those blocks never begin
            where = r", block \(\d+, \d+, \d+\), thread \(\d+, \d+, \d+\): .*\(seed \d+\)$"
            assert re.search(where, message), message


@pytest.mark.parametrize("name", MESSAGES)
def test_mended_kernel_passes(selftest, name):
    for seed in SEEDS:
        assert selftest.run(name, seed, mended=True) == (PASSED, "")


def test_seed_fixes_the_order(selftest):
    first = [selftest.run("unsynchronised_sum", seed)[1] for seed in SEEDS]
    assert first == [selftest.run("unsynchronised_sum", seed)[1] for seed in SEEDS]
    orders = {re.sub(r" \(seed \d+\)$", "", message) for message in first}
    assert len(orders) > len(SEEDS) / 2
    selftest.library.tokcore_emulation_set_seed(2**63 + 5)
    assert selftest.library.tokcore_emulation_get_seed() == 2**63 + 5


def test_failed_blocks_leave_nothing_behind(selftest):
    def repeat(times):
        for seed in range(times):
            # 1024 threads, most of them on the stack of a barrier when the block is given up.
            assert selftest.run("block_sum", seed)[0] == REPORTED
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = repeat(20)
    assert repeat(100) - before < 4096  # KB


SANITIZED = """
import sys
from test_emulation import MESSAGES, Selftest

selftest = Selftest(sys.argv[1])
for name in MESSAGES:
    for seed in range(2):
        assert selftest.run(name, seed)[0] == 1, name
        assert selftest.run(name, seed, mended=True) == (0, ""), name
print("all cases ran", flush=True)
selftest.library.tokcore_selftest_read_past_end()
print("not reached")
"""


def test_under_sanitizers(tmp_path):
    """Fibers do not disturb AddressSanitizer, and it sees a kernel read past a global buffer."""
    preload = []
    for name in ("libasan.so", "libstdc++.so.6"):  # without the second the first throw aborts
        command = [CXX, f"-print-file-name={name}"]
        preload.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not all(map(os.path.isabs, preload)):
        pytest.skip("no libasan.so beside the compiler")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
    library = build(tmp_path / "libtokcore_selftest.so", *flags)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.stdout == "all cases ran\n", done.stderr
    assert done.returncode != 0
    assert re.search(r"AddressSanitizer: heap-buffer-overflow", done.stderr), done.stderr
    assert re.search(r"read_past_end.*selftest/kernels\.h", done.stderr), done.stderr
