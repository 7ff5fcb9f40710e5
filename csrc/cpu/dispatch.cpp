// Which instruction set runs: the best the machine has, or the one named by KERNOMICS_ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace kn {

static const Kernels* tables[3];
static int count = 0;
static const Kernels* chosen = nullptr;

static void detect() {
    if (count) return;
    tables[count++] = &base::table;
#if defined(KN_HAVE_avx2)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
    if (v3) tables[count++] = &avx2::table;
#endif
#if defined(KN_HAVE_avx512)
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        tables[count++] = &avx512::table;
#endif
    chosen = tables[count - 1];
    if (const char* name = std::getenv("KERNOMICS_ISA")) use_isa(name);  // the bindings complain of a name unknown here
}

int isa_count() { return detect(), count; }
const Kernels& isa(int i) { return detect(), *tables[i]; }
const Kernels& kernels() { return detect(), *chosen; }

bool use_isa(const char* name) {
    detect();
    for (int i = 0; i < count; ++i)
        if (!std::strcmp(tables[i]->isa, name)) return chosen = tables[i], true;
    return false;
}

}  // namespace kn
