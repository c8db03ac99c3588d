// A device "npu" that lies in host memory, as PyTorch's PrivateUse1: guard, allocator, views and
// copies. Every other operator runs on the CPU and its result is laid into device memory. A tensor
// that was left on the CPU is refused, as a real device would.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr int COUNT = 16;  // devices of a node
thread_local int current = 0;

// -- memory -------------------------------------------------------------------------------------

struct Usage {
  std::atomic<int64_t> now{0};
  std::atomic<int64_t> peak{0};
};
std::array<Usage, COUNT> usage;

void count_bytes(int device, int64_t bytes) {
  const int64_t now = usage[device].now.fetch_add(bytes) + bytes;
  int64_t peak = usage[device].peak.load();
  while (now > peak && !usage[device].peak.compare_exchange_weak(peak, now)) {
  }
}

// Stands before each block of memory, so that freeing needs no table.
struct alignas(64) Header {
  int64_t bytes;
  int device;
};

void release(void* data) {
  if (data == nullptr) return;
  Header* header = static_cast<Header*>(data) - 1;
  count_bytes(header->device, -header->bytes);
  std::free(header);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      const size_t whole = (sizeof(Header) + bytes + 63) / 64 * 64;
      auto* header = static_cast<Header*>(std::aligned_alloc(64, whole));
      TORCH_CHECK(header != nullptr, "NPU out of memory: ", bytes, " bytes");
      header->bytes = static_cast<int64_t>(bytes);
      header->device = current;
      count_bytes(current, header->bytes);
      data = header + 1;
    }
    return {data, data, &release, c10::Device(NPU, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(NPU, &allocator);

void grow(c10::StorageImpl* storage, size_t bytes) {
  c10::DeviceGuard guard(storage->device());
  c10::DataPtr larger = allocator.allocate(bytes);
  const size_t kept = std::min(bytes, storage->nbytes());
  if (kept > 0) std::memcpy(larger.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(larger));
  storage->set_nbytes(bytes);
}

// -- device -------------------------------------------------------------------------------------

// What was launched is done: streams and events have nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = NPU;
  c10::DeviceType type() const override { return NPU; }
  c10::Device getDevice() const override { return c10::Device(NPU, current); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  // Host memory is host memory: pinned or not, it is copied the same.
  at::Allocator* getPinnedMemoryAllocator() const override { return at::GetAllocator(at::kCPU); }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(NPU, current); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    grow(storage.unsafeGetStorageImpl(), bytes);
  }
};

// -- tensors ------------------------------------------------------------------------------------

// The same memory as a CPU tensor, which keeps it alive.
at::Tensor host_view(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == NPU, "a tensor on ", tensor.device(), " is not on the npu");
  auto* first = static_cast<char*>(tensor.storage().mutable_data());
  void* data = first ? first + tensor.storage_offset() * tensor.itemsize() : nullptr;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(
      data, tensor.sizes(), tensor.strides(), [storage = tensor.storage()](void*) {}, options);
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(at::Device(NPU, current)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(at::Device(NPU, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  at::NoGradGuard no_grad;
  const at::Tensor from = source.device().type() == NPU ? host_view(source) : source.detach();
  at::Tensor to = target.device().type() == NPU ? host_view(target) : target.detach();
  to.copy_(from);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_storage_offset(offset);
  const auto strides = stride.data() ? c10::OptionalIntArrayRef(stride) : std::nullopt;
  at::native::resize_impl_cpu_(impl, size, strides);
  return tensor;
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (bytes > impl->unsafe_storage().nbytes()) {
    grow(impl->unsafe_storage().unsafeGetStorageImpl(), bytes);
  }
  return tensor;
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> first;
  if (offset) first = offset->expect_int();
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), first);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

// -- all other operators ------------------------------------------------------------------------

std::set<std::string> seen;  // operators that ran here, to be looked up in the list of NPU kernels
std::mutex seen_lock;

// A kernel reads one number from the host, but no tensor.
void refuse_host_tensor(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() == NPU || tensor.dim() == 0) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", op.operator_name(),
              " got one on ", tensor.device(), " and one on npu");
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  {
    std::lock_guard<std::mutex> lock(seen_lock);
    seen.insert(c10::toString(op.operator_name()));
  }
  const size_t count = op.schema().arguments().size();
  for (const auto& argument : torch::jit::last(*stack, count)) {
    if (argument.isTensor()) refuse_host_tensor(op, argument.toTensor());
    if (argument.isTensorList()) {
      for (const at::Tensor& tensor : argument.toTensorList()) refuse_host_tensor(op, tensor);
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY(npu_standin, m) { m.def("host_view(Tensor(a) tensor) -> Tensor(a)"); }
TORCH_LIBRARY_IMPL(npu_standin, PrivateUse1, m) { m.impl("host_view", host_view); }
TORCH_LIBRARY_IMPL(npu_standin, AutogradPrivateUse1, m) {
  m.impl("host_view", torch::CppFunction::makeFallthrough());
}

std::string seen_text;

}  // namespace

extern "C" {

void standin_init() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
int standin_device_count() { return COUNT; }
int standin_current_device() { return current; }
void standin_set_device(int device) { current = device; }
int64_t standin_bytes(int device) { return usage[device].now.load(); }
int64_t standin_peak_bytes(int device) { return usage[device].peak.load(); }
void standin_reset_peak(int device) { usage[device].peak.store(usage[device].now.load()); }

// Names of the operators that ran, one a line; good until the next call.
const char* standin_seen() {
  std::lock_guard<std::mutex> lock(seen_lock);
  seen_text.clear();
  for (const std::string& name : seen) seen_text += name + "\n";
  return seen_text.c_str();
}
}
