// What PyTorch asks of a device: guard, allocators, generators, hooks.
#pragma once
#include "memory.hpp"

namespace {
using namespace rt;
using c10::DeviceType;
constexpr auto PU1 = DeviceType::PrivateUse1;

struct Event {
  State state;
  int device;
  bool timed;
};

c10::Stream wrap(Stream* s) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(PU1, s->device), s->id); }
Stream* unwrap(const c10::Stream& s) { return stream(s.device_index(), s.id()); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return PU1; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = cur_dev;
    if (d.index() >= 0) setDevice(d);
    return {PU1, (c10::DeviceIndex)old};
  }
  c10::Device getDevice() const override { return {PU1, (c10::DeviceIndex)cur_dev}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() >= 0 && d.index() < kDevices, "invalid simgpu device ", (int)d.index());
    cur_dev = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) cur_dev = d.index();
  }
  static int idx(c10::Device d) { return d.index() >= 0 ? d.index() : cur_dev; }
  c10::Stream getStream(c10::Device d) const override { return wrap(current(idx(d))); }
  c10::Stream getDefaultStream(c10::Device d) const override { return wrap(stream(idx(d), 0)); }
  c10::Stream getNewStream(c10::Device d, int = 0) const override {
    init();
    return wrap(stream(idx(d), 1 + devices[idx(d)]->next++ % kPool));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool = false) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = wrap(current(s.device_index()));
    cur_stream[s.device_index()] = s.id();
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete (Event*)e; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex d, const c10::EventFlag flag) const override {
    TORCH_CHECK(d == -1 || d == s.device_index(), "Event device index ", (int)d,
                " does not match recording stream's device index ", (int)s.device_index(), ".");
    if (!*e) *e = new Event{nullptr, s.device_index(), flag == c10::EventFlag::BACKEND_DEFAULT};
    ((Event*)*e)->state = unwrap(s)->record();
  }
  void block(void* e, const c10::Stream& s) const override {
    if (e && ((Event*)e)->state) unwrap(s)->wait(((Event*)e)->state);
  }
  bool queryEvent(void* e) const override {
    st.query++;
    check_failed();
    return !e || !((Event*)e)->state || ((Event*)e)->state->query();
  }
  bool queryStream(const c10::Stream& s) const override {
    auto r = unwrap(s)->record();
    return r->query();
  }
  void synchronizeStream(const c10::Stream& s) const override { unwrap(s)->sync(); }
  void synchronizeEvent(void* e) const override {
    about_to_block();
    if (e && ((Event*)e)->state) ((Event*)e)->state->wait();
  }
  void synchronizeDevice(const c10::DeviceIndex d) const override {
    init();
    for (auto* s : devices[d < 0 ? cur_dev : d]->streams) s->sync();
  }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override {
    record_stream(p.get(), s.id());
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    TORCH_CHECK(a && b, "Both events must be recorded before calculating elapsed time.");
    auto *x = (Event*)a, *y = (Event*)b;
    TORCH_CHECK(x->timed && y->timed, "both events need enable_timing");
    TORCH_CHECK(x->state->query() && y->state->query(), "Both events must be completed");
    return std::chrono::duration<double, std::milli>(y->state->at - x->state->at).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

void delete_device(void* p) { dealloc(p); }
struct DevAlloc final : public c10::DeviceAllocator {
  at::DataPtr allocate(size_t n) override {
    void* p = alloc(n, cur_dev, cur_stream[cur_dev]);
    return {p, p, &delete_device, c10::Device(PU1, cur_dev)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &delete_device; }
  void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "copy_data"); }
  bool initialized() override { return used; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& p, c10::Stream s) override { record_stream(p.get(), s.id()); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex d) override {
    return {size_t(cfg.memory_limit[d] - in_use[d]), size_t(cfg.memory_limit[d])};
  }
};
DevAlloc* dev_alloc = new DevAlloc();
REGISTER_ALLOCATOR(PU1, dev_alloc);

void host_process() {
  for (size_t i = 0; i < hpending.size();) {
    bool all = true;
    for (auto& s : hpending[i]->uses) all = all && s->query();
    if (all) {
      auto* b = hpending[i];
      hpending.erase(hpending.begin() + i);
      b->uses.clear();
      hfree[b->size].push_back(b);
    } else
      i++;
  }
}
void delete_host(void* p) {
  if (!p) return;
  std::lock_guard<std::mutex> g(host_m);
  hpending.push_back(hblocks.at((char*)p));
  host_process();
}
struct HostAlloc final : public at::HostAllocator {
  at::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) {
      size_t size = (n + 4095) / 4096 * 4096;
      std::lock_guard<std::mutex> g(host_m);
      host_process();
      auto& l = hfree[size];
      if (!l.empty()) {
        p = l.back()->ptr;
        l.pop_back();
      } else {
        p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TORCH_CHECK(p != MAP_FAILED);
        hblocks[(char*)p] = new HBlock{p, size, {}};
      }
    }
    return {p, p, &delete_host, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &delete_host; }
  void copy_data(void* d, const void* s, std::size_t n) const override { memcpy(d, s, n); }
  bool record_event(void* p, void*, c10::Stream s) override {
    std::lock_guard<std::mutex> g(host_m);
    auto* b = find_host(p);
    if (b) b->uses.push_back(unwrap(s)->record());
    return b;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
HostAlloc* host_alloc = new HostAlloc();
REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, host_alloc)
bool pinned(const void* p) {
  std::lock_guard<std::mutex> g(host_m);
  return find_host(p);
}

struct GenImpl : public at::CPUGeneratorImpl {
  explicit GenImpl(c10::DeviceIndex i) {
    device_ = c10::Device(PU1, i);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  static DeviceType device_type() { return PU1; }
};
const at::Generator& default_generator(c10::DeviceIndex i) {
  static auto* gens = [] {
    auto* v = new std::vector<at::Generator>();
    for (int d = 0; d < kDevices; d++) v->push_back(at::make_generator<GenImpl>(d));
    return v;
  }();
  return (*gens)[i < 0 ? cur_dev : i];
}

void enqueue_raw_copy(Stream* s, void* dst, void* src, size_t n) {
  s->push([=] { memmove(dst, src, n); });
}
void resize_storage(c10::StorageImpl* impl, size_t n) {
  c10::DeviceGuard guard(impl->device());
  auto ptr = dev_alloc->allocate(n);
  if (impl->nbytes() && n)
    enqueue_raw_copy(current(impl->device().index()), shadow(ptr.get()), shadow(impl->data()),
                     std::min(n, impl->nbytes()));
  impl->set_data_ptr_noswap(std::move(ptr));
  impl->set_nbytes(n);
}

struct Hooks : public at::PrivateUse1HooksInterface {
  void init() const override { rt::init(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return used; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex d) const override { Guard().setDevice({PU1, d}); }
  c10::DeviceIndex getCurrentDevice() const override { return cur_dev; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return Guard().exchangeDevice({PU1, d}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override {
    return d < 0 || d >= kDevices ? cur_dev : exchangeDevice(d);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return host_alloc; }
  bool isPinnedPtr(const void* p) const override { return pinned(p); }
  at::Device getDeviceFromPtr(void* p) const override {
    int d = device_of_ptr(p);
    TORCH_CHECK(d >= 0, "failed to get device from pointer");
    return {PU1, (c10::DeviceIndex)d};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override {
    return at::make_generator<GenImpl>(i < 0 ? cur_dev : i);
  }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    resize_storage(s.unsafeGetStorageImpl(), n);
  }
};
bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace
