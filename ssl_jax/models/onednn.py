"""Convolutions and dense layers by oneDNN inside XLA's CPU programs, without a compiler: the FFI handler is a ctypes callback.

The library is the wheel `onednn-cpu-gomp` (the extra `cpu`). XLA's own convolutions reach less of a CPU's speed; docs/performance.md
has the figures. Layouts of the foreign structures: xla/ffi/api/c_api.h of jaxlib, and dnnl.h of oneDNN 3.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

TARGET = "ssl_jax_convolution"
FORWARD, INPUT, KERNEL = 0, 1, 2  # which of y, x and kernel is computed from the other two

EXECUTE, METADATA = 3, 1  # XLA_FFI_ExecutionStage, XLA_FFI_Extension_Type
INTERNAL_ERROR, UNIMPLEMENTED = 13, 3  # XLA_FFI_Error_Code, dnnl_status_t
TYPES = {"float32": 3, "bfloat16": 2}  # oneDNN's numbers
XLA_TYPES = {11: TYPES["float32"], 16: TYPES["bfloat16"]}

SRC, DST, WEIGHTS, DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, SCRATCHPAD = 1, 17, 33, 129, 145, 161, 80  # arguments of a primitive
WEIGHTS_LAYOUT, DIFF_WEIGHTS_LAYOUT, SCRATCHPAD_LAYOUT = 131, 132, 136  # queries of a primitive's description
CPU, ANY_LAYOUT, FORWARD_TRAINING, DIRECT, USER_SCRATCHPAD = 1, 1, 64, 1, 1
ALIGNMENT = 64  # bytes
AVX512 = 0x20  # the bit of dnnl_cpu_isa_t

Pointer, Int, Int64, Size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
Dims = Int64 * 12


def _structure(name: str, *fields: tuple) -> type[ctypes.Structure]:
    """A structure of XLA's C interface, which begins with its size and its extensions."""
    return type(name, (ctypes.Structure,), {"_fields_": [("size", Size), ("extension", Pointer), *fields]})


Buffer = _structure("Buffer", ("type", Int), ("data", Pointer), ("rank", Int64), ("dims", ctypes.POINTER(Int64)))
Items = _structure("Items", ("count", Int64), ("types", Pointer), ("items", ctypes.POINTER(Pointer)))
Attributes = _structure("Attributes", ("count", Int64), ("types", Pointer), ("names", Pointer), ("items", ctypes.POINTER(Pointer)))
Version = _structure("Version", ("major", Int), ("minor", Int))
Error = _structure("Error", ("message", ctypes.c_char_p), ("code", Int))
Api = _structure("Api", ("version", Version), ("internal", Pointer), ("create_error", Pointer))
Frame = _structure("Frame", ("api", ctypes.POINTER(Api)), ("context", Pointer), ("stage", Int), ("arguments", Items),
                   ("results", Items), ("attributes", Attributes), ("future", Pointer))  # fmt: skip


class Metadata(ctypes.Structure):
    _fields_ = [("size", Size), ("version", Version), ("traits", ctypes.c_uint32), ("state", Int64)]


class Extension(ctypes.Structure):
    _fields_ = [("size", Size), ("type", Int), ("next", Pointer), ("metadata", ctypes.POINTER(Metadata))]


class Numbers(ctypes.Structure):  # an attribute that is an array
    _fields_ = [("type", Int), ("count", Size), ("data", ctypes.POINTER(Int64))]


class Argument(ctypes.Structure):
    _fields_ = [("place", Int), ("memory", Pointer)]


Handler = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(Frame))
CreateError = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(Error))


@contextlib.contextmanager
def _waiting_passively() -> Iterator[None]:
    """OpenMP reads these variables when it is loaded: threads that wait must not take the cores from XLA's threads."""
    wanted = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def load() -> OneDNN | str:
    """The library, ready for programs that are traced from now on, or one line that says why it cannot be had."""
    path = Path(sys.prefix) / "lib" / "libdnnl.so.3"
    if not path.exists():
        return f"{path} is missing; pip install -r requirements-cpu.txt (Linux on x86-64)"
    try:
        with _waiting_passively():
            library = OneDNN(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.handler), platform="cpu")
    # A handler waits for Python's lock. Threads that read data would keep it for 5 ms, as long as a convolution.
    sys.setswitchinterval(min(sys.getswitchinterval(), 5e-4))
    atexit.register(_finish)
    return library


def _finish() -> None:
    """Handlers are Python: no program may be running when the interpreter ends."""
    for array in jax.live_arrays("cpu"):
        with contextlib.suppress(RuntimeError):  # donated, or its program failed, which raised where it was read
            array.block_until_ready()


def convolve(role: int, a: jax.Array, b: jax.Array, shape: tuple[int, ...], strides: tuple, padding: tuple) -> jax.Array:
    """Any of y = conv(x, kernel) and its two gradients, in float32 or bfloat16.

    Args:
        role: FORWARD (a = x, b = kernel), INPUT (a = y, b = kernel) or KERNEL (a = x, b = y).
        shape: of the result. x is [B, H, W, C], kernel [h, w, C, F], y [B, h', w', F].
        padding: ((top, bottom), (left, right)).
    """
    geometry = np.asarray(_geometry(role, strides, padding), np.int64)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, a.dtype), vmap_method="sequential")
    return call(a, b, geometry=geometry)


