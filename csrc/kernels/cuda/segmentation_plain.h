// Softmax with class indices, which is what training meets most: kernels that keep the logits in registers.
//
// A lane owns two pixels. Its warp reads up to 24 classes of them, all at once so that no load waits for another, and
// what follows (maximum, exponentials, sums, gradient) reads registers. With more classes than that, two, four or eight
// warps are a team: each has a part of the classes of the same pixels, and they exchange a number a pixel through
// shared memory. The numbers of a class that are summed over pixels stay in registers for a whole chunk.
//
//   columns  class-strided logits: a lane's two pixels are neighbors, read in one access
//   rows     class-innermost logits: the block copies its pixels, one piece of memory, to shared memory first, and
//            gradients go the same way back
//
// The general kernels (segmentation_forward.cu, segmentation_backward.cu) take what these do not: soft labels, label
// smoothing, sigmoid, float64, more classes, odd sizes, a squared error of each pixel.
#pragma once

#include "kernels/cuda/segmentation_pixels.h"
#include "kernels/cuda/segmentation_rows.h"

namespace fusedloss::cuda {

constexpr int kPlainThreads = 256;
constexpr int kPlainWarps = kPlainThreads / gpu::kWarp;
constexpr int kPlainVector = 2;                         // pixels of a lane
constexpr int kTeamPixels = gpu::kWarp * kPlainVector;  // pixels of a warp, and of a team
constexpr int kMostPlainClasses = 24;                   // of a warp; more do not fit into 128 registers a thread
constexpr int kMostTeam = kPlainWarps;
constexpr int kFewPlainClasses = 16;

struct PlainPlan {
  bool taken;
  bool rows;
  int team;              // warps that share pixels: 1, 2, 4 or 8
  int classes_of_warp;   // the last of a team may have fewer
  int64_t tile_bytes;    // of shared memory for logits in rows
  int64_t shared_bytes;  // of the pass in hand, that tile included
};

// Pixels that a block works on at once.
FUSEDLOSS_HOST_DEVICE int plain_tile_pixels(int team) { return kPlainWarps / team * kTeamPixels; }

// Of shared memory, for what teams exchange: two of these in turn, so that one barrier a tile is enough.
inline int64_t plain_exchange_bytes(int team, int64_t bytes_of_pixel) {
  return team > 1 ? 2 * kPlainWarps * kTeamPixels * bytes_of_pixel : 0;
}

// Shared memory of the forward: sums of a block, what teams exchange, and (2, C, slots + 1) I and T.
inline int64_t plain_forward_bytes(int64_t classes, int team, bool overlap) {
  const int64_t slots = kPlainThreads / team;
  return static_cast<int64_t>(kPlainWarps * kPartialSums * sizeof(double)) +
         plain_exchange_bytes(team, 2 * sizeof(float)) +
         (overlap ? 2 * classes * (slots + 1) * static_cast<int64_t>(sizeof(float)) : 0);
}

// Of the backward: what teams exchange, and (3, C) numbers of the classes.
inline int64_t plain_backward_bytes(int64_t classes, int team) {
  return plain_exchange_bytes(team, sizeof(float)) + 3 * classes * static_cast<int64_t>(sizeof(float));
}

// gradient: nullptr in the forward.
inline PlainPlan plain_plan(const SegmentationParams& params, const void* gradient) {
  PlainPlan plan{};
  const int64_t element = bytes_of(params.input_dtype);
  if (params.activation != Activation::kSoftmax || params.soft_labels || params.label_smoothing != 0.0 ||
      params.input_dtype == DType::kFloat64 || params.squared_error_of_pixels != nullptr || params.classes < 1 ||
      params.classes > kMostPlainClasses * kMostTeam || takes_rows(params)) {
    return plan;
  }
  plan.team = 1;
  while (params.classes > plan.team * kMostPlainClasses) plan.team *= 2;
  plan.classes_of_warp = static_cast<int>((params.classes + plan.team - 1) / plan.team);
  plan.rows = params.input_layout.pixel_stride != 1;
  const auto fits = [&](const void* data, const LogitLayout& layout) {
    const auto at = reinterpret_cast<uintptr_t>(data);
    if (plan.rows) {
      return layout.class_stride == 1 && layout.pixel_stride == params.classes && at % 16 == 0 &&
             (params.samples == 1 || layout.sample_stride * element % 16 == 0);
    }
    return layout.pixel_stride == 1 && at % (kPlainVector * element) == 0 && params.pixels % kPlainVector == 0 &&
           layout.class_stride % kPlainVector == 0 && layout.class_stride <= INT32_MAX / kMostPlainClasses &&
           (params.samples == 1 || layout.sample_stride % kPlainVector == 0);
  };
  if (!fits(params.input, params.input_layout) || (gradient != nullptr && !fits(gradient, params.gradient_layout))) {
    return plan;
  }
  plan.tile_bytes = plan.rows ? (plain_tile_pixels(plan.team) * params.classes * element + 15) / 16 * 16 : 0;
  plan.shared_bytes =
      plan.tile_bytes + (gradient == nullptr ? plain_forward_bytes(params.classes, plan.team, params.overlap)
                                             : plain_backward_bytes(params.classes, plan.team));
  plan.taken = plan.shared_bytes <= gpu::shared_memory_limit();
  return plan;
}

// Which classes and pixels a thread has.
template <bool kTeams>
struct PlainPlace {
  int lane;
  int warp;
  int team;
  int member;  // of the team
  int group;   // the block's team
  int first;   // class
  int count;   // classes
  bool rows;

