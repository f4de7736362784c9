// The part of the recorder that collectives on the CPU pass, without Python: for a caller in C++, such as the reducer of
// DistributedDataParallel, the interpreter is cold, and a hook in Python costs a tenth of a millisecond there.
//
// A kernel at the `ADInplaceOrView` key of the c10d operators, above the recorder's kernels in Python at `BackendSelect`
// (faulttol/compat.py). What it knows it writes into the ring itself and passes on below them; all else goes the way
// through Python, which tells it (`faulttol_know`) what it needs to know the next time. The work's future tells the end,
// in the backend's thread, as it happens. Nothing here raises into training, and nothing waits for Python's lock.
//
// Records are those of faulttol/ring.py. Plain C functions, called by faulttol/compiled.py.

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/library.h>

extern "C" {

// Where in the file of a ring is what (ring.py); sizes are compared with those of the records here.
struct Layout {
  uint64_t first;         // offset of the first record
  uint64_t capacity;      // records
  uint64_t record_bytes;
  uint64_t begin_bytes;   // of them, of the part that is written first
  uint64_t begun_counter; // offset
};

// One operator: places in its arguments, -1 where it has none (operations.py).
struct Operation {
  const char* name;
  int32_t kind;
  int32_t tensors;
  int32_t group;
  int32_t peer;
  int32_t device;
};
}

