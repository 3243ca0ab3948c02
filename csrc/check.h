// What can be said about addresses, sizes and strides without dereferencing any of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "target.h"

namespace tinyclip {

// One call's arguments; everything wrong with them is a std::invalid_argument that names the
// argument, what it was, and the rule.
class Check {
 public:
  explicit Check(std::string call) : call_(std::move(call)) {}

  void require(bool holds, const std::string& sentence) const {
    if (!holds) throw std::invalid_argument(call_ + ": " + sentence);
  }

  void at_least(const std::string& name, Index value, Index low) const {
    require(value >= low,
            name + " must be at least " + std::to_string(low) + ", got " + std::to_string(value));
  }

  Index product(const std::string& name, Index a, Index b) const {
    Index result = 0;
    require(!__builtin_mul_overflow(a, b, &result), name + " is too large: " + std::to_string(a) +
                                                        " * " + std::to_string(b) +
                                                        " does not fit 64 bits");
    return result;
  }

  Index sum(const std::string& name, Index a, Index b) const {
    Index result = 0;
    require(!__builtin_add_overflow(a, b, &result), name + " is too large: " + std::to_string(a) +
                                                        " + " + std::to_string(b) +
                                                        " does not fit 64 bits");
    return result;
  }

  // `count` elements of `element` bytes from `address` on, of which the call writes if `written`.
  void range(const std::string& name, std::uintptr_t address, Index count, std::size_t element,
             bool written, std::size_t alignment = 0) {
    const auto bytes =
        static_cast<std::uintptr_t>(product(name, count, static_cast<Index>(element)));
    if (bytes == 0) return;
    alignment = alignment ? alignment : element;
    require(address != 0, name + " must not be null");
    require(address % alignment == 0, name + " must be aligned to " + std::to_string(alignment) +
                                          " bytes, got address " + std::to_string(address));
    std::uintptr_t end = 0;
    require(!__builtin_add_overflow(address, bytes, &end),
            name + " reaches past the end of memory: " + std::to_string(bytes) +
                " bytes from address " + std::to_string(address));
    for (const Range& other : ranges_)
      require(!(written || other.written) || end <= other.begin || other.end <= address,
              name + " must not overlap " + other.name + ": one of the two is written to");
    ranges_.push_back({name, address, end, written});
  }

  // Rows of `width` elements at `stride`.
  void matrix(const std::string& name, std::uintptr_t address, Index height, Index width,
              Index stride, std::size_t element, bool written) {
    require(stride >= width, name + ".stride must be at least the width " + std::to_string(width) +
                                 ", got " + std::to_string(stride));
    const bool empty = height == 0 || width == 0;
    const Index last = empty ? 0 : product(name, height - 1, stride);
    range(name, address, empty ? 0 : sum(name, last, width), element, written);
  }

 private:
  struct Range {
    std::string name;
    std::uintptr_t begin, end;
    bool written;
  };
  std::string call_;
  std::vector<Range> ranges_;
};

}  // namespace tinyclip
