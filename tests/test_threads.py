"""The BLAS under MLX computes what NumPy computes, and every way to do without it works."""

import json
import os
import shutil
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from m2r2kit.model.cpu import threads as runtime

linux = pytest.mark.skipif(sys.platform != "linux", reason="MLX's BLAS is replaced on Linux only")
patched = pytest.mark.skipif(
    runtime.prepare().kind != "openblas", reason=f"no OpenBLAS under MLX here: {runtime.prepare().detail}"
)
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def layouts(matrix: np.ndarray) -> dict[str, mx.array]:
    """One matrix in four memory layouts; MLX passes each to BLAS in another way."""
    wide = np.zeros((matrix.shape[0], 2 * matrix.shape[1]), np.float32)
    wide[:, ::2] = matrix
    padded = np.pad(matrix, ((1, 2), (3, 4)))
    rows, columns = matrix.shape
    return {
        "contiguous": mx.array(matrix),
        "transposed": mx.array(np.ascontiguousarray(matrix.T)).T,
        "every second column": mx.array(wide)[:, ::2],
        "part of a larger one": mx.array(padded)[1 : 1 + rows, 3 : 3 + columns],
    }


# --- products -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("inner, columns", [(33, 21), (160, 480), (40, 40), (12, 112), (5, 1), (1, 9)])
def test_products_are_numpys(rows, inner, columns):
    a, b = random(rows, inner), random(inner, columns)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    for left_name, left in layouts(a).items():
        for right_name, right in layouts(b).items():
            product = np.array(mx.matmul(left, right, stream=mx.cpu))
            np.testing.assert_allclose(
                product, expected, atol=2e-6 * inner, rtol=1e-4, err_msg=f"{left_name} @ {right_name}"
            )


@pytest.mark.parametrize("rows", [1, 3])
def test_products_in_a_batch(rows):
    a, b = random(4, rows, 17), random(4, 17, 5)
    product = mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu)
    np.testing.assert_allclose(np.array(product), a @ b, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_addmm_keeps_alpha_and_beta(rows):
    a, b, c = random(rows, 8), random(8, 6), random(rows, 6)
    result = mx.addmm(mx.array(c), mx.array(a), mx.array(b), alpha=0.5, beta=-2.0, stream=mx.cpu)
    np.testing.assert_allclose(np.array(result), 0.5 * (a @ b) - 2.0 * c, atol=1e-5)


@linux
def test_other_number_types():
    a, b = random(3, 8), random(8, 4)
    wide = mx.matmul(
        mx.array(a).astype(mx.float64, stream=mx.cpu),
        mx.array(b).astype(mx.float64, stream=mx.cpu),
        stream=mx.cpu,
    )
    np.testing.assert_allclose(np.array(wide), a.astype(np.float64) @ b.astype(np.float64), atol=1e-12)
    waves = mx.matmul(mx.array(a * (1 + 2j)), mx.array(b * (3 - 1j)), stream=mx.cpu)
    np.testing.assert_allclose(np.array(waves), (a * (1 + 2j)) @ (b * (3 - 1j)), atol=1e-4)


# --- linear algebra -----------------------------------------------------------------------


def square(n: int = 24) -> np.ndarray:
    a = random(n, n)
    return a @ a.T + n * np.eye(n, dtype=np.float32)  # symmetric, and far from singular


def test_qr():
    a = random(20, 12)
    q, r = (np.array(x) for x in mx.linalg.qr(mx.array(a), stream=mx.cpu))
    np.testing.assert_allclose(q @ r, a, atol=1e-5)
    np.testing.assert_allclose(np.abs(r), np.abs(np.linalg.qr(a)[1]), atol=1e-4)


def test_svd():
    a = random(20, 12)
    u, s, vt = (np.array(x) for x in mx.linalg.svd(mx.array(a), stream=mx.cpu))
    np.testing.assert_allclose(s, np.linalg.svd(a, compute_uv=False), atol=1e-4)
    np.testing.assert_allclose(u[:, :12] * s @ vt[:12], a, atol=1e-4)


def test_inverse():
    a = random(24, 24) + 24 * np.eye(24, dtype=np.float32)
    inverse = np.array(mx.linalg.inv(mx.array(a), stream=mx.cpu))
    np.testing.assert_allclose(inverse, np.linalg.inv(a), atol=1e-5)


def test_solve():
    a, b = random(24, 24) + 24 * np.eye(24, dtype=np.float32), random(24, 3)
    solution = np.array(mx.linalg.solve(mx.array(a), mx.array(b), stream=mx.cpu))
    np.testing.assert_allclose(solution, np.linalg.solve(a, b), atol=1e-5)


def test_cholesky():
    factor = np.array(mx.linalg.cholesky(mx.array(square()), stream=mx.cpu))
    np.testing.assert_allclose(factor, np.linalg.cholesky(square()), atol=1e-4)


def test_eigh():
    values, vectors = (np.array(x) for x in mx.linalg.eigh(mx.array(square()), stream=mx.cpu))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(square()), rtol=1e-4)
    np.testing.assert_allclose(vectors * values @ vectors.T, square(), atol=1e-3)


