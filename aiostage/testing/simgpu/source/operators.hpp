// Copies and kernels. Each is enqueued with addresses only and keeps nothing alive, so that a missing wait, a source
// freed too early or a buffer used again too early gives wrong bytes.
#pragma once
#include "device.hpp"

namespace {
// a tensor as the device sees it: places, nothing kept
struct Ref {
  void* ptr;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  bool conj, neg, is_device;
  Block* block = nullptr;
  uint64_t gen = 0;
  int64_t alloc_stream = 0;
  int64_t failures_before = failures;
  c10::weak_intrusive_ptr<c10::StorageImpl> host{c10::intrusive_ptr<c10::StorageImpl>()};
  explicit Ref(const at::Tensor& t)
      : sizes(t.sizes().vec()),
        strides(t.strides().vec()),
        dtype(t.scalar_type()),
        conj(t.is_conj()),
        neg(t.is_neg()),
        is_device(t.device().type() == PU1) {
    void* p = t.numel() ? t.data_ptr() : nullptr;
    if (is_device) {
      ptr = shadow(p);
      if (p && (block = find_block(p))) {
        gen = block->gen;
        alloc_stream = block->stream;
      }
    } else {
      ptr = p;
      if (p) host = c10::weak_intrusive_ptr<c10::StorageImpl>(t.storage().getWeakStorageImpl());
    }
  }
  at::Tensor see(Stream* on) const {
    if (block && block->gen != gen && alloc_stream != on->id) st.freed_source++;
    if (!is_device && ptr && host.expired() && !pinned(ptr)) st.expired_host++;
    auto t = at::from_blob(ptr, sizes, strides, at::TensorOptions().dtype(dtype).device(at::kCPU));
    if (conj) t._set_conj(true);
    if (neg) t._set_neg(true);
    return t;
  }
};
void pause(int64_t us) {
  if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

void run_copy(Stream* s, const Ref& d, const Ref& r) {
  std::shared_lock<std::shared_mutex> g(copying);
  if (failed || d.failures_before != failures) return;
  auto us = draw(cfg.copy_min, cfg.copy_max);
  auto dst = d.see(s), src = r.see(s);
  if (dst.numel() == 0) return;
  pause(us / 2);
  if (cfg.chunked && dst.dim() > 0 && dst.sizes() == src.sizes() && dst.size(0) >= 2 && us > 0) {
    auto h = dst.size(0) / 2;
    dst.narrow(0, 0, h).copy_(src.narrow(0, 0, h));
    pause(us / 2);
    dst.narrow(0, h, dst.size(0) - h).copy_(src.narrow(0, h, dst.size(0) - h));
  } else {
    dst.copy_(src);
    pause(us / 2);
  }
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  st.copies++;
  check_failed();
  at::assert_no_internal_overlap(dst);
  bool sd = self.device().type() == PU1, dd = dst.device().type() == PU1;
  TORCH_CHECK((sd || self.is_cpu()) && (dd || dst.is_cpu()), "simgpu copy: unsupported devices");
  TORCH_CHECK(self.layout() == at::kStrided && dst.layout() == at::kStrided, "simgpu copy: strided only");
  init();
  Stream* s = current(sd ? self.device().index() : dst.device().index());
  if (sd && dd && self.device() != dst.device()) {
    auto* other = current(dst.device().index());
    s->wait(other->record());
    Ref d(dst), r(self);
    st.d2d++;
    s->push([=] { run_copy(s, d, r); });
    other->wait(s->record());
    return dst;
  }
  if (sd && dd) {
    st.d2d++;
    Ref d(dst), r(self);
    s->push([=] { run_copy(s, d, r); });
    return dst;
  }
  const at::Tensor& host = sd ? dst : self;
  if (sd)
    st.d2h++;
  else
    st.h2d++;
  bool pin = host.numel() && pinned(host.data_ptr());
  if (pin) st.pinned_copies++;
  if (!sd && non_blocking && !pin && !cfg.pageable_async) {  // as CUDA: staged before the call returns
    at::Tensor kept = self.clone();
    Ref d(dst), r(kept);
    s->push([=] {
      (void)kept;
      run_copy(s, d, r);
    });
    return dst;
  }
  Ref d(dst), r(self);
  s->push([=] { run_copy(s, d, r); });
  if (pin) host_alloc->record_event(host.data_ptr(), nullptr, wrap(s));
  if (!non_blocking || (sd && !pin && !cfg.pageable_async)) s->sync();
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  const_cast<at::Tensor&>(dst).copy_(self, false);
  return dst;
}

void kernel(const at::Tensor& self, std::vector<at::Tensor> reads,
            std::function<void(at::Tensor&, std::vector<at::Tensor>&)> f) {
  st.kernels++;
  Stream* s = current(self.device().index());
  at::assert_no_internal_overlap(self);
  Ref w(self);
  std::vector<Ref> rs;
  std::vector<at::Tensor> constants(reads.size());
  for (size_t i = 0; i < reads.size(); i++) {
    if (reads[i].is_cpu()) {
      constants[i] = reads[i].clone();
      rs.emplace_back(constants[i]);
    } else
      rs.emplace_back(reads[i]);
  }
  s->push([=] {
    pause(draw(cfg.kernel_min, cfg.kernel_max));
    auto t = w.see(s);
    std::vector<at::Tensor> in;
    for (size_t i = 0; i < rs.size(); i++) in.push_back(constants[i].defined() ? constants[i] : rs[i].see(s));
    if (t.numel()) f(t, in);
  });
}
#define OTHER_OK(o) (((o).is_cpu() && (o).dim() == 0) || (o).device() == self.device())
at::Tensor& k_fill(at::Tensor& self, const at::Scalar& v) {
  kernel(self, {}, [v](auto& t, auto&) { t.fill_(v); });
  return self;
}
at::Tensor& k_fill_t(at::Tensor& self, const at::Tensor& v) {
  TORCH_CHECK(OTHER_OK(v));
  kernel(self, {v}, [](auto& t, auto& r) { t.fill_(r[0]); });
  return self;
}
at::Tensor& k_zero(at::Tensor& self) {
  kernel(self, {}, [](auto& t, auto&) { t.zero_(); });
  return self;
}
at::Tensor& k_add(at::Tensor& self, const at::Tensor& o, const at::Scalar& a) {
  TORCH_CHECK(OTHER_OK(o));
  kernel(self, {o}, [a](auto& t, auto& r) { t.add_(r[0], a); });
  return self;
}
at::Tensor& k_mul(at::Tensor& self, const at::Tensor& o) {
  TORCH_CHECK(OTHER_OK(o));
  kernel(self, {o}, [](auto& t, auto& r) { t.mul_(r[0]); });
  return self;
}
at::Tensor& k_lerp(at::Tensor& self, const at::Tensor& o, const at::Scalar& a) {
  TORCH_CHECK(OTHER_OK(o));
  kernel(self, {o}, [a](auto& t, auto& r) { t.lerp_(r[0], a); });
  return self;
}

at::Tensor k_empty(at::IntArrayRef size, std::optional<at::ScalarType> dt, std::optional<at::Layout> l,
                   std::optional<at::Device> dev, std::optional<bool> pin, std::optional<at::MemoryFormat> mf) {
  auto device = c10::device_or_default(dev);
  TORCH_CHECK(c10::layout_or_default(l) == at::kStrided && !c10::pinned_memory_or_default(pin),
              "simgpu empty: strided, not pinned");
  init();
  c10::DeviceGuard g(device.has_index() ? device : at::Device(PU1, cur_dev));
  return at::detail::empty_generic(size, dev_alloc, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dt), mf);
}
at::Tensor k_empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dt,
                           std::optional<at::Layout> l, std::optional<at::Device> dev, std::optional<bool> pin) {
  auto device = c10::device_or_default(dev);
  TORCH_CHECK(c10::layout_or_default(l) == at::kStrided && !c10::pinned_memory_or_default(pin),
              "simgpu empty: strided, not pinned");
  init();
  c10::DeviceGuard g(device.has_index() ? device : at::Device(PU1, cur_dev));
  return at::detail::empty_strided_generic(size, stride, dev_alloc, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dt));
}
at::Tensor k_cat(const at::ITensorListRef& list, int64_t dim) {
  std::vector<at::Tensor> ts;
  for (const auto& t : list)
    if (!(t.dim() == 1 && t.numel() == 0)) ts.push_back(t);
  if (ts.empty()) return list.front().clone();
  dim = at::maybe_wrap_dim(dim, ts[0].dim());
  auto sizes = ts[0].sizes().vec();
  sizes[dim] = 0;
  auto dtype = ts[0].scalar_type();
  for (auto& t : ts) dtype = c10::promoteTypes(dtype, t.scalar_type());
  for (auto& t : ts) {
    TORCH_CHECK(t.device() == ts[0].device(), "cat: devices");
    sizes[dim] += t.size(dim);
  }
  auto out = at::empty(sizes, ts[0].options().dtype(dtype));
  int64_t at_ = 0;
  for (auto& t : ts) {
    out.narrow(dim, at_, t.size(dim)).copy_(t, true);
    at_ += t.size(dim);
  }
  return out;
}
at::Tensor& k_cat_out(const at::ITensorListRef& list, int64_t dim, at::Tensor& out) {
  auto r = k_cat(list, dim);
  out.resize_(r.sizes());
  out.copy_(r, true);
  return out;
}
at::Scalar k_item(const at::Tensor& self) {
  auto c = self.cpu();
  return c.item();
}
const at::Tensor& k_resize(const at::Tensor& self, c10::SymIntArrayRef ssize, std::optional<at::MemoryFormat> mf) {
  auto size = C10_AS_INTARRAYREF_SLOW(ssize);
  auto* impl = self.unsafeGetTensorImpl();
  int64_t n = c10::multiply_integers(size);
  size_t need = (n + impl->storage_offset()) * self.element_size();
  if (n && self.storage().nbytes() < need) resize_storage(self.storage().unsafeGetStorageImpl(), need);
  impl->set_sizes_contiguous(size);
  if (mf.has_value()) impl->empty_tensor_restride(*mf);
  return self;
}
at::Tensor& k_set_tensor(at::Tensor& self, const at::Tensor& s) { return at::native::set_tensor_(self, s); }
at::Tensor& k_set_storage(at::Tensor& self, at::Storage s) { return at::native::set_(self, s); }
at::Tensor& k_set_storage_off(at::Tensor& self, at::Storage s, c10::SymInt off, c10::SymIntArrayRef size,
                              c10::SymIntArrayRef stride) {
  auto sz = C10_AS_INTARRAYREF_SLOW(size);
  auto str = C10_AS_INTARRAYREF_SLOW(stride);
  at::native::checkSetStorage(self, s, off.expect_int(), sz, str);
  self.unsafeGetTensorImpl()->set_storage_offset(off.expect_int());
  if (str.data() || sz.empty())
    self.unsafeGetTensorImpl()->set_sizes_and_strides(sz, str);
  else
    self.unsafeGetTensorImpl()->set_sizes_contiguous(sz);
  return self;
}
at::Tensor& k_set(at::Tensor& self) {
  c10::Storage s(c10::Storage::use_byte_size_t(), 0, dev_alloc, true);
  return at::native::set_(self, s);
}
void k_record_stream(at::Tensor& self, c10::Stream s) { record_stream(self.storage().data(), s.id()); }
at::Tensor k_as_strided(const at::Tensor& self, at::IntArrayRef a, at::IntArrayRef b, std::optional<int64_t> o) {
  return at::native::as_strided_tensorimpl(self, a, b, o);
}
at::Tensor k_view(const at::Tensor& self, at::IntArrayRef a) { return at::native::view(self, a); }
at::Tensor k_reshape_alias(const at::Tensor& self, at::IntArrayRef a, at::IntArrayRef b) {
  return at::native::_reshape_alias(self, a, b);
}
bool k_is_set_to(const at::Tensor& a, const at::Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl() &&
         a.storage_offset() == b.storage_offset() && a.sizes() == b.sizes() && a.strides() == b.strides();
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  st.fallback_ops++;
  if (getenv("SIMGPU_LOG")) fprintf(stderr, "fallback %s\n", op.schema().name().c_str());
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", k_empty);
  m.impl("empty_strided", k_empty_strided);
  m.impl("as_strided", k_as_strided);
  m.impl("view", k_view);
  m.impl("_reshape_alias", k_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", k_resize);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", k_item);
  m.impl("set_.source_Tensor", k_set_tensor);
  m.impl("set_.source_Storage", k_set_storage);
  m.impl("set_.source_Storage_storage_offset", k_set_storage_off);
  m.impl("set_", k_set);
  m.impl("is_set_to", k_is_set_to);
  m.impl("record_stream", k_record_stream);
  m.impl("fill_.Scalar", k_fill);
  m.impl("fill_.Tensor", k_fill_t);
  m.impl("zero_", k_zero);
  m.impl("add_.Tensor", k_add);
  m.impl("mul_.Tensor", k_mul);
  m.impl("lerp_.Scalar", k_lerp);
  m.impl("cat", k_cat);
  m.impl("cat.out", k_cat_out);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_sparse_coo_tensor_with_dims", at::native::new_with_dims_sparse);
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", at::native::new_with_dims_and_tensor_sparse_symint);
  m.impl("empty.memory_format", at::native::empty_sparse);
  m.impl("_indices", at::native::_indices_sparse);
  m.impl("_values", at::native::_values_sparse);
  m.impl("indices", at::native::indices_sparse);
  m.impl("values", at::native::values_sparse);
  m.impl("_nnz", at::native::_nnz_sparse);
  m.impl("sparse_dim", at::native::sparse_dim_sparse);
  m.impl("dense_dim", at::native::dense_dim_sparse);
  m.impl("is_coalesced", at::native::is_coalesced_sparse);
  m.impl("_coalesced_", at::native::_coalesced_sparse_);
  m.impl("copy_sparse_to_sparse_", at::native::copy_sparse_);
}

}  // namespace
