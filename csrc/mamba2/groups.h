// Heads of a group share B and C; no two groups share anything, RMSNorm included. A group is therefore computed as an op
// of one group: the same tensors, from its own first head and channel on.
#pragma once

#include "mamba2/mamba2.h"

namespace mvar {
namespace mamba2 {

inline Sizes of_group(Sizes n) {
  n.H /= n.groups;
  return n;
}

// The same for group g, whose channels of x are its first of [x, B, C].
inline Sizes of_group(Sizes n, int64_t g) {
  const int64_t all = n.groups * n.H * n.P;
  n.B_channel = all + g * n.N - g * n.H * n.P;
  n.C_channel = n.B_channel + n.groups * n.N;
  return n;
}

// View: with `data`, which is null where a pass has no such tensor.
template <typename View>
void move(View& view, int64_t elements, int64_t itemsize) {
  if (view.data) view.data = (decltype(view.data))((char*)view.data + elements * itemsize);
}

// itemsize: of x, B, C, y and the convolution's state. Of `n`, here and below, H is the heads of a group.
inline ScanForward of_group(ScanForward a, const Sizes& n, int64_t g, int64_t itemsize) {
  const int64_t head = g * n.H;
  for (Heads* t : {&a.x, &a.y}) move(*t, head * t->head_stride, itemsize);
  for (Tokens* t : {&a.B, &a.C}) move(*t, g * n.N, itemsize);
  for (States* t : {&a.initial, &a.last}) move(*t, head * t->head_stride, sizeof(float));
  move(a.dt, head, sizeof(float));
  a.A += head;
  a.D += head * n.D_width();
  return a;
}

inline ScanBackward of_group(ScanBackward a, const Sizes& n, int64_t g, int64_t itemsize) {
  const int64_t head = g * n.H;
  a.forward = of_group(a.forward, n, g, itemsize);
  for (Heads* t : {&a.grad_y, &a.dx}) move(*t, head * t->head_stride, itemsize);
  for (Tokens* t : {&a.dB, &a.dC}) move(*t, g * n.N, itemsize);
  for (States* t : {&a.grad_last, &a.dinitial}) move(*t, head * t->head_stride, sizeof(float));
  move(a.ddt, head, sizeof(float));
  a.dA += head;
  a.dD += head * n.D_width();
  return a;
}

inline MixerForward of_group(MixerForward a, const Sizes& n, int64_t g, int64_t itemsize) {
  const int64_t head = g * n.H, channel = head * n.P;
  for (Tokens* t : {&a.z, &a.xbc, &a.conv_state, &a.y, &a.last_conv}) move(*t, channel, itemsize);
  for (States* t : {&a.initial, &a.last}) move(*t, head * t->head_stride, sizeof(float));
  move(a.dt, head, a.dt.is_float32 ? sizeof(float) : itemsize);
  a.conv_weight += channel * n.taps;
  a.conv_bias += channel;
  a.dt_bias += head;
  a.A_log += head;
  a.D += head * n.D_width();
  a.norm_weight += channel;
  return a;
}

inline MixerBackward of_group(MixerBackward a, const Sizes& n, int64_t g, int64_t itemsize) {
  const int64_t head = g * n.H, channel = head * n.P;
  a.forward = of_group(a.forward, n, g, itemsize);
  for (Tokens* t : {&a.grad_y, &a.grad_last_conv, &a.dz, &a.dxbc, &a.dconv_state}) move(*t, channel, itemsize);
  for (States* t : {&a.grad_last, &a.dinitial}) move(*t, head * t->head_stride, sizeof(float));
  move(a.ddt, head, sizeof(float));
  a.dconv_weight += channel * n.taps;
  a.dconv_bias += channel;
  a.ddt_bias += head;
  a.dA_log += head;
  a.dD += head * n.D_width();
  a.dnorm_weight += channel;
  return a;
}

}  // namespace mamba2
}  // namespace mvar
