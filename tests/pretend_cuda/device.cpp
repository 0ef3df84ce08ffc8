// A device of type "cuda" whose memory is host memory and whose operators are torch's CPU operators.
//
// A CPU build of torch lacks a device guard, current streams, the hooks that autograd and pinned memory ask, an
// allocator and operators for CUDA. This file registers them. A boxed fallback runs an operator on CPU tensors that
// share the memory of its arguments, and refuses tensors on several devices as CUDA's operators do.
//
// PRETEND_CUDA is the mode. "run": fresh memory is NaN, so that reading it shows. "skip": fresh memory is zero, since
// no Triton kernel writes it. "shapes": operators on large tensors only give shapes, and a large block of memory is an
// address range without pages.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;

constexpr int kDevices = 8;
constexpr auto kCuda = c10::DeviceType::CUDA;
constexpr int64_t kSmallBytes = 1 << 20;   // Larger blocks are only addresses in the mode "shapes".
constexpr int64_t kSmallNumel = 1 << 16;   // Operators on larger tensors compute nothing there.
constexpr int64_t kGranularity = 512;      // Bytes; CUDA's caching allocator rounds to it.

const std::string mode = std::getenv("PRETEND_CUDA") ? std::getenv("PRETEND_CUDA") : "run";
const bool shapes_only = mode == "shapes";

thread_local DeviceIndex current = 0;
thread_local int64_t streams[kDevices] = {};

struct Bytes {
  std::atomic<int64_t> live, peak;
};
Bytes device_bytes[kDevices];

// The device of an argument: the current one if it names none.
Device resolved(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(kCuda, current);
}

// Makes a device current within a scope.
struct OnDevice {
  DeviceIndex before = current;
  explicit OnDevice(Device device) { current = device.index(); }
  ~OnDevice() { current = before; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kCuda;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kCuda; }
  Device getDevice() const override { return {kCuda, current}; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "CUDA error: invalid device ordinal");
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Stream getStream(Device device) const noexcept override {
    DeviceIndex index = device.index() < 0 ? current : device.index();
    return Stream(Stream::UNSAFE, Device(kCuda, index), streams[index]);
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    int64_t before = std::exchange(streams[stream.device_index()], stream.id());
    return Stream(Stream::UNSAFE, stream.device(), before);
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // All work is done when a call returns, so events and waits between streams have nothing to do.
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// ------------------------------------------------------------------------------------------------------- Memory

struct Block {
  void* memory;
  int64_t bytes;
  int device;
};

void report_bytes(const Block& block, int64_t change) {
  int64_t live = device_bytes[block.device].live;
  c10::reportMemoryUsageToProfiler(block.memory, change, live, live, Device(kCuda, block.device));
}

bool is_address_only(int64_t bytes) { return shapes_only && bytes > kSmallBytes; }

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  device_bytes[block->device].live -= block->bytes;
  if (block->bytes) report_bytes(*block, -block->bytes);
  if (is_address_only(block->bytes)) {
    munmap(block->memory, block->bytes);
  } else {
    std::free(block->memory);
  }
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t requested) override {
    int64_t bytes = (static_cast<int64_t>(requested) + kGranularity - 1) / kGranularity * kGranularity;
    void* memory = nullptr;
    if (is_address_only(bytes)) {
      int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (memory == MAP_FAILED) memory = nullptr;
    } else if (bytes) {
      memory = std::aligned_alloc(kGranularity, bytes);
      if (memory) std::memset(memory, mode == "run" ? 0xff : 0, bytes);
    }
    TORCH_CHECK(!bytes || memory, "CUDA out of memory: the host has no ", bytes, " bytes");
    auto* block = new Block{memory, bytes, current};
    auto& counted = device_bytes[current];
    int64_t live = counted.live += bytes, peak = counted.peak;
    while (live > peak && !counted.peak.compare_exchange_weak(peak, live)) {
    }
    if (bytes) report_bytes(*block, bytes);
    return {memory, block, &free_block, Device(kCuda, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned_blocks;  // Bytes by address.

bool is_pinned(const void* pointer) {
  auto* address = static_cast<const char*>(pointer);
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto after = pinned_blocks.upper_bound(address);
  if (after == pinned_blocks.begin()) return false;
  auto& [first, bytes] = *std::prev(after);
  return address < first + bytes;
}

void free_pinned(void* memory) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  pinned_blocks.erase(static_cast<const char*>(memory));
  std::free(memory);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t requested) override {
    size_t bytes = (requested + kGranularity - 1) / kGranularity * kGranularity;
    void* memory = bytes ? std::aligned_alloc(kGranularity, bytes) : nullptr;
    if (memory) {
      std::lock_guard<std::mutex> hold(pinned_lock);
      pinned_blocks[static_cast<const char*>(memory)] = bytes;
    }
    return {memory, memory, &free_pinned, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

// torch asks once for the hooks of CUDA, by the name of this class.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  int getNumGPUs() const override { return kDevices; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  Device getDeviceFromPtr(void*) const override { return {kCuda, current}; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator generator = at::detail::createCPUGenerator(7);
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(7); }
  void deviceSynchronize(DeviceIndex) const override {}
};

// ------------------------------------------------------------------------------------------- What the tests record

std::atomic<bool> counting = false;
std::mutex count_lock;
c10::Dict<std::string, int64_t> operation_counts;

void count_operation(const std::string& name) {
  if (!counting) return;
  std::lock_guard<std::mutex> hold(count_lock);
  auto found = operation_counts.find(name);
  operation_counts.insert_or_assign(name, found == operation_counts.end() ? 1 : found->value() + 1);
}

// Tell Python that the host waits for the device; device.py finds the line.
void host_waits(const std::string& operation) {
  static auto told = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("pretend_cuda::host_waits", "")
                         .typed<void(c10::string_view)>();
  if (counting) told.call(operation);
}

// --------------------------------------------------------------------------------------------- Tensors and storages

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(resolved(device));
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, keys,
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  OnDevice on(resolved(device));
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_memory, keys, c10::dtype_or_default(dtype));
}

// A CPU tensor with the memory of a device tensor, which it keeps alive.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto* kept = new c10::Storage(tensor.storage());
  auto free_kept = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(tensor.storage().mutable_data(), kept, free_kept, Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(), std::move(data),
                       at::getCPUAllocator(), true);
  c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* impl = host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return host;
}

