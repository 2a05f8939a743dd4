// A CUDA card that is not there: tensors of device type `cuda` on host memory, for a CPU build of torch 2.13.
//
// Every operator without a kernel of its own here goes through one boxed fallback. It refuses what a card refuses (tensors
// of two devices), checks the order of what it reads and writes (order.h), runs the CPU kernel on aliases of the same bytes,
// and puts results into card memory. Streams and events are those of torch's device guard, so `torch.Stream`, `torch.Event`,
// autograd's own threads and `torch.accelerator` work as they are.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
#include <set>
#include <thread>
#include <unordered_map>

#include "order.h"

namespace {
using at::Tensor;
using torch::jit::Stack;
const c10::Device kCard(c10::DeviceType::CUDA, 0);
const auto kCardKeys = c10::DispatchKeySet(c10::DispatchKey::CUDA);

card::Card& the_card() {
  static auto* made = new card::Card();
  return *made;
}

// Holds the card. Whoever waits for it gives the GIL up meanwhile: the holder may want it.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex) : mutex_(mutex) {
    if (mutex_.try_lock()) return;
    if (Py_IsInitialized() && PyGILState_Check()) {
      py::gil_scoped_release released;
      mutex_.lock();
    } else {
      mutex_.lock();
    }
  }
  ~Lock() { mutex_.unlock(); }
  Lock(const Lock&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

thread_local int64_t current_stream = 0;

// --- where in the project's code something was asked for: "offload/kv/layer.py:80 append".
std::unordered_map<PyCodeObject*, std::string> ours;  // empty for other people's code; the code objects are kept alive

const std::string& file_of(PyCodeObject* code) {
  auto found = ours.find(code);
  if (found != ours.end()) return found->second;
  Py_INCREF(code);
  std::string path = PyUnicode_AsUTF8(code->co_filename), name;
  const bool other = path.find("/site-packages/") != std::string::npos || path.find("/tests/pretended/torch_cuda") != std::string::npos;
  for (const char* folder : {"/offload/", "/storage/", "/scheduler/", "/tests/"}) {
    const auto at = path.rfind(folder);
    if (!other && at != std::string::npos && (name.empty() || path.size() - at > name.size())) name = path.substr(at + 1);
  }
  return ours.emplace(code, name).first->second;
}

std::string place() {
  if (!Py_IsInitialized()) return "?";
  py::gil_scoped_acquire gil;
  std::string found = "?";
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  for (int depth = 0; frame != nullptr && depth < 60; ++depth) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const std::string& file = file_of(code);
    if (!file.empty()) found = file + ":" + std::to_string(PyFrame_GetLineNumber(frame)) + " " + PyUnicode_AsUTF8(code->co_name);
    Py_DECREF(code);
    if (!file.empty()) break;
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  Py_XDECREF(frame);
  return found;
}

// --- what stops the host, by place.
std::map<std::pair<std::string, std::string>, int64_t> host_waits;
void note_wait(const std::string& what, const std::string& at) { ++host_waits[{what, at}]; }

void raise_violations() {
  auto& card = the_card();
  if (card.violations.empty()) return;
  const auto first = card.violations.front();
  card.violations.clear();
  TORCH_CHECK(false, first);
}

// --- memory: freed blocks are used again at once and filled with 0xFF, as the next user of a caching allocator's would.
const size_t kTotal = size_t(8) << 30;
double fraction = 1.0;
int64_t held = 0, peak = 0;
std::unordered_map<size_t, std::vector<void*>> pool;
struct Block {
  void* memory;
  size_t nbytes;
  int64_t stream;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  const auto begin = reinterpret_cast<uintptr_t>(block->memory);
  const auto at = place();
  auto& card = the_card();
  Lock lock(card.mutex);
  // Whoever gets the memory next may write to it in the order of the stream that it was allocated on, and of no other.
  const auto access = card.submit(block->stream, "freeing", at);
  try {
    card.ranges.access(begin, begin + block->nbytes, true, access, card.stream(block->stream).clock);
  } catch (const card::Unordered& error) {
    card.violations.push_back(error.what());
    card.ranges.forget(begin, begin + block->nbytes);
  }
  // What is queued on its own stream still finds it as it was, as on a card.
  card.run_all(block->stream);
  std::memset(block->memory, 0xFF, block->nbytes);
  pool[block->nbytes].push_back(block->memory);
  held -= block->nbytes;
  delete block;
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    if (asked == 0) return {nullptr, kCard};
    const size_t nbytes = (asked + 511) / 512 * 512;
    const auto at = place();
    auto& card = the_card();
    Lock lock(card.mutex);
    const auto limit = static_cast<int64_t>(fraction * kTotal);
    TORCH_CHECK_WITH(OutOfMemoryError, held + static_cast<int64_t>(nbytes) <= limit, "CUDA out of memory. Tried to allocate ", asked,
                     " bytes. The pretended card has ", limit, " bytes, of which ", held, " are in use.");
    void* memory = nullptr;
    auto& free = pool[nbytes];
    if (!free.empty()) {
      memory = free.back();
      free.pop_back();
    } else {
      TORCH_CHECK(posix_memalign(&memory, 4096, nbytes) == 0, "the host has no memory left for the pretended card");
      std::memset(memory, 0xFF, nbytes);
    }
    held += nbytes;
    peak = std::max(peak, held);
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    // Its last user's kernels may still be queued on this stream.
    card.ranges.forget(begin, begin + nbytes);
    const auto access = card.submit(current_stream, "allocating", at);
    card.ranges.access(begin, begin + nbytes, true, access, card.stream(current_stream).clock);
    return {memory, new Block{memory, nbytes, current_stream}, &free_block, kCard};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} card_allocator;

// --- streams and events.
c10::Stream stream_of(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kCard, id); }

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kCard; }
  c10::Device getDevice() const override { return kCard; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream_of(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getNewStream(kCard, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(the_card().mutex);
    return stream_of(the_card().make_stream());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = current_stream;
    current_stream = stream.id();
    return stream_of(before);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(the_card().mutex);
    if (*event == nullptr) *event = new card::Event();
    the_card().record(*static_cast<card::Event*>(*event), stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    Lock lock(the_card().mutex);
    the_card().stream_waits(stream.id(), *static_cast<card::Event*>(event));
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    auto& card = the_card();
    Lock lock(card.mutex);
    auto& found = *static_cast<card::Event*>(event);
    const bool over = card.is_over(found);
    // Compute is always over here; that somebody saw it is no order.
    if (over && found.stream != 0) card::join(card.host, found.clock);
    return over;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<card::Event*>(event); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    const auto at = place();
    Lock lock(the_card().mutex);
    note_wait("a stream", at);
    the_card().host_waits_for(stream.id());
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    const auto at = place();
    auto& card = the_card();
    Lock lock(card.mutex);
    auto& found = *static_cast<card::Event*>(event);
    // Of an event that the host knows of, it learns nothing, and waits for nothing.
    const card::Access last{found.stream, static_cast<size_t>(found.stream) < found.clock.size() ? found.clock[found.stream] : 0, "", ""};
    if (!card::is_before(last, card.host)) note_wait("an event", at);
    card.host_waits(found);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    const auto at = place();
    Lock lock(the_card().mutex);
    note_wait("the device", at);
    the_card().host_waits_for_all();
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    return 1000 * (static_cast<card::Event*>(end)->at - static_cast<card::Event*>(begin)->at);
  }
};

// --- page-locked ranges of host memory.
std::map<uintptr_t, size_t> locked;
const int64_t kStagedByDriver = 64 << 10;
bool is_locked(const void* at, size_t nbytes) {
  Lock lock(the_card().mutex);
  const auto begin = reinterpret_cast<uintptr_t>(at);
  auto found = locked.upper_bound(begin);
  if (found == locked.begin()) return false;
  --found;
  return begin + nbytes <= found->first + found->second;
}

// --- aliases of the same bytes.
Tensor host_alias(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::DeviceType::CPU)),
                    c10::GetAllocator(c10::DeviceType::CPU), true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

Tensor card_empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, c10::optional<at::ScalarType> dtype = {},
                          c10::optional<at::Layout> = {}, c10::optional<at::Device> = {}, c10::optional<bool> = {}) {
  return at::detail::empty_strided_generic(size, stride, &card_allocator, kCardKeys,
                                           dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())));
}

