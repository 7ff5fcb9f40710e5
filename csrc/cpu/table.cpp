#include "kernels.h"

#define KN_STRING_(x) #x
#define KN_STRING(x) KN_STRING_(x)

namespace kn::KN_ISA {
#define KN_ENTRY(name, Params) &name,
extern const Kernels table = {KN_STRING(KN_ISA), KN_KERNELS(KN_ENTRY)};
}  // namespace kn::KN_ISA
