// Streams, events and devices: a queue and a thread for each stream, an event that is new at each record.
#pragma once
#include "torch_headers.hpp"

namespace rt {
using Clock = std::chrono::steady_clock;
constexpr int kDevices = 2;
constexpr size_t kArena = size_t(3) << 30;
constexpr int kPool = 32;

struct Config {
  std::atomic<int64_t> copy_min{0}, copy_max{0}, kernel_min{0}, kernel_max{0};
  std::atomic<bool> pageable_async{true}, chunked{true}, poison{true};
  std::atomic<int64_t> memory_limit[kDevices];
} cfg;
struct Stats {
  std::atomic<int64_t> copies{0}, h2d{0}, d2h{0}, d2d{0}, kernels{0}, freed_source{0}, expired_host{0},
      pinned_copies{0}, events{0}, waits{0}, ooms{0}, fallback_ops{0}, query{0};
} st;
std::mutex rng_m;
std::mt19937_64 rng{1};
int64_t draw(int64_t lo, int64_t hi) {
  if (hi <= lo) return lo;
  std::lock_guard<std::mutex> g(rng_m);
  return lo + int64_t(rng() % uint64_t(hi - lo + 1));
}
std::atomic<bool> stopping{false};
// A device that has failed copies no more, also when a test has made it work again: what was enqueued before is not done,
// and failing waits for what is being copied, since its memory may be given back then.
std::atomic<bool> failed{false};
std::atomic<int64_t> failures{0};
std::shared_mutex copying;
void set_failed(bool b) {
  std::unique_lock<std::shared_mutex> g(copying);
  if (b) failures++;
  failed = b;
}
std::atomic<int> sync_mode{0};  // 0 off, 1 count, 2 raise; for threads that said sync_watch()
thread_local bool watched = false;
std::atomic<int64_t> watched_syncs{0};
void about_to_block() {
  if (!watched || !sync_mode) return;
  watched_syncs++;
  TORCH_CHECK(sync_mode != 2, "simgpu: called a synchronizing operation in a watched thread");
}
void check_failed() { TORCH_CHECK(!failed, "simgpu error: unspecified launch failure"); }
std::atomic<bool> bad_fork{false};

struct EventState {
  std::mutex m;
  std::condition_variable cv;
  bool done = false;
  Clock::time_point at;
  void complete() {
    {
      std::lock_guard<std::mutex> g(m);
      done = true;
      at = Clock::now();
    }
    cv.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> l(m);
    while (!done && !stopping) cv.wait_for(l, std::chrono::milliseconds(50));
  }
  bool query() {
    std::lock_guard<std::mutex> g(m);
    return done;
  }
};
using State = std::shared_ptr<EventState>;

struct Stream {
  int device;
  int64_t id;
  std::mutex m;
  std::condition_variable cv;
  std::deque<std::function<void()>> q;
  std::once_flag started;
  std::atomic<bool> used{false};
  Stream(int d, int64_t i) : device(d), id(i) {}
  void run() {
    at::set_num_threads(1);
    at::NoGradGuard no_grad;
    at::AutoDispatchBelowADInplaceOrView below;
    for (;;) {
      std::function<void()> f;
      {
        std::unique_lock<std::mutex> l(m);
        cv.wait(l, [&] { return !q.empty(); });
        f = std::move(q.front());
        q.pop_front();
      }
      if (stopping) continue;
      try {
        f();
      } catch (const std::exception& e) {
        fprintf(stderr, "simgpu stream: %s\n", e.what());
        abort();
      }
    }
  }
  void push(std::function<void()> f) {
    TORCH_CHECK(!bad_fork, "Cannot use simgpu in forked subprocess");
    used = true;
    std::call_once(started, [&] { std::thread([this] { run(); }).detach(); });
    {
      std::lock_guard<std::mutex> g(m);
      q.push_back(std::move(f));
    }
    cv.notify_one();
  }
  State record() {
    check_failed();
    st.events++;
    auto s = std::make_shared<EventState>();
    push([s] { s->complete(); });
    return s;
  }
  void wait(State s) {
    check_failed();
    st.waits++;
    push([s] { s->wait(); });
  }
  void sync() {
    about_to_block();
    check_failed();
    record()->wait();
    check_failed();
  }
};

// id = 0: default; otherwise 1 + index
struct Device {
  char* base = nullptr;
  char* shadow = nullptr;
  size_t top = 0;
  std::vector<Stream*> streams;
  std::atomic<int> next{0};
};
Device* devices[kDevices];
std::once_flag init_flag;
std::atomic<bool> used{false};
void init() {
  std::call_once(init_flag, [] {
    for (int d = 0; d < kDevices; d++) {
      auto* dev = new Device();
      int fd = memfd_create("simgpu", 0);
      TORCH_CHECK(fd >= 0 && ftruncate(fd, kArena) == 0);
      bool unified = getenv("SIMGPU_UNIFIED") != nullptr;
      dev->base =
          (char*)mmap(nullptr, kArena, unified ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
      dev->shadow = (char*)mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
      TORCH_CHECK(dev->base != MAP_FAILED && dev->shadow != MAP_FAILED);
      close(fd);
      for (int i = 0; i <= kPool; i++) dev->streams.push_back(new Stream(d, i));
      devices[d] = dev;
      if (!cfg.memory_limit[d]) cfg.memory_limit[d] = kArena;
    }
    pthread_atfork(nullptr, nullptr, [] {
      if (used) bad_fork = true;
    });
    used = true;
  });
}
void* shadow(const void* p) {
  if (!p) return nullptr;
  for (auto* d : devices)
    if (d && (char*)p >= d->base && (char*)p < d->base + kArena) return d->shadow + ((char*)p - d->base);
  TORCH_CHECK(false, "not a device pointer");
}
int device_of_ptr(const void* p) {
  for (int i = 0; i < kDevices; i++)
    if (devices[i] && (char*)p >= devices[i]->base && (char*)p < devices[i]->base + kArena) return i;
  return -1;
}
thread_local int cur_dev = 0;
thread_local int64_t cur_stream[kDevices] = {};
Stream* stream(int d, int64_t id) {
  init();
  TORCH_CHECK(d >= 0 && d < kDevices && id >= 0 && id <= kPool, "bad simgpu stream");
  return devices[d]->streams[id];
}
Stream* current(int d) { return stream(d, cur_stream[d]); }

}  // namespace rt
