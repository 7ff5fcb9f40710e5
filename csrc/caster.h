// The one way a tensor enters C++: the tuple (address, dtype code, sizes); (0, 0, ()) is an optional one left out.
// torch hands out data_ptr() and NumPy its array interface; DLPack would cost 8-12 us a tensor and refuses
// ml_dtypes arrays. Contracts are checked in Python before a tuple is made.
#pragma once
#include <nanobind/nanobind.h>

#include "tensor.h"

namespace nanobind::detail {

template <> struct type_caster<kn::TensorView> {
    NB_TYPE_CASTER(kn::TensorView, const_name("tuple[int, int, tuple[int, ...]]"))

    bool from_python(handle src, uint8_t, cleanup_list*) noexcept {
        value = {};
        PyObject* t = src.ptr();
        if (!PyTuple_Check(t) || PyTuple_Size(t) != 3) return false;
        PyObject* sizes = PyTuple_GetItem(t, 2);
        if (!PyTuple_Check(sizes)) return false;
        value.data = PyLong_AsVoidPtr(PyTuple_GetItem(t, 0));
        value.dtype = static_cast<kn::Dtype>(PyLong_AsLong(PyTuple_GetItem(t, 1)));
        // Leading dims beyond the fifth from the end are one to every kernel.
        const int given = static_cast<int>(PyTuple_Size(sizes)), folded = given > 5 ? given - 5 : 0;
        value.ndim = given - folded;
        for (int i = 0; i < value.ndim; ++i) value.size[i] = PyLong_AsLongLong(PyTuple_GetItem(sizes, i + folded));
        for (int i = 0; i < folded; ++i) value.size[0] *= PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        // An empty tensor may have no address, and must still differ from one left out.
        static char empty;
        if (!value.data && value.ndim) value.data = &empty;
        return true;
    }
};

}  // namespace nanobind::detail
