// A PyTorch device with the CPU's memory and kernels and a GPU's rules: see pretend.py.
//
// Tensors share their memory with CPU tensors that `down` and `up` make for the length of one operation; `fallback` runs
// the CPU's kernel for every operation that is not listed at the end, after it has refused strangers.
#include <torch/extension.h>
#include <torch/library.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

using namespace at;
constexpr auto PU = c10::DeviceType::PrivateUse1;
static Device there() { return Device(PU, 0); }

struct Alloc final : c10::Allocator {
  static void del(void* p) { c10::free_cpu(p); }
  DataPtr allocate(size_t n) override { void* p = c10::alloc_cpu(n); return {p, p, &del, there()}; }
  DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, size_t n) const override { default_copy_data(d, s, n); }
};
static Alloc alloc_;
REGISTER_ALLOCATOR(PU, &alloc_);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = PU;
  c10::DeviceType type() const override { return PU; }
  Device exchangeDevice(Device) const override { return there(); }
  Device getDevice() const override { return there(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, there()); }
  c10::Stream getNewStream(Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, there()); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct PGen final : c10::GeneratorImpl {
  Generator inner;
  explicit PGen(Generator g) : c10::GeneratorImpl(there(), DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(g)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  PGen* clone_impl() const override { return new PGen(inner.clone()); }
};
static Generator fresh() { return make_generator<PGen>(at::detail::createCPUGenerator()); }

struct Hooks final : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { static Generator g = fresh(); return g; }
  Generator getNewGenerator(DeviceIndex) const override { return fresh(); }
  Device getDeviceFromPtr(void*) const override { return there(); }
};

static Tensor down(const Tensor& t) {
  if (!t.defined() || t.device().type() != PU) return t;
  Tensor keep = t;
  return at::from_blob(t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr, t.sizes(), t.strides(), [keep](void*) {}, t.options().device(kCPU));
}
static Tensor up(const Tensor& t) {
  if (!t.defined() || t.device().type() == PU) return t;
  Tensor c = t.is_conj() || t.is_neg() ? t.clone() : t;
  return at::for_blob(c.numel() ? const_cast<void*>(c.const_data_ptr()) : nullptr, c.sizes()).strides(c.strides()).deleter([c](void*) {})
      .target_device(there()).options(c.options().device(there())).make_tensor();
}
static void complain(const std::string& op, const Tensor& t) {
  TORCH_CHECK(false, "PRETEND: expected all tensors to be on the same device, but ", op, " got a CPU tensor of shape ", t.sizes());
}

static void grow(const Tensor& t, IntArrayRef size) {  // in place where the storage has room, as everywhere
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (t.storage_offset() + t.numel()) * t.dtype().itemsize();
  if (bytes > t.storage().nbytes()) {
    impl->set_storage_offset(0);
    impl->set_storage_keep_dtype(Storage(Storage::use_byte_size_t(), bytes, alloc_.allocate(bytes), &alloc_, true));
  }
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  const bool free_ = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::_unsafe_index";
  const bool is_out = schema.overload_name().find("out") != std::string::npos || schema.overload_name().find("grad_input") != std::string::npos;
  const auto n = schema.arguments().size();
  const auto begin = stack->size() - n;
  std::vector<c10::IValue> originals(stack->begin() + begin, stack->end());
  std::vector<Tensor> strangers;
  bool first = true;
  auto see = [&](const Tensor& t) {
    if (t.defined() && t.device().type() == kCPU && t.dim() > 0 && (!free_ || first)) strangers.push_back(t);
    first = false;
  };
  for (size_t i = 0; i < n; i++) {
    auto& v = (*stack)[begin + i];
    if (v.isTensor()) {
      Tensor t = v.toTensor(); see(t);
      const auto* a = schema.arguments()[i].alias_info();
      if (a && a->isWrite() && t.defined() && t.device().type() == PU && (t.numel() == 0 || is_out)) v = at::empty({0}, t.options().device(kCPU));
      else v = down(t);
    }
    else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) { see(t); out.push_back(down(t)); }
      v = out;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const auto& e : v.toOptionalTensorList()) {
        std::optional<Tensor> t = e;
        if (t) { see(*t); t = down(*t); }
        out.push_back(t);
      }
      v = out;
    } else if (v.isGenerator()) {
      auto g = v.toGenerator();
      if (auto p = dynamic_cast<PGen*>(g.unsafeGetGeneratorImpl())) v = p->inner;
      else TORCH_CHECK(false, "PRETEND: expected a 'pretend' device type for generator but found 'cpu' in ", name);
    } else if (v.isDevice() && v.toDevice().type() == PU) v = Device(kCPU);
  }
  if (!strangers.empty()) complain(name, strangers[0]);
  std::vector<Tensor> lowered(n);
  for (size_t i = 0; i < n; i++) if ((*stack)[begin + i].isTensor()) lowered[i] = (*stack)[begin + i].toTensor();
  op.callBoxed(stack);
  const auto r = schema.returns().size();
  const auto from = stack->size() - r;
  for (size_t i = 0; i < r; i++) {
    auto& v = (*stack)[from + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t k = 0; k < n; k++) {
        const auto* a = schema.arguments()[k].alias_info();
        if (a && a->isWrite() && *a == *alias && originals[k].isTensor()) {
          Tensor o = originals[k].toTensor(), l = lowered[k];
          if (o.defined() && o.sizes() != l.sizes()) grow(o, l.sizes());
          if (l.defined() && l.numel() && o.const_data_ptr() != l.const_data_ptr()) down(o).copy_(l);  // an out=
          v = o;
        }
      }
    } else if (v.isTensor()) v = up(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(up(t));
      v = out;
    }
  }
}