at::Tensor view_of(const at::Tensor& base, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                       base.key_set(), base.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return view;
}

void resize_to(c10::StorageImpl* storage, size_t bytes) {
  OnDevice on(storage->device());
  c10::DataPtr fresh = device_memory.allocate(bytes);
  size_t kept = std::min(bytes, storage->nbytes());
  if (kept && !is_address_only(kept)) std::memcpy(fresh.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

void resize_storage(const at::Tensor& tensor, int64_t bytes) {
  resize_to(tensor.storage().unsafeGetStorageImpl(), bytes);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  size_t needed = (self.storage_offset() + self.numel()) * self.element_size();
  if (self.storage().nbytes() < needed) resize_storage(self, needed);
  return self;
}

// As in CUDA, a copy between host and device waits unless it is non_blocking, and always if it goes to pageable memory.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  count_operation("aten::copy_");
  bool to_host = source.is_cuda() && !self.is_cuda();
  bool from_host = self.is_cuda() && !source.is_cuda();
  if ((to_host && !(non_blocking && is_pinned(self.const_data_ptr()))) || (from_host && !non_blocking))
    host_waits(to_host ? "copy to the host" : "copy from the host");
  if (shapes_only && self.numel() * static_cast<int64_t>(self.element_size()) > kSmallBytes) return self;
  at::AutoDispatchBelowADInplaceOrView guard;
  on_host(self).copy_(on_host(source));
  return self;
}

at::Scalar local_scalar(const at::Tensor& self) {
  host_waits("item");
  return at::_local_scalar_dense(on_host(self));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.size() == sizes.size()) {
    impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  } else {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  int64_t numel = storage.nbytes() / self.element_size();
  return set_storage(self, std::move(storage), 0, {c10::SymInt(numel)}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

at::Tensor& set_nothing(at::Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

void record_stream(at::Tensor& self, Stream stream) {
  TORCH_CHECK(stream.device() == self.device(), "record_stream: the stream is on another device");
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  int64_t first = offset.has_value() ? offset->expect_int() : self.storage_offset();
  return view_of(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), first);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  auto inferred = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), inferred);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with the tensor's size and stride; use .reshape(...)");
  return view_of(self, inferred, *stride, self.storage_offset());
}

// ------------------------------------------------------------------------------------------------------ The fallback

// A call of an operator: its arguments on the stack, as they were given.
struct Call {
  const c10::FunctionSchema& schema;
  c10::Stack* stack;
  size_t first;                    // Index of the first argument on the stack.
  std::vector<IValue> arguments;

  Call(const c10::OperatorHandle& op, c10::Stack* on)
      : schema(op.schema()),
        stack(on),
        first(on->size() - schema.arguments().size()),
        arguments(on->begin() + first, on->end()) {}

  // The argument that a return value is, for operators that work in place or into out=; otherwise null.
  const IValue* written_as(const c10::Argument& result) const {
    const auto* alias = result.alias_info();
    if (!alias || !alias->isWrite()) return nullptr;
    for (size_t i = 0; i < arguments.size(); i++) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other && other->isWrite() && other->beforeSets() == alias->beforeSets()) return &arguments[i];
    }
    return nullptr;
  }

  // Replaces each tensor among the arguments, and the device if an argument names one.
  template <typename Change>
  void change_arguments(c10::DeviceType device, const Change& change);
  // Replaces each tensor among the results; those that were written are the arguments themselves.
  template <typename Change>
  void change_results(const Change& change);
};

