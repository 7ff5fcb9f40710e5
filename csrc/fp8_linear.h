#pragma once
#include "tensor.h"

namespace kn {
struct Fp8Linear {
    TensorView x;           // bf16 [m, k]
    TensorView w, w_scale;  // fp8 [n, k], f32 [n/128, k/128]
    TensorView bias;        // bf16 [n] or absent
    TensorView out;         // bf16 or f32 [m, n]
    TensorView workspace;   // as Fp8Gemm
    bool fp8_activations;   // x through FP8 per row and 128 columns, or as it is
    int threads;
};
}  // namespace kn
