"""The emulation itself: it finds each fault of a planted kernel, nothing in its correct twin, and computes what the
PTX manual says of each instruction."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import emulated
import pytest
import torch

FOLDER = Path(__file__).parent
PLANTED = [FOLDER / "planted.cu", FOLDER / "planted_hopper.cu"]
MODES = [
    {},
    {"landing": "early"},
    {"landing": "random", "seed": 2},
    {"shuffled": True, "seed": 3},
    {"landing": "random", "shuffled": True, "seed": 4},
]
INPUT, OUTPUT, INOUT, WORKSPACE = range(4)


def marked(file: str, name: str) -> list[str]:
    """file:line of the lines that are marked with the kernel's or fault's name, at their end or in comments above."""
    lines = (FOLDER / file).read_text().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if re.search(rf"// here:.* {name}( |$)", line):
            code = (i for i in range(number, len(lines) + 1) if not lines[i - 1].lstrip().startswith("//"))
            found.append(f"{file}:{next(code)}")
    return found


def check(error: str | None, pattern: str, file: str, name: str) -> None:
    """The error says what and where; a deadlock, all places where threads wait."""
    assert error and re.search(pattern, error), error
    if error.startswith("deadlock"):
        assert set(re.findall(rf"{file}:\d+", error)) <= set(marked(file, name)), error
    else:
        assert error.split(": ")[0] in marked(file, name), error


class Planted(emulated.Kernels):
    def __init__(self, library: Path):
        super().__init__(library)
        for name in ("run", "matrices", "fragments", "launch", "names", "pipeline", "faults", "product", "box"):
            getattr(self.library, f"planted_{name}").restype = ctypes.c_char_p
        self.library.planted_written_operands.restype = ctypes.c_char_p

    def add(self, name: str, tensor: torch.Tensor, use: int, size=None, stride=None) -> None:
        size = [1] * (4 - tensor.dim()) + list(tensor.shape) if size is None else size
        stride = [0] * (4 - tensor.dim()) + list(tensor.stride()) if stride is None else stride
        array = ctypes.c_int64 * 4
        self.library.emulation_add(
            name.encode(), ctypes.c_void_p(tensor.data_ptr()), array(*size), array(*stride),
            ctypes.c_int64(tensor.element_size()), use,
        )  # fmt: skip

    def call(self, function: str, *arguments, **buffers) -> str | None:
        """Calls planted_<function>; what keywords name is registered and passed last: (tensor, use)."""
        self.library.emulation_clear()
        for name, (tensor, use) in buffers.items():
            self.add(name, tensor, use)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor, _ in buffers.values()]
        error = getattr(self.library, f"planted_{function}")(*arguments, *pointers)
        return None if error is None else error.decode()

    def run(self, name: str, faulty: bool) -> str | None:
        self.library.emulation_clear()
        memory = torch.arange(4096.0)  # With room between the buffers.
        tensors = memory[:1024], memory[2048:3072], memory[4000:4012]
        for tensor, label, use in zip(tensors[:2], ("in", "out"), (INPUT, WORKSPACE), strict=True):
            self.add(label, tensor, OUTPUT if name == "written_twice" and label == "out" else use)
        self.add("pixels", tensors[2], INPUT, size=[1, 1, 2, 4], stride=[0, 0, 8, 1])
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        error = self.library.planted_run(name.encode(), ctypes.c_bool(faulty), *pointers)
        return None if error is None else error.decode()


@pytest.fixture(scope="session")
def planted(builder) -> Planted:
    return Planted(builder.library([*emulated.MACHINE, *PLANTED]))


# Which of two racing threads is the later one, the order of threads decides.
TOO_EARLY = r"|shared bytes are read that nobody has written"
FOUND = {
    "read_race": r"race: shared bytes written by thread \d+ at planted.cu:\d+ are read with no barrier" + TOO_EARLY,
    "overwrite_race": r"race: shared bytes (read|written) by thread \d+ at planted.cu:\d+ are (overwritten|read) with",
    "crowd_race": r"race: shared bytes (read|written) by thread \d+.* are (overwritten|read) with no barrier between",
    "write_race": r"race: shared bytes written by thread \d+ at .* are overwritten with no barrier between",
    "race_across_a_shuffle": r"race: shared bytes written by thread \d+ at .* are read with no barrier" + TOO_EARLY,
    "missing_wait": r"shared bytes are read while a copy to them is under way, issued at planted.cu",
    "wait_for_too_few": r"shared bytes are read while a copy to them is under way",
    "wait_after_the_barrier": r"shared bytes are read while a copy to them is under way|race: shared bytes written",
    "copy_overwritten": r"shared bytes are overwritten while a copy to them is under way",
    "copy_not_waited_for": r"copy_async that its thread never waited for",
    "copy_too_early": r"race: shared bytes (read|written) by thread \d+ at .* are (overwritten|read) with no barrier",
    "read_out_of_bounds": r"global read of 4 bytes out of bounds, 0 bytes past the end of in",
    "write_out_of_bounds": r"global write of 4 bytes out of bounds, 4 bytes before out",
    "copy_out_of_bounds": r"global read of 16 bytes out of bounds, \d+ bytes past the end of in",
    "read_between_pixels": r"global read between the pixels of pixels",
    "misaligned_global": r"misaligned global read of 16 bytes",
    "misaligned_shared": r"misaligned shared access: address \d+ is no multiple of 8",
    "shared_out_of_bounds": r"shared access out of bounds: 4 bytes at 4096 of 4096",
    "shared_from_zero": r"shared access out of bounds: 4 bytes at -\d+ of 4096",
    "shared_never_written": r"shared bytes are read that nobody has written",
    "global_never_written": r"element \d+ of out is read, which nobody has written",
    "global_race": r"race: element \d+ of out is read, which another thread writes|which nobody has written",
    "written_twice": r"element \d+ of out is written twice",
    "read_only": r"write to in, which is read-only",
    "divergent_shuffle": r"divergent shuffle_xor: other lanes of the warp are in shuffle_xor at planted.cu:\d+",
    "divergent_barrier": r"divergent sync_block: other lanes of the warp are in that at planted.cu:\d+",
    "barrier_not_reached": r"sync_block is never reached by th",
    "shuffle_not_reached": r"shuffle_xor is never reached by lane",
    "lanes_wait_for_each_other": r"deadlock: 1 threads in shuffle_xor at planted.cu:\d+, 63 threads in sync_block",
}
PROFILED = {
    "bank_conflicts": lambda line: line.what == "store" and line.conflicts == 31 * line.requests,
    "matrix_bank_conflicts": lambda line: line.what == "load_matrices" and line.conflicts == 28 * line.requests,
    "scattered_sectors": lambda line: line.what == "load" and (line.sectors, line.ideal) == (64, 8),
}


def test_every_planted_kernel_is_tested(planted):
    assert set(planted.library.planted_names().decode().split()) == {*FOUND, *PROFILED, "endless"}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_faults_are_found_where_they_are(planted, name, mode):
    with planted.options(**mode):
        check(planted.run(name, faulty=True), FOUND[name], "planted.cu", name)
        assert planted.run(name, faulty=False) is None


def test_endless_loops_end(planted):
    check(planted.run("endless", faulty=True), "the launch does not end", "planted.cu", "endless")
    assert planted.run("endless", faulty=False) is None


@pytest.mark.parametrize("name", PROFILED)
def test_profile(planted, name):
    (place,) = marked("planted.cu", name)
    file, line = place.split(":")
    for faulty in (False, True):
        with planted.options(profile=True):
            assert planted.run(name, faulty) is None
            rows = planted.profile()
        found = [row for row in rows if row.conflicts or row.sectors > row.ideal]
        if faulty:
            assert [(row.file, row.line) for row in found] == [(file, int(line))] and PROFILED[name](found[0]), rows
        else:
            assert rows and not found, found


def test_races_are_not_looked_for_without_the_option(planted):
    with planted.options(races=False):
        assert planted.run("read_race", faulty=True) is None
        assert planted.run("missing_wait", faulty=True) is None


def test_copies_land_late_or_early(planted):
    """Without the race checker a missing wait shows in the values, if copies come late."""
    shown = {}
    for landing in ("late", "early"):
        ins, out = torch.arange(1024.0), torch.zeros(1024)
        with planted.options(landing=landing, races=False, bounds=False):
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (ins, out, ins)]
            assert planted.library.planted_run(b"missing_wait", ctypes.c_bool(True), *pointers) is None
        shown[landing] = out[:64]
    assert shown["late"].isnan().all() and torch.equal(shown["early"], torch.arange(0.0, 256, 4))


def test_unwritten_outputs_are_found(planted):
    out = torch.zeros(4)
    planted.library.emulation_clear()
    planted.add("out", out, OUTPUT)
    assert planted.library.emulation_unwritten() == b"4 of 4 elements of out were never written, the first is 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 0, False), "launch: 0 blocks"),
        ((2**31, 32, 0, False), "launch: 2147483648 blocks"),
        ((1, 1056, 0, False), "launch: 1056 threads"),
        ((1, 48, 0, False), "launch: 48 threads"),
        ((1, 32, 227 * 1024 + 1, False), "launch: 232449 bytes of shared memory"),
        ((1, 32, 0, True), "launch: 5000 bytes of parameters"),
        ((1, 1024, 227 * 1024, False), None),
    ],
)
def test_limits_of_a_launch(planted, arguments, message):
    blocks, threads, shared, large = arguments
    types = ctypes.c_int64(blocks), ctypes.c_uint32(threads), ctypes.c_uint32(shared), ctypes.c_bool(large)
    assert planted.call("launch", *types) == message


# Numbers


def dtype_of(half: bool) -> torch.dtype:
    return torch.float16 if half else torch.bfloat16


@pytest.mark.parametrize("half", [False, True])
def test_widening_and_relu_masks(planted, half):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values, masks = torch.empty(2**16), torch.empty(2**15, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, values, masks)]
    planted.library.planted_unpack(ctypes.c_bool(half), ctypes.c_int64(2**15), *pointers)
    expected = bits.view(dtype_of(half)).float()
    assert torch.equal(values.nan_to_num(nan=0), expected.nan_to_num(nan=0))
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(masks.view(torch.int16), -(~(expected <= 0)).short())


@pytest.mark.parametrize("half", [False, True])
def test_rounding(planted, half):
    """Around every number of the dtype, at the ties, and anywhere."""
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype_of(half)).float()
    between = torch.stack([exact, exact.roll(-1)]).double().mean(0).float()
    near = [torch.nextafter(t, torch.tensor(end)) for t in (exact, between) for end in (-torch.inf, torch.inf)]
    anywhere = torch.randint(-(2**31), 2**31, [2**16], generator=torch.Generator().manual_seed(0)).int()
    values = torch.cat([exact, between, *near, anywhere.view(torch.float32)])
    bits = torch.empty(len(values) // 2, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, bits)]
    planted.library.planted_pack(ctypes.c_bool(half), ctypes.c_int64(len(bits)), *pointers)
    ours, nan = bits.view(torch.int16), values.isnan()
    assert torch.equal(ours[~nan], values.to(dtype_of(half)).view(torch.int16)[~nan])
    assert (ours[nan] == 0x7FFF).all()


# Instructions, by the PTX manual's figures of their fragments


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(planted, transposed):
    m = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    flat = out.view(torch.int32)
    error = planted.call("matrices", ctypes.c_bool(transposed), m=(m.view(torch.int32), INPUT), out=(flat, OUTPUT))
    assert error is None
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                expected = m[matrix, column, row] if transposed else m[matrix, row, column]
                assert out[lane, matrix, half] == expected


@pytest.mark.parametrize("half", [False, True])
def test_multiply_add(planted, half):
    generator = torch.Generator().manual_seed(1)
    # Integers, so that sums are exact in whatever order.
    a, b, c = (torch.randint(-9, 10, size, generator=generator).float() for size in ((16, 16), (16, 8), (16, 8)))
    bits = torch.zeros(32, 12, dtype=torch.int16)
    floats = torch.zeros(32, 4)
    for lane in range(32):
        group, pair = lane // 4, lane % 4
        for i in range(8):  # "Register fragments of A": elements a0 to a7
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = pair * 2 + (i & 1) + (0 if i < 4 else 8)
            bits[lane, i] = a[row, column].to(dtype_of(half)).view(torch.int16)
        for i in range(4):
            row = pair * 2 + (i & 1) + (0 if i < 2 else 8)
            bits[lane, 8 + i] = b[row, group].to(dtype_of(half)).view(torch.int16)
            floats[lane, i] = c[group + (0 if i < 2 else 8), pair * 2 + (i & 1)]
    registers = torch.cat([bits.view(torch.int32), floats.view(torch.int32)], dim=1).contiguous()
    out = torch.zeros(32, 4)
    assert planted.call("fragments", ctypes.c_bool(half), m=(registers, INPUT), out=(out, OUTPUT)) is None
    exact = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == exact[lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)]


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("n", [8, 64, 256])
@pytest.mark.parametrize("half", [False, True])
def test_wgmma(planted, half, n, a_transposed, b_transposed):
    """From tensor copies to sums; with "transposed" the depth is the outer dimension in memory."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-9, 10, size, generator=generator).to(dtype_of(half)) for size in ((64, 64), (64, n)))
    stored_a, stored_b = (a.T if a_transposed else a).contiguous(), (b if b_transposed else b.T).contiguous()
    for mode in MODES[:3]:
        out = torch.zeros(64, n)
        with planted.options(**mode):
            error = planted.call(
                "product", ctypes.c_bool(half), n, ctypes.c_bool(a_transposed), ctypes.c_bool(b_transposed),
                a=(stored_a, INPUT), b=(stored_b, INPUT), out=(out, OUTPUT),
            )  # fmt: skip
        assert error is None
        assert torch.equal(out, a.float() @ b.float())


