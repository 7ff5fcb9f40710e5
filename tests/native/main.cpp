// Runs a check.py in an embedded interpreter, with the instrumented kernels as kernomics._cpu or kernomics._cuda.
#include <cstdlib>
#include <filesystem>

#include "embed.h"

namespace py = pybind11;

// Memory of exactly this many bytes from malloc: the sanitizer sees the first byte read or written beyond it,
// which NumPy's own allocations, rounded up and kept in caches, would hide.
PYBIND11_EMBEDDED_MODULE(tight, m) {
    m.def("bytes", [](size_t n) {
        void* p = std::malloc(n);
        return py::array_t<uint8_t>({n}, {1}, static_cast<uint8_t*>(p), py::capsule(p, [](void* q) { std::free(q); }));
    });
}

int main(int argc, char** argv) {
    py::scoped_interpreter interpreter;
    py::list ops;
    for (int i = 2; i < argc; ++i) ops.append(argv[i]);
    try {
#ifdef KN_ON_CPU
        py::module_::import("sys").attr("modules")["kernomics._cuda"] = py::module_::import("_cuda");
#else
        py::module_::import("sys").attr("modules")["kernomics._cpu"] = py::module_::import("_cpu");
#endif
        // As `python check.py` would: what lies beside the script can be imported.
        py::module_::import("sys").attr("path").attr("insert")(0, std::filesystem::path(argv[1]).parent_path().string());
        py::dict scope;
        scope["OPS_TO_CHECK"] = ops;
        scope["__file__"] = argv[1];
        py::eval_file(argv[1], scope);
    } catch (const py::error_already_set& error) {
        py::print(error.what());
        return 1;
    }
    return 0;
}