def test_eig():
    a = random(12, 12)
    values = np.array(mx.linalg.eig(mx.array(a), stream=mx.cpu)[0])
    expected = np.linalg.eigvals(a.astype(np.float64))
    assert max(np.abs(values - e).min() for e in expected) < 1e-4


# --- with, without and with a broken OpenBLAS ---------------------------------------------

REPORT = """
import json, sys
from m2r2kit.model.cpu import blas, threads as runtime
state = runtime.prepare()
print(json.dumps([state.kind, state.detail, len(blas._old), runtime._product_is_right()]))
"""


def fresh(program: str, **variables: str):
    """Run a program in a Python of its own and read the JSON it prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("M2R2KIT_BLAS", "M2R2KIT_CACHE")} | variables
    result = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@linux
def test_stock_leaves_mlx_alone():
    kind, detail, replaced, right = fresh(REPORT, M2R2KIT_BLAS="stock")
    assert (kind, replaced, right) == ("stock", 0, True)
    assert "M2R2KIT_BLAS=stock" in detail


@patched
def test_without_a_compiler(tmp_path):
    """Neither `cc` on PATH nor a compiled shim from an earlier time."""
    kind, detail, replaced, right = fresh(REPORT, PATH=str(tmp_path), M2R2KIT_CACHE=str(tmp_path / "cache"))
    assert (kind, right) == ("openblas", True)
    assert replaced >= 3 and "no C compiler" in detail


@patched
@compiler
def test_with_a_compiler(tmp_path):
    kind, detail, _, right = fresh(REPORT, M2R2KIT_CACHE=str(tmp_path))
    assert (kind, right) == ("openblas", True)
    assert "few rows through few_rows.c" in detail and list(tmp_path.glob("blas-*.so"))


@patched
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    kind, _, _, right = fresh(REPORT, M2R2KIT_CACHE=str(tmp_path / "file" / "cache"))
    assert (kind, right) == ("openblas", True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    path.write_bytes(path.read_bytes().replace(b"m2r2kit", b"m2r2kid"))


def opened(path):
    path.chmod(0o666)


def unsigned(path):
    path.with_suffix(".sha256").unlink()


@patched
@compiler
@pytest.mark.parametrize("harm", [cut, flipped, opened, unsigned])
def test_a_shim_that_may_not_be_what_was_compiled_is_not_loaded_and_made_again(harm, tmp_path):
    assert fresh(REPORT, M2R2KIT_CACHE=str(tmp_path))[0] == "openblas"
    (path,) = tmp_path.glob("blas-*.so")
    whole = path.read_bytes()
    harm(path)
    kind, detail, _, right = fresh(REPORT, M2R2KIT_CACHE=str(tmp_path))  # a cut one kills who loads it
    assert (kind, right) == ("openblas", True) and "few rows through few_rows.c" in detail
    assert path.read_bytes() == whole and path.stat().st_mode & 0o022 == 0
    assert not list(tmp_path.glob(".m2r2kit-*"))


@patched
@compiler
def test_nothing_is_loaded_from_a_folder_to_which_others_may_write(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    shared.chmod(0o777)
    detail = fresh(REPORT, M2R2KIT_CACHE=str(shared), TMPDIR=str(own))[1]
    assert "few rows through few_rows.c" in detail and not list(shared.iterdir())
    assert [p.name[:5] for p in own.glob("m2r2kit-*/*.so")] == ["blas-"]


@patched
def test_a_compiler_that_cannot_compile(tmp_path):
    for name in ("cc", "gcc", "clang"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    kind, detail, _, right = fresh(REPORT, PATH=str(tmp_path), M2R2KIT_CACHE=str(tmp_path / "cache"))
    assert (kind, right) == ("openblas", True) and "the C compiler does not work" in detail


WRONG = {
    "one row": ("(ROW, PLAIN, n, p->k, p->alpha", "(ROW, PLAIN, n, p->k, 0 * p->alpha"),
    "few rows": ("+= x[i] * y", "+= x[0] * y"),
    "a part": ("p->c + at;", "p->c;"),
    "the last columns": ("x += a[i * lda + t]", "x -= a[i * lda + t]"),
}


@patched
@compiler
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_products_are_found_and_taken_back(fault, tmp_path):
    """A shim with a fault must not stay."""
    program = (
        f"wrong = {WRONG[fault]!r}"
        + """