template <typename Change>
IValue changed(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(change(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      tensors.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return tensors;
  }
  return value;
}

template <typename Change>
void Call::change_arguments(c10::DeviceType device, const Change& change) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const IValue& value = arguments[i];
    bool names_device = value.isDevice() && value.toDevice().is_cuda();
    (*stack)[first + i] = names_device ? IValue(Device(device)) : changed(value, change);
  }
}

template <typename Change>
void Call::change_results(const Change& change) {
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); i++) {
    IValue& value = (*stack)[stack->size() - returns.size() + i];
    const IValue* written = written_as(returns[i]);
    value = written ? *written : changed(value, change);
  }
}

bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* each) { return name == each; });
}

bool is_indexing(const std::string& name) {
  return is_one_of(name, {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
                          "aten::_unsafe_index", "aten::_unsafe_index_put"});
}

// Operators whose result's size depends on values, so that CUDA's wait for the device.
bool depends_on_values(const std::string& name) {
  return is_one_of(name, {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
                          "aten::unique_consecutive", "aten::bincount"});
}

// The tensors of a call, checked as CUDA's operators check them.
struct Tensors {
  std::vector<at::Tensor> on_device;
  std::optional<Device> device;
  int64_t largest = 0;
  bool has_mask = false, has_host_indices = false;

  explicit Tensors(const Call& call) {
    const std::string& name = call.schema.name();
    bool indexes = is_indexing(name), is_mixed = false;
    for (const IValue& value : call.arguments) {
      changed(value, [&](const at::Tensor& tensor) {
        if (!tensor.defined()) return tensor;
        bool is_index = indexes && value.isOptionalTensorList();
        has_mask = has_mask || (is_index && (tensor.dtype() == at::kBool || tensor.dtype() == at::kByte));
        if (tensor.is_cuda()) {
          TORCH_CHECK(!device || *device == tensor.device(), "Expected all tensors to be on the same device, but ",
                      name, " has some on ", device->str(), " and on ", tensor.device().str());
          device = tensor.device();
          on_device.push_back(tensor);
          largest = std::max<int64_t>(largest, tensor.numel());
        } else if (tensor.dim() > 0 && tensor.device().is_cpu()) {
          has_host_indices = has_host_indices || is_index;
          is_mixed = is_mixed || !is_index;
        }
        return tensor;
      });
      if (value.isDevice() && value.toDevice().is_cuda() && !device) device = resolved(value.toDevice());
      if (value.isIntList()) {  // A size, of factories.
        int64_t numel = 1;
        for (int64_t size : value.toIntVector()) numel *= std::max<int64_t>(size, 1);
        largest = std::max(largest, numel);
      }
    }
    TORCH_CHECK(!is_mixed || on_device.empty(), "Expected all tensors to be on the same device, but ", name,
                " has some on ", device ? device->str() : "cuda", " and on cpu");
  }
};

at::Tensor empty_like_on(const at::Tensor& tensor, Device device) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device).pinned_memory(false));
}

