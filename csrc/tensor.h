// A tensor as kernels see it: where it lies, what it holds, its sizes. No torch and no Python here.
// Tensors are contiguous: the callers of kernels copy what is not.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kn {

enum class Dtype : int { f32, bf16, fp8, u8, i32, i64 };  // positions as in contract.NAMES

struct TensorView {
    void* data = nullptr;  // null: an optional tensor left out
    Dtype dtype = Dtype::u8;
    int ndim = 0;
    int64_t size[5] = {};

    template <class T> __attribute__((always_inline)) T* as() const { return static_cast<T*>(data); }
    __attribute__((always_inline)) explicit operator bool() const { return data != nullptr; }
};

using bf16 = uint16_t;  // the upper half of an f32
using fp8 = uint8_t;    // e4m3fn

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace kn
