// What all calls share: the kernels in use, the threads, and memory for intermediate results.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "kernels.h"
#include "pool.h"

namespace foregate {

// Aligned memory that is kept from call to call and grows to the largest request; contents are not kept.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            memory_ = static_cast<char*>(std::aligned_alloc(ALIGNMENT, bytes));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

    static constexpr size_t ALIGNMENT = 64;

private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

// Held by one call at a time: lock `mutex` before touching anything else.
struct Runtime {
    Runtime();

    std::mutex mutex;
    const Kernels* kernels;
    int threads;
    std::unique_ptr<Pool> pool;
    Scratch inputs, hidden, inner;  // prepared tokens; first products; prepared inputs of the second
};

// The process's runtime. A forked child gets a new one with the same settings, since threads do not survive a fork.
Runtime& runtime();

// The kernels called `name` (null: the best). Throws std::invalid_argument naming the choices.
const Kernels& find_kernels(const char* name);

// The kernels that this machine can run, best first, comma-separated.
const std::string& kernel_names();

}  // namespace foregate