// Gives the results of an operator their shapes, by its meta kernel.
void give_shapes(const c10::OperatorHandle& op, Call& call, Device target) {
  const auto& returns = call.schema.returns();
  bool writes_all = std::all_of(returns.begin(), returns.end(), [&](auto& each) { return call.written_as(each); });
  bool grows = false;  // An empty out= gets its size from the operator.
  for (size_t i = 0; i < call.arguments.size(); i++)
    grows = grows || (call.schema.arguments()[i].is_out() && call.arguments[i].toTensor().numel() == 0);
  if (writes_all && !grows) {
    torch::jit::drop(*call.stack, call.arguments.size());
    for (const auto& each : returns) call.stack->push_back(*call.written_as(each));
    return;
  }
  Device meta(c10::DeviceType::Meta);
  call.change_arguments(c10::DeviceType::Meta, [&](const at::Tensor& tensor) {
    return tensor.defined() ? empty_like_on(tensor, meta) : tensor;
  });
  std::vector<IValue> metas(call.stack->begin() + call.first, call.stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), call.stack);
  for (size_t i = 0; grows && i < metas.size(); i++)
    if (call.schema.arguments()[i].is_out()) call.arguments[i].toTensor().resize_(metas[i].toTensor().sizes());
  call.change_results([&](const at::Tensor& tensor) {
    return tensor.defined() ? empty_like_on(tensor, target) : tensor;
  });
}

// Runs an operator on host tensors with the memory of its arguments, and puts results on the device.
void run_on_host(const c10::OperatorHandle& op, Call& call, const Tensors& tensors, Device target) {
  std::vector<at::Tensor> hosts;
  call.change_arguments(c10::DeviceType::CPU, [&](const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    hosts.push_back(on_host(tensor));
    return hosts.back();
  });
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), call.stack);
  for (size_t i = 0; i < hosts.size(); i++) {  // An out= that was resized gets the new memory.
    at::Tensor given = tensors.on_device[i];
    bool is_moved = hosts[i].storage().data() != given.storage().data();
    if (!is_moved && hosts[i].sizes() == given.sizes()) continue;
    auto grown = empty_like_on(hosts[i], given.device());
    on_host(grown).copy_(hosts[i]);
    set_tensor(given, grown);
  }
  call.change_results([&](const at::Tensor& result) -> at::Tensor {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (size_t i = 0; i < hosts.size(); i++) {
      const at::Tensor& given = tensors.on_device[i];
      if (result.is_same(hosts[i])) return given;
      if (result.storage().nbytes() && result.storage().data() == hosts[i].storage().data()) {
        auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
        auto found = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(given.storage()), keys, result.dtype());
        found.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
        return found;
      }
    }
    auto moved = empty_like_on(result, target);
    on_host(moved).copy_(result);
    return moved;
  });
}

void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  Call call(op, stack);
  Tensors tensors(call);
  const std::string& name = call.schema.name();
  bool waits = depends_on_values(name) || tensors.has_mask || tensors.has_host_indices ||
               (name == "aten::repeat_interleave" && call.schema.overload_name() == "Tensor");
  if (waits) host_waits(name.substr(name.rfind(':') + 1));
  const auto& returns = call.schema.returns();
  bool is_view = !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
  if (!is_view) count_operation(name);
  Device target = resolved(tensors.device);
  if (shapes_only && tensors.largest > kSmallNumel && !depends_on_values(name)) {
    give_shapes(op, call, target);
  } else {
    run_on_host(op, call, tensors, target);
  }
}

struct SetAllocator {
  SetAllocator() { c10::SetAllocator(kCuda, &device_memory); }
} set_allocator;

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("record_stream", &record_stream);
  // Their own code for all devices chooses a library by the device, or reads sizes on the host, as CUDA's does not.
  for (const char* name : {"convolution", "convolution_backward", "_grouped_mm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(pretend_cuda, m) {
  m.def("host(Tensor(a) tensor) -> Tensor(a)");
  m.def("resize_storage(Tensor tensor, int bytes) -> ()");
  m.def("host_waits(str operation) -> ()");  // device.py defines it.
  m.def("set_device(int index) -> ()", [](int64_t index) { current = index; });
  m.def("get_device() -> int", []() -> int64_t { return current; });
  m.def("set_stream(int index, int stream) -> ()", [](int64_t index, int64_t stream) { streams[index] = stream; });
  m.def("memory(int index) -> int[]", [](int64_t index) {
    return std::vector<int64_t>{device_bytes[index].live, device_bytes[index].peak};
  });
  m.def("reset_peak(int index) -> ()",
        [](int64_t index) { device_bytes[index].peak = device_bytes[index].live.load(); });
  m.def("count(bool on) -> ()", [](bool on) { counting = on; });
  m.def("take_counts() -> Dict(str, int)", [] {
    std::lock_guard<std::mutex> hold(count_lock);
    return std::exchange(operation_counts, c10::Dict<std::string, int64_t>());
  });
}

TORCH_LIBRARY_IMPL(pretend_cuda, CompositeExplicitAutograd, m) {
  m.impl("host", &on_host);
  m.impl("resize_storage", &resize_storage);
}