Tensor to_card(const Tensor& host) {
  auto made = card_empty_strided(host.sizes(), host.strides(), host.scalar_type());
  if (host.numel()) host_alias(made).copy_(host);
  return made;
}

std::pair<uintptr_t, uintptr_t> range_of(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0 || tensor.storage().data() == nullptr) return {0, 0};
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.storage().data()) + tensor.storage_offset() * tensor.element_size();
  return {begin, begin + (last + 1) * tensor.element_size()};
}

// --- the fallback.
at::Generator card_generator;
const std::set<std::string> kWaits = {"aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave", "aten::_unique", "aten::_linalg_check_errors"};
const std::set<std::string> kProducts = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_unsafe_index", "aten::_unsafe_index_put"};
// Kernels that take no scalar from the CPU either.
const std::set<std::string> kNoScalars = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::embedding", "aten::index_select",
    "aten::gather", "aten::scatter", "aten::scatter_add_", "aten::_grouped_mm", "aten::linear", "aten::cat", "aten::native_layer_norm",
    "aten::_softmax", "aten::index_copy_", "aten::index_add_"};

struct Call {
  const c10::FunctionSchema& schema;
  std::vector<std::pair<Tensor, Tensor>> aliases;  // of the card's tensors
  std::vector<std::pair<Tensor, bool>> used;       // and whether each is written
  bool on_card = false;
  std::string host_argument, wait;

