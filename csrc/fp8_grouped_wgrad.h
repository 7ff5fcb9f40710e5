#pragma once
#include "tensor.h"

namespace kn {
struct Fp8GroupedWgrad {
    TensorView dy, dy_scale;  // fp8 [t, n], f32 [t/128, n]
    TensorView x, x_scale;    // fp8 [t, k], f32 [t/128, k]
    TensorView offsets;       // i32 [e + 1]
    TensorView dw;            // f32 [e, n, k]
    int threads;
};
}  // namespace kn
