#include "pool.h"

#include <chrono>
#include <deque>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace foregate {

namespace {

// A waiting thread spins for the time between the products of a layer, then sleeps: waking takes a phase's time.
constexpr auto SPIN_TIME = std::chrono::microseconds(100);
constexpr int SPINS = 64;  // between looks at the clock

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until `ready()`; false when it did not come true in time.
template <class Ready>
bool spin(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + SPIN_TIME;
    do {
        for (int i = 0; i < SPINS; i++) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

}  // namespace

// A thread that comes late finds the counters exhausted and touches nothing of the caller's: only a claimed item, for
// which the caller waits, runs its function.
struct Pool::Job {
    struct Counters {
        alignas(64) std::atomic<int64_t> next{0};
        alignas(64) std::atomic<int64_t> done{0};
    };

    explicit Job(std::vector<Phase> p) : phases(std::move(p)), counters(phases.size()) {}

    void carry_out() {
        for (size_t i = 0; i < phases.size(); i++) {
            Phase& phase = phases[i];
            Counters& counter = counters[i];
            for (int64_t item; (item = counter.next.fetch_add(1, std::memory_order_relaxed)) < phase.count;) {
                phase.work(item);
                counter.done.fetch_add(1, std::memory_order_release);
            }
            const auto finished = [&] { return counter.done.load(std::memory_order_acquire) == phase.count; };
            while (!spin(finished)) std::this_thread::yield();
        }
    }

    std::vector<Phase> phases;
    std::deque<Counters> counters;  // in place: atomics do not move
};

struct Pool::State {
    std::mutex mutex;
    std::condition_variable wake;
    std::shared_ptr<Job> job;        // under the mutex
    std::atomic<uint64_t> posts{0};  // jobs so far, the end of the pool included; changed under the mutex
    bool ended = false;              // under the mutex
};

Pool::Pool(int threads) : state_(std::make_shared<State>()), alone_(threads < 2) {
    try {
        for (int i = 1; i < threads; i++) std::thread(worker, state_).detach();
    } catch (const std::system_error&) {
        // The system grants no more threads: those that there are do all the work.
    }
}

Pool::~Pool() {
    const std::lock_guard lock(state_->mutex);
    state_->ended = true;
    state_->posts++;
    state_->wake.notify_all();
}

void Pool::run(std::vector<Phase> phases) {
    const auto job = std::make_shared<Job>(std::move(phases));
    if (!alone_) {
        const std::lock_guard lock(state_->mutex);
        state_->job = job;
        state_->posts++;
        state_->wake.notify_all();
    }
    job->carry_out();
    if (!alone_) {
        const std::lock_guard lock(state_->mutex);
        state_->job.reset();
    }
}

void Pool::worker(std::shared_ptr<State> state) {
    uint64_t seen = 0;
    while (true) {
        spin([&] { return state->posts.load(std::memory_order_relaxed) != seen; });
        std::shared_ptr<Job> job;
        {
            std::unique_lock lock(state->mutex);
            state->wake.wait(lock, [&] { return state->posts != seen; });
            if (state->ended) return;
            seen = state->posts;
            job = state->job;
        }
        if (job) job->carry_out();
    }
}

}  // namespace foregate