  FUSEDLOSS_DEVICE PlainPlace(const PlainPlan& plan, int64_t classes)
      : lane(gpu::thread() % gpu::kWarp),
        warp(gpu::thread() / gpu::kWarp),
        team(kTeams ? plan.team : 1),
        member(kTeams ? warp % plan.team : 0),
        group(kTeams ? warp / plan.team : warp),
        first(kTeams ? member * plan.classes_of_warp : 0),
        count(static_cast<int>(classes)),
        rows(plan.rows) {
    if (kTeams) count = count - first < plan.classes_of_warp ? count - first : plan.classes_of_warp;
  }

  // Pixel v of the lane, in the tile.
  FUSEDLOSS_DEVICE int pixel(int v) const {
    return group * kTeamPixels + (rows ? lane + v * gpu::kWarp : lane * kPlainVector + v);
  }
  // A label counted from the warp's first class, or -1 where the class is another warp's.
  FUSEDLOSS_DEVICE int own(int label) const {
    const int k = label - first;
    return static_cast<unsigned>(k) < static_cast<unsigned>(count) ? k : -1;
  }
  // Of the block's lanes that have pixels of their own.
  FUSEDLOSS_DEVICE int slot() const { return group * gpu::kWarp + lane; }
};

// Classes go in fours, and a four that no lane has is skipped: kClasses is what the registers are made for, not C.
constexpr int kFour = 4;

// Calls visit(k, v) for the classes of a warp, k counted from its first, and the pixels of a lane.
template <int kClasses, class Visit>
FUSEDLOSS_DEVICE void for_classes(int count, Visit visit) {
  FUSEDLOSS_UNROLL
  for (int four = 0; four < kClasses; four += kFour) {
    if (four < count) {
      FUSEDLOSS_UNROLL
      for (int k = four; k < four + kFour; ++k) {
        FUSEDLOSS_UNROLL
        for (int v = 0; v < kPlainVector; ++v) visit(k, v);
      }
    }
  }
}

// Tile of logits in rows to shared memory, and back. All threads of the block have to come.
template <class T>
FUSEDLOSS_DEVICE void copy_rows_in(T* tile, const T* from, int elements) {
  constexpr int kWide = 16 / sizeof(T);
  const int packs = elements / kWide;
  for (int i = gpu::thread(); i < packs; i += kPlainThreads) gpu::copy_async<16>(tile + i * kWide, from + i * kWide);
  for (int i = packs * kWide + gpu::thread(); i < elements; i += kPlainThreads) tile[i] = from[i];
  gpu::wait_for_copies();
  gpu::sync_block();
}

template <class T>
FUSEDLOSS_DEVICE void copy_rows_out(T* to, const T* tile, int elements) {
  constexpr int kWide = 16 / sizeof(T);
  const int packs = elements / kWide;
  gpu::sync_block();  // the gradients are in the tile
  for (int i = gpu::thread(); i < packs; i += kPlainThreads) {
    gpu::store_streaming(reinterpret_cast<Pack<T, kWide>*>(to + i * kWide), load_pack<T, kWide>(tile + i * kWide));
  }
  for (int i = packs * kWide + gpu::thread(); i < elements; i += kPlainThreads) to[i] = tile[i];
  gpu::sync_block();  // the tile has been read
}

// Logits of a lane's pixels; -infinity, whose exponential is nothing, where there is no class.
template <int kClasses>
struct PlainLogits {
  float z[kClasses][kPlainVector];

