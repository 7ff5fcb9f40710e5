#pragma once
#include "tensor.h"

namespace kn {
struct MlaPrefill {
    TensorView q, k, v;     // bf16 [t, h, 192], [s, h, 192], [s, h, 128]
    TensorView cu_q, cu_k;  // i32 [b + 1]
    TensorView out, lse;    // bf16 [t, h, 128], f32 [h, t]
    float softmax_scale;
    bool causal;
    int threads;
};
}  // namespace kn
