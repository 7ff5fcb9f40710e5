#pragma once
#include "tensor.h"

namespace kn {
struct MlaIndex {
    TensorView q;            // fp8 [t, h, 128]
    TensorView k, k_scale;   // fp8 [s, 128], f32 [s]
    TensorView weights;      // f32 [t, h]
    TensorView start, stop;  // i32 [t]
    TensorView out;          // f32 [t, s]
    int threads;
};
}  // namespace kn
