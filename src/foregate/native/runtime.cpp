#include "runtime.h"

#include <cmath>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace foregate {

namespace {

constexpr const Kernels* ALL_KERNELS[] = {  // best first
#if defined(FOREGATE_X86)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable};

struct ScaleTable {
    float values[256];
    ScaleTable() {
        for (int i = 0; i < 256; i++) values[i] = static_cast<float>(std::exp2(-i / 16.0));
    }
};
const ScaleTable table;

int usable_cpus() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? static_cast<int>(count) : 1;
}

Runtime* current = nullptr;

void replace_in_child() {
    // The old one is left as it is: another thread of the parent may have held its lock.
    const Runtime* old = current;
    if (!old) return;
    current = new Runtime;
    current->kernels = old->kernels;
    current->threads = old->threads;
}

Runtime* make_runtime() {
    current = new Runtime;  // never deleted: threads may still wait in it when the process ends
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, replace_in_child);
#endif
    return current;
}

}  // namespace

const float* const scale_table = table.values;

Runtime::Runtime() : kernels(&find_kernels(nullptr)), threads(usable_cpus()) {}

Runtime& runtime() {
    static Runtime* const first = make_runtime();
    static_cast<void>(first);
    return *current;
}

const Kernels& find_kernels(const char* name) {
    for (const Kernels* kernels : ALL_KERNELS)
        if (kernels->supported() && (!name || kernels->name == std::string(name))) return *kernels;
    throw std::invalid_argument("no instruction set '" + std::string(name) + "' here, only " + kernel_names());
}

const std::string& kernel_names() {
    static const std::string names = [] {
        std::string text;
        for (const Kernels* kernels : ALL_KERNELS)
            if (kernels->supported()) text += (text.empty() ? "" : ", ") + std::string(kernels->name);
        return text;
    }();
    return names;
}

}  // namespace foregate