def copy_box(planted, x, box, corner, size=None, stride=None):
    array = ctypes.c_int64 * 4, ctypes.c_int64 * 3, ctypes.c_uint32 * 4, ctypes.c_int * 4
    size, stride = size or reversed(x.shape), stride or x.stride()[2::-1]
    arguments = [kind(*values) for kind, values in zip(array, (size, stride, box, corner), strict=True)]
    out = torch.zeros(torch.Size(box).numel() // 2)
    planted.library.emulation_clear()
    planted.add("x", x, INPUT)
    planted.add("out", out, OUTPUT)
    pointer = ctypes.c_void_p(x.data_ptr())
    error = planted.library.planted_box(pointer, *arguments, ctypes.c_void_p(out.data_ptr()))
    return out.view(torch.bfloat16).view(*reversed(box)), None if error is None else error.decode()


@pytest.mark.parametrize("corner", [(0, 0, 0, 0), (32, 1, 3, 1), (-8, -1, 2, 0), (64, 0, 0, 0), (0, 0, 0, 7)], ids=str)
def test_tensor_copy(planted, corner):
    """A box of a strided view, swizzled, zero where the view has nothing."""
    pixels = torch.randn(3, 9, 8, 88, generator=torch.Generator().manual_seed(3)).bfloat16()
    x, box = pixels[:, ::2, ::2, :80], (64, 3, 2, 2)
    got, error = copy_box(planted, x, box, corner)
    assert error is None
    padded = torch.zeros(20, 40, 40, 300, dtype=torch.bfloat16)
    padded[8:11, 8:13, 8:12, 64:144] = x
    first = [at + offset for at, offset in zip(corner, (64, 8, 8, 8), strict=True)]
    index = [slice(begin, begin + side) for begin, side in zip(first, box, strict=True)]
    rows = padded[tuple(reversed(index))].reshape(-1, 8, 8)
    got = got.reshape(-1, 8, 8)
    for row in range(len(rows)):
        for chunk in range(8):
            assert torch.equal(got[row, chunk ^ row % 8], rows[row, chunk])


def test_tensor_maps_are_checked(planted):
    x = torch.zeros(2, 3, 4, 64).bfloat16()

    def error(tensor=x, box=(64, 1, 1, 1), **other):
        return copy_box(planted, tensor, box, (0, 0, 0, 0), **other)[1]

    assert error() is None
    shifted = torch.zeros(x.numel() + 4).bfloat16()[4:].view(x.shape)
    assert error(shifted) == "encode_tensor_map: the tensor is not aligned to 16 bytes"
    assert error(torch.zeros(2, 3, 4, 68).bfloat16()[..., :64]) == (
        "encode_tensor_map: a stride is no multiple of 16 bytes below 2^40"
    )
    assert error(x, stride=(64, 256, 2**39), size=(64, 4, 3, 1)) == (
        "encode_tensor_map: a stride is no multiple of 16 bytes below 2^40"
    )
    assert error(box=(64, 257, 1, 1)) == "encode_tensor_map: a side of the box is not between 1 and 256"
    assert error(box=(32, 1, 1, 1)) == "encode_tensor_map: the box is not 64 elements wide"
    assert error(size=(64, 4, 3, 0)) == "encode_tensor_map: a size is not between 1 and 2^32"
    beyond = error(box=(64, 4, 3, 3), size=(64, 4, 3, 3))
    check(beyond, "global read of 128 bytes out of bounds, 0 bytes past the end of x", "planted_hopper.cu", "box")


# Hopper's pipeline

OVERWRITTEN = "overwritten that wgmma still reads|race: shared bytes read by an asynchronous operation .* overwritten"
HOPPER = {
    "wrong_parity": "wgmma reads shared bytes while a copy to them is under way|" + OVERWRITTEN,
    "missing_full_wait": "wgmma reads shared bytes while a copy to them is under way|" + OVERWRITTEN,
    "missing_empty_wait": "more arrivals at the mbarrier|race: shared bytes written by an asynchronous|" + OVERWRITTEN,
    "released_early": OVERWRITTEN,
    "more_arrivals": "deadlock: 128 threads in barrier_wait|" + OVERWRITTEN,
    "fewer_arrivals": "deadlock: 128 threads in barrier_wait",
    "fewer_bytes": "64 bytes more were copied than the mbarrier expects",
    "more_bytes": "the mbarrier expects 64 bytes that nobody copies",
    "no_init_fence": "copy_tensor_async to a mbarrier without barrier_init_fence",
    "no_barrier_after_init": "race: the mbarrier is used with no barrier after its barrier_init|no mbarrier was",
    "no_wgmma_wait": "are overwritten that wgmma still reads",
    "no_wgmma_fence": "wgmma with no wgmma_fence before",
    "descriptor_within_a_group": "the wgmma descriptor begins within a group of eight rows",
    "descriptor_beyond_memory": "shared access out of bounds",
    "misaligned_target": "the target of copy_tensor_async is not 1024-byte aligned",
    "wgmma_differs": "wgmma differs within the warp group",
    "barrier_overwritten": "a mbarrier is overwritten",
    "tile_read_early": "shared bytes are read while a copy to them is under way|race: shared bytes written by an",
    "one_thread_waits": "wgmma reads shared bytes while a copy to them is under way|" + OVERWRITTEN,
}


def pipeline(planted, fault, tiles=5):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-9, 10, (64, tiles * 64), generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(64, 64)
    buffers = [(name, tensor, use) for name, tensor, use in (("a", a, INPUT), ("b", b, INPUT), ("out", out, OUTPUT))]
    planted.library.emulation_clear()
    for buffer in buffers:
        planted.add(*buffer)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for _, tensor, _ in buffers]
    error = planted.library.planted_pipeline(fault.encode(), *pointers, ctypes.c_int64(tiles))
    return out, a.float() @ b.float().T, None if error is None else error.decode()