  Tensor alias_of(const Tensor& tensor, const c10::Argument& argument) {
    if (!tensor.defined()) return tensor;
    const auto& name = schema.name();
    if (tensor.is_cuda()) {
      on_card = true;
      used.emplace_back(tensor, argument.alias_info() != nullptr && argument.alias_info()->isWrite());
      for (auto& pair : aliases)
        if (pair.first.is_same(tensor)) return pair.second;
      aliases.emplace_back(tensor, host_alias(tensor));
      return aliases.back().second;
    }
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) return tensor;
    if (kIndexing.count(name) && argument.name() == "indices") {
      if (wait.empty()) wait = name + " with an index from the CPU";
    } else if (tensor.dim() != 0 || kNoScalars.count(name)) {
      host_argument = argument.name();
    }
    return tensor;
  }
};

c10::IValue given_to_cpu(Call& call, const c10::IValue& value, const c10::Argument& argument) {
  if (value.isTensor()) return call.alias_of(value.toTensor(), argument);
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& item : value.toTensorVector()) list.push_back(call.alias_of(item, argument));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<c10::optional<Tensor>> list;
    for (const c10::optional<Tensor>& item : value.toOptionalTensorVector()) {
      if (!item.has_value() || !item->defined()) {
        list.push_back(item);
        continue;
      }
      const bool mask = item->scalar_type() == at::kBool || item->scalar_type() == at::kByte;
      if (mask && kIndexing.count(call.schema.name())) call.wait = call.schema.name() + " with a mask";
      list.push_back(call.alias_of(*item, argument));
    }
    return list;
  }
  if (value.isDevice()) {
    call.on_card = call.on_card || value.toDevice().is_cuda();
    return value.toDevice().is_cuda() ? c10::Device(c10::DeviceType::CPU) : value.toDevice();
  }
  if (value.isNone() && argument.type()->str().find("Generator") != std::string::npos) return card_generator;
  return value;
}

