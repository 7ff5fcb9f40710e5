#pragma once
#include "tensor.h"

namespace kn {
struct Fp8Gemm {
    TensorView a, a_scale;  // fp8 [m, k], f32 [m, k/128]
    TensorView b, b_scale;  // fp8 [n, k], f32 [n/128, k/128]
    TensorView c;           // bf16 or f32 [m, n]
    TensorView workspace;   // f32 values of a, min(m, 256) rounded up to 64 rows, times k
    int threads;
};
}  // namespace kn