from m2r2kit.model.cpu import blas, threads as runtime
import json
blas.uninstall()
wrong = blas.SHIM.replace(*wrong)
assert wrong != blas.SHIM
blas.SHIM = wrong
state = runtime._prepare_blas()
print(json.dumps([state.kind, state.detail, len(blas._old), runtime._product_is_right()]))
"""
    )
    kind, detail, replaced, right = fresh(program, M2R2KIT_CACHE=str(tmp_path))
    assert (kind, replaced, right) == ("stock", 0, True)
    assert "wrong products" in detail


@patched
def test_install_twice_and_back():
    program = """
from m2r2kit.model.cpu import blas, threads as runtime
import ctypes, json, os
blas.install()
old, threads = dict(blas._old), blas._openblas[0][1]
blas.install()  # a second time: what is remembered are still MLX's own
same = blas._old == old and blas._openblas[0][1] == threads
wanted = min(threads, len(os.sched_getaffinity(0)))
same = same and all(pool.m2r2kit_set_threads(1) == wanted for pool in blas._pools)
blas.uninstall()
back = all(ctypes.c_uint64.from_address(a).value == v for a, v in old.items())
print(json.dumps([same, back, len(old), runtime._product_is_right()]))
"""
    same, back, entries, right = fresh(program)
    assert same and back and right and entries >= 3


@linux
def test_a_thread_that_reads_is_no_batch_work_and_the_others_stay_so():
    found = []

    def policy():
        found.append(os.sched_getscheduler(0))

    def read():
        policy()
        with runtime.answering():
            policy()

    def work():  # a thread's policy is its own
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            return  # a container may forbid it
        in_a_thread(read)
        policy()

    in_a_thread(work)
    assert found in ([], [os.SCHED_BATCH, os.SCHED_OTHER, os.SCHED_BATCH])


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@linux
def test_while_decoding_readers_keep_off_the_core_that_computes_and_all_is_as_before_afterwards():
    cores, ready, ask, found = os.sched_getaffinity(0), threading.Event(), threading.Event(), []

    def read():
        with runtime.answering():
            ready.set()
            ask.wait()
            found.append(os.sched_getaffinity(0))

    reader = threading.Thread(target=read)
    reader.start()
    ready.wait()
    with pytest.raises(KeyError), runtime.decoding(0, apart=True):
        with runtime.decoding(0, apart=True):  # inside another: nothing more
            mine = os.sched_getaffinity(0)
        assert os.sched_getaffinity(0) == mine
        ask.set()
        reader.join()
        raise KeyError
    assert os.sched_getaffinity(0) == cores
    if len(cores) > 1:
        assert len(mine) == 1 and found == [cores - mine]
    with runtime.decoding(0), runtime.decoding(0):
        assert os.sched_getaffinity(0) == cores


@patched
@compiler
def test_beside_reads_a_product_has_one_thread(tmp_path):
    program = """
from m2r2kit.model.cpu import blas, threads as runtime
import json, os
runtime.prepare()
os.sched_getaffinity = lambda _: {0, 1}
os.sched_setaffinity = lambda *_: None
(pool,) = blas._pools
pool.m2r2kit_set_threads(2)

def threads():
    now = pool.m2r2kit_set_threads(1)
    pool.m2r2kit_set_threads(now)
    return now

found = [threads()]
for matrix, apart in ((0, False), (runtime.SMALL, True), (runtime.SMALL + 1, True)):
    with runtime.decoding(matrix, apart):
        found.append(threads())