namespace {

#pragma pack(push, 1)
struct Begun {
  uint64_t index, when, bytes;
  uint32_t seq;
  int32_t step, peer;
  uint16_t group, phase, dtype;
  uint8_t kind, flags;
};
struct Ended {
  uint64_t when, device;
  uint8_t state, flags;
};
struct Marked {
  double loss, gradient_norm;
  uint8_t state, has;
};
struct Record {
  Begun begun;
  uint32_t begun_seal;
  Ended ended;
  uint32_t ended_seal;
};
#pragma pack(pop)
static_assert(sizeof(Ended) == sizeof(Marked), "both ends have the same place");

constexpr uint8_t kEnded = 1, kFailed = 2, kLate = 1;
constexpr int kNoDtype = -1;
constexpr int32_t kNoPeer = -1;

uint64_t now_ns() {
  timespec at{};
  clock_gettime(CLOCK_MONOTONIC, &at);
  return static_cast<uint64_t>(at.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(at.tv_nsec);
}

// zlib's crc32, four bits at a time: its table is one line of the cache, which a cold caller has to fetch.
uint32_t crc32(const void* data, size_t size, uint32_t start = 0) {
  static constexpr uint32_t kTable[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                          0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                          0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
  uint32_t crc = ~start;
  for (auto* byte = static_cast<const uint8_t*>(data); size--; ++byte) {
    crc ^= *byte;
    crc = (crc >> 4) ^ kTable[crc & 15];
    crc = (crc >> 4) ^ kTable[crc & 15];
  }
  return ~crc;
}

// The mapped file; as long as an operation may still end in it.
class Ring {
 public:
  Ring(const char* path, const Layout& layout) : layout_(layout) {
    const int file = open(path, O_RDWR | O_CLOEXEC);
    struct stat info {};
    if (file >= 0 && fstat(file, &info) == 0) {
      size_ = static_cast<size_t>(info.st_size);
      void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      map_ = mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
    }
    error_ = errno;
    if (file >= 0) close(file);
  }
  Ring(const Ring&) = delete;
  ~Ring() {
    if (map_) munmap(map_, size_);
  }

  int error() const { return map_ ? 0 : error_; }

  // Takes the next record; it is empty until it is written.
  uint64_t claim() { return counter().fetch_add(1, std::memory_order_relaxed) + 1; }

  void begin(const Begun& begun) {
    Record record{begun, crc32(&begun, sizeof begun), {}, 0};
    std::memcpy(at(begun.index), &record, sizeof record);
  }

  template <typename End>
  void end(uint64_t index, const End& ended) {
    if (counter().load(std::memory_order_relaxed) - index >= layout_.capacity) return;  // overwritten since
    const uint32_t seal = crc32(&ended, sizeof ended, static_cast<uint32_t>(index));
    char* place = at(index) + layout_.begin_bytes;
    std::memcpy(place, &ended, sizeof ended);
    std::memcpy(place + sizeof ended, &seal, sizeof seal);
  }

 private:
  char* at(uint64_t index) { return map_ + layout_.first + (index - 1) % layout_.capacity * layout_.record_bytes; }
  std::atomic<uint64_t>& counter() { return *reinterpret_cast<std::atomic<uint64_t>*>(map_ + layout_.begun_counter); }

  Layout layout_;
  char* map_ = nullptr;
  size_t size_ = 0;
  int error_ = 0;
};

using Counter = std::atomic<uint64_t>;

// What Python told of a group and a dtype.
struct Known {
  uint16_t group, dtype;
  Counter* collectives;
  std::shared_ptr<const std::vector<int64_t>> ranks;
};

using Key = std::pair<c10d::ProcessGroup*, int>;

// What a call in this thread looked for and did not find: what Python tells next is about it.
thread_local Key missed{nullptr, kNoDtype};

struct ForgetsMissed {
  ~ForgetsMissed() { missed = {nullptr, kNoDtype}; }
};

struct Recorder {
  Recorder(const char* path, const Layout& layout, uint64_t number) : ring(path, layout), number(number) {}

  bool find(const Key& key, Known& found) {
    const std::lock_guard<std::mutex> held(lock);
    const auto place = known.find(key);
    if (place == known.end()) return false;
    found = place->second;
    return true;
  }

  void end(uint64_t index, bool failed, bool late) {
    ring.end(index, Ended{now_ns(), 0, failed ? kFailed : kEnded, static_cast<uint8_t>(late ? kLate : 0)});
    num_open.fetch_sub(1, std::memory_order_relaxed);
  }

  Ring ring;
  const uint64_t number;
  std::atomic<bool> is_on{true};
  std::atomic<int64_t> where{0};  // step << 16 | phase
  std::atomic<int64_t> num_open{0};
  std::mutex lock;
  std::map<Key, Known> known;
  std::map<c10d::ProcessGroup*, Counter*> counters;
  std::unique_ptr<torch::Library> library;
};

std::mutex current_lock;  // of these two
std::shared_ptr<Recorder> current;
uint64_t num_recorders = 0;

std::shared_ptr<Recorder> in_use() {
  const std::lock_guard<std::mutex> held(current_lock);
  return current;
}

// The recorder of a number that Python has: null once it is closed, for other threads may come later.
std::shared_ptr<Recorder> numbered(uint64_t number) {
  auto recorder = in_use();
  if (recorder && recorder->number != number) recorder.reset();
  return recorder;
}

void replace_current(std::shared_ptr<Recorder> recorder) {
  const std::lock_guard<std::mutex> held(current_lock);
  current.swap(recorder);
}

void lock_all() {
  current_lock.lock();
  if (current) current->lock.lock();
}

void unlock_all() {
  if (current) current->lock.unlock();
  current_lock.unlock();
}

// The first tensor of an argument and the bytes of all; false for what Python has to look at.
bool measure(const c10::IValue& value, at::Tensor& first, uint64_t& bytes) {
  const auto add = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu() || tensor.layout() != at::kStrided) return false;
    if (!first.defined()) first = tensor;
    bytes += tensor.nbytes();
    return true;
  };
  if (value.isTensor()) return add(value.toTensor());
  if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorList()) {
      if (!add(tensor)) return false;
    }
    return first.defined();
  }
  if (!value.isList()) return false;
  for (const c10::IValue& inner : value.toListRef()) {
    if (!inner.isTensorList()) return false;
    for (const at::Tensor& tensor : inner.toTensorList()) {
      if (!add(tensor)) return false;
    }
  }
  return first.defined();
}

