// Threads that carry out phases of independent work items.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace foregate {

// Items 0..count-1, in any order, on any threads. Work must not throw.
struct Phase {
    int64_t count;
    std::function<void(int64_t)> work;
};

// One caller at a time. Threads take items from a shared counter, so a thread that the system has put aside delays
// nobody but by the item it holds: that is also what makes all threads finish together.
class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Carry out the phases one after another; the caller works too. Returns when all is done.
    void run(std::vector<Phase> phases);

private:
    struct Job;
    struct State;
    static void worker(std::shared_ptr<State> state);

    std::shared_ptr<State> state_;  // shared with the threads, which outlive the pool by the moment they take to notice
    bool alone_;
};

}  // namespace foregate
