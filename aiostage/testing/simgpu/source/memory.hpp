// The caching allocators. A freed block is handed out at once to the stream that it was allocated for, as CUDA's is,
// and is poisoned in the order of that stream; what other streams do to it counts only if record_stream told of them.
#pragma once
#include "runtime.hpp"

namespace rt {
struct Block {
  char* ptr;
  size_t size, asked;
  int device;
  int64_t stream;
  std::set<int64_t> recorded;
  std::atomic<uint64_t> gen{0};
  bool live = false;
};
std::recursive_mutex alloc_m;
std::map<char*, Block*> blocks;
std::map<std::tuple<int, int64_t, size_t>, std::vector<Block*>> free_lists;
std::deque<std::pair<Block*, std::vector<State>>> pending;
std::atomic<int64_t> in_use[kDevices];

void give(Block* b) {  // to the free list of its stream; what is enqueued there later may overwrite it at once
  b->gen++;
  b->recorded.clear();
  if (cfg.poison) {
    char* p = (char*)shadow(b->ptr);
    size_t n = b->size;
    devices[b->device]->streams[b->stream]->push([p, n] { memset(p, 0xDB, n); });
  }
  free_lists[{b->device, b->stream, b->size}].push_back(b);
}
void process_pending() {
  for (size_t i = 0; i < pending.size();) {
    bool all = true;
    for (auto& s : pending[i].second) all = all && s->query();
    if (all) {
      auto* b = pending[i].first;
      pending.erase(pending.begin() + i);
      give(b);
    } else
      i++;
  }
}
void* alloc(size_t n, int d, int64_t sid) {
  init();
  if (!n) return nullptr;
  size_t size = (n + 511) / 512 * 512;
  std::lock_guard<std::recursive_mutex> g(alloc_m);
  process_pending();
  if (in_use[d] + int64_t(size) > cfg.memory_limit[d]) {
    st.ooms++;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "simgpu out of memory: tried to allocate ", n, " bytes");
  }
  Block* b = nullptr;
  auto& list = free_lists[{d, sid, size}];
  if (!list.empty()) {
    b = list.back();
    list.pop_back();
  } else if (devices[d]->top + size <= kArena) {
    b = new Block();
    b->ptr = devices[d]->base + devices[d]->top;
    b->size = size;
    b->device = d;
    devices[d]->top += size;
    blocks[b->ptr] = b;
  } else {
    for (auto& [key, l] : free_lists)
      if (std::get<0>(key) == d && std::get<2>(key) >= size && !l.empty()) {
        b = l.back();
        l.pop_back();
        devices[d]->streams[b->stream]->sync();
        break;
      }
    if (!b) {
      st.ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "simgpu out of memory: tried to allocate ", n, " bytes");
    }
  }
  b->stream = sid;
  b->asked = n;
  b->live = true;
  in_use[d] += b->size;
  return b->ptr;
}
Block* find_block(const void* p) {
  std::lock_guard<std::recursive_mutex> g(alloc_m);
  auto it = blocks.upper_bound((char*)p);
  if (it == blocks.begin()) return nullptr;
  --it;
  return (char*)p < it->second->ptr + it->second->size ? it->second : nullptr;
}
void dealloc(void* p) {
  if (!p || bad_fork || stopping) return;
  std::lock_guard<std::recursive_mutex> g(alloc_m);
  auto* b = blocks.at((char*)p);
  TORCH_INTERNAL_ASSERT(b->live);
  b->live = false;
  in_use[b->device] -= b->size;
  std::vector<State> states;
  if (!failed)
    for (auto s : b->recorded)
      if (s != b->stream) states.push_back(devices[b->device]->streams[s]->record());
  if (states.empty())
    give(b);
  else
    pending.emplace_back(b, std::move(states));
  process_pending();
}
void record_stream(const void* p, int64_t s) {
  if (auto* b = find_block(p)) {
    std::lock_guard<std::recursive_mutex> g(alloc_m);
    b->recorded.insert(s);
  }
}
// pinned host memory
struct HBlock {
  void* ptr;
  size_t size;
  std::vector<State> uses;
};
std::mutex host_m;
std::map<char*, HBlock*> hblocks;
std::map<size_t, std::vector<HBlock*>> hfree;
std::deque<HBlock*> hpending;
HBlock* find_host(const void* p) {
  auto it = hblocks.upper_bound((char*)p);
  if (it == hblocks.begin()) return nullptr;
  --it;
  return (char*)p < (char*)it->second->ptr + it->second->size ? it->second : nullptr;
}
}  // namespace rt
