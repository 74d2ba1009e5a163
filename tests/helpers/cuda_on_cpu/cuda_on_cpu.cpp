// The fibres and their scheduler; cuda_runtime.h says what they promise.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

int lane;
unsigned char* shared = nullptr;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 4 << 10;
constexpr size_t kMaxShared = 163 << 10;  // of a block, on sm_80
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format
constexpr unsigned char kUntouched = 0xa5;

std::string failure;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Fibre {
  dim3 index;
  int lane;
  enum State { kReady, kAtBarrier, kAtExchange, kEnded } state;
  ucontext_t start;
  jmp_buf resume;
  bool started;
  const char* operation;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is not yet committed
};

// What the lanes of a warp hand over: two buffers, because a lane may be one operation ahead of those that still read.
struct Warp {
  alignas(16) unsigned char buffers[2][kWarp * kExchanged];
  int arrived, turn[kWarp];
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> stacks;
  const std::function<void()>* kernel;
  jmp_buf scheduler;
  uint32_t random;
};
Block* current = nullptr;
Fibre* running = nullptr;

uint32_t draw(uint32_t below) {
  uint32_t& x = current->random;  // xorshift32
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return x % below;
}

// A fibre is entered once by its ucontext and from then on by longjmp, which does not ask the kernel for anything.
void wait(Fibre::State state) {
  Fibre& fibre = *running;
  fibre.state = state;
  if (!_setjmp(fibre.resume)) _longjmp(current->scheduler, 1);
}

[[noreturn]] void fail(const std::string& reason) {
  failure = reason;
  _longjmp(current->scheduler, 2);
}

void entry() {
  (*current->kernel)();
  running->state = Fibre::kEnded;
  _longjmp(current->scheduler, 1);
}

// Runs one fibre until it waits or ends. False: the launch has failed.
bool step(Fibre& fibre) {
  running = &fibre;
  threadIdx = fibre.index;
  lane = fibre.lane;
  switch (_setjmp(current->scheduler)) {
    case 0:
      if (fibre.started) _longjmp(fibre.resume, 1);
      fibre.started = true;
      setcontext(&fibre.start);
      return false;
    case 1:
      return true;
    default:
      return false;
  }
}

bool release_barrier(std::vector<Fibre>& fibres) {
  int waiting = 0, ended = 0;
  for (const Fibre& fibre : fibres) {
    waiting += fibre.state == Fibre::kAtBarrier;
    ended += fibre.state == Fibre::kEnded;
  }
  if (waiting == 0) return ended == (int)fibres.size();
  if (waiting != (int)fibres.size()) {
    failure = std::to_string(waiting) + " of " + std::to_string(fibres.size()) +
              " threads wait at __syncthreads and the others never come: " + std::to_string(ended) + " have ended";
    return false;
  }
  for (Fibre& fibre : fibres) fibre.state = Fibre::kReady;
  return true;
}

// One block from its start to its end. False: `failure` says why not.
bool run_block(Block& b) {
  const int count = (int)b.fibres.size();
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  while (true) {
    bool progress = true;
    while (progress) {
      progress = false;
      for (int i = count - 1; i > 0; --i) std::swap(order[i], order[draw(i + 1)]);
      for (int i : order) {
        if (b.fibres[i].state != Fibre::kReady) continue;
        if (!step(b.fibres[i])) return false;
        progress = true;
      }
    }
    for (const Fibre& fibre : b.fibres) {
      if (fibre.state != Fibre::kAtExchange) continue;
      failure = std::string("lanes wait at ") + fibre.operation + " for others of their warp, which never come";
      return false;
    }
    if (!release_barrier(b.fibres)) return false;
    if (b.fibres[0].state == Fibre::kEnded) return true;
  }
}

bool guards_untouched(const unsigned char* memory, size_t bytes) {
  for (size_t i = 0; i < kGuard; ++i) {
    if (memory[i] != kUntouched || memory[kGuard + bytes + i] != kUntouched) return false;
  }
  return true;
}

}  // namespace

void barrier() { wait(Fibre::kAtBarrier); }

void check_full(unsigned mask) {
  if (mask != ~0u) fail("only operations of whole warps are known here: mask 0xffffffff");
}

const unsigned char* exchange(const char* operation, const void* mine, size_t bytes) {
  Fibre& fibre = *running;
  const int index = int(&fibre - current->fibres.data());
  Warp& warp = current->warps[index / kWarp];
  unsigned char* buffer = warp.buffers[warp.turn[fibre.lane] ^= 1];
  if (bytes) memcpy(buffer + fibre.lane * kExchanged, mine, bytes);
  fibre.operation = operation;
  if (++warp.arrived < kWarp) {
    wait(Fibre::kAtExchange);
    return buffer;
  }
  warp.arrived = 0;
  Fibre* lanes = &current->fibres[index / kWarp * kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (strcmp(lanes[lane].operation, operation)) {
      fail(std::string("lanes of one warp wait at ") + operation + " and " + lanes[lane].operation);
    }
    lanes[lane].state = Fibre::kReady;
  }
  return buffer;
}

void start_copy(void* to, const void* from, size_t bytes, size_t valid) {
  running->copies.back().push_back({to, from, bytes, valid});
}

void commit_copies() { running->copies.emplace_back(); }

void wait_for_copies(int groups_left) {
  auto& groups = running->copies;
  while ((int)groups.size() - 1 > groups_left) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, copy.valid);
      memset((char*)copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
    groups.erase(groups.begin());
  }
}

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned threads = block.x * block.y * block.z;
  failure.clear();
  if (threads == 0 || threads > 1024 || threads % kWarp || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxShared) {
    failure = "a launch that a GPU refuses, or a block that is not of whole warps";
    return cudaErrorLaunchFailure;
  }
  gridDim = grid;
  blockDim = block;
  Block b;
  b.fibres.resize(threads);
  b.warps.resize(threads / kWarp);
  b.kernel = &kernel;
  b.random = 2463534242u;
  for (unsigned i = 0; i < threads; ++i) b.stacks.emplace_back(new char[kStack]);
  std::vector<unsigned char> storage(shared_bytes + 2 * kGuard + 128);
  unsigned char* memory = storage.data() + (128 - (uintptr_t)storage.data() % 128) % 128;
  shared = memory + kGuard;
  current = &b;

  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / ((uint64_t)grid.x * grid.y));
    memset(memory, kUntouched, shared_bytes + 2 * kGuard);
    memset(shared, kPoison, shared_bytes);
    for (Warp& warp : b.warps) warp = Warp();
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = b.fibres[t];
      fibre.index = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
      fibre.lane = t % kWarp;
      fibre.state = Fibre::kReady;
      fibre.started = false;
      fibre.operation = "";
      fibre.copies.assign(1, {});
      getcontext(&fibre.start);
      fibre.start.uc_stack.ss_sp = b.stacks[t].get();
      fibre.start.uc_stack.ss_size = kStack;
      fibre.start.uc_link = nullptr;
      makecontext(&fibre.start, entry, 0);
    }
    if (!run_block(b)) return cudaErrorLaunchFailure;
    if (!guards_untouched(memory, shared_bytes)) {
      failure = "a thread wrote past the ends of shared memory";
      return cudaErrorLaunchFailure;
    }
    for (const Fibre& fibre : b.fibres) {
      if (fibre.copies.size() > 1 || !fibre.copies[0].empty()) {
        failure = "a thread ended before its asynchronous copies were waited for";
        return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

const char* last_failure() { return failure.c_str(); }

}  // namespace cuda_on_cpu
