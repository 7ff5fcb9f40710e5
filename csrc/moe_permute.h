#pragma once
#include "tensor.h"

namespace kn {
struct MoePermute {
    TensorView x, experts;                 // [t, d] of 1, 2 or 4 bytes, i32 [t, top_k]
    TensorView x_sorted, offsets, row_of;  // [t * top_k, d], i32 [e + 1], i32 [t, top_k]
    TensorView workspace;                  // i32 [e]
    int threads;
};
}  // namespace kn
