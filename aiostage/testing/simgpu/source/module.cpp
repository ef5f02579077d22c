// What Python sees of the device.
#include "operators.hpp"

namespace {
struct Gate {
  State s = std::make_shared<EventState>();
};
}  // namespace

PYBIND11_MODULE(_C, m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("_init", [] {
    at::globalContext().lazyInitDevice(PU1);
    rt::init();
  });
  m.def("_get_device", [] { return cur_dev; });
  m.def("_set_device", [](int d) { Guard().setDevice({PU1, (c10::DeviceIndex)d}); });
  m.def("_exchangeDevice", [](int d) {
    int old = cur_dev;
    if (d < 0) return -1;
    Guard().setDevice({PU1, (c10::DeviceIndex)d});
    return old;
  });
  m.def("_get_device_count", [] { return kDevices; });
  m.def("_isInBadFork", [] { return bad_fork.load(); });
  m.def("_get_default_generator", [](int i) {
    return py::reinterpret_steal<py::object>(THPGenerator_initDefaultGenerator(default_generator(i)));
  });
  m.def("copy_delay", [](int64_t a, int64_t b) {
    cfg.copy_min = a;
    cfg.copy_max = b;
  });
  m.def("kernel_delay", [](int64_t a, int64_t b) {
    cfg.kernel_min = a;
    cfg.kernel_max = b;
  });
  m.def("seed", [](uint64_t s) {
    std::lock_guard<std::mutex> g(rng_m);
    rng.seed(s);
  });
  m.def("pageable_async", [](bool b) { cfg.pageable_async = b; });
  m.def("chunked", [](bool b) { cfg.chunked = b; });
  m.def("poison", [](bool b) { cfg.poison = b; });
  m.def("memory_limit", [](int d, int64_t n) {
    init();
    cfg.memory_limit[d] = n < 0 ? int64_t(kArena) : n;
  });
  m.def("in_use", [](int d) { return in_use[d].load(); });
  m.def(
      "sleep", [](int64_t us, int d) { current(d < 0 ? cur_dev : d)->push([us] { pause(us); }); }, py::arg("us"),
      py::arg("device") = -1);
  m.def(
      "drain",
      [] {
        init();
        for (int d = 0; d < kDevices; d++)
          for (auto* s : devices[d]->streams)
            if (s->used) s->record()->wait();
      },
      nogil());
  m.def("fail_device", &set_failed, nogil());
  m.def(
      "fail_later",
      [](int64_t us, int d) {
        current(d < 0 ? cur_dev : d)->push([us] {
          pause(us);
          set_failed(true);
        });
      },
      py::arg("us") = 0, py::arg("device") = -1);
  m.def("sync_watch", [](int mode) {
    watched = mode != 0;
    sync_mode = mode;
  });
  m.def("watched_syncs", [] { return watched_syncs.load(); });
  m.def("stop", [] { stopping = true; });
  m.def("pending", [] {
    std::lock_guard<std::recursive_mutex> g(alloc_m);
    process_pending();
    return pending.size();
  });
  m.def("stats", [] {
    py::dict d;
#define S(x) d[#x] = st.x.load()
    S(copies);
    S(h2d);
    S(d2h);
    S(d2d);
    S(kernels);
    S(freed_source);
    S(expired_host);
    S(pinned_copies);
    S(events);
    S(waits);
    S(ooms);
    S(fallback_ops);
    S(query);
    return d;
  });
  py::class_<Gate>(m, "Gate")
      .def(py::init([](int d) {
             Gate g;
             init();
             auto s = g.s;
             current(d < 0 ? cur_dev : d)->push([s] { s->wait(); });
             return g;
           }),
           py::arg("device") = -1)
      .def("release", [](Gate& g) { g.s->complete(); });
}