print(json.dumps([*found, threads()]))
"""
    assert fresh(program, M2R2KIT_CACHE=str(tmp_path)) == [2, 2, 1, 2, 2]


# --- products that are shared out ------------------------------------------------------------

SHARED = """
import ctypes, json, os, sys, threading
import mlx.core as mx, numpy as np
from m2r2kit.model.cpu import blas, threads as runtime
runtime.prepare()
(pool,) = blas._pools
random = np.random.default_rng(0)

def check(m, k, n):
    a, b = (random.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n)))
    with mx.stream(mx.cpu):
        both = [mx.array(a) @ mx.array(b), mx.array(a) @ mx.array(np.ascontiguousarray(b.T)).T]
        both.append(mx.array(np.ascontiguousarray(a.T)).T @ mx.array(b))
        mx.eval(both)
    return all(np.allclose(np.array(c), a @ b, atol=1e-6 * k, rtol=1e-4) for c in both)
"""
SIZES = [(1, 1024, 2100), (5, 700, 1100), (9, 576, 20000), (40, 300, 1000), (700, 65, 130), (2048, 40, 33)]


@patched
@compiler
def test_shared_out_among_threads_they_are_numpy_s_too():
    program = f"""{SHARED}
found = []
for count in (1, 2, 5):
    pool.m2r2kit_set_threads(count)
    found += [check(*size) for size in {SIZES}]
print(json.dumps(found))
"""
    assert fresh(program) == [True] * 3 * len(SIZES)


@patched
@compiler
def test_several_threads_and_forked_processes_share_out_theirs_at_once():
    program = f"""{SHARED}
pool.m2r2kit_set_threads(3)
found = [check(64, 300, 5000)]
workers = [threading.Thread(target=lambda: found.extend(check(*s) for s in {SIZES})) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
a, b = (random.standard_normal((256, 256), dtype=np.float32) for _ in "ab")
child = os.fork()  # there MLX has no threads any more: the function itself is called
if child == 0:
    c = np.zeros((256, 256), np.float32)
    at = lambda x: ctypes.c_void_p(x.ctypes.data)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    pool.m2r2kit_sgemm(101, 111, 111, 256, 256, 256, one, at(a), 256, at(b), 256, zero, at(c), 256)
    os._exit(0 if np.allclose(c, a @ b, atol=1e-3) else 1)
found.append(os.waitpid(child, 0)[1] == 0)
print(json.dumps(found))
"""
    assert fresh(program) == [True] * (2 + 3 * len(SIZES))


# --- the process ------------------------------------------------------------------------------

PROCESS = """
import json, os, resource, sys
def state():
    return [os.sched_getscheduler(0), list(resource.getrlimit(resource.RLIMIT_NOFILE)), dict(os.environ)]
before = state()
import m2r2kit
found = ["mlx.core" in sys.modules, state() == before]
from m2r2kit.model.cpu import blas, threads as runtime
"""


@linux
def test_importing_changes_nothing():
    assert fresh(PROCESS + "print(json.dumps(found))") == [False, True]


@patched
def test_what_is_prepared_is_undone_by_one_call():
    program = """
runtime.prepare()
batch = os.sched_getscheduler(0) == os.SCHED_BATCH
again = []
for _ in range(2):
    runtime.restore()
    again += [state() == before, len(blas._old), runtime._product_is_right()]
kind = runtime.prepare().kind
print(json.dumps([batch, *again, kind]))
"""
    assert fresh(PROCESS + program) == [True, True, 0, True, True, 0, True, "openblas"]


@linux
def test_stock_leaves_the_process_alone_too():
    program = "runtime.prepare()\nprint(json.dumps(state() == before))"
    assert fresh(PROCESS + program, M2R2KIT_BLAS="stock") is True


@linux
def test_preparing_never_raises():
    """Neither where there is no home, nor a folder for temporary files, nor a user of this number's name."""
    program = """
import pwd, tempfile
def nobody(*_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
def nowhere(*_):
    raise FileNotFoundError("no usable temporary directory")
tempfile.gettempdir = nowhere
os.environ.pop("HOME")
state = runtime.prepare()
print(json.dumps([state.kind, runtime._product_is_right()]))
"""
    kind, right = fresh(PROCESS + program, TMPDIR="/nonexistent")
    assert right and kind == runtime.prepare().kind
