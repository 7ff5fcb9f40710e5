#pragma once
#include "tensor.h"

namespace kn {
struct Fp8GroupedGemm {
    TensorView a, a_scale;  // fp8 [t, k], f32 [t, k/128]
    TensorView b, b_scale;  // fp8 [e, n, k], f32 [e, n/128, k/128]
    TensorView offsets;     // i32 [e + 1]
    TensorView c;           // bf16 [t, n]
    TensorView workspace;   // as Fp8Gemm with m = t
    int threads;
};
}  // namespace kn