void submit(const std::string& operation, const std::vector<std::pair<Tensor, bool>>& used, const std::string& at) {
  auto& card = the_card();
  raise_violations();
  // What else the stream has to do comes first.
  card.run_all(current_stream);
  const auto access = card.submit(current_stream, operation, at);
  double nbytes = 0;
  for (const auto& [tensor, writes] : used) {
    const auto [begin, end] = range_of(tensor);
    card.ranges.access(begin, end, writes, access, card.stream(current_stream).clock);
    nbytes += end - begin;
  }
  card.take_time(current_stream, "compute", card.speeds.kernel_seconds + nbytes * card.speeds.memory_seconds_a_byte);
}

Tensor result_of(const Call& call, const std::vector<c10::IValue>& given, const Tensor& result) {
  if (!result.defined()) return result;
  for (const auto& pair : call.aliases)
    if (pair.second.is_same(result)) return pair.first;
  for (const auto& item : given)
    if (item.isTensor() && item.toTensor().is_same(result)) return result;
  for (const auto& pair : call.aliases) {
    if (!result.numel() || pair.first.storage().data() != result.storage().data()) continue;
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(pair.first.storage()), kCardKeys, result.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    return view;
  }
  return to_card(result);
}

// As cuBLAS does: for each thread and stream that multiplied, once, and for good.
size_t workspace_bytes = 0;
std::map<std::pair<std::thread::id, int64_t>, c10::DataPtr> workspaces;
void take_workspace() {
  if (workspace_bytes == 0) return;
  Lock lock(the_card().mutex);
  auto& held = workspaces[{std::this_thread::get_id(), current_stream}];
  if (!held) held = card_allocator.allocate(workspace_bytes);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call call{op.schema(), {}, {}, false, "", ""};
  const auto& arguments = call.schema.arguments();
  const std::vector<c10::IValue> given(stack->end() - arguments.size(), stack->end());
  Stack inner;
  for (size_t i = 0; i < arguments.size(); ++i) inner.push_back(given_to_cpu(call, given[i], arguments[i]));
  TORCH_CHECK(!call.on_card || call.host_argument.empty(),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (argument ",
              call.host_argument, " of ", call.schema.name(), ", pretended card)");
  // A product without rows reads no weight: an empty group's slot may be on its way.
  auto is_empty = [](const auto& item) { return item.first.numel() == 0; };
  if (kProducts.count(call.schema.name()) && std::any_of(call.used.begin(), call.used.end(), is_empty)) call.used.clear();
  if (kProducts.count(call.schema.name()) && call.on_card) take_workspace();
  if (kWaits.count(call.schema.name()) && call.wait.empty()) call.wait = call.schema.name();
  const auto at = place();
  {
    Lock lock(the_card().mutex);
    submit(call.schema.name(), call.used, at);
    if (!call.wait.empty()) {
      note_wait(call.wait, at);
      the_card().host_waits_for(current_stream);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);
  for (auto& [mine, alias] : call.aliases) {
    if (alias.sizes() == mine.sizes() && alias.storage().data() == mine.storage().data()) continue;
    // It was resized in the call.
    auto fresh = to_card(alias);
    mine.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), fresh.storage_offset());
  }
  torch::jit::drop(*stack, arguments.size());
  for (auto& value : inner) {
    if (value.isTensor()) {
      stack->emplace_back(result_of(call, given, value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& item : value.toTensorVector()) list.push_back(result_of(call, given, item));
      stack->emplace_back(list);
    } else {
      stack->push_back(value);
    }
  }
}

// --- kernels of its own.
Tensor card_empty(c10::IntArrayRef size, c10::optional<at::ScalarType> dtype, c10::optional<at::Layout>, c10::optional<at::Device>,
                  c10::optional<bool>, c10::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &card_allocator, kCardKeys, dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())), format);
}
Tensor card_as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, c10::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor card_view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }
Tensor card_reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
Tensor card_unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(self, dim, size, step); }

const Tensor& card_resize(const Tensor& self, c10::IntArrayRef size, c10::optional<at::MemoryFormat>) {
  int64_t elements = 1;
  for (auto item : size) elements *= item;
  const size_t wanted = (elements + self.storage_offset()) * self.element_size();
  if (wanted > self.storage().nbytes()) {
    auto data = card_allocator.allocate(wanted);
    if (self.storage().nbytes()) std::memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(data));
    self.storage().set_nbytes(wanted);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}