def test_every_hopper_fault_is_tested(planted):
    assert set(planted.library.planted_faults().decode().split()) == {*HOPPER, "none", "sums_read_early"}


@pytest.mark.parametrize("mode", MODES, ids=str)
class TestPipeline:
    def test_correct(self, planted, mode):
        with planted.options(**mode):
            out, exact, error = pipeline(planted, "none")
        assert error is None and torch.equal(out, exact)

    @pytest.mark.parametrize("fault", HOPPER)
    def test_faults_are_found_where_they_are(self, planted, fault, mode):
        with planted.options(**mode):
            *_, error = pipeline(planted, fault)
        check(error, HOPPER[fault], "planted_hopper.cu", fault)

    def test_wgmma_must_be_waited_for(self, planted, mode):
        with planted.options(**mode):
            *_, error = pipeline(planted, "no_wgmma_wait", tiles=1)
        check(error, "wgmma that its thread never waited for", "planted_hopper.cu", "no_wgmma_wait")

    def test_sums_are_nan_until_waited_for(self, planted, mode):
        with planted.options(**mode):
            out, _, error = pipeline(planted, "sums_read_early")
        assert error is None and out.isnan().all()

    def test_operands_written_by_threads_need_a_fence(self, planted, mode):
        out = torch.zeros(64, 8)
        with planted.options(**mode):
            assert planted.call("written_operands", ctypes.c_bool(True), out=(out, OUTPUT)) is None
            assert (out == 16).all()
            error = planted.call("written_operands", ctypes.c_bool(False), out=(out, OUTPUT))
        pattern = "shared bytes written at .* are used by the asynchronous proxy with no async_proxy_fence between"
        check(error, pattern, "planted_hopper.cu", "written_operands")


def test_guard_zones():
    """What Python checks: memory around an output, and around the pixels of a strided one."""
    dense = emulated._Output.dense(3, 4)
    dense.tensor.fill_(1)
    dense.check()
    dense._around[emulated._GUARD - 1] = 0
    with pytest.raises(emulated.EmulationError, match="memory around an output changed, first at element 511"):
        dense.check()
    pixels = torch.zeros(2, 4, 4, 8)
    strided = emulated._Output.inside(pixels, 2)
    pixels[:, ::2, ::2] = 1
    strided.check()
    pixels[1, 1, 0, 0] = 1
    with pytest.raises(emulated.EmulationError, match="memory around an output changed, first at element 160"):
        strided.check()


def test_switches_by_ucontext(builder, tmp_path):
    """The way for CPUs other than x86-64."""
    fibers = tmp_path / "fibers_by_ucontext.cpp"
    fibers.write_text('#define FASTRES_EMULATION_UCONTEXT\n#include "fibers.cpp"\n')
    others = [path for path in emulated.MACHINE if path.name != "fibers.cpp"]
    planted = Planted(builder.library([fibers, *others, *PLANTED]))
    assert planted.run("overwrite_race", faulty=False) is None
    assert "race" in planted.run("overwrite_race", faulty=True)