class Kernel : public c10::OperatorKernel {
 public:
  explicit Kernel(const Operation& operation) : operation_(operation) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto recorder = in_use();
    const auto below = (keys & c10::after_ADInplaceOrView_keyset).remove(c10::DispatchKey::BackendSelect);
    const ForgetsMissed at_the_end;
    Begun begun{};
    // A mode of Python's or a transform between here and the backend may keep the call from communicating.
    const bool is_plain = below.highestFunctionalityKey() == c10::DispatchKey::Dense;
    if (!recorder || !recorder->is_on || !is_plain || !describe(*recorder, op, *stack, begun)) {
      op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
      return;
    }
    begun.index = recorder->ring.claim();
    begun.when = now_ns();
    recorder->num_open.fetch_add(1, std::memory_order_relaxed);
    recorder->ring.begin(begun);
    try {
      op.redispatchBoxed(below, stack);
    } catch (...) {
      recorder->end(begun.index, true, false);
      throw;
    }
    follow(recorder, begun.index, *stack);
  }

 private:
  // Fills in what is recorded of a call; false, and `missed`, where Python did not tell yet.
  bool describe(Recorder& recorder, const c10::OperatorHandle& op, const torch::jit::Stack& stack, Begun& begun) const {
    const size_t base = stack.size() - op.schema().arguments().size();
    at::Tensor first;
    uint64_t bytes = 0;
    const int32_t place = operation_.tensors >= 0 ? operation_.tensors : operation_.device;
    if (place < 0 || !measure(stack[base + place], first, bytes)) return false;
    const auto group = stack[base + operation_.group].toCustomClass<c10d::ProcessGroup>();
    const bool counts = operation_.tensors >= 0;
    const Key key{group.get(), counts ? static_cast<int>(first.scalar_type()) : kNoDtype};
    Known known{};
    if (!recorder.find(key, known)) {
      missed = key;
      return false;
    }
    const int64_t where = recorder.where.load(std::memory_order_relaxed);
    begun.bytes = counts ? bytes : 0;
    begun.seq = static_cast<uint32_t>(known.collectives->fetch_add(1, std::memory_order_relaxed) + 1);
    begun.step = static_cast<int32_t>(where >> 16);
    begun.phase = static_cast<uint16_t>(where & 0xFFFF);
    begun.peer = kNoPeer;
    if (operation_.peer >= 0) {
      const int64_t local = stack[base + operation_.peer].toInt();
      const bool is_rank = local >= 0 && static_cast<size_t>(local) < known.ranks->size();
      begun.peer = static_cast<int32_t>(is_rank ? (*known.ranks)[local] : local);
    }
    begun.group = known.group;
    begun.dtype = known.dtype;
    begun.kind = static_cast<uint8_t>(operation_.kind);
    return true;
  }

  // Lets the work's future write the end; late, and at once, where there is none.
  static void follow(const std::shared_ptr<Recorder>& recorder, uint64_t index, const torch::jit::Stack& stack) {
    try {
      c10::intrusive_ptr<c10d::Work> work;
      if (!stack.empty() && stack.back().isCustomClass()) work = stack.back().toCustomClass<c10d::Work>();
      if (work) {
        work->getFuture()->addCallback(
            [recorder, index](c10::ivalue::Future& future) { recorder->end(index, future.hasError(), false); });
        return;
      }
    } catch (const std::exception&) {  // such a work has no future
    }
    recorder->end(index, false, true);
  }

  const Operation operation_;
};

// Made once and kept: a thread may still be in one when the recorder is taken out.
std::map<std::string, c10::BoxedKernel>& kernels() {
  static auto* made = new std::map<std::string, c10::BoxedKernel>();
  return *made;
}

thread_local std::string last_error;

}  // namespace

