#pragma once

#include "macros.h"

// Arithmetic of the correlation family. picnn_fast/reference/correlation.py is the definition.
namespace PICNN_FAST_NAMESPACE {

// The least norm that is divided by, and what keeps a denominator from 0.
template <typename A>
constexpr A kEpsilon = static_cast<A>(1e-5);

// Of a map about its mean; NaN stays.
template <typename A>
PICNN_FAST_HD A inverse_norm(A norm) {
  return A{1} / (norm < kEpsilon<A> ? kEpsilon<A> : norm);
}

// What the gradient of a map u of that norm is made of: unit·g - along·u, where g is the gradient
// of û and `product` is ⟨u, g⟩.
template <typename A>
struct MapGradient {
  A unit, along;
};
template <typename A>
PICNN_FAST_HD MapGradient<A> map_gradient(A norm, A product) {
  const A inverse = inverse_norm(norm);
  // By turns, so that no power of the inverse overflows.
  const A along = norm >= kEpsilon<A> ? product * inverse * inverse * inverse : A{0};
  return {inverse, along};
}

// Derivatives of the loss: B·g = own·S_A + total·Σ S_A' + Σ total'·S_A', S the sums of û by group.
template <typename A>
struct GroupGradient {
  A own, total;
};
template <typename A>
PICNN_FAST_HD GroupGradient<A> group_gradient(A within, A across, A scale) {
  const A below = across + kEpsilon<A>;
  return {A{-2} / below * scale, within / (below * below) * scale};
}

// A group's part of the loss.
template <typename A>
PICNN_FAST_HD A group_loss(A within, A across) {
  return -within / (across + kEpsilon<A>);
}

}  // namespace PICNN_FAST_NAMESPACE
