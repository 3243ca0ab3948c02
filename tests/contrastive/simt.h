// A GPU's block on the host: a fiber a thread, and the instructions of cuda_isa.h executed as the
// PTX manual describes them. It is stricter than a GPU: threads run in a random order between two
// meetings, copies arrive and wgmma runs only when waited for, and shared memory begins as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "contrastive/cuda_elements.h"
#include "contrastive/cuda_layout.h"

namespace simt {

using namespace tinyclip;
using namespace tinyclip::contrastive;

[[noreturn]] inline void fail(const char* what) {
  std::printf("the emulated GPU: %s\n", what);
  std::fflush(stdout);
  std::_Exit(3);
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float decode(Bf16, const char* at) {
  std::uint16_t half;
  std::memcpy(&half, at, 2);
  return float_of(std::uint32_t{half} << 16);
}
inline float decode(Fp16, const char* at) {
  std::uint16_t half;
  std::memcpy(&half, at, 2);
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float x = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(float(mantissa), -24)
                            : std::ldexp(float(1024 + mantissa), exponent - 25);
  return half >> 15 ? -x : x;
}
template <bool Whole>
float decode(Fp32<Whole>, const char* at) {
  float x;
  std::memcpy(&x, at, 4);
  return x;
}

inline std::uint16_t encode(Bf16, float x) {
  const std::uint32_t bits = bits_of(x);
  if (std::isnan(x)) return bits >> 16 | 64;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline std::uint16_t encode(Fp16, float x) {
  const std::uint16_t sign = bits_of(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | std::uint16_t(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float mantissa = std::nearbyint(std::ldexp(std::frexp(size, &exponent), 11));
  return sign | std::uint16_t((exponent + 13) * 1024 + int(mantissa));
}

struct Copy {
  char* into;
  const char* from;
  bool real;
};

struct Product {  // one wgmma, of one warp group
  std::function<void()> run;
};

struct Thread {
  ucontext_t context;  // where it begins; from then on it goes by jumps, which ask no system call
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool begun = false;
  bool done = false;
  std::vector<std::vector<Copy>> groups{1};  // the last one is still being filled
  bool unpublished = false;
  bool fenced = false;
};

// Those who wait for each other: the last to come does what was agreed, and all go on.
struct Meeting {
  int come = 0;
  long held = 0;
};

constexpr int kStack = 128 * 1024;

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int threads, Index index, int shared_bytes, unsigned seed)
      : threads_(threads),
        warps_(threads / 32),
        groups_((threads + 127) / 128),
        queued_(groups_.size()),
        slots_(threads),
        index_(index),
        random_(seed),
        memory_(shared_bytes + 1024) {
    std::memset(memory_.data(), 0xff, memory_.size());
    shared_ = memory_.data() + (1024 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 1024);
  }

  void run(const std::function<void()>& program) {
    program_ = &program;
    current() = this;
    for (Thread& thread : threads_) {
      thread.stack.reset(new char[kStack]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
    }
    std::vector<int> left(threads_.size());
    for (std::size_t t = 0; t < left.size(); ++t) left[t] = int(t);
    std::uint32_t held_back = 0;  // warps that rest while the others go as far as they can
    while (!left.empty()) {
      std::shuffle(left.begin(), left.end(), random_);
      const long before = progress_;
      for (int t : left) {
        if (held_back >> t / 32 & 1) continue;
        now_ = t;
        resume(threads_[t]);
      }
      std::vector<int> still;
      for (int t : left)
        if (!threads_[t].done) still.push_back(t);
      if (still.size() == left.size() && progress_ == before) {
        if (!held_back) fail("every thread waits");
        held_back = 0;
      } else if (random_() % 16 == 0) {
        held_back = random_() & random_();
      }
      left = still;
    }
    for (const Thread& thread : threads_)
      for (const auto& group : thread.groups)
        if (!group.empty()) fail("a copy was never waited for");
    for (const auto& queue : queued_)
      if (!queue.empty()) fail("a wgmma was never waited for");
  }

  int thread() const { return now_; }
  Index index() const { return index_; }
  char* shared() const { return shared_; }
  Thread& self() { return threads_[now_]; }
  std::vector<Thread>& threads() { return threads_; }
  std::vector<Product>& queue() { return queued_[now_ / 128]; }
  void* payload(int thread) const { return slots_[thread]; }

  void meet(Meeting& meeting, int members, void* payload, const std::function<void()>& last) {
    slots_[now_] = payload;
    const long held = meeting.held;
    if (++meeting.come == members) {
      last();
      meeting.come = 0;
      ++meeting.held;
      ++progress_;
    }
    while (meeting.held == held) yield();
  }
  void all(const std::function<void()>& last = [] {}) {
    meet(block_, int(threads_.size()), nullptr, last);
  }
  void warp(void* payload, const std::function<void(int first)>& last) {
    const int first = now_ / 32 * 32;
    meet(warps_[now_ / 32], 32, payload, [&] { last(first); });
  }
  void group(void* payload, const std::function<void(int first)>& last) {
    const int first = now_ / 128 * 128;
    meet(groups_[now_ / 128], 128, payload, [&] { last(first); });
  }

 private:
  static void enter() {
    Block* block = current();
    (*block->program_)();
    block->self().done = true;
    _longjmp(block->scheduler_, 1);
  }
  void resume(Thread& thread) {
    if (_setjmp(scheduler_)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
  }
  void yield() {
    if (!_setjmp(self().place)) _longjmp(scheduler_, 1);
  }

  std::vector<Thread> threads_;
  std::vector<Meeting> warps_, groups_;
  Meeting block_;
  std::vector<std::vector<Product>> queued_;
  std::vector<void*> slots_;
  Index index_;
  std::mt19937 random_;
  std::vector<char> memory_;
  char* shared_ = nullptr;
  const std::function<void()>* program_ = nullptr;
  jmp_buf scheduler_;
  int now_ = 0;
  long progress_ = 0;
};

// The Machine of cuda_tile.h.
struct Host {
  static Block& block_now() { return *Block::current(); }
  static int thread() { return block_now().thread(); }
  static Index block() { return block_now().index(); }
  static void sync() { block_now().all(); }

  static float times(float x, float y) { return x * y; }

  struct Exp {
    float operator()(float x) const { return std::exp(x); }
  };
  struct Expm1 {
    float operator()(float x) const { return std::expm1(x); }
  };

  static float shuffle_xor(float value, int mask) {
    struct Lane {
      float given, taken;
    } lane{value, 0};
    Block& block = block_now();
    block.warp(&lane, [&](int first) {
      for (int l = 0; l < 32; ++l)
        static_cast<Lane*>(block.payload(first + l))->taken =
            static_cast<Lane*>(block.payload(first + (l ^ mask)))->given;
    });
    return lane.taken;
  }

  static std::uint32_t shared_address(const void* at) {
    return std::uint32_t(static_cast<const char*>(at) - block_now().shared());
  }

  static void copy16(char* into, const char* from, bool real) {
    if (reinterpret_cast<std::uintptr_t>(into) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
      fail("a copy of 16 bytes is not aligned");
    block_now().self().groups.back().push_back({into, from, real});
  }
  static void copies_commit() { block_now().self().groups.emplace_back(); }
  static void copies_wait() {
    Thread& self = block_now().self();
    while (self.groups.size() - 1 > std::size_t(kStages - 2)) {
      for (const Copy& copy : self.groups.front()) {
        if (copy.real) {
          std::memcpy(copy.into, copy.from, 16);
        } else {
          std::memset(copy.into, 0, 16);
        }
        self.unpublished = true;
      }
      self.groups.erase(self.groups.begin());
    }
  }
  static void publish() { block_now().self().unpublished = false; }
  static void move16(char* into, const char* from) {
    if (reinterpret_cast<std::uintptr_t>(into) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
      fail("a move of 16 bytes is not aligned");
    std::memcpy(into, from, 16);
  }

  static void load_matrices(std::uint32_t (&into)[4], const char* from) {
    struct Lane {
      std::uint32_t* into;
      const char* from;
    } lane{into, from};
    Block& block = block_now();
    block.warp(&lane, [&](int first) {
      for (int l = 0; l < 32; ++l)
        for (int n = 0; n < 4; ++n) {
          const Lane* row = static_cast<Lane*>(block.payload(first + 8 * n + l / 4));
          std::memcpy(static_cast<Lane*>(block.payload(first + l))->into + n, row->from + l % 4 * 4,
                      4);
        }
    });
  }

  // D += A B of 16 x 8, 32 bytes deep, in the registers that the PTX manual gives each lane.
  template <class Element>
  static void fragments(Element element, float (&sums)[4], const std::uint32_t* a,
                        const std::uint32_t* b) {
    struct Lane {
      float* sums;
      const std::uint32_t *a, *b;
    } lane{sums, a, b};
    Block& block = block_now();
    block.warp(&lane, [&](int first) {
      const auto at = [&](int l) { return static_cast<Lane*>(block.payload(first + l)); };
      float of_a[16][16], of_b[8][16];
      constexpr int kBytes = Element::kBytes, kPer = 4 / kBytes;
      for (int l = 0; l < 32; ++l)
        for (int n = 0; n < 4; ++n)
          for (int p = 0; p < kPer; ++p) {
            const int k = (l % 4 + 4 * (n / 2)) * kPer + p;
            const auto* bytes = reinterpret_cast<const char*>(at(l)->a + n);
            of_a[l / 4 + 8 * (n % 2)][k] = decode(element, bytes + p * kBytes);
            if (n > 1) continue;
            const int k_b = (l % 4 + 4 * n) * kPer + p;
            bytes = reinterpret_cast<const char*>(at(l)->b + n);
            of_b[l / 4][k_b] = decode(element, bytes + p * kBytes);
          }
      for (int l = 0; l < 32; ++l)
        for (int n = 0; n < 4; ++n) {
          double sum = at(l)->sums[n];
          for (int k = 0; k < 32 / kBytes; ++k)
            sum += double(of_a[l / 4 + 8 * (n / 2)][k]) * of_b[l % 4 * 2 + n % 2][k];
          at(l)->sums[n] = float(sum);
        }
    });
  }
  template <class Element>
  static void mma(Element element, float (&sums)[4], const std::uint32_t* a,
                  const std::uint32_t* b) {
    fragments(element, sums, a, b);
  }
  template <bool Whole>
  static void mma(Fp32<Whole>, float (&sums)[4], const std::uint32_t* a, const std::uint32_t* b) {
    mma_fp32<Host, Whole>(sums, a, b);
  }
  static void mma_tf32(float (&sums)[4], const std::uint32_t* a, const std::uint32_t* b) {
    for (int n = 0; n < 4; ++n)
      if ((a[n] & 0x1fff) || (n < 2 && (b[n] & 0x1fff))) fail("an operand is not TF32");
    fragments(Fp32<true>(), sums, a, b);
  }
  static std::uint32_t tf32(std::uint32_t x) { return (x + 0x1000) & ~0x1fffu; }
  static std::uint32_t less(std::uint32_t x, std::uint32_t y) {
    return bits_of(float_of(x) - float_of(y));
  }

  template <class Element>
  static void store_pair(Element element, char* into, float x, float y) {
    const std::uint16_t both[2] = {encode(element, x), encode(element, y)};
    std::memcpy(into, both, 4);
  }
  template <bool Whole>
  static void store_pair(Fp32<Whole>, char* into, float x, float y) {
    const float both[2] = {x, y};
    std::memcpy(into, both, 8);
  }

  static void wgmma_fence() { block_now().self().fenced = true; }
  static void wgmma_commit() {}

  // An element of an operand, 128-byte swizzle: bits 4 to 6 of its address, and bits 7 to 9.
  template <class Element>
  static float element(Element element, std::uint64_t descriptor, int row, int k) {
    if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
    const std::uint32_t start = (descriptor & 0x3fff) << 4;
    const std::uint32_t apart = (descriptor >> 32 & 0x3fff) << 4;
    std::uint32_t at = start + row / 8 * apart + row % 8 * 128 + k * Element::kBytes;
    at ^= (at >> 7 & 7) << 4;
    return decode(element, block_now().shared() + at);
  }

  template <int Columns, class Element>
  static void wgmma(Element kind, float* d, std::uint64_t a, std::uint64_t b) {
    struct Lane {
      float* d;
      std::uint64_t a, b;
    } lane{d, a, b};
    Block& block = block_now();
    block.group(&lane, [&](int first) {
      std::vector<Lane> lanes;
      for (int l = 0; l < 128; ++l) {
        lanes.push_back(*static_cast<Lane*>(block.payload(first + l)));
        if (lanes[l].a != a || lanes[l].b != b) fail("a warp group does not agree on operands");
        if (!block.threads()[first + l].fenced) fail("wgmma without a fence before it");
      }
      block.queue().push_back({[=] {
        for (const Thread& thread : block_now().threads())
          if (thread.unpublished) fail("wgmma reads what was not published");
        for (int l = 0; l < 128; ++l)
          for (int n = 0; n < Columns / 2; ++n) {
            const int row = l / 32 * 16 + l % 32 / 4 + n / 2 % 2 * 8;
            const int column = n / 4 * 8 + l % 4 * 2 + n % 2;
            double sum = lanes[l].d[n];
            for (int k = 0; k < 32 / Element::kBytes; ++k)
              sum += double(element(kind, a, row, k)) * element(kind, b, column, k);
            lanes[l].d[n] = float(sum);
          }
      }});
    });
  }
  static void wgmma_wait() {
    Block& block = block_now();
    block.group(nullptr, [&](int first) {
      for (const Product& product : block.queue()) product.run();
      block.queue().clear();
      for (int l = 0; l < 128; ++l) block.threads()[first + l].fenced = false;
    });
  }
};

// Blocks 0 to count - 1, one after another.
inline void launch(Index count, int threads, int shared_bytes, unsigned seed,
                   const std::function<void(char* shared)>& program) {
  for (Index index = 0; index < count; ++index) {
    Block block(threads, index, shared_bytes, seed + unsigned(index));
    block.run([&] { program(block.shared()); });
  }
}

}  // namespace simt
