"""CUDA C++ of this package: compiled at run time by NVRTC, which ships with PyTorch, cached, loaded and launched."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from llama_engine.errors import RunError

ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED


def _check(code: int, what: str) -> None:
    if code:
        raise RunError(f"{what} failed with code {code}")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    site = Path(torch.__file__).parent.parent / "nvidia"
    names = [f"libnvrtc.so.{major}", *sorted(map(str, site.glob(f"*/lib/libnvrtc.so.{major}"))), "libnvrtc.so"]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RunError(f"libnvrtc.so.{major}, which PyTorch ships, was not found: reinstall torch")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def enable_peer_access(device: torch.device, peer: torch.device) -> None:
    """Let kernels on ``device`` read and write the memory of ``peer``. Raises :class:`RunError` where they cannot."""
    if not torch.cuda.can_device_access_peer(device, peer):
        raise RunError(f"{device} cannot reach the memory of {peer}: no NVLink or PCIe peer access between them")
    cuda, context = _driver(), ctypes.c_void_p()
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), peer.index), "cuDevicePrimaryCtxRetain")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # this device's own context must exist
        code = cuda.cuCtxEnablePeerAccess(context, 0)
    if code != ALREADY_ENABLED:
        _check(code, "cuCtxEnablePeerAccess")


def architecture(device: torch.device) -> str:
    """NVRTC's name for the GPU, such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def compile_cubin(source: Path, macros: dict[str, int], arch: str, headers: Sequence[Path] = ()) -> bytes:
    """``source`` (which may include ``headers``) with ``macros``; cached under ``$XDG_CACHE_HOME/llama_engine``.

    Raises :class:`RunError` with the compiler's log.
    """
    text, included = source.read_bytes(), [header.read_bytes() for header in headers]
    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    nvrtc = _nvrtc()
    version = (ctypes.c_int * 2)()
    nvrtc.nvrtcVersion(ctypes.byref(version), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    key = hashlib.sha256(repr((text, included, options, tuple(version))).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_engine"
    cached = folder / f"{source.stem}-{key}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    texts = (ctypes.c_char_p * len(headers))(*included)
    names = (ctypes.c_char_p * len(headers))(*(header.name.encode() for header in headers))
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), len(headers), texts, names)
    _check(created, "nvrtcCreateProgram")
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), array):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RunError(f"NVRTC could not compile {source.name}: {log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    cubin = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    try:  # a cache that cannot be written costs only time
        folder.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_bytes(cubin.raw)
        os.replace(partial, cached)
    except OSError:
        pass
    return cubin.raw


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


COOPERATIVE, CLUSTER, PROGRAMMATIC = 2, 4, 6  # CUlaunchAttributeID


class Function:
    """A kernel of a cubin, launched with a fixed grid, block, shared memory and launch attributes."""

    def __init__(
        self,
        cubin: bytes,
        name: str,
        device: torch.device,
        *,
        grid: int,
        threads: int,
        shared: int,
        attributes: dict[int, Sequence[int]],
    ) -> None:
        self._device, self._cuda = device, _driver()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the primary context must exist
            _check(self._cuda.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
            found = self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
            _check(found, "cuModuleGetFunction")
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
            _check(self._cuda.cuFuncSetAttribute(self._function, 8, shared), "cuFuncSetAttribute")
        self._attributes = (_Attribute * len(attributes))()
        for slot, (number, values) in zip(self._attributes, attributes.items()):
            slot.id = number
            slot.value[: len(values)] = values
        self._config = _Config(grid, 1, 1, threads, 1, 1, shared, None, self._attributes, len(attributes))

    def launch(self, params: ctypes.Structure) -> None:
        """Enqueue on the current stream, ``params`` passed by value."""
        self._config.stream = torch.cuda.current_stream(self._device).cuda_stream
        argument = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        _check(
            self._cuda.cuLaunchKernelEx(ctypes.byref(self._config), self._function, argument, None), "cuLaunchKernelEx"
        )
