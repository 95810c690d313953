// The pool of threads. They sleep between two loops: MindSpore's own kernels need the cores then.

#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

const int64_t kWorth = 16384;  // fewer floats than this are one thread's work
const int kParts = 4;          // per thread, so that a delayed thread holds up one of them
const int kMaxThreads = 256;
const int kSpins = 2000;       // of a waiting thread before it sleeps

std::atomic<int> g_threads{1};

// A loop, on the stack of its caller.
struct Loop {
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};  // pool threads in it; changed under the pool's mutex
  int64_t count, step;
  int helpers;  // pool threads that it may still take
  Part part;
  const void* body;
  std::fenv_t rounding;  // and denormals, of the caller: every thread computes alike

  void work() {
    for (int64_t i; (i = next.fetch_add(step)) < count;) part(body, i, std::min(i + step, count));
  }
};

class Pool {
 public:
  void run(Loop* loop) {
    const int helpers = loop->helpers;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      while (size_ < helpers) {
        ++size_;
        std::thread(&Pool::serve, this).detach();
      }
      loops_.push_back(loop);
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    loop->work();
    {
      std::lock_guard<std::mutex> hold(mutex_);
      remove(loop);  // from here on no thread joins it
    }
    for (int i = 0; i < kSpins && loop->busy; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [loop] { return loop->busy == 0; });
  }

 private:
  void remove(Loop* loop) {
    const auto found = std::find(loops_.begin(), loops_.end(), loop);
    if (found != loops_.end()) loops_.erase(found);
  }

  void serve() {
    std::fenv_t own;
    std::fegetenv(&own);
    std::unique_lock<std::mutex> hold(mutex_);
    while (true) {
      wake_.wait(hold, [this] { return !loops_.empty(); });
      Loop* loop = loops_.front();
      ++loop->busy;
      if (--loop->helpers == 0) remove(loop);
      hold.unlock();
      std::fesetenv(&loop->rounding);
      loop->work();
      hold.lock();
      if (--loop->busy == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Loop*> loops_;  // that may take threads
  int size_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};  // never deleted: its threads may outlive static objects

// A fork has none of its parent's threads, and its mutex as it was.
void after_fork() { g_pool = nullptr; }

Pool* pool() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, after_fork); });
  Pool* found = g_pool;
  if (!found) {
    Pool* made = new Pool;
    if (g_pool.compare_exchange_strong(found, made)) return made;
    delete made;  // another thread was first; it has no threads yet
  }
  return found;
}

}  // namespace

// Set the number of threads of every loop from now on, the caller's included.
extern "C" int cvt_set_threads(int number) {
  if (number < 1 || number > kMaxThreads) return 1;
  g_threads = number;
  return 0;
}

extern "C" int cvt_threads() { return g_threads; }

void run_parallel(int64_t count, int64_t cost, Part part, const void* body) {
  if (count <= 0) return;
  const int64_t worth = std::max<int64_t>(1, count * std::max<int64_t>(cost, 1) / kWorth);
  const int64_t threads = std::min({static_cast<int64_t>(cvt_threads()), count, worth});
  if (threads == 1) return part(body, 0, count);
  Loop loop;
  loop.count = count;
  loop.step = std::max<int64_t>(1, count / (threads * kParts));
  loop.helpers = static_cast<int>(threads - 1);
  loop.part = part;
  loop.body = body;
  std::fegetenv(&loop.rounding);
  pool()->run(&loop);
}