static Tensor pempty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> f) {
  return at::detail::empty_generic(size, &alloc_, DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), f);
}
static Tensor pempty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &alloc_, DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
static Tensor copy_from(const Tensor& self, const Tensor& dst, bool) { down(dst).copy_(down(self)); return dst; }
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) { TORCH_CHECK(self.sizes() == dst.sizes()); down(dst).copy_(down(self)); return dst; }
static Tensor pview(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
static Tensor pas_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> off) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), off ? std::optional<int64_t>(off->expect_int()) : std::nullopt);
}
static Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
static Tensor& set_storage_offset(Tensor& self, Storage s, c10::SymInt off, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(s);
  impl->set_storage_offset(off.expect_int());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}
static Tensor& set_storage(Tensor& self, Storage s) {
  int64_t n = s.nbytes() / self.dtype().itemsize();
  return set_storage_offset(self, s, 0, {c10::SymInt(n)}, {c10::SymInt(1)});
}
static Tensor& set_tensor(Tensor& self, const Tensor& t) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(t.storage()); impl->set_storage_offset(t.storage_offset()); impl->set_sizes_and_strides(t.sizes(), t.strides());
  return self;
}
static const Tensor& presize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<MemoryFormat>) {
  grow(self, C10_AS_INTARRAYREF_SLOW(size));
  return self;
}
static Tensor conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::SymIntArrayRef s, c10::SymIntArrayRef p, c10::SymIntArrayRef d, bool t, c10::SymIntArrayRef op, c10::SymInt g) {
  for (const Tensor& e : {x, w, b ? *b : Tensor()}) if (e.defined() && e.device().type() == kCPU) complain("convolution", e);
  std::optional<Tensor> bias; if (b && b->defined()) bias = down(*b);
  return up(at::convolution_symint(down(x), down(w), bias, s, p, d, t, op, g));
}
static std::tuple<Tensor, Tensor, Tensor> conv_back(const Tensor& gy, const Tensor& x, const Tensor& w, c10::SymIntArrayRef s, c10::SymIntArrayRef p, c10::SymIntArrayRef d, bool t, c10::SymIntArrayRef op, c10::SymInt g, std::array<bool, 3> mask) {
  c10::SymInt n = t ? w.sym_size(1) * g : w.sym_size(0);
  std::vector<c10::SymInt> bs{n};
  auto [a, b, c] = at::convolution_backward_symint(down(gy), down(x), down(w), c10::SymIntArrayRef(bs), s, p, d, t, op, g, mask);
  return {up(a), up(b), up(c)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &pempty);
  m.impl("empty_strided", &pempty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("view", &pview);
  m.impl("as_strided", &pas_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &presize_);
  m.impl("convolution_overrideable", &conv);
  m.impl("convolution_backward_overrideable", &conv_back);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
