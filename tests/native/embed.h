// csrc/cpu_bindings.cpp compiled with pybind11 into the test executable: the same bindings, over instrumented kernels.
#pragma once
#include <pybind11/embed.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "tensor.h"

namespace nanobind = pybind11;
#define NB_MODULE(name, m) PYBIND11_EMBEDDED_MODULE(name, m)

namespace pybind11::detail {

template <> struct type_caster<kn::TensorView> {  // as csrc/caster.h
    PYBIND11_TYPE_CASTER(kn::TensorView, const_name("tuple[int, int, tuple[int, ...]]"));

    bool load(handle src, bool) {
        if (!isinstance<tuple>(src)) return false;
        auto t = reinterpret_borrow<tuple>(src);
        auto sizes = t[2].cast<tuple>();
        static char empty;
        value = {};
        value.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
        value.dtype = static_cast<kn::Dtype>(t[1].cast<int>());
        const int given = int(sizes.size()), folded = given > 5 ? given - 5 : 0;
        value.ndim = given - folded;
        for (int i = 0; i < value.ndim; ++i) value.size[i] = sizes[i + folded].cast<int64_t>();
        for (int i = 0; i < folded; ++i) value.size[0] *= sizes[i].cast<int64_t>();
        if (!value.data && value.ndim) value.data = &empty;
        return true;
    }
};

}  // namespace pybind11::detail