def can_convolve(role: int, a: jax.Array, b: jax.Array, shape: tuple[int, ...], strides: tuple, padding: tuple) -> bool:
    """Whether the library has what `convolve` needs for these arguments, such as bfloat16 on this processor."""
    library = load()
    if isinstance(library, str) or a.dtype != b.dtype or a.dtype.name not in TYPES:
        return False
    if not all(isinstance(n, int) and n > 0 for n in (*a.shape, *b.shape)):  # a batch of any size, or an empty one
        return False
    try:
        library.primitive(_geometry(role, strides, padding), a.shape, b.shape, shape, TYPES[a.dtype.name])
    except Unsupported:
        return False
    return True


def _geometry(role: int, strides: tuple, padding: tuple) -> tuple[int, ...]:
    (top, bottom), (left, right) = padding
    return role, *strides, top, left, bottom, right


class Unsupported(RuntimeError):
    """oneDNN has no such convolution on this processor."""


class OneDNN:
    """A loaded library: `handler` runs one convolution for XLA."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.dnnl_primitive_desc_query_md.restype = Pointer
        library.dnnl_primitive_desc_query_md.argtypes = [Pointer, Int, Int]
        library.dnnl_memory_desc_get_size.restype = Size
        library.dnnl_memory_desc_get_size.argtypes = [Pointer]
        library.dnnl_memory_desc_equal.argtypes = [Pointer, Pointer]
        library.dnnl_memory_create.argtypes = [Pointer] * 4
        library.dnnl_memory_destroy.argtypes = library.dnnl_stream_wait.argtypes = [Pointer]
        library.dnnl_primitive_execute.argtypes = [Pointer, Pointer, Int, Pointer]
        self.avx512 = bool(library.dnnl_get_effective_cpu_isa() & AVX512)
        self.engine = self.make("engine", Int(CPU), Size(0))
        self.attributes = self.make("primitive_attr")
        self("primitive_attr_set_scratchpad_mode", self.attributes, USER_SCRATCHPAD)
        self.of_thread = threading.local()
        self.primitives: dict[tuple, Convolution] = {}
        self.handler = Handler(self.handle)

    def __call__(self, function: str, *arguments) -> None:
        if status := getattr(self.library, f"dnnl_{function}")(*arguments):
            kind = Unsupported if status == UNIMPLEMENTED else RuntimeError
            raise kind(f"oneDNN: {function} failed with status {status}")

    def make(self, what: str, *arguments) -> Pointer:
        """`dnnl_WHAT_create`: what it returns through its first argument."""
        made = Pointer()
        self(f"{what}_create", ctypes.byref(made), *arguments)
        return made

    def stream(self) -> Pointer:
        if not hasattr(self.of_thread, "stream"):
            self.of_thread.stream = self.make("stream", self.engine, 1)
        return self.of_thread.stream

    def scratch(self, size: int) -> Pointer:
        """Memory of this thread, `size` bytes at least. XLA runs several handlers at once."""
        held = getattr(self.of_thread, "scratch", None)
        if held is None or held.nbytes < size + ALIGNMENT:
            held = self.of_thread.scratch = np.empty(size + ALIGNMENT, np.uint8)
        return Pointer(-(-held.ctypes.data // ALIGNMENT) * ALIGNMENT)

    def layout(self, dims: tuple[int, ...], strides: tuple[int, ...] | None, dtype: int) -> Pointer:
        """A description of memory; strides None: whichever layout is fastest."""
        if strides is None:
            return self.make_layout("with_tag", dims, dtype, ANY_LAYOUT)
        return self.make_layout("with_strides", dims, dtype, Dims(*strides))

    def make_layout(self, how: str, dims: tuple[int, ...], dtype: int, order) -> Pointer:
        made = Pointer()
        self(f"memory_desc_create_{how}", ctypes.byref(made), len(dims), Dims(*dims), dtype, order)
        return made

    def handle(self, frame) -> int | None:
        """XLA calls this: None, or an error, which `jax` raises as JaxRuntimeError."""
        frame = frame.contents
        try:
            if frame.extension:
                extension = ctypes.cast(frame.extension, ctypes.POINTER(Extension)).contents
                if extension.type == METADATA:  # at registration: the version for which this handler was made
                    version, ours = frame.api.contents.version, extension.metadata.contents.version
                    ours.major, ours.minor = version.major, version.minor
                    return None
            if frame.stage == EXECUTE:
                self.execute(frame)
        except Exception as error:  # noqa: BLE001  an exception cannot pass through C; XLA gets it as its own
            message = f"{type(error).__name__}: {error}".encode()
            failure = Error(ctypes.sizeof(Error), None, message, INTERNAL_ERROR)
            return CreateError(frame.api.contents.create_error)(ctypes.byref(failure))
        return None

    def execute(self, frame: Frame) -> None:
        a, b, out = (
            ctypes.cast(item, ctypes.POINTER(Buffer)).contents
            for item in (frame.arguments.items[0], frame.arguments.items[1], frame.results.items[0])
        )
        geometry = ctypes.cast(frame.attributes.items[0], ctypes.POINTER(Numbers)).contents
        geometry = tuple(geometry.data[: geometry.count])
        primitive = self.primitive(geometry, *(tuple(buffer.dims[: buffer.rank]) for buffer in (a, b, out)), XLA_TYPES[a.type])
        primitive(a.data, b.data, out.data)

    def primitive(self, *key) -> Convolution:
        if key not in self.primitives:  # two threads may make the same one, which is harmless
            self.primitives[key] = Convolution(self, *key)
        return self.primitives[key]


class Convolution:
    """One role at one shape. oneDNN chooses the layout of the kernel, so the kernel is reordered in each call."""

    def __init__(self, library: OneDNN, geometry, a, b, out, dtype: int):
        role, down, right, *padding = geometry
        x, kernel, y = {FORWARD: (a, b, out), INPUT: (out, b, a), KERNEL: (a, out, b)}[role]
        (batch, height, width, channels), (rows, columns, _, features) = x, kernel

        def pixels(channels, height, width):
            return library.layout((batch, channels, height, width), (height * width * channels, 1, width * channels, channels), dtype)

        self.library, self.role = library, role
        self.x, self.y = pixels(channels, height, width), pixels(features, *y[1:3])
        dims = (features, channels, rows, columns)
        self.kernel = library.layout(dims, (1, features, columns * channels * features, channels * features), dtype)
        steps = Dims(down, right), Dims(0, 0), Dims(*padding[:2]), Dims(*padding[2:])
        free, none = library.layout(dims, None, dtype), Pointer()

        def describe(what, *layouts):
            return library.make(f"convolution_{what}_primitive_desc", library.engine, *layouts)

        forward = (FORWARD_TRAINING, DIRECT, self.x, free, none, self.y, *steps)
        description = describe("forward", *forward, library.attributes if role == FORWARD else none)
        if role == INPUT:
            description = describe("backward_data", DIRECT, self.x, free, self.y, *steps, description, library.attributes)
        if role == KERNEL:
            description = describe("backward_weights", DIRECT, self.x, free, none, self.y, *steps, description, library.attributes)
        self.primitive = library.make("primitive", description)
        query, size = library.library.dnnl_primitive_desc_query_md, library.library.dnnl_memory_desc_get_size
        self.inner = Pointer(query(description, DIFF_WEIGHTS_LAYOUT if role == KERNEL else WEIGHTS_LAYOUT, 0))
        self.scratchpad = Pointer(query(description, SCRATCHPAD_LAYOUT, 0))
        self.reorder = None
        if not library.library.dnnl_memory_desc_equal(self.inner, self.kernel):
            ends = (self.inner, self.kernel) if role == KERNEL else (self.kernel, self.inner)
            description = library.make("reorder_primitive_desc", ends[0], library.engine, ends[1], library.engine, none)
            self.reorder = library.make("primitive", description)
        self.inner_size = -(-size(self.inner) // ALIGNMENT) * ALIGNMENT if self.reorder else 0
        self.size = self.inner_size + size(self.scratchpad)

    def __call__(self, a: int, b: int, out: int) -> None:
        library, made = self.library, []
        scratch = library.scratch(self.size).value

        def memory(layout, address):
            made.append(library.make("memory", layout, library.engine, address))
            return made[-1]

        def run(primitive, **places):
            arguments = (Argument * len(places))(*((globals()[name], held) for name, held in places.items()))
            library("primitive_execute", primitive, library.stream(), len(places), ctypes.byref(arguments))

        x, kernel, y = {FORWARD: (a, b, out), INPUT: (out, b, a), KERNEL: (a, out, b)}[self.role]
        x, y, kernel = memory(self.x, x), memory(self.y, y), memory(self.kernel, kernel)
        inner = memory(self.inner, scratch) if self.reorder else kernel
        pad = memory(self.scratchpad, scratch + self.inner_size)
        try:
            if self.role == FORWARD:
                if self.reorder:
                    run(self.reorder, SRC=kernel, DST=inner)
                run(self.primitive, SRC=x, WEIGHTS=inner, DST=y, SCRATCHPAD=pad)
            elif self.role == INPUT:
                if self.reorder:
                    run(self.reorder, SRC=kernel, DST=inner)
                run(self.primitive, DIFF_DST=y, WEIGHTS=inner, DIFF_SRC=x, SCRATCHPAD=pad)
            else:
                run(self.primitive, SRC=x, DIFF_DST=y, DIFF_WEIGHTS=inner, SCRATCHPAD=pad)
                if self.reorder:
                    run(self.reorder, SRC=inner, DST=kernel)
            library("stream_wait", library.stream())
        finally:
            for each in made:
                library.library.dnnl_memory_destroy(each)