Tensor& card_set(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\"");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}
Tensor& card_set_storage(Tensor& self, at::Storage source) {
  const int64_t elements = source.nbytes() / self.dtype().itemsize();
  return card_set(self, std::move(source), 0, {elements}, {1});
}
Tensor& card_set_tensor(Tensor& self, const Tensor& source) {
  return card_set(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& card_set_nothing(Tensor& self) {
  return card_set(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, card_allocator.allocate(0), &card_allocator, true), 0, {0}, {1});
}

at::Scalar card_scalar(const Tensor& self) {
  const auto at = place();
  {
    Lock lock(the_card().mutex);
    submit("item", {{self, false}}, at);
    note_wait("item", at);
    the_card().host_waits_for(current_stream);
  }
  return at::_local_scalar_dense(host_alias(self));
}

Tensor& card_copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_same(source)) return self;
  TORCH_CHECK((self.is_cuda() || self.is_cpu()) && (source.is_cuda() || source.is_cpu()), "pretended card: a copy between ",
              source.device(), " and ", self.device());
  const bool out = !self.is_cuda(), in = !source.is_cuda();
  const Tensor& host = out ? self : source;
  const bool pinned = !(in || out) || is_locked(host.data_ptr(), host.storage().nbytes() - host.storage_offset() * host.element_size());
  const bool plain = self.scalar_type() == source.scalar_type() && self.is_contiguous() && source.is_contiguous();
  // Of pageable memory the driver takes a copy of its own first, if it is small; else whoever asked stands still.
  const bool small = in && static_cast<int64_t>(source.nbytes()) <= kStagedByDriver;
  const bool asynchronous = !(in || out) || (non_blocking && (small || (pinned && (in || plain))));
  Tensor to = host_alias(self), from = host_alias(source);
  auto run = [to, from]() mutable {
    at::AutoDispatchBelowADInplaceOrView guard;
    to.copy_(from);
  };
  const auto at = place();
  auto& card = the_card();
  bool now = true;
  {
    Lock lock(card.mutex);
    raise_violations();
    const bool lazy = current_stream != 0 && asynchronous && pinned;
    if (!lazy) card.run_all(current_stream);
    const auto kind = out ? "d2h" : in ? "h2d" : "compute";
    const auto access = card.submit(current_stream, std::string("a copy (") + kind + ")", at);
    auto& clock = card.stream(current_stream).clock;
    const auto read = range_of(source), written = range_of(self);
    // Of the host's memory, only what is page-locked is read and written behind the host's back.
    if (!in || (asynchronous && pinned)) card.ranges.access(read.first, read.second, false, access, clock);
    if (!out || (asynchronous && pinned)) card.ranges.access(written.first, written.second, true, access, clock);
    const double nbytes = written.second - written.first;
    const auto& speeds = card.speeds;
    card.take_time(current_stream, kind, out ? nbytes * speeds.d2h_seconds_a_byte : in ? nbytes * speeds.h2d_seconds_a_byte
                                             : speeds.kernel_seconds + 2 * nbytes * speeds.memory_seconds_a_byte);
    if (lazy) {
      card.later(current_stream, run);
      now = false;
    } else if (!asynchronous) {
      if (out || source.numel() > 0) note_wait(out ? "a copy to the CPU" : "a copy from the CPU", at);
      card.host_waits_for(current_stream);
    }
  }
  if (now) run();
  return self;
}

std::tuple<Tensor, Tensor> card_dropout(const Tensor& input, double p, c10::optional<bool> train) {
  {
    const auto at = place();
    Lock lock(the_card().mutex);
    submit("aten::native_dropout", {{input, false}}, at);
  }
  auto host = host_alias(input);
  if (!train.value_or(true) || p == 0) return {to_card(host.clone()), to_card(at::ones(host.sizes(), at::kBool))};
  auto mask = at::empty(host.sizes(), at::kBool).bernoulli_(1 - p, card_generator);
  return {to_card(host * mask * (p == 1 ? 0.0 : 1.0 / (1.0 - p))), to_card(mask)};
}
void card_record_stream(Tensor&, at::Stream) {}
int64_t card_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const c10::optional<Tensor>&, double, bool, c10::optional<double>, bool) {
  return 0;
}
}  // namespace