extern "C" {

const char* faulttol_error() { return last_error.c_str(); }

// Maps a ring and puts the kernels into torch; returns the recorder's number, or 0 on failure, which faulttol_error then
// tells. There is one at a time.
uint64_t faulttol_open(const char* path, const Layout* layout, const Operation* operations, int num_operations) {
  // A child that is forked while another thread holds a lock finds it free.
  static const int forks = pthread_atfork(lock_all, unlock_all, unlock_all);
  if (forks != 0 || layout->record_bytes != sizeof(Record) ||
      layout->begin_bytes != sizeof(Begun) + sizeof(uint32_t)) {
    last_error = forks ? std::strerror(forks) : "records are of another size there";
    return 0;
  }
  try {
    auto recorder = std::make_shared<Recorder>(path, *layout, ++num_recorders);
    if (recorder->ring.error()) {
      last_error = std::string(path) + ": " + std::strerror(recorder->ring.error());
      return 0;
    }
    replace_current(recorder);
    recorder->library = std::make_unique<torch::Library>(
        torch::Library::IMPL, "c10d", c10::DispatchKey::ADInplaceOrView, __FILE__, __LINE__);
    for (int place = 0; place < num_operations; ++place) {
      const std::string name = operations[place].name;
      auto found = kernels().find(name);
      if (found == kernels().end()) {
        auto kernel = c10::BoxedKernel::makeFromFunctor(std::make_unique<Kernel>(operations[place]));
        found = kernels().emplace(name, std::move(kernel)).first;
      }
      recorder->library->impl(name.c_str(), torch::CppFunction::makeFromBoxedKernel(found->second));
    }
    return recorder->number;
  } catch (const std::exception& error) {
    last_error = error.what();
    replace_current(nullptr);
    return 0;
  }
}

// Takes the kernels out of torch; what goes on still writes its end.
void faulttol_close(uint64_t number) {
  if (const auto recorder = numbered(number)) {
    recorder->is_on = false;
    recorder->library.reset();
    replace_current(nullptr);
  }
}

// Records nothing any more, and takes nothing back.
void faulttol_switch_off(uint64_t number) {
  if (const auto recorder = numbered(number)) recorder->is_on = false;
}

// Says where what begins from now on is, without a mark.
void faulttol_place(uint64_t number, int step, int phase) {
  const int64_t where = (static_cast<int64_t>(step) << 16) | (phase & 0xFFFF);
  if (const auto recorder = numbered(number)) recorder->where.store(where, std::memory_order_relaxed);
}

// Takes the next record of the ring for a writer in Python; 0 once it is closed.
uint64_t faulttol_claim(uint64_t number) {
  const auto recorder = numbered(number);
  return recorder ? recorder->ring.claim() : 0;
}

// Tells of the group and the dtype that the call in this thread was about, if it came past a kernel here and was not
// known; returns the counter of the group's collectives, which starts at `num_collectives`, or null. Counters are kept
// for ever: a thread of Python's may still count.
void* faulttol_know(
    uint64_t number, int group, int dtype, uint64_t num_collectives, const int64_t* ranks, int num_ranks) {
  const auto recorder = numbered(number);
  if (!recorder || !missed.first) return nullptr;
  const std::lock_guard<std::mutex> held(recorder->lock);
  Counter*& counter = recorder->counters[missed.first];
  if (!counter) counter = new Counter(num_collectives);
  auto copied = std::make_shared<const std::vector<int64_t>>(ranks, ranks + num_ranks);
  recorder->known[missed] = {static_cast<uint16_t>(group), static_cast<uint16_t>(dtype), counter, std::move(copied)};
  return counter;
}

// Forgets the group that has this counter: it is gone, and another may have its address.
void faulttol_forget(uint64_t number, void* counter) {
  const auto recorder = numbered(number);
  if (!recorder) return;
  const std::lock_guard<std::mutex> held(recorder->lock);
  std::erase_if(recorder->known, [&](const auto& entry) { return entry.second.collectives == counter; });
  std::erase_if(recorder->counters, [&](const auto& entry) { return entry.second == counter; });
}

// Counts one more collective of a group.
uint64_t faulttol_count(void* counter) {
  return static_cast<Counter*>(counter)->fetch_add(1, std::memory_order_relaxed) + 1;
}

// How many operations that began here go on.
int64_t faulttol_num_open(uint64_t number) {
  const auto recorder = numbered(number);
  return recorder ? recorder->num_open.load() : 0;
}

// Writes a mark of the loop, and says where what begins from now on is.
void faulttol_mark(
    uint64_t number, int kind, int step, int phase, uint64_t tokens, double loss, double gradient_norm, int has) {
  const auto recorder = numbered(number);
  if (!recorder) return;
  faulttol_place(number, step, phase);
  Begun begun{};
  begun.index = recorder->ring.claim();
  begun.when = now_ns();
  begun.bytes = tokens;
  begun.step = step;
  begun.peer = kNoPeer;
  begun.phase = static_cast<uint16_t>(phase);
  begun.kind = static_cast<uint8_t>(kind);
  recorder->ring.begin(begun);
  recorder->ring.end(begun.index, Marked{loss, gradient_norm, kEnded, static_cast<uint8_t>(has)});
}
}
