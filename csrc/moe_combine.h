#pragma once
#include "tensor.h"

namespace kn {
struct MoeCombine {
    TensorView y;        // bf16 or f32 [t * top_k, d]
    TensorView row_of;   // i32 [t, top_k], -1 contributes 0
    TensorView weights;  // f32 [t, top_k] or absent
    TensorView out;      // [t, d]
    int threads;
};
}  // namespace kn