// --- hooks: what torch's generic code asks about the card.
namespace at {
struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return is_locked(data, 1); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  Device getDeviceFromPtr(void*) const override { return kCard; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return card_generator; }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override { CardGuard().synchronizeDevice(0); }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)
}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, CardGuard);

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &card_empty);
  m.impl("empty_strided", &card_empty_strided);
  m.impl("as_strided", &card_as_strided);
  m.impl("view", &card_view);
  m.impl("_reshape_alias", &card_reshape_alias);
  m.impl("unfold", &card_unfold);
  m.impl("resize_", &card_resize);
  m.impl("set_.source_Storage_storage_offset", &card_set);
  m.impl("set_.source_Storage", &card_set_storage);
  m.impl("set_.source_Tensor", &card_set_tensor);
  m.impl("set_", &card_set_nothing);
  m.impl("_local_scalar_dense", &card_scalar);
  m.impl("copy_", &card_copy);
  m.impl("native_dropout", &card_dropout);
  m.impl("record_stream", &card_record_stream);
  m.impl("_fused_sdp_choice", &card_sdp_choice);
}

PYBIND11_MODULE(pretended_card, m) {
  c10::SetAllocator(c10::DeviceType::CUDA, &card_allocator);
  m.attr("total_bytes") = kTotal;
  m.def("set_generator", [](at::Generator generator) { card_generator = generator; });
  m.def("held_bytes", [] { return held; });
  m.def("peak_bytes", [] { return peak; });
  m.def("reset_peak", [] { peak = held; });
  m.def("set_workspace", [](size_t nbytes) {
    workspaces.clear();
    workspace_bytes = nbytes;
  });
  m.def("set_fraction", [](double share) { fraction = share; });
  m.def("fraction", [] { return fraction; });
  m.def("host_waits", [] { Lock lock(the_card().mutex); return host_waits; });
  m.def("violations", [] {
    Lock lock(the_card().mutex);
    return std::exchange(the_card().violations, {});
  });
  m.def("lock", [](uintptr_t address, size_t nbytes) {
    Lock lock(the_card().mutex);
    auto next = locked.lower_bound(address);
    if (next != locked.end() && next->first < address + nbytes) return 712;
    if (next != locked.begin() && std::prev(next)->first + std::prev(next)->second > address) return 712;
    locked[address] = nbytes;
    return 0;
  });
  m.def("unlock", [](uintptr_t address) {
    const auto at = place();
    auto& card = the_card();
    Lock lock(card.mutex);
    auto found = locked.find(address);
    if (found == locked.end()) return 713;
    try {
      // The host is about to give the memory to somebody else.
      card.ranges.access(address, address + found->second, true, card::Access{0, 0, "unlocking", at}, card.host);
    } catch (const card::Unordered& error) {
      card.violations.push_back(error.what());
    }
    card.host_waits_for_all();
    card.ranges.forget(address, address + found->second);
    locked.erase(found);
    return 0;
  });
  m.def("is_locked", [](uintptr_t address, size_t nbytes) { return is_locked(reinterpret_cast<void*>(address), nbytes); });
  m.def("set_speeds", [](double kernel_seconds, double memory, double h2d, double d2h, double launch_seconds) {
    Lock lock(the_card().mutex);
    auto inverse = [](double rate) { return rate > 0 ? 1 / rate : 0; };
    the_card().speeds = card::Speeds{kernel_seconds, inverse(memory), inverse(h2d), inverse(d2h), launch_seconds};
  });
  m.def("busy_seconds", [] { Lock lock(the_card().mutex); return the_card().busy; });
  m.def("host_seconds", [] { Lock lock(the_card().mutex); return the_card().host_at; });
}