  template <class T>
  FUSEDLOSS_DEVICE void load_columns(const T* at, uint32_t class_stride, int count, bool inside) {
    FUSEDLOSS_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      z[k][0] = z[k][1] = -math::Constants<float>::infinity;
      if (k >= count || !inside) continue;
      const Pack<T, kPlainVector> pack = load_pack<T, kPlainVector>(at + k * class_stride);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kPlainVector; ++v) z[k][v] = to_compute(pack.values[v]);
    }
  }

  // at: of the lane's first pixel and the warp's first class.
  template <class T>
  FUSEDLOSS_DEVICE void load_rows(const T* at, int classes, int count, const bool (&inside)[kPlainVector]) {
    FUSEDLOSS_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kPlainVector; ++v) {
        z[k][v] = -math::Constants<float>::infinity;
        if (k < count && inside[v]) z[k][v] = to_compute(at[v * gpu::kWarp * classes + k]);
      }
    }
  }

  // exp(z - maximum) in place of z.
  FUSEDLOSS_DEVICE void exponentials(int count, const float (&maximum)[kPlainVector]) {
    for_classes<kClasses>(count, [&](int k, int v) { z[k][v] = math::exp_shifted<float>(z[k][v], maximum[v]); });
  }

  // Zeros for a pixel without weight whose logits are not finite: a product with 0 would be NaN. Seldom.
  FUSEDLOSS_DEVICE void drop(int pixel) {
    FUSEDLOSS_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kPlainVector; ++v) {
        if (v == pixel) z[k][v] = 0.0f;
      }
    }
  }
};

// Calls f(TypeName<T>, kClasses, kTeams, kProbabilities), the last three as integral constants.
template <class F>
int with_plain_kernel(const SegmentationParams& params, const PlainPlan& plan, F f) {
  using Few = std::integral_constant<int, kFewPlainClasses>;
  using Many = std::integral_constant<int, kMostPlainClasses>;
  const auto with_terms = [&](auto type, auto classes, auto teams) {
    return params.overlap || params.squared_error ? f(type, classes, teams, std::true_type{})
                                                  : f(type, classes, teams, std::false_type{});
  };
  const auto with_classes = [&](auto type) {
    if (plan.team > 1) return with_terms(type, Many{}, std::true_type{});
    return plan.classes_of_warp <= kFewPlainClasses ? with_terms(type, Few{}, std::false_type{})
                                                    : with_terms(type, Many{}, std::false_type{});
  };
  return with_type(params.input_dtype, [&](auto type) {
    if constexpr (std::is_same_v<typename decltype(type)::Type, double>) {
      return 0;  // plain_plan() takes none
    } else {
      return with_classes(type);
    }
  });
}

int forward_plain(const ForwardParams& params, const PlainPlan& plan, void* stream);
int backward_plain(const BackwardParams& params, const PlainPlan& plan, void* stream);

}  // namespace fusedloss::cuda
