"""Products of active channels on a CPU: a small C++ library, compiled for this machine on first use, then cached.

It needs nothing but a C++ compiler, no headers of torch: tensors are passed as addresses. OpenMP calls resolve to the
runtime that torch has loaded already, so both share one pool of threads. Where there is no compiler, `library` gives
None, and callers take PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 { uint16_t bits; };

inline float load(float value) { return value; }
inline float load(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void store(float& to, float value) { to = value; }
inline void store(bf16& to, float value) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int WIDTH = 16;  // the compiler splits vectors that the processor has no registers for
typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

inline vector vector_at(const float* from) {
    vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline vector vector_at(const bf16* from) {
    halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (vector)(__builtin_convertvector(bits, words) << 16);
}

constexpr int GROUP = 8;           // rows of the weight that are read side by side
constexpr int64_t COLUMNS = 2048;  // of the output, which stay in the first-level cache meanwhile

struct Work {
    std::vector<float> x, dropped, sums, values;
    std::vector<const void*> rows;
};
thread_local Work work;

// y[m][0:width] += sum_j values[j][m] * rows[j][0:width]; `next` are the rows that follow, fetched ahead.
template <class T, int M, int ROWS>
void add_rows(const T* const* rows, const T* const* next, const float* values, float* y, int64_t stride,
              int64_t width) {
    int64_t n = 0;
    for (; n + 2 * WIDTH <= width; n += 2 * WIDTH) {
        vector sums[M][2];
        for (int m = 0; m < M; ++m)
            for (int i = 0; i < 2; ++i) sums[m][i] = vector_at(y + m * stride + n + i * WIDTH);
#pragma GCC unroll 8
        for (int j = 0; j < ROWS; ++j) {
            const vector first = vector_at(rows[j] + n), second = vector_at(rows[j] + n + WIDTH);
            __builtin_prefetch(next[j] + n);
            if (sizeof(T) == 4) __builtin_prefetch(next[j] + n + WIDTH);
            for (int m = 0; m < M; ++m) {
                sums[m][0] += values[j * M + m] * first;
                sums[m][1] += values[j * M + m] * second;
            }
        }
        for (int m = 0; m < M; ++m)
            for (int i = 0; i < 2; ++i) std::memcpy(y + m * stride + n + i * WIDTH, &sums[m][i], sizeof(vector));
    }
    for (; n < width; ++n)
        for (int j = 0; j < ROWS; ++j)
            for (int m = 0; m < M; ++m) y[m * stride + n] += values[j * M + m] * load(rows[j][n]);
}

// sums[m] = sum_k row[k] x[m][k]
template <class T, int M>
void dot(const T* row, const float* x, int64_t size, float* sums) {
    constexpr int PARTS = M == 1 ? 4 : 2;
    vector lanes[M][PARTS] = {};
    int64_t k = 0;
    for (; k + PARTS * WIDTH <= size; k += PARTS * WIDTH)
        for (int i = 0; i < PARTS; ++i) {
            const vector weights = vector_at(row + k + i * WIDTH);
            for (int m = 0; m < M; ++m) lanes[m][i] += weights * vector_at(x + m * size + k + i * WIDTH);
        }
    for (int m = 0; m < M; ++m) {
        for (int i = 1; i < PARTS; ++i) lanes[m][0] += lanes[m][i];
        sums[m] = 0;
        for (int i = 0; i < WIDTH; ++i) sums[m] += lanes[m][0][i];
        for (int64_t rest = k; rest < size; ++rest) sums[m] += load(row[rest]) * x[m * size + rest];
    }
}

template <class T, int M>
void linear(const T* x, const T* weight, const float* scale, float threshold, const T* bias, const T* up,
            const T* down, T* out, int64_t K, int64_t N, int64_t rank, int threads) {
    work.sums.resize(M * N);
    work.values.resize((K + rank + GROUP) * M);
    work.rows.resize(K + rank + GROUP);
    work.dropped.resize(rank ? M * K : 0);
    float *sums = work.sums.data(), *values = work.values.data(), *dropped = work.dropped.data();
    const T** rows = reinterpret_cast<const T**>(work.rows.data());
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k) {
        bool kept = false;
        for (int m = 0; m < M; ++m) {
            float value = load(x[m * K + k]), score = std::fabs(value);
            if (scale) score *= scale[k];
            bool keep = !(score <= threshold);  // a NaN is kept
            values[count * M + m] = keep ? value : 0;
            if (rank) dropped[m * K + k] = keep ? 0 : value;
            kept |= keep;
        }
        rows[count] = weight + k * N;
        count += kept;
    }
    for (int64_t j = 0; j < rank; ++j) rows[count + j] = up + j * N;
    const int64_t last = count + rank - 1, lines = (N + 31) / 32;
#pragma omp parallel num_threads(threads)
    {
        if (rank) {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < rank; ++j) dot<T, M>(down + j * K, dropped, K, values + (count + j) * M);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            int64_t end = std::min(N, lines * (part + 1) / threads * 32);
            for (int64_t from = lines * part / threads * 32; from < end; from += COLUMNS) {
                const int64_t width = std::min(COLUMNS, end - from);
                float* y = sums + from;
                for (int m = 0; m < M; ++m)
                    for (int64_t n = 0; n < width; ++n) y[m * N + n] = bias ? load(bias[from + n]) : 0;
                const T *now[GROUP], *next[GROUP];
                int64_t i = 0;
                for (; i + GROUP <= last + 1; i += GROUP) {
                    for (int j = 0; j < GROUP; ++j) {
                        now[j] = rows[i + j] + from;
                        next[j] = rows[std::min(i + GROUP + j, last)] + from;
                    }
                    add_rows<T, M, GROUP>(now, next, values + i * M, y, N, width);
                }
                for (; i <= last; ++i) {
                    now[0] = rows[i] + from;
                    add_rows<T, M, 1>(now, now, values + i * M, y, N, width);
                }
                for (int m = 0; m < M; ++m)
                    for (int64_t n = 0; n < width; ++n) store(out[m * N + from + n], y[m * N + n]);
            }
        }
    }
}

template <class T, int M>
void swiglu(const T* x, const T* gate, const T* up, const float* thresholds, T* out, int64_t K, int64_t N,
            int threads) {
    work.x.resize(M * K);
    float* wide = work.x.data();
    for (int64_t k = 0; k < M * K; ++k) wide[k] = load(x[k]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        float gates[M], ups[M];
        dot<T, M>(gate + n * K, wide, K, gates);
        bool kept = false;
        for (int m = 0; m < M; ++m) {
            gates[m] /= 1 + std::exp(-gates[m]);
            if (std::fabs(gates[m]) <= thresholds[n]) gates[m] = 0;  // a NaN is kept
            else kept = true;
        }
        if (kept) dot<T, M>(up + n * K, wide, K, ups);
        for (int m = 0; m < M; ++m) store(out[m * N + n], gates[m] == 0 ? 0 : gates[m] * ups[m]);
    }
}

template <class T>
void linear_rows(int M, const void* x, const void* weight, const float* scale, float threshold, const void* bias,
                 const void* up, const void* down, void* out, int64_t K, int64_t N, int64_t rank, int threads) {
    auto run = M == 1 ? linear<T, 1> : M == 2 ? linear<T, 2> : M == 3 ? linear<T, 3> : linear<T, 4>;
    run((const T*)x, (const T*)weight, scale, threshold, (const T*)bias, (const T*)up, (const T*)down, (T*)out, K, N,
        rank, threads);
}

template <class T>
void swiglu_rows(int M, const void* x, const void* gate, const void* up, const float* thresholds, void* out, int64_t K,
                 int64_t N, int threads) {
    auto run = M == 1 ? swiglu<T, 1> : M == 2 ? swiglu<T, 2> : M == 3 ? swiglu<T, 3> : swiglu<T, 4>;
    run((const T*)x, (const T*)gate, (const T*)up, thresholds, (T*)out, K, N, threads);
}

}  // namespace

#define EXPORT(T, NAME)                                                                                           \
    extern "C" void sparse_linear_##NAME(int M, const void* x, const void* weight, const float* scale,            \
                                         float threshold, const void* bias, const void* up, const void* down,     \
                                         void* out, int64_t K, int64_t N, int64_t rank, int threads) {            \
        linear_rows<T>(M, x, weight, scale, threshold, bias, up, down, out, K, N, rank, threads);                 \
    }                                                                                                             \
    extern "C" void sparse_swiglu_##NAME(int M, const void* x, const void* gate, const void* up,                  \
                                         const float* thresholds, void* out, int64_t K, int64_t N, int threads) { \
        swiglu_rows<T>(M, x, gate, up, thresholds, out, K, N, threads);                                           \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
"""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning, where it cannot be built."""
    try:
        compiled = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"sparse products run on masked dense PyTorch, no faster than dense: {error}\n"
            "  next: install a C++ compiler (or name one in CXX)",
            stacklevel=2,
        )
        return None
    address, number, count = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64
    for name in DTYPES.values():
        linear, swiglu = getattr(compiled, f"sparse_linear_{name}"), getattr(compiled, f"sparse_swiglu_{name}")
        linear.argtypes = [ctypes.c_int, *[address] * 3, number, *[address] * 4, *[count] * 3, ctypes.c_int]
        swiglu.argtypes = [ctypes.c_int, *[address] * 5, *[count] * 2, ctypes.c_int]
        linear.restype = swiglu.restype = None
    return compiled


def _compiled() -> Path:
    """Path of the library for this source, compiler and processor; built if it is not there."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), "")
    if not name or not (compiler := shutil.which(name)):
        raise RuntimeError(f"no C++ compiler found{f' named {name}' if name else ''}")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256(SOURCE.encode() + version + _processor().encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kit" / "kernels"
    path = folder / f"sparse_matvec-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, made = Path(temporary) / "kernel.cpp", Path(temporary) / "kernel.so"
        source.write_text(SOURCE, encoding="utf-8")
        for threads in (["-fopenmp"], []):  # Apple's compiler has no OpenMP: one thread
            flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", *threads]
            built = subprocess.run([compiler, *flags, source, "-o", made], capture_output=True, timeout=300)
            if built.returncode == 0:
                made.replace(path)
                return path
    raise RuntimeError(f"{compiler} failed: {built.stderr.decode(errors='replace').strip()[:300]}")


def _processor() -> str:
    """What -march=native depends on: the processor and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: float,
    scale: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """`reference.sparse_linear` of 1 to 4 rows, in fp32 sums; all tensors contiguous, of x's dtype, scale fp32."""
    size, outputs = weight_t.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    up_t, down = low_rank or (None, None)
    getattr(library(), f"sparse_linear_{DTYPES[x.dtype]}")(
        x.numel() // size, x.data_ptr(), weight_t.data_ptr(), _address(scale), threshold, _address(bias),
        _address(up_t), _address(down), y.data_ptr(), size, outputs, 0 if down is None else down.shape[0],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def sparse_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor) -> Tensor:
    """`reference.sparse_swiglu` of 1 to 4 rows, in fp32 to the end; all contiguous, thresholds fp32."""
    outputs, size = gate_weight.shape
    h = x.new_empty(*x.shape[:-1], outputs)
    getattr(library(), f"sparse_swiglu_{DTYPES[x.dtype]}")(
        x.numel() // size, x.data_ptr(), gate_weight.data_ptr(), up_weight.data_ptr(), thresholds.data_ptr(),
        h.data_ptr(), size, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return h


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
