// Class-major tiles: class c of pixel i is at z[c * z_stride + i], so a vector holds neighboring pixels.
//
// A tile is one block of pixels, eight vectors wide: 512 bytes of each class row with AVX-512. So much of a row keeps
// the hardware's prefetchers and the page table cache content also for 150 class rows; the second visit to the tile
// then finds it in the L1 or L2 cache (docs/performance.md has the widths that were tried).
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cross_entropy.h"
#include "math/cross_entropy.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

template <class A>
constexpr int kBlock = 8 * kLanes<A>;

// From class to class in a tile of our own: one vector more than a block, so that its rows do not fall into the same
// few cache sets.
template <class A>
constexpr int kTileStride = kBlock<A> + kLanes<A>;

// What all pixels share.
template <class A>
struct Classes {
  int count;        // C
  const A* weight;  // (C,), or nullptr for ones
  math::Smoothing<A> smoothing;

  FUSEDLOSS_HOST_DEVICE A weight_of(int64_t c) const { return weight == nullptr ? A(1) : weight[c]; }
};

// Where the logits of a later block lie. A visit asks for as many of them as it reads itself, a vector at a time.
// Of class-strided logits a block has half a kilobyte of a class and then goes on to the next class, a megabyte away:
// too short a run for the hardware's prefetcher. Of class-innermost ones the classes say only when, not where.
template <class T>
struct Ahead {
  const T* logits;
  int64_t stride;  // from class to class

  // z: the logits of this block, `count` pixels.
  FUSEDLOSS_HOST_DEVICE Ahead(const T* z, const LogitLayout& layout, int count)
      : logits(z + kBlocksAhead * count * layout.pixel_stride),
        stride(layout.pixel_stride == 1 ? layout.class_stride : count) {}

  FUSEDLOSS_HOST_DEVICE void ask(int64_t c, int i) const { ask_for(logits + c * stride + i); }
};

// Rows of a block's gradient on their way past the caches. A core has few buffers for what it streams, and waits where
// they are full, so a block's rows go while the exponentials of the next block are computed, a vector of them with each
// vector of pixels and class.
template <class T>
struct Outgoing {
  const T* rows = nullptr;  // (count, C), side by side; nullptr: nothing
  T* to = nullptr;          // aligned to kVectorBytes
  int count = 0;            // a multiple of kStep
  int classes = 0;

  static constexpr int kStep = kVectorBytes / static_cast<int>(sizeof(T));  // one vector of pixels, or two

  // With class c of kVectors vectors of pixels from i on: that part of C times `count` numbers, whatever they mean.
  template <int kVectors>
  FUSEDLOSS_HOST_DEVICE void send(int64_t c, int i) const {
    constexpr int numbers = kVectors * kLanes<ComputeType<T>>;
    if (rows == nullptr || (numbers < kStep && i % kStep != 0)) return;
    const int64_t at = c * count + i;
#pragma GCC unroll 8
    for (int k = 0; k < numbers; k += kStep) {
      store_bits<true>(to + at + k, *reinterpret_cast<const VectorOf<uint32_t>::Memory*>(rows + at + k));
    }
  }

  // Before the exponentials of a block of `next` pixels: what they do not take along.
  void send_before(int next) {
    if (rows != nullptr && next != count) {
      stream_copy(to, rows, static_cast<int64_t>(classes) * count);
      rows = nullptr;
    }
  }
};

template <class A>
FUSEDLOSS_HOST_DEVICE math::Bits<Vector<A>> load_labels(const math::Bits<A>* p) {
  return *reinterpret_cast<const typename VectorOf<math::Bits<A>>::Memory*>(p);
}

// Calls visit(vectors, partial, first pixel, count) until `count` pixels are done; the first two are compile-time
// constants (std::integral_constant). A whole block goes in steps of kVectors, a tail vector by vector.
template <class A, int kVectors, class Visit>
FUSEDLOSS_HOST_DEVICE void for_vectors(int count, Visit visit) {
  int i = 0;
  for (; i + kVectors * kLanes<A> <= count; i += kVectors * kLanes<A>) {
    visit(std::integral_constant<int, kVectors>{}, std::false_type{}, i, kVectors * kLanes<A>);
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    visit(std::integral_constant<int, 1>{}, std::false_type{}, i, kLanes<A>);
  }
  if (i < count) visit(std::integral_constant<int, 1>{}, std::true_type{}, i, count - i);
}

// Calls visit(class, pixels) for each class among the labels of a vector of pixels; `pixels` is true where it is the
// label. Neighboring pixels mostly have the same one (in CamVid, 1.2 classes in 16 pixels), and what is to be done
// with the row of a class is done with whole vectors, where a loop over the pixels takes a dozen instructions for each.
template <class A, class Visit>
FUSEDLOSS_HOST_DEVICE void for_labels(const math::Bits<A>* labels, Visit visit) {
  using B = math::Bits<Vector<A>>;
  const B label = load_labels<A>(labels);
  for (uint32_t left = (1u << kLanes<A>)-1; left != 0;) {
    const math::Bits<A> c = labels[__builtin_ctz(left)];
    visit(static_cast<int64_t>(c), label == c);
    left &= ~equal_lanes<A>(label, B{} + c);
  }
}

// What read(c) gives for the class c that each of a vector of pixels is labelled with.
template <class A, class Read>
FUSEDLOSS_HOST_DEVICE Vector<A> of_labels(const math::Bits<A>* labels, Read read) {
  Vector<A> value = {};
  for_labels<A>(labels, [&](int64_t c, auto labelled) { value = labelled ? read(c) : value; });
  return value;
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
